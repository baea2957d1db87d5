"""Replace the MLPs of a transformer, or the convs of a PyG GNN, with MoE layers.

Shapes: B images, T tokens, D width, E experts, I in, O out features of a linear layer.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from inspect import isfunction
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from gmoe._checks import change_of, check, check_counts
from gmoe._mlps import read_mlp
from gmoe.dispatch import Backend
from gmoe.moe import MoE, MoELayer, Start, check_copies, check_start, refuse_unknown
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
    start: Start | None = None,
    router_kwargs: Mapping[str, Any] | None = None,
    backend: Backend = "auto",
    **unknown: Any,
) -> nn.Module:
    r"""Add experts to a transformer's MLPs or a GNN's convs; the first forward stays the dense
    model's.

    .. math::
        y_t = \mathrm{mlp}(x_t) + \sum_e w_{te} f_e(x_t), \qquad f_e = 0 \text{ at the start}

    The MLP stays as the shared expert, with its hooks, parametrizations, dropout and frozen
    parameters. Router and experts train even if the model is frozen.

    - Transformers are changed in place: torchvision's, timm's and Hugging Face's ViTs, Swins, or
      any model with blocks in a ``ModuleList`` or ``Sequential`` that each hold an ``mlp``. Blocks
      are numbered across stages.
    - Any other model is changed in place if ``targets`` names its MLPs or PyG convs.
    - Of a PyG ``GCN``, ``GraphSAGE``, ``GIN``, ``GAT``, ... without ``targets`` all convs but an
      output layer's.

    An MLP is linear, activation, linear: in a ``Sequential`` as torchvision's, or as timm's
    ``Mlp``; or gated, with one layer twice as wide or two before the last (timm's ``GluMlp`` and
    ``SwiGLU``, Llama's ``w1``, ``w2``, ``w3``). Norms before the linear layers and dropout are
    kept. It is read by what it computes: it is run once on random tokens, and the order of the
    calls of its parts counts, not the order of their names. An MLP sees tokens as (B, ..., D):
    those of an image, in a row or in a grid, are one group, padding included, so that padding takes
    places where experts choose.

    Args:
        model: the dense model.
        every: n; block, target or layer ``i`` becomes MoE where ``i % n == n - 1`` (default 2 of a
            transformer, 1 of ``targets`` and of a GNN, whose output layer stays dense).
        k: K, experts per token (default 1).
        router: a name or factory (default ``"token_choice"``); each layer gets its own router.
        num_experts: E (default 8).
        upcycle: with ``start="shared"``, the experts begin as copies of the dense layer as it is
            now, of an MLP all but its last layer (default); ``False`` draws them afresh.
        targets: patterns of ``model.named_modules()``, such as ``"blocks.*.mlp"`` or
            ``["conv1", "conv2"]``, instead of the ``mlp`` of all blocks (default ``None``). Modules
            inside a match go with it.
        blocks: numbers of the blocks, or targets, that become MoE, instead of ``every``; -1 is the
            last (default ``None``).
        start: how the layers start.

            - ``"shared"`` (default, ``None``): the dense MLP or conv stays, as a shared expert, and
              what is added to it starts at zero: an expert's last layer, of a conv the gain of
              :class:`MoEConv`.
            - ``"copies"``: the experts are copies of it and all that is left of it, and train even
              if it was frozen (sparse upcycling, `Komatsuzaki et al., 2023
              <https://arxiv.org/abs/2212.05055>`_). The model starts as the dense one, since a
              token's weights sum to 1; other routers are refused (``router.sums_to_one``): token
              choice and centroids take ``router_kwargs={"weight": "straight_through"}`` at K = 1
              and are right as they are above. That the copies compute what the MLP does is verified
              on random tokens.
            - ``"plain"``: independent experts of its form, drawn afresh.
        router_kwargs: further arguments of the routers.
        backend: see :func:`gmoe.grouped_linear`.

    Returns:
        The model with MoE layers; collect their routings with :func:`gmoe.record_routing`.

    Raises:
        ValueError: no such blocks or targets, fewer than ``every``, or an argument out of range; an
            MLP of another form, or without values (on the meta device); with copies or plain
            experts, one that computes something else than it looks like, or with what its weights
            alone would lose: a parametrized weight (weight norm, spectral norm, pruning), hooks,
            linear layers of an own class (LoRA, quantized).

    Example:
        >>> vit = moefy(timm.create_model("vit_tiny_patch16_224"), blocks=[-3, -1], router="expert_choice")
        >>> gnn = moefy(gnn, targets="conv*")
    """
    refuse_unknown("moefy", unknown)
    check(
        not isinstance(router, Router),
        "router",
        "an instance for several layers",
        "a name or a factory",
    )
    options: dict[str, Any] = {
        "num_experts": num_experts,
        "k": k,
        "router": router,
        "router_kwargs": router_kwargs,
    }
    options |= {"upcycle": upcycle, "start": check_start(start), "backend": backend}
    check(upcycle or start != "copies", "upcycle", False, "True with start='copies'")
    usual, widths = 2 if targets is None else 1, dict[str, int]()
    pyg = sys.modules.get("torch_geometric.nn")  # who has a PyG model has imported it
    if pyg is not None and targets is None and isinstance(model, pyg.models.basic_gnn.BasicGNN):
        hidden = range(model.num_layers - (model.jk_mode is None))
        usual, widths = (
            1,
            {f"convs.{i}": model.hidden_channels if i else model.in_channels for i in hidden},
        )
        found = list(widths)
    else:
        found = _mlps(model) if targets is None else _matches(model, targets)
    names = [name for name in found if not any(name.startswith(f"{outer}.") for outer in found)]
    chosen = choose_blocks(len(names), usual if every is None else every, blocks)
    modules = {names[i]: model.get_submodule(names[i]) for i in chosen}
    layers: dict[nn.Module, nn.Module] = {}
    for (
        name,
        module,
    ) in modules.items():  # build all before changing any: an error leaves the model as it was
        check(
            not isinstance(module, MoELayer),
            "model",
            f"{name}, a MoE already",
            "a dense one; see `blocks`",
        )
        empty = any(is_lazy(p) or p.is_meta for p in module.parameters())
        check(
            not empty,
            "model",
            "parameters on the meta device or of lazy layers",
            "ones with values",
        )
        build = _moe
        if pyg is not None and isinstance(module, pyg.MessagePassing):
            build = partial(_moe_conv, width=widths.get(name))
        if module not in layers:  # one that is used twice stays one
            layers[module] = build(name, module, **options)
    for name, module in modules.items():
        model.set_submodule(name, layers[module])
    return model


def choose_blocks(count: int, every: int, blocks: Sequence[int] | None = None) -> list[int]:
    """Number the blocks that become MoE: every n-th of ``count``, or those that are named, from the
    end too.

    Raises:
        ValueError: no block, or one that is not there or is named twice.
    """
    check_counts(every=every)
    if blocks is None:
        check(
            every <= count,
            "every",
            every,
            f"at most {count}, the number of blocks or hidden layers (with jk, all)",
        )
        return list(range(every - 1, count, every))
    try:
        chosen = sorted({range(count)[block] for block in blocks})
    except (IndexError, TypeError):
        chosen = []
    check(
        chosen and len(chosen) == len(blocks),
        "blocks",
        blocks,
        f"some of {-count} to {count - 1}, each once",
    )
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
    check(
        found,
        "model",
        type(model).__name__,
        f"{legal}; or `targets`, patterns of the names of MLPs or convs",
    )
    return found


def _matches(model: nn.Module, targets: str | Sequence[str]) -> list[str]:
    """The names of the modules that match a pattern."""
    patterns = [targets] if isinstance(targets, str) else list(targets)
    check(patterns, "targets", repr(targets), "a pattern of names of modules, or a list of them")
    named = model.named_modules(remove_duplicate=False)
    names = [
        name
        for name, module in named
        if name and not isinstance(module, nn.ModuleList | nn.ModuleDict)
    ]
    for pattern in patterns:
        matches = any(fnmatchcase(name, pattern) for name in names)
        check(
            matches,
            "targets",
            repr(pattern),
            f"a pattern of names that are there, such as {', '.join(names[:8])}",
        )
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


# MLPs ---------------------------------------------------------------------------------------------


class TokenMoE(MoE):
    """A MoE on (B, ..., D) whose groups are the B entries: all tokens of an image, in a row or in a
    grid.
    """

    def forward(self, x: Tensor, *others: Any, return_routing: bool = False) -> Any:
        """See :class:`MoE`; it takes tokens alone."""
        if others:
            got = f"{len(others)} arguments behind the tokens"
            raise ValueError(f"forward: got {got}, expected none: experts see tokens alone")
        y, routing = super().forward(x.flatten(1, -2) if x.dim() > 3 else x, return_routing=True)
        y = y.view(*x.shape[:-1], y.size(-1))
        return (y, routing) if return_routing else y


def _moe(
    name: str,
    mlp: nn.Module,
    *,
    num_experts: int,
    k: int,
    router: RouterLike,
    router_kwargs: Mapping[str, Any] | None,
    upcycle: bool,
    start: Start,
    backend: Backend,
) -> MoE:
    """The layer in place of an MLP."""
    dense = read_mlp(name, mlp)
    copied = start == "copies" or (start == "shared" and upcycle)
    if start != "shared":
        _check_nothing_is_lost(name, mlp, copied)
    experts = dense.experts(num_experts, copied, zero_init=start == "shared", backend=backend)
    built = build_router(router, experts.in_features, num_experts, k, router_kwargs)
    check_copies(start, built)
    layer = TokenMoE(built, experts)
    layer.to(experts.up.weight).train(mlp.training)
    # The MLP joins last, so that its parts keep their own types and modes.
    layer.shared_expert = mlp if start == "shared" else None
    return layer


@torch.no_grad()
def _check_nothing_is_lost(name: str, mlp: nn.Module, upcycle: bool) -> None:
    """Refuse an MLP whose copies would not be the MLP."""
    legal = "a plain MLP, since experts would not run them; keep it with start='shared'"
    for path, part in mlp.named_modules(prefix=name):
        change = change_of(part)
        check(change is None, "model", f"{path} with {change}", legal)
    if not upcycle:
        return
    dense = copy.deepcopy(mlp).cpu().double()  # not every device has doubles
    for part in dense.modules():
        if isinstance(part, nn.Dropout):  # experts have the same dropouts
            part.p = 0.0
    with torch.device("cpu"):
        expert = (
            read_mlp(name, dense).experts(1, upcycle=True, zero_init=False, backend="loop").eval()
        )
        tokens = torch.randn(
            2,
            3,
            expert.in_features,
            dtype=torch.float64,
            generator=torch.Generator().manual_seed(0),
        )
        copied = expert(tokens.flatten(0, 1), torch.tensor([6]))
        expected = dense.train()(
            tokens
        )  # in training mode, so that a dropout that is a function shows
    same = expected.numel() == copied.numel() and torch.allclose(
        expected.view_as(copied), copied, atol=1e-8
    )
    legal = (
        "one that computes linear, activation, linear of each token, as it looks; or start='shared'"
    )
    check(same, "model", f"{name}, a {type(mlp).__name__} that computes something else", legal)


# convs --------------------------------------------------------------------------------------------


def _moe_conv(
    name: str, conv: Any, *, width: int | None, upcycle: bool, start: Start, **options: Any
) -> Any:
    """The layer in place of a PyG conv: copies of it as its experts and, frozen if it is, as the
    shared one.
    """
    from gmoe.conv.kinds import CopyOf, Trial
    from gmoe.conv.moe_conv import MoEConv

    width = getattr(conv, "in_channels", None) or width
    if width in (
        None,
        -1,
        (-1, -1),
    ):  # of a GIN, which has no widths, or where a first call gave them
        width = next((p.size(1) for p in conv.parameters() if p.dim() == 2), 0)
    out: Any = getattr(conv, "out_channels", None) or (width and Trial(conv, width).width)
    check(
        out,
        "model",
        f"{name}, a {type(conv).__name__} of unknown widths",
        "in_channels and out_channels",
    )
    for path, part in conv.named_modules(prefix=name):
        # A function may hold the conv itself, which then would run in place of its copies.
        patched = [
            key
            for key, value in vars(part).items()
            if isfunction(value) and hasattr(type(part), key)
        ]
        legal = "a conv whose methods are those of a class, since experts are copies of it"
        check(not patched, "model", f"{path} with a function as its {', '.join(patched)}", legal)
    is_frozen = not any(parameter.requires_grad for parameter in conv.parameters())
    copied = copy.deepcopy(conv)
    if (
        is_frozen
    ):  # Experts train all the same. Where some parameters are frozen, as under LoRA, they stay so.
        copied.requires_grad_(True)
    layer = MoEConv(CopyOf(copied), width, out, start=start, **options)
    if is_frozen and layer.shared_expert is not None:
        layer.shared_expert.requires_grad_(False)
    if start == "plain" or not upcycle:
        layer.experts.reset_parameters()
    return layer.to(next(conv.parameters())).train(conv.training)
