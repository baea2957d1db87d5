"""Replace the MLPs of a transformer, or the convs of a PyG GNN, with MoE layers.

Shapes: B images, T tokens, D width, E experts, I in, O out features of a linear layer.
"""

from __future__ import annotations

import copy
import re
import sys
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import skip_init

from gmoe._checks import check, check_count
from gmoe.dispatch import Backend
from gmoe.experts import ACTIVATIONS, MLPExperts
from gmoe.moe import MoE, MoELayer
from gmoe.routers import Router, RouterLike, build_router

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
"""Where torch keeps the hooks of a module."""

FORM = re.compile("(N?)(L|LA|LL|LLA|LAL)(D?)(N?)(L)(D?)")
"""What an MLP may call, by :func:`_kind`: a norm; one or two linear layers and their activation, if it is a module;
dropout; a norm; the last linear layer; dropout."""


def moefy(
    model: nn.Module,
    every: int | None = None,
    k: int = 1,
    router: RouterLike = "token_choice",
    num_experts: int = 8,
    upcycle: bool = True,
    *,
    targets: str | Sequence[str] | None = None,
    blocks: Sequence[int] | None = None,
    shared_expert: bool = True,
    dense_start: bool = True,
    router_kwargs: Mapping[str, Any] | None = None,
    backend: Backend = "auto",
) -> nn.Module:
    r"""Add experts to a transformer's MLPs or a GNN's convs; the first forward stays the dense model's.

    .. math::
        y_t = \mathrm{mlp}(x_t) + \sum_e w_{te} f_e(x_t), \qquad f_e = 0 \text{ at the start}

    The MLP stays as the shared expert, with its hooks, parametrizations, dropout and frozen parameters.
    Router and experts train even if the model is frozen.

    - Transformers are changed in place: torchvision's and timm's ViTs and Swins, or any model with blocks in a
      ``ModuleList`` or ``Sequential`` that each hold an ``mlp``. Blocks are numbered across stages.
    - Any other model is changed in place if ``targets`` names its MLPs or PyG convs.
    - A PyG ``GCN``, ``GraphSAGE``, ``GIN``, ``GAT``, ... without ``targets`` becomes a :class:`gmoe.GNNMoE`.

    An MLP is linear, activation, linear; or gated (SwiGLU, GEGLU), whatever the layout of its gate; with norms before
    the linear layers, dropout after the activation and at the end. It is recognized by what it computes, not by its
    class. It sees
    tokens as (B, ..., D): those of an image, in a row or in a grid, are one group, padding included, so that padding
    takes places where experts choose.

    Args:
        model: the dense model.
        every: n; block, target or layer ``i`` becomes MoE where ``i % n == n - 1`` (default 2 of a transformer, 1 of
            ``targets`` and of a GNN, whose output layer stays dense).
        k: K, experts per token (default 1).
        router: a name or factory (default ``"token_choice"``); each layer gets its own router.
        num_experts: E (default 8).
        upcycle: start the experts as copies of the dense MLP or conv, of its weights as they are now (default; sparse
            upcycling, `Komatsuzaki et al., 2023 <https://arxiv.org/abs/2212.05055>`_), or afresh; of an MLP with a
            dense start, all but the last layer.
        targets: patterns of ``model.named_modules()``, such as ``"blocks.*.mlp"`` or ``["conv1", "conv2"]``, instead
            of the ``mlp`` of all blocks (default ``None``). Modules inside a match go with it.
        blocks: numbers of the blocks, or targets, that become MoE, instead of ``every``; -1 is the last (default
            ``None``).
        shared_expert: keep the dense MLP (default). ``False`` is the plain mixture, whose experts are all that is left
            of the MLP, and train even if it was frozen. Upcycled, it starts as ``(sum of the token's weights) *
            mlp(x)``: the dense model with routers whose weights sum to 1 (random, uniform, token choice and
            multi-centroid at K >= 2), a scaled one else, and zero for tokens that no expert took.
        dense_start: start an expert's last layer at zero, of a conv the gain of :class:`MoEConv` (default); ``False``
            adds the experts as they are. Without a shared expert there is no dense start.
        router_kwargs: further arguments of the routers.
        backend: see :func:`gmoe.grouped_linear`.

    Returns:
        The model with MoE layers; collect their routings with :func:`gmoe.record_routing`.

    Raises:
        ValueError: no such blocks or targets, fewer than ``every``, or an argument out of range; an MLP of another
            form, or without values (on the meta device); with ``shared_expert=False``, one with a parametrized weight
            (weight norm, spectral norm, pruning) or hooks, which would be lost.

    Example:
        >>> vit = moefy(timm.create_model("vit_tiny_patch16_224"), blocks=[-3, -1], router="expert_choice")
        >>> gnn = moefy(gnn, targets="conv*")
    """
    check(isinstance(model, nn.Module), "model", type(model).__name__, "a transformer or a PyG GNN")
    if every is not None:
        check_count("every", every)
    if isinstance(router, Router):
        raise ValueError("router: got an instance, expected a name or a factory, since several layers are built")
    options: dict[str, Any] = {"num_experts": num_experts, "k": k, "router": router, "router_kwargs": router_kwargs}
    options |= {"upcycle": upcycle, "shared_expert": shared_expert, "dense_start": dense_start, "backend": backend}
    pyg = sys.modules.get("torch_geometric.nn")  # who has a PyG model has imported it
    if pyg is not None and targets is None and isinstance(model, pyg.models.basic_gnn.BasicGNN):
        every, output_is_conv = every or 1, model.jk_mode is None
        found = [f"convs.{layer}" for layer in range(model.num_layers - output_is_conv)]
    else:
        found = _mlps(model) if targets is None else _matches(model, targets)
    names = [name for name in found if not any(name.startswith(f"{outer}.") for outer in found)]
    chosen = choose_blocks(len(names), every or (2 if targets is None else 1), blocks)
    modules = {names[i]: model.get_submodule(names[i]) for i in chosen}
    layers: dict[nn.Module, nn.Module] = {}
    for name, module in modules.items():  # build all before changing any: an error leaves the model as it was
        if isinstance(module, MoELayer):
            raise ValueError(f"model: got {name}, a MoE already, expected a dense one; see `blocks` and `targets`")
        if any(isinstance(p, UninitializedParameter) or p.is_meta for p in module.parameters()):
            raise ValueError("model: got parameters on the meta device or of lazy layers, expected ones with values")
        build = _moe_conv if pyg is not None and isinstance(module, pyg.MessagePassing) else _moe
        if module not in layers:  # one that is used twice stays one
            layers[module] = build(name, module, **options)
    for name, module in modules.items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layers[module])
    return model


