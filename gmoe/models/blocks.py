"""Pre-norm residual blocks of a GNN: a conv, then a feed-forward part, dense or with experts.

Shapes: N nodes, C columns of a conv's output, H hidden width, E experts.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from gmoe._checks import check, check_choice
from gmoe.conv.kinds import ConvLike, kinds_of
from gmoe.convert import experts_of
from gmoe.models.layers import build_conv, build_router_of, columns_of
from gmoe.models.parts import FFN, Norm, Residual, is_by_row, norm_of
from gmoe.moe import MoE
from gmoe.start import Start, drawn_apart


class DropThenAct(nn.Module):
    """Dropout before an activation, where Platonov et al. (2023) have it.

    Args:
        dropout: the probability of dropping a number.
        act: the activation, of which it keeps a copy.
    """

    def __init__(self, dropout: float, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.act = copy.deepcopy(act)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.dropout(x))


def check_blocks(
    ffn: object,
    conv: ConvLike,
    jk: str | None,
    residual: Residual,
    router_input: tuple[str, ...] | None,
) -> None:
    """Refuse what blocks with a feed-forward part do not have.

    Args:
        ffn, conv, jk, residual: as :class:`gmoe.GNNMoE` takes them; without ``ffn``, there is
            nothing to refuse.
        router_input: what the router of each block is to see; ``None`` if blocks have none.
    """
    if ffn is None:
        return
    check_choice("ffn", ffn, FFN)
    check(jk in (None, "last"), "jk", f"{jk!r} with ffn={ffn!r}", "None or 'last'")
    check(residual == "identity", "residual", f"{residual!r} with ffn={ffn!r}", "'identity'")
    is_one_kind = isinstance(conv, str) or callable(conv)
    legal = "one kind: the convs have no experts"
    check(ffn == "dense" or is_one_kind, "conv", f"several with ffn={ffn!r}", legal)
    legal = "'node', what a block's conv gives; or shared_router=True"
    sees_block = router_input in (None, ("node",))
    check(sees_block, "router_input", f"{router_input} with ffn={ffn!r}", legal)


def block_norm_of(norm: Norm, width: int) -> nn.Module:
    """The norm of blocks, as :func:`norm_of`; ``None`` is a layer norm of each node.

    Raises:
        ValueError: one that mixes nodes, of which layer-wise inference would see a part.
    """
    if norm is None:
        return nn.LayerNorm(width)
    layer = norm_of(norm, width)
    got = f"{type(layer).__name__} in blocks"
    legal = "one by row: nn.LayerNorm, PyG's LayerNorm(mode='node'), batch norm or nn.Identity"
    check(is_by_row(layer), "norm", got, legal)
    return layer


def build_block(
    ffn: FFN,
    conv: ConvLike,
    width: int,
    dropout: float,
    act: Callable[[Tensor], Tensor],
    moe_kwargs: Mapping[str, Any] | None,
    conv_kwargs: Mapping[str, Any],
) -> tuple[nn.Module, nn.Module]:
    """The conv of a block, and its feed-forward part.

    Args:
        ffn, conv, dropout: as :class:`gmoe.GNNMoE` takes them.
        width: of the nodes.
        act: the activation.
        moe_kwargs: arguments of the part that has experts; ``None`` if there is none.
        conv_kwargs: arguments of the convs.
    """
    of_conv = moe_kwargs if ffn == "dense" else None
    built = build_conv(conv, width, width, True, of_conv, conv_kwargs, is_free=True)
    has_weights = any(True for _ in built.experts.parameters()) if of_conv is not None else True
    legal = "one with weights, or ffn='experts': without weights no experts differ"
    check(has_weights, "conv", repr(conv), legal)
    of_ffn = moe_kwargs if ffn == "experts" else None
    columns = columns_of(built, width, kinds_of(conv, None)[0]) or width
    return built, _feed_forward(columns, width, dropout, act, of_ffn)


def _feed_forward(
    in_channels: int,
    out_channels: int,
    dropout: float,
    act: Callable[[Tensor], Tensor],
    moe_kwargs: Mapping[str, Any] | None,
) -> nn.Module:
    """The feed-forward part of a block: an MLP, or a MoE in its place, as ViTs have it.

    Args:
        in_channels: C.
        out_channels: H, the hidden width of the MLP and its output's.
        dropout: of hidden units and of the output.
        act: the activation.
        moe_kwargs: arguments of :class:`gmoe.MoEConv`, of which those are read that do not concern
            convs; ``None`` for the MLP. Without a router, it is to be told each decision.
    """
    mlp = nn.Sequential(
        nn.Linear(in_channels, out_channels),
        DropThenAct(dropout, act),
        nn.Linear(out_channels, out_channels),
        nn.Dropout(dropout),
    )
    if moe_kwargs is None:
        return mlp
    for option in ("shared_transform", "local"):  # of convs with experts
        value = moe_kwargs.get(option)
        check(not value, option, f"{value!r} with ffn='experts'", "it with experts in convs only")
    start: Start = moe_kwargs["start"]
    num_experts = moe_kwargs["num_experts"]
    given = moe_kwargs["router"]
    with drawn_apart(start != "plain"):
        experts = experts_of(
            "ffn", mlp, num_experts, start, start == "copies", moe_kwargs.get("backend", "auto")
        )
        router = None if given is None else build_router_of(given, in_channels, moe_kwargs)
        shared_expert = mlp if start == "shared" else None
        layer = MoE(router, experts, shared_expert)
    layer.start = start
    return layer
