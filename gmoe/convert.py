"""Replace the MLPs of a transformer, or the convs of a PyG GNN, with MoE layers.

Shapes: B images, T tokens, D width, E experts, I in, O out features of a linear layer.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy

from gmoe._checks import check, check_counts
from gmoe.dispatch import Backend
from gmoe.experts import MLPExperts
from gmoe.moe import MoE, MoELayer
from gmoe.routers import Router, RouterLike, build_router


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
    - Of a PyG ``GCN``, ``GraphSAGE``, ``GIN``, ``GAT``, ... without ``targets`` all convs but an output layer's.

    An MLP is linear, activation, linear: in a ``Sequential`` as torchvision's, or as timm's ``Mlp``; or gated, with one
    layer twice as wide or two before the last (timm's ``GluMlp`` and ``SwiGLU``, Llama's ``w1``, ``w2``, ``w3``). Norms
    before the linear layers and dropout are kept. It is read by the order and the shapes of its parts, and sees tokens
    as (B, ..., D): those of an image, in a row or in a grid, are one group, padding included, so that padding takes
    places where experts choose.

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
            multi-centroid at K >= 2), a scaled one else, and zero for tokens that no expert took. That the copies
            compute what the MLP does is verified on random tokens.
        dense_start: start an expert's last layer at zero, of a conv the gain of :class:`MoEConv` (default); ``False``
            adds the experts as they are. Without a shared expert there is no dense start.
        router_kwargs: further arguments of the routers.
        backend: see :func:`gmoe.grouped_linear`.

    Returns:
        The model with MoE layers; collect their routings with :func:`gmoe.record_routing`.

    Raises:
        ValueError: no such blocks or targets, fewer than ``every``, or an argument out of range; an MLP of another
            form, or without values (on the meta device); with ``shared_expert=False``, one that computes something
            else than it looks like, or with a parametrized weight (weight norm, spectral norm, pruning) or hooks, which
            would be lost.

    Example:
        >>> vit = moefy(timm.create_model("vit_tiny_patch16_224"), blocks=[-3, -1], router="expert_choice")
        >>> gnn = moefy(gnn, targets="conv*")
    """
    check(not isinstance(router, Router), "router", "an instance for several layers", "a name or a factory")
    options: dict[str, Any] = {"num_experts": num_experts, "k": k, "router": router, "router_kwargs": router_kwargs}
    options |= {"upcycle": upcycle, "shared_expert": shared_expert, "dense_start": dense_start, "backend": backend}
    usual, widths = 2 if targets is None else 1, dict[str, int]()
    pyg = sys.modules.get("torch_geometric.nn")  # who has a PyG model has imported it
    if pyg is not None and targets is None and isinstance(model, pyg.models.basic_gnn.BasicGNN):
        hidden = range(model.num_layers - (model.jk_mode is None))
        usual, widths = 1, {f"convs.{i}": model.hidden_channels if i else model.in_channels for i in hidden}
        found = list(widths)
    else:
        found = _mlps(model) if targets is None else _matches(model, targets)
    names = [name for name in found if not any(name.startswith(f"{outer}.") for outer in found)]
    chosen = choose_blocks(len(names), usual if every is None else every, blocks)
    modules = {names[i]: model.get_submodule(names[i]) for i in chosen}
    layers: dict[nn.Module, nn.Module] = {}
    for name, module in modules.items():  # build all before changing any: an error leaves the model as it was
        check(not isinstance(module, MoELayer), "model", f"{name}, a MoE already", "a dense one; see `blocks`")
        empty = any(is_lazy(p) or p.is_meta for p in module.parameters())
        check(not empty, "model", "parameters on the meta device or of lazy layers", "ones with values")
        build = _moe
        if pyg is not None and isinstance(module, pyg.MessagePassing):
            build = partial(_moe_conv, width=widths.get(name))
        if module not in layers:  # one that is used twice stays one
            layers[module] = build(name, module, **options)
    for name, module in modules.items():
        model.set_submodule(name, layers[module])
    return model


def choose_blocks(count: int, every: int, blocks: Sequence[int] | None = None) -> list[int]:
    """Number the blocks that become MoE: every n-th of ``count``, or those that are named, from the end too.

    Raises:
        ValueError: no block, or one that is not there or is named twice.
    """
    check_counts(every=every)
    if blocks is None:
        check(every <= count, "every", every, f"at most {count}, the number of blocks or hidden layers (with jk, all)")
        return list(range(every - 1, count, every))
    try:
        chosen = sorted({range(count)[block] for block in blocks})
    except (IndexError, TypeError):
        chosen = []
    check(chosen and len(chosen) == len(blocks), "blocks", blocks, f"some of {-count} to {count - 1}, each once")
    return chosen