def choose_blocks(count: int, every: int, blocks: Sequence[int] | None) -> list[int]:
    """Which of ``count`` blocks become MoE: every n-th, or those that are named, from the end too.

    Raises:
        ValueError: no block, or one that is not there or is named twice.
    """
    if blocks is None:
        check(every <= count, "every", every, f"at most the number of blocks, {count}")
        return list(range(every - 1, count, every))
    if not isinstance(blocks, Iterable):
        raise ValueError(f"blocks: got {blocks!r}, expected a list of numbers of blocks")
    blocks = tuple(blocks)
    there = all(isinstance(block, Integral) and -count <= block < count for block in blocks)  # NumPy's too
    chosen = sorted({int(block) % count for block in blocks}) if there else []
    check(chosen and len(chosen) == len(blocks), "blocks", blocks, f"some of {-count} to {count - 1}, each once")
    return chosen


def _mlps(model: nn.Module) -> list[str]:
    """The names of the MLPs of transformer blocks, in order."""
    named = dict(model.named_modules(remove_duplicate=False))
    containers = {name: part for name, part in named.items() if isinstance(part, nn.ModuleList | nn.Sequential)}
    found = [
        f"{name}.{key}.mlp".lstrip(".")
        for name, container in containers.items()
        if all(isinstance(getattr(block, "mlp", None), nn.Module) for block in container)
        for key in container._modules
    ]
    kinds = Counter(type(block).__name__ for container in containers.values() for block in container if block._modules)
    of = "".join(f" of {kind}, which has no `mlp` apart from its other layers" for kind, _ in kinds.most_common(1))
    legal = "a transformer with blocks that hold an `mlp`, such as timm's VisionTransformer, or a PyG BasicGNN"
    check(found, "model", type(model).__name__ + of, f"{legal}; or `targets`, patterns of the names of MLPs or convs")
    return found


