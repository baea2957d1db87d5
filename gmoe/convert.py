"""Replace the MLPs of a transformer, or the convs of a PyG GNN, with MoE layers.

Shapes: B images, T tokens, D width, E experts, I in features and O out features of a linear layer.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import ModuleType
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gmoe._calls import with_modules
from gmoe._check_mlp import read_mlp
from gmoe._checks import (
    change_of,
    check,
    check_choice,
    check_module,
    refuse_computed,
    refuse_functions,
)
from gmoe._torch import unwrapped
from gmoe._verify import is_option
from gmoe.experts import Experts
from gmoe.hosts import guard
from gmoe.mixed import Mix, MixedWeights
from gmoe.moe import MoE, MoELayer, choose_blocks
from gmoe.recorded import AsBuilt, Recorded
from gmoe.routers import DEFAULT_EXPERTS, ROUTERS, FromCall, Router, RouterLike, read_router
from gmoe.routing import Routing
from gmoe.split_mlps import joined, place_of, refuse_parts, with_place
from gmoe.stack import base_parameters, share_base
from gmoe.start import Start, build_layer_router, resolved_start


def moefy(
    model: nn.Module,
    *,
    every: int | None = None,
    k: int = 1,
    router: RouterLike = "token_choice",
    num_experts: int | None = None,
    targets: str | Sequence[str] | None = None,
    start: Start | None = None,
    router_input: Any = None,
    mix: Mix = "outputs",
    router_kwargs: Mapping[str, object] | None = None,
) -> nn.Module:
    r"""Add experts to a transformer's MLPs or a GNN's convs.

    The first forward stays what it is, unless ``start="plain"``, or in training where a conv has
    batch norms, which each expert then has over its own rows. By default (``start="shared"``):

    .. math::
        y_t = \mathrm{mlp}(x_t) + \sum_e w_{te} f_e(x_t), \qquad f_e = 0 \text{ at the start}

    The MLP then stays as the shared expert, with its hooks, parametrizations, dropout and frozen
    parameters. Router and experts train even if the model is frozen.

    - Transformers are changed in place: torchvision's, timm's and Hugging Face's ViTs, Swins, or
      any model with blocks in a ``ModuleList`` or ``Sequential`` that each hold an ``mlp``; or the
      MLP's layers, as torch's ``TransformerEncoderLayer`` and Hugging Face's ``intermediate`` and
      ``output``, which ``targets`` names as a block. Blocks are numbered across stages.
    - Any other model is changed in place if ``targets`` names its MLPs or PyG convs.
    - In a PyG ``GCN``, ``GraphSAGE``, ``GIN``, ``GAT``, ..., without ``targets``, all convs except
      that of the output layer become MoE.

    A single ``nn.Linear`` that ``targets`` names becomes E of them. An MLP is linear, activation,
    linear: a ``Sequential`` as torchvision's, or timm's ``Mlp``; or gated, with one layer twice as
    wide or two before the last (timm's ``GluMlp`` and ``SwiGLU``, Llama's). Dropout is kept, and so
    are norms before the linear layers. Classes of timm, torchvision, transformers and PyG are
    known; :func:`gmoe.mlps.register` tells the roles of the parts in a class of your own. What they
    give is compared with the MLP on a copy with other weights: 1, 8 and 65 tokens of scales 0 to
    1,000, in evaluation and, if experts replace it, in training, with a gradient.

    An MLP sees (B, ..., D), and each of the B entries is a group: the tokens of an image, in a row
    or in a grid, or those of a window where a model folds windows into the first dimension (in
    torch's layers with ``batch_first=False``, those at one place of all sequences). Padding is part
    of the group, so it takes up places where experts choose. The rows of (T, D), such as
    pooled images or the nodes of a graph, are one group: under a router whose tokens compete
    (:attr:`Router.by_token` is false) what a row gets depends on the others. A GNN then refuses
    ``batch``, trimmed graphs and a layer-wise ``inference``: its layers do not hear of them.

    Args:
        model: the dense model. Of transformers, the whole one: a classifier around an encoder that
            was given here does not know of the experts, and saves itself as a dense model.
        every: n; block, target or layer ``i`` becomes MoE if ``i % n == n - 1`` (default 2 for a
            transformer, 1 for ``targets`` and for a GNN, whose output layer stays dense).
        k: K, experts per token (default 1).
        router: a name or factory (default ``"token_choice"``); each layer gets its own router. Or
            :class:`gmoe.routers.ByType`, :class:`gmoe.routers.FromInput`: by types, or by a vector,
            that are an argument of the model.
        num_experts: E (default 8; by type, the number of types).
        targets: patterns of ``model.named_modules()``, such as ``"blocks.*.mlp"`` or ``["conv1",
            "conv2"]``, instead of the ``mlp`` of all blocks (default ``None``). Modules inside a
            match are replaced with it.
        start: how the layers start (default ``"shared"``).

            - ``"shared"``: the dense MLP or conv stays as a shared expert, and the routed experts
              are its copies. What they add starts at zero: the last layer of an MLP's experts, or
              the gain of a :class:`MoEConv`.
            - ``"copies"``: the experts start as the dense layer and replace it. It is the base of
              their weights, to which each expert adds a difference that starts at zero, see
              ``gmoe.stack``: if it was frozen, the base stays frozen and the differences train. The
              model starts as the dense one, since a token's weights sum to 1; other routers are
              refused (``router.sums_to_one``). Independent copies are sparse upcycling
              (`Komatsuzaki et al., 2023 <https://arxiv.org/abs/2212.05055>`_). Token choice has
              weights of 1 at K = 1 and does not balance its load, as in :class:`MoEConv`.
            - ``"plain"``: independent experts of the same form, drawn anew.
        router_input: what the routers of convs see, as in :class:`MoEConv` (default ``None``).
        mix: the ``"outputs"`` of K experts (default); or of linear layers and MLPs the
            ``"weights"``, by ``ByType`` or ``FromInput``, with ``batch=`` for rows (T, D) of
            several groups: :class:`gmoe.mixed.MixedWeights`.
        router_kwargs: further arguments of the routers.

    Returns:
        The model with MoE layers; collect their routings with :func:`gmoe.record_routing`.

    Raises:
        ValueError: no such blocks or targets, fewer than ``every``, or an argument out of range; an
            MLP of another form, or without values (on the meta device); a module that the model
            also keeps outside of its modules, in a list for example. With copies or plain experts,
            and for convs, also one that is tied to another layer. With copies or plain experts, an
            MLP that is more than its weights: a residual, a scale, hooks, buffers, parametrized,
            tied or partly frozen weights, linear layers of a custom class (LoRA, quantized).

    Example:
        >>> vit = timm.create_model("vit_tiny_patch16_224")
        >>> vit = moefy(vit, targets=["blocks.9.mlp", "blocks.11.mlp"], router="expert_choice")
        >>> gnn = moefy(gnn, targets="conv*")
    """
    check_module("model", model)
    wrapper = type(model).__name__
    inside = "the model inside: compile, wrap or average it when it has its experts"
    check(unwrapped(model) is model, "model", f"a model in {wrapper}", inside)
    is_instance = isinstance(router, Router)
    check(not is_instance, "router", "an instance for several layers", "a name or a factory")
    router = read_router(router)
    if isinstance(router, FromCall):
        num_experts = router.experts_of(num_experts=num_experts, model=model)
    elif num_experts is None:
        num_experts = DEFAULT_EXPERTS
    start = resolved_start(start)
    check_choice("mix", mix, Mix)
    if mix == "weights":
        legal = "ByType or FromInput, which decide for groups of tokens"
        check(isinstance(router, FromCall), "router", f"{router!r} with mix='weights'", legal)

    # 1. List the layers that can become MoE, and choose among them.
    candidates = _candidates(model, targets)
    if every is None:
        every = candidates.every
    chosen = choose_blocks(len(candidates.names), every)
    names = [candidates.names[i] for i in chosen]

    # 2. Build all MoE layers before changing any: an error leaves the model as it was.
    options: dict[str, Any] = {
        "num_experts": num_experts,
        "k": k,
        "router": router,
        "router_kwargs": router_kwargs,
        "start": start,
        "router_input": router_input,
        "mix": mix,
    }
    with joined(model, names):
        modules = {name: model.get_submodule(name) for name in names}
        pyg = _imported_pyg()
        layers: dict[nn.Module, MoELayer] = {}
        checked: set[Hashable] = set()
        for name, module in modules.items():
            _check_convertible(name, module)
            _refuse_hidden(name, module, model)
            if module in layers:  # it is used twice, and so will the layer be
                continue
            is_conv = pyg is not None and isinstance(module, pyg.MessagePassing)
            if is_conv or start != "shared":  # else the shared expert is the module itself
                _refuse_shared(name, module, model)
            if is_conv:
                width = candidates.widths.get(name)
                layers[module] = _moe_conv(name, module, width=width, **options)
            else:
                layers[module] = _moe(name, module, checked=checked, **options)

        if isinstance(router, FromCall):
            router.arguments_in(model)  # or it is refused

        # 3. Put them in place, and note how they were made, to save them.
        for layer in layers.values():
            layer.moefied = Recorded.of(options, ROUTERS)
            layer.as_built = AsBuilt.of(layer)
        with_modules(model, layers)
    if isinstance(router, FromCall):
        router.attach(model, takes_others=start == "shared")
    if pyg is not None and any(isinstance(part, pyg.MessagePassing) for part in model.modules()):
        guard(model, layers.values())
    return model


# What to replace ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Candidates:
    """The layers of a model that can become MoE."""

    names: list[str]
    every: int
    """Every so many of them become MoE by default."""
    widths: dict[str, int] = field(default_factory=dict)
    """The input widths of the layers that may not know theirs: PyG's GIN has no ``in_channels``."""


def _imported_pyg() -> ModuleType | None:
    """``torch_geometric.nn``, or ``None`` if nobody imported it: a PyG model implies that it was.

    Looking it up here keeps ``import gmoe`` free of PyG.
    """
    return sys.modules.get("torch_geometric.nn")


def _candidates(model: nn.Module, targets: str | Sequence[str] | None) -> _Candidates:
    """The convs of a PyG model, the MLPs of a transformer, or what ``targets`` match."""
    pyg = _imported_pyg()
    is_gnn = pyg is not None and isinstance(model, pyg.models.basic_gnn.BasicGNN)
    widths: dict[str, int] = {}
    if is_gnn:
        gnn: Any = model
        widths = {f"convs.{i}": gnn.hidden_channels for i in range(gnn.num_layers)}
        widths["convs.0"] = gnn.in_channels
    if targets is not None:
        names = _outermost(_matches(model, targets))
        for name in names:
            refuse_parts(name, model.get_submodule(name.rpartition(".")[0]))
        return _Candidates([with_place(model, name) for name in names], every=1, widths=widths)
    if is_gnn:
        # With jumping knowledge a linear layer is the output, and all convs are hidden layers.
        num_hidden = gnn.num_layers if gnn.jk_mode is not None else gnn.num_layers - 1
        return _Candidates([*widths][:num_hidden], every=1, widths=widths)
    return _Candidates(_outermost(_mlps(model)), every=2)


def _outermost(names: list[str]) -> list[str]:
    """The modules that do not lie inside another one of the list."""
    return [name for name in names if not any(name.startswith(f"{outer}.") for outer in names)]


def _mlps(model: nn.Module) -> list[str]:
    """The names of the MLPs of transformer blocks, in order."""
    names = []
    for name, container in model.named_modules(remove_duplicate=False):
        if not isinstance(container, nn.ModuleList | nn.Sequential):
            continue
        places = {
            key: "mlp" if isinstance(getattr(block, "mlp", None), nn.Module) else place_of(block)
            for key, block in container.named_children()
        }
        if None not in places.values():
            names += [f"{name}.{key}.{place}".lstrip(".") for key, place in places.items()]
    legal = "a transformer with blocks that hold an `mlp`, such as timm's VisionTransformer, or a "
    legal += "PyG BasicGNN; or `targets`, patterns of the names of MLPs or convs"
    got = f"{type(model).__name__}, in which not all blocks have MLPs"
    check(names, "model", got, legal)
    return names


def _matches(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """The names of the modules that match a pattern, in the model's order."""
    patterns = [targets] if isinstance(targets, str) else list(targets)
    check(patterns, "targets", repr(targets), "a pattern of names of modules, or a list of them")
    names = [
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if name and not isinstance(module, nn.ModuleList | nn.ModuleDict)
    ]
    for pattern in patterns:
        is_found = any(fnmatchcase(name, pattern) for name in names)
        legal = f"a pattern that matches names of the model, such as {', '.join(names[:8])}"
        check(is_found, "targets", repr(pattern), legal)
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _check_convertible(name: str, module: nn.Module) -> None:
    """Refuse a layer that is a MoE already, or whose parameters have no values to copy."""
    is_moe = isinstance(module, MoELayer)
    check(not is_moe, "model", f"{name}, a MoE already", "a dense one; see `targets`")
    lacks_values = any(value.is_meta or is_lazy(value) for value in module.parameters())
    got = f"{name} with parameters on the meta device or of lazy layers"
    check(not lacks_values, "model", got, "ones with values")


def _refuse_shared(name: str, module: nn.Module, model: nn.Module) -> None:
    """Refuse a module whose parameters the rest of the model has as well.

    Experts are copies, which would no longer be tied to the rest.

    Args:
        name: of the module, for errors.
        module: what experts replace. It may have several names, as the networks of PyG's SchNet.
        model: the whole.
    """
    parts = model.named_modules(remove_duplicate=False)
    starts = tuple(f"{path}." for path, part in parts if part is module)
    outside: dict[nn.Parameter, str] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        if not path.startswith(starts):
            outside.setdefault(parameter, path)
    for path, parameter in module.named_parameters(prefix=name):
        legal = "parameters of this layer alone: experts would not be tied to the rest of the model"
        got = f"{path}, which is {outside.get(parameter)} as well"
        check(parameter not in outside, "model", got, legal)


def _refuse_hidden(name: str, module: nn.Module, model: nn.Module) -> None:
    """Refuse a module that a part of the model also keeps where ``named_modules`` does not look.

    A list of Python's, or a bound method, would go on to hold and call the dense module.
    """
    for path, part in model.named_modules():
        for key, value in vars(part).items():
            if is_option(key) and _holds(value, module):
                raise ValueError(
                    f"model: got {name}, which {path or 'the model'} also keeps as its {key}, "
                    "expected a module of the model alone: what is kept there would go on to run"
                )


def _holds(value: object, module: nn.Module) -> bool:
    """True for the module, a method of it, and plain containers of those, at any depth."""
    if isinstance(value, dict):
        return any(_holds(item, module) for item in value.values())
    if isinstance(value, list | tuple | set):
        return any(_holds(item, module) for item in value)
    return value is module or getattr(value, "__self__", None) is module


# MLPs ---------------------------------------------------------------------------------------------


class TokenMoE(MoE):
    """A MoE on (B, ..., D), where each of the B entries is a group: all tokens of an image.

    The rows of (T, D) are one group, as in :class:`MoE`.
    """

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        *,
        routing: Routing | None = None,
        return_routing: bool = False,
    ) -> Tensor | tuple[Tensor, Routing]:
        """See :class:`MoE`; it takes tokens only."""
        # (B, H, W, D) grids, as Swins have them, become rows of tokens: (B, H * W, D).
        rows = x.flatten(1, -2) if x.dim() > 3 else x
        y, routing = super().forward(rows, routing=routing, return_routing=True)
        y = y.view(*x.shape[:-1], y.size(-1))
        return (y, routing) if return_routing else y


def _moe(
    name: str,
    mlp: nn.Module,
    *,
    num_experts: int,
    k: int,
    router: RouterLike,
    router_kwargs: Mapping[str, object] | None,
    start: Start,
    router_input: object,
    mix: Mix,
    checked: set[Hashable],
) -> MoE:
    """The MoE layer that replaces an MLP; ``checked`` as :func:`read_mlp` takes it."""
    legal = f"None: {name} is no conv, so its router sees each token"
    check(router_input is None, "router_input", repr(router_input), legal)
    stacked = experts_of(name, mlp, num_experts, start, start != "plain", checked)
    built = build_layer_router(start, router, stacked.in_features, num_experts, k, router_kwargs)
    layer = TokenMoE(built, MixedWeights(stacked) if mix == "weights" else stacked)
    layer.start = start
    layer.to(next(stacked.parameters())).train(mlp.training)
    # The MLP joins last, so that its parts keep their own types and modes.
    layer.shared_expert = mlp if start == "shared" else None
    layer.replaced = (copy.deepcopy(mlp).to("meta"),) if start != "shared" else ()
    return layer


def experts_of(
    name: str,
    mlp: nn.Module,
    num_experts: int,
    start: Start,
    copied: bool,
    checked: set[Hashable] | None = None,
) -> Experts:
    """The experts that replace an MLP or linear layer, or with ``start="shared"`` run beside it.

    Args:
        name: of the MLP, for errors.
        mlp: the MLP or linear layer.
        num_experts: E.
        start: how the layer starts.
        copied: the experts are copies of it; ``False`` draws them anew.
        checked: see :func:`read_mlp`.
    """
    if start != "shared":
        _check_nothing_is_lost(name, mlp)
    zero_init = start == "shared"  # the shared expert alone is the dense model
    form = read_mlp(name, mlp, is_replaced=start != "shared", checked=checked)
    stacked = form.experts(num_experts, copied, zero_init=zero_init)
    if start == "copies":
        share_base(stacked)
        is_trained = any(parameter.requires_grad for parameter in mlp.parameters())
        for base in base_parameters(stacked):
            base.requires_grad_(is_trained)
    return stacked


def _check_nothing_is_lost(name: str, mlp: nn.Module) -> None:
    """Refuse an MLP that is more than its weights, which experts would not run."""
    for path, part in mlp.named_modules(prefix=name):
        change = change_of(part)
        legal = "a plain MLP, since experts would not run it; keep it with start='shared'"
        check(change is None, "model", f"{path} with {change}", legal)


# Convs --------------------------------------------------------------------------------------------


def _moe_conv(
    name: str,
    conv: nn.Module,
    *,
    width: int | None,
    start: Start,
    mix: Mix,
    **options: Any,
) -> MoELayer:
    """The MoE layer that replaces a PyG conv: its copies are the experts and the shared expert.

    The shared expert stays frozen if the conv is, and so does the base of copies.
    """
    from gmoe.conv.kinds import CopyOf
    from gmoe.conv.moe_conv import MoEConv

    got = f"{name}, a {type(conv).__name__}, with mix='weights'"
    check(mix == "outputs", "targets", got, "linear layers and MLPs, such as those of the conv")
    in_channels, out_channels = _conv_widths(name, conv, width)
    refuse_functions("model", name, conv)
    refuse_computed("model", name, conv)
    got = f"{name}, a {type(conv).__name__} without parameters"
    check(any(True for _ in conv.parameters()), "model", got, "convs whose copies could differ")
    is_frozen = not any(parameter.requires_grad for parameter in conv.parameters())
    copied = copy.deepcopy(conv)
    if is_frozen:
        # Experts train even so. If only some parameters are frozen, as under LoRA, those stay
        # frozen.
        copied.requires_grad_(True)
    layer = MoEConv(CopyOf(copied), in_channels, out_channels, start=start, **options)
    if is_frozen and layer.shared_expert is not None:
        layer.shared_expert.requires_grad_(False)
    if is_frozen:
        for base in base_parameters(layer.experts):
            base.requires_grad_(False)
    if start == "plain":
        layer.experts.reset_parameters()
    layer.to(next(conv.parameters()))
    if all(part.training == conv.training for part in conv.modules()):
        return layer.train(conv.training)
    # A part that somebody put into another mode, such as a frozen batch norm, stays in it.
    layer.training = conv.training
    if layer.router is not None:
        layer.router.train(conv.training)
    return layer


def _conv_widths(
    name: str, conv: nn.Module, width: int | None
) -> tuple[int | tuple[int, int], int]:
    """The in and out channels of a conv, which not every kind tells.

    Args:
        name: of the conv in its model, for errors.
        conv: the conv.
        width: its input width as its model knows it, or ``None``.
    """
    from gmoe.conv.build import Trial

    in_channels: Any = getattr(conv, "in_channels", None) or width
    if in_channels in (None, -1, (-1, -1)):
        # A GIN has no widths, and a lazy conv keeps -1 after its first call: ask the first matrix.
        matrices = [parameter for parameter in conv.parameters() if parameter.dim() == 2]
        in_channels = matrices[0].size(1) if matrices else 0
    out_channels: Any = getattr(conv, "out_channels", None)
    if not out_channels and in_channels:
        out_channels = Trial(conv, in_channels).width
    got = f"{name}, a {type(conv).__name__} of unknown widths"
    legal = "one with the attributes in_channels and out_channels: set them in its __init__"
    check(out_channels, "model", got, legal)
    return in_channels, out_channels