def _mlps(model: nn.Module) -> list[str]:
    """The names of the MLPs of transformer blocks, in order."""
    found = [
        f"{name}.{key}.mlp".lstrip(".")
        for name, container in model.named_modules(remove_duplicate=False)
        if isinstance(container, nn.ModuleList | nn.Sequential)
        and all(isinstance(getattr(block, "mlp", None), nn.Module) for block in container)
        for key, _ in container.named_children()
    ]
    legal = "a transformer with blocks that hold an `mlp`, such as timm's VisionTransformer, or a PyG BasicGNN"
    check(found, "model", type(model).__name__, f"{legal}; or `targets`, patterns of the names of MLPs or convs")
    return found


def _matches(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """The names of the modules that match a pattern."""
    patterns = [targets] if isinstance(targets, str) else list(targets)
    check(patterns, "targets", repr(targets), "a pattern of names of modules, or a list of them")
    named = model.named_modules(remove_duplicate=False)
    names = [name for name, module in named if name and not isinstance(module, nn.ModuleList | nn.ModuleDict)]
    for pattern in patterns:
        matches = any(fnmatchcase(name, pattern) for name in names)
        check(matches, "targets", repr(pattern), f"a pattern of names that are there, such as {', '.join(names[:8])}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


# MLPs -----------------------------------------------------------------------------------------------------------------


class TokenMoE(MoE):
    """A MoE on (B, ..., D) whose groups are the B entries: all tokens of an image, in a row or in a grid."""

    def forward(self, x: Tensor, *args: Any, return_routing: bool = False) -> Any:
        """See :class:`MoE`."""
        y, routing = super().forward(x.flatten(1, -2) if x.dim() > 3 else x, *args, return_routing=True)
        y = y.view(*x.shape[:-1], y.size(-1))
        return (y, routing) if return_routing else y


def _moe(
    name: str, mlp: nn.Module, *, num_experts: int, k: int, router: RouterLike, router_kwargs: Any, upcycle: bool,
    shared_expert: bool, dense_start: bool, backend: Backend,
) -> MoE:  # fmt: skip
    """The layer in place of an MLP."""
    if not shared_expert:
        _check_nothing_is_lost(name, mlp, upcycle)
    experts = _experts(name, mlp, num_experts, upcycle, shared_expert and dense_start, backend)
    layer = TokenMoE(build_router(router, experts.in_features, num_experts, k, router_kwargs), experts)
    layer.to(experts.up.weight).train(mlp.training)
    layer.shared_expert = mlp if shared_expert else None  # not before: its parts keep their types and modes
    return layer


@torch.no_grad()
def _check_nothing_is_lost(name: str, mlp: nn.Module, upcycle: bool) -> None:
    """Refuse an MLP whose copies would not be the MLP."""
    for path, part in mlp.named_modules(prefix=name):
        computed = isinstance(part, nn.Linear) and "weight" not in part._parameters
        hooks = part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
        legal = "a plain MLP, since experts would not run them; keep it with shared_expert=True"
        check(not (computed or hooks), "model", f"{path} with hooks or a parametrized weight", legal)
    if upcycle:
        dense = copy.deepcopy(mlp).cpu().double()  # not every device has doubles
        for part in dense.modules():
            if isinstance(part, nn.Dropout):  # which experts have; any other would be lost
                part.p = 0.0
        with torch.device("cpu"):
            expert = _experts(name, dense, 1, True, False, "loop").eval()
            generator = torch.Generator().manual_seed(0)
            x = torch.randn(2, 3, expert.in_features, dtype=torch.float64, generator=generator)
            found, y = expert(x.flatten(0, 1), torch.tensor([6])), dense.train()(x)  # dropout that is no module shows
        legal = "one that computes linear, activation, linear of each token, as it looks; or shared_expert=True"
        same = y.numel() == found.numel() and torch.allclose(y.view_as(found), found, atol=1e-8)
        check(same, "model", f"{name}, a {type(mlp).__name__} that computes something else", legal)


@torch.no_grad()
def _experts(
    name: str, mlp: nn.Module, num_experts: int, upcycle: bool, zero_init: bool, backend: Backend
) -> MLPExperts:
    """Experts of the form of an MLP, with copies of its layers in each or drawn afresh."""
    up, down, gate_last, form = _read(name, mlp)
    norms = form["input_norm"], form["hidden_norm"]
    (up_weight, up_bias), (down_weight, down_bias) = _folded(up, norms[0]), _folded([down], norms[1])
    if gate_last:  # an expert's gate comes first
        up_weight, up_bias = (value.roll(len(value) // 2, dims=0) for value in (up_weight, up_bias))
    form["bias"] = any(getattr(part, "bias", None) is not None for part in (*up, down, *norms))
    sizes = up_weight.size(1), down_weight.size(1), len(down_weight), num_experts
    experts = MLPExperts(*sizes, zero_init=zero_init, backend=backend, **copy.deepcopy(form))
    for norm in (experts.input_norm, experts.hidden_norm):
        for parameter in list(norm._parameters):  # folded into the layer that follows
            norm.register_parameter(parameter, None)
    experts.to(down_weight)
    if upcycle:
        experts.up.copy_(slice(None), up_weight.T, up_bias)
        if not zero_init:
            experts.down.copy_(slice(None), down_weight.T, down_bias)
    return experts


def _read(name: str, mlp: nn.Module) -> tuple[list[nn.Linear], nn.Linear, bool, dict[str, Any]]:
    """The first layer (a gate first, if apart), the last, whether a gate comes last, and the form that experts take."""
    parts = [part for part in mlp._modules.values() if part is not None and not isinstance(part, nn.Identity)]
    linears = [part for part in parts if isinstance(part, nn.Linear)]
    norms = [part for part in parts if hasattr(part, "normalized_shape")]
    others = [part for part in parts if part not in norms and not isinstance(part, nn.Linear | nn.Dropout)]
    functions = [vars(mlp)[key] for key in ("act", "activation", "act_fn") if key in vars(mlp)]
    got = f"{name}, a {type(mlp).__name__} of ({', '.join(type(part).__name__ for part in parts)})"
    legal = (
        "linear layers with one activation without parameters, gated or not, and at most a norm before each; there are "
        "no experts of convolutions: name modules of that form by `targets`"
    )
    check(len(linears) in (2, 3), "model", got, legal)
    shapes = [linear.weight.shape for linear in linears]
    *up, down = sorted(linears, key=lambda linear: -shapes.count(linear.weight.shape))  # of three, two are of one shape
    width, hidden = sum(len(linear.weight) for linear in up), down.weight.size(1)
    glu, gate_last = width == 2 * hidden, getattr(mlp, "gate_last", False)
    activations = others or functions or [F.silu] * glu  # Llama's calls it without naming it
    start, end = parts.index(linears[0]), parts.index(down)
    is_first = {norm in parts[:start]: norm for norm in norms if norm in parts[:end]}
    fits = len({linear.weight.shape for linear in up}) == 1 and (glu or width == hidden) and start == (True in is_first)
    fits = fits and len(activations) == 1 and not any(list(part.parameters()) for part in others)
    check(fits and len(is_first) == len(norms), "model", got, legal)
    (activation,) = activations
    if isinstance(activation, nn.GLU):
        activation, gate_last = torch.sigmoid, True
    dropout = tuple(sum(p.p for p in side if isinstance(p, nn.Dropout)) for side in (parts[:end], parts[end:]))
    form = {"activation": activation, "glu": glu, "dropout": dropout}
    return up, down, gate_last, form | {"input_norm": is_first.get(True), "hidden_norm": is_first.get(False)}


def _folded(linears: list[nn.Linear], norm: nn.Module | None) -> tuple[Tensor, Tensor]:
    """(O, I) weight and (O,) bias of linear layers side by side, with the scale and shift of the norm before them."""
    weight = torch.cat([part.weight for part in linears])
    bias = torch.cat([weight.new_zeros(len(part.weight)) if part.bias is None else part.bias for part in linears])
    scale, shift = getattr(norm, "weight", None), getattr(norm, "bias", None)
    bias = bias if shift is None else bias + weight @ shift
    return weight if scale is None else weight * scale, bias


# convs ----------------------------------------------------------------------------------------------------------------


def _moe_conv(name: str, conv: Any, *, width: int | None, upcycle: bool, **options: Any) -> Any:
    """The layer in place of a PyG conv: copies of it as its experts and, frozen if it is, as the shared one."""
    from gmoe.conv.kinds import CopyOf, Trial
    from gmoe.conv.moe_conv import MoEConv

    width = getattr(conv, "in_channels", None) or width
    if width in (None, -1, (-1, -1)):  # of a GIN, which has no widths, or where a first call gave them
        width = next((p.size(1) for p in conv.parameters() if p.dim() == 2), 0)
    out: Any = getattr(conv, "out_channels", None) or (width and Trial(conv, width).width)
    check(out, "model", f"{name}, a {type(conv).__name__} of unknown widths", "in_channels and out_channels")
    frozen = {not parameter.requires_grad for parameter in conv.parameters()}
    check(len(frozen) < 2, "model", f"{name} with some parameters frozen", "all or none: experts stack them")
    layer = MoEConv(CopyOf(copy.deepcopy(conv).requires_grad_(True)), width, out, **options)
    if True in frozen and layer.shared_expert is not None:
        layer.shared_expert.requires_grad_(False)
    if not upcycle:
        layer.experts.reset_parameters()
    return layer.to(next(conv.parameters())).train(conv.training)