def _matches(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """The names of the modules that match a pattern."""
    patterns = [targets] if isinstance(targets, str) else list(targets)
    check(patterns, "targets", repr(targets), "a pattern of names of modules, or a list of them")
    named = dict(model.named_modules(remove_duplicate=False))
    called = [name for name in named if name and not isinstance(named[name], nn.ModuleList | nn.ModuleDict)]
    some = ", ".join(sorted(called, key=lambda name: not named[name]._modules)[:8])
    for pattern in patterns:
        matched = any(fnmatchcase(name, pattern) for name in called)
        check(matched, "targets", repr(pattern), f"a pattern of names that are there, such as {some}")
    return [name for name in called if any(fnmatchcase(name, pattern) for pattern in patterns)]


# MLPs -----------------------------------------------------------------------------------------------------------------


class TokenMoE(MoE):
    """A MoE on (B, ..., D) whose groups are the B entries: all tokens of an image, in a row or in a grid."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """See :class:`MoE`."""
        if x.dim() < 4:
            return super().forward(x, *args, **kwargs)
        found = super().forward(x.flatten(1, -2), *args, **kwargs)
        y, *routing = found if isinstance(found, tuple) else (found,)
        y = y.view(*x.shape[:-1], y.size(-1))
        return (y, *routing) if routing else y


def _moe(name: str, mlp: Any, num_experts: int, k: int, router: RouterLike, router_kwargs: Any, **options: Any) -> MoE:
    """The layer in place of an MLP."""
    shared = options["shared_expert"]
    if not shared:
        _refuse_what_would_be_lost(name, mlp)
    with torch.device("cpu"):  # whatever the default device, MLPs are tried out here
        form = {"zero_init": shared and options["dense_start"], "backend": options["backend"]}
        experts = _experts_like(name, mlp, num_experts, options["upcycle"], form)
    built = build_router(router, experts.in_features, num_experts, k, router_kwargs)
    stand_in = nn.Identity() if shared else None
    layer = TokenMoE(built, experts, stand_in)
    like = experts.down.weight
    layer.to(device=like.device, dtype=like.dtype).train(mlp.training)
    if shared:
        layer.shared_expert = mlp  # not before: the types and modes of its parts are its own
    return layer


def _refuse_what_would_be_lost(name: str, mlp: nn.Module) -> None:
    """Weights that are computed from other parameters, and hooks: experts would take over neither."""
    for path, part in mlp.named_modules(prefix=name):
        hooks = [hook for kind in HOOKS for hook in getattr(part, kind).values()]
        if _is_computed(part):
            got, expected = "a parametrized weight (weight norm, spectral norm, pruning)", "a plain one"
        elif hooks:
            called = ", ".join(getattr(hook, "__qualname__", type(hook).__name__) for hook in hooks)
            got, expected = f"hooks ({called})", "none"
        else:
            continue
        raise ValueError(
            f"model: got {path} with {got}, expected {expected}, since experts would not run it; keep it with "
            "shared_expert=True, remove it first, or leave the block out of `blocks`"
        )


def _is_computed(part: nn.Module) -> bool:
    """Whether the weight of a linear layer is no plain parameter."""
    return isinstance(part, nn.Linear) and not {"weight", "bias"} <= part._parameters.keys()


@torch.no_grad()
def _experts_like(name: str, mlp: Any, num_experts: int, upcycle: bool, options: Mapping[str, Any]) -> MLPExperts:
    """Experts of the form of a dense MLP, which is found by what its forward calls and settled by what it computes."""
    bare = _bare(mlp)
    called = [part for part in _calls(name, bare) if _kind(bare, part) != "D" or mlp.get_submodule(part).p > 0]
    if match := FORM.fullmatch("".join(_kind(bare, part) for part in called)):
        before, first, inner, norm, down, end = (called[slice(*match.span(i))] for i in range(1, 7))
        up = [part for part in first if _kind(bare, part) == "L"]
        modules: list[Any] = [bare.get_submodule(part) for part in first if part not in up]
        norms: dict[str, Any] = {"input_norm": _plain(bare, before), "hidden_norm": _plain(bare, norm)}
        parts = map(bare.get_submodule, (*before, *up, *norm, *down))
        biased = any(getattr(part, "bias", None) is not None for part in parts)
        dropout = tuple(sum(mlp.get_submodule(part).p for part in drops) for drops in (inner, end))
        for activation in (*modules, *ACTIVATIONS, torch.sigmoid):
            for glu, gate_last in ((False, False), (True, False), (True, True)):
                names = up, down, before, norm, gate_last
                form = norms | {"activation": activation, "glu": glu, "bias": biased}
                if _computes(bare, names, form):
                    return _experts(_layers(mlp, *names), num_experts, upcycle, form | {"dropout": dropout, **options})
    kinds = [
        f"Linear {part.weight.size(1)} to {part.weight.size(0)}" if kind == "L" else type(part).__name__
        for part, kind in ((bare.get_submodule(part), _kind(bare, part)) for part in called)
    ]
    legal = (
        "(Linear, an activation without parameters, Linear), gated or not, that computes just that, with norms only "
        "before the first and the last Linear, dropout only after the activation and at the end"
    )
    if "Conv2d" in kinds:
        legal = "linear layers: there are no experts of 1 x 1 convolutions; name modules that have them by targets="
    raise ValueError(f"model: got {name}, a {type(mlp).__name__} of ({', '.join(kinds)}), expected {legal}")


def _bare(mlp: nn.Module) -> Any:
    """A copy of random weights in float64 on the CPU, without hooks, parametrizations and dropout, to be tried out."""
    memo: dict[int, Any] = {id(getattr(part, kind)): OrderedDict() for part in mlp.modules() for kind in HOOKS}
    for part in mlp.modules():
        if _is_computed(part):  # which deepcopy may refuse
            memo[id(part)] = skip_init(nn.Linear, part.in_features, part.out_features, part.bias is not None)
    bare = copy.deepcopy(mlp, memo).cpu().double()  # not every device has doubles
    generator = torch.Generator().manual_seed(0)
    for parameter in bare.parameters():  # of the MLP's own, zeros would hide what is computed
        value = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
        parameter.data = value / max(parameter.shape[-1:], default=1) ** 0.5
    for part in bare.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    return bare


def _kind(tree: nn.Module, name: str) -> str:
    """What a part is: a linear layer (L), a norm of tokens (N), an activation (A), dropout (D), or none of them (X)."""
    part = tree.get_submodule(name)
    if isinstance(part, nn.Dropout) or hasattr(part, "normalized_shape"):
        return "D" if isinstance(part, nn.Dropout) else "N"
    weight = part._parameters.get("weight")
    if weight is not None and weight.dim() == 2:
        return "L"
    return "A" if next(part.parameters(), None) is None else "X"


def _calls(name: str, bare: nn.Module) -> list[str]:
    """The names of the innermost parts of an MLP as a forward of it calls them; identities left out."""
    leaves = {path: part for path, part in bare.named_modules() if not part._modules}
    first: Any = next((part for path, part in leaves.items() if _kind(bare, path) == "L"), None)
    if first is None:
        return list(leaves)
    called: list[str] = []
    handles = [
        part.register_forward_hook(lambda *_, path=path: called.append(path))
        for path, part in leaves.items()
        if not isinstance(part, nn.Identity)
    ]
    width = first.weight.size(1)
    try:
        bare.eval()(torch.zeros(1, 5, width, dtype=torch.float64))
    except Exception as error:
        got = f"{name}, a {type(bare).__name__} that does not take tokens (B, T, {width})"
        raise ValueError(f"model: got {got}, expected one that does ({type(error).__name__}: {error})") from error
    for handle in handles:  # experts take over copies of the parts
        handle.remove()
    return called


def _plain(bare: nn.Module, names: Sequence[str]) -> nn.Module | None:
    """A copy of the norm, if there is one, without scale and shift, which each expert has in its next layer."""
    for norm in map(copy.deepcopy, map(bare.get_submodule, names)):
        for parameter in list(norm._parameters):
            norm.register_parameter(parameter, None)
        return norm
    return None


def _layers(
    tree: Any, up: Sequence[str], down: Sequence[str], before: Sequence[str], norm: Sequence[str], gate_last: bool
) -> list[tuple[Tensor, Tensor]]:
    """(O, I) weight and (O,) bias of an expert's two layers: the gate first, what norms scale and shift by included."""
    found = []
    for linears, norms in ((up, before), (down, norm)):
        parts = [tree.get_submodule(linear) for linear in linears]
        weight = torch.cat([part.weight for part in parts])
        bias = torch.cat([weight.new_zeros(len(part.weight)) if part.bias is None else part.bias for part in parts])
        for part in map(tree.get_submodule, norms):
            if getattr(part, "bias", None) is not None:
                bias = bias + weight @ part.bias
            if getattr(part, "weight", None) is not None:
                weight = weight * part.weight
        if gate_last and linears is up:
            weight, bias = (value.roll(len(value) // 2, dims=0) for value in (weight, bias))
        found.append((weight, bias))
    return found


def _experts(layers: Any, num_experts: int, upcycle: bool, form: Mapping[str, Any]) -> MLPExperts:
    """Experts of that form, with copies of the two layers in each or drawn afresh; what starts at zero stays so."""
    (up, _), (down, _) = layers
    sizes = up.size(1), down.size(1), down.size(0), num_experts
    experts = MLPExperts(*sizes, **copy.deepcopy(dict(form))).to(device=up.device, dtype=up.dtype)
    if upcycle:
        for part, (weight, bias) in zip((experts.up, experts.down), layers, strict=True):
            if not part.zero_init:
                part.copy_(slice(None), weight.T, bias)
    return experts


def _computes(bare: nn.Module, names: Sequence[Any], form: Mapping[str, Any]) -> bool:
    """Whether an expert of that form computes what the MLP does, on random tokens."""
    layers = _layers(bare, *names)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, layers[0][0].size(1), dtype=torch.float64, generator=generator)
    try:
        expert = _experts(layers, 1, True, form)
        for training in (False, True):  # in training too: a dropout that is no module shows
            expected = bare.train(training)(x[None])[0, :3]
            found = expert.train(training)(x[:3], torch.tensor([3]))  # fewer tokens: it shows if they see one another
            if found.shape != expected.shape or not torch.allclose(found, expected, atol=1e-8):
                return False
    except RuntimeError:  # of widths that do not fit together
        return False
    return True


# convs ----------------------------------------------------------------------------------------------------------------


def _moe_conv(name: str, conv: Any, *, upcycle: bool, **options: Any) -> Any:
    """The layer in place of a PyG conv: copies of it as its experts and, frozen if it is, as the shared one."""
    from gmoe.conv.kinds import CopyOf, output_width
    from gmoe.conv.moe_conv import MoEConv

    linears = [part for part, _ in conv.named_modules() if _kind(conv, part) == "L"]  # of a GIN, which has no widths
    width = getattr(conv, "in_channels", None) or next((conv.get_submodule(part).weight.size(1) for part in linears), 0)
    out: Any = getattr(conv, "out_channels", None) or (width and output_width(conv, width))
    check(
        out, "model", f"{name}, a {type(conv).__name__} of unknown widths", "a conv with in_channels and out_channels"
    )
    layer: Any = MoEConv(CopyOf(copy.deepcopy(conv).requires_grad_(True), True), width, out, **options)
    _settle(name, layer, conv, upcycle)
    first = next(conv.parameters())
    return layer.to(device=first.device, dtype=first.dtype).train(conv.training)


def _settle(name: str, layer: Any, conv: nn.Module, upcycle: bool) -> None:
    """Draw the experts in place of a conv anew without ``upcycle``; freeze, if it is frozen, what is left of it."""
    frozen = {not parameter.requires_grad for parameter in conv.parameters()}
    check(len(frozen) < 2, "model", f"{name} with some parameters frozen", "all or none: experts stack them")
    of_experts = isinstance(layer, MoELayer)
    kept = layer.shared_expert if of_experts else layer
    if True in frozen and kept is not None:
        kept.requires_grad_(False)
    if of_experts and not upcycle:
        layer.experts.reset_parameters()
