"""Blocks with a feed-forward part: drawn, and by definition.

They are drawn last, of some cases: the numbers of the others stay the cases that they were.
"""

from __future__ import annotations

from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from gmoe import BlockGNN, MoE, Routing
from tests.compose.drawing import flip, without

BY_ROW = (None, "by node", "batch_norm")
"""Norms that blocks may have."""


def draw_blocks(random: Random, c: Any) -> None:
    """Turn the layers of some models into blocks, whose feed-forward parts have experts.

    Args:
        random: what is drawn from.
        c: a case of graphs, drawn up to here. Options that blocks do not have are left out.
    """
    if c.way == "layer" or len(c.kinds) > 1 or not flip(random, 0.3):
        return
    c.has_blocks = True
    options = c.options
    routes_once = options["shared_router"]
    if routes_once is None:
        routes_once = c.start == "copies"
    norm = options.get("norm")
    c.options = without(options, "residual", "norm", "local", "jk")
    c.options |= {"norm": norm} if norm in BY_ROW and norm is not None else {}
    # All MLPs are stacked: of one decision, copies are the default.
    is_default = c.start == "copies" and routes_once and flip(random)
    told = (None, None) if is_default else (c.start, routes_once)
    c.options |= {"start": told[0], "shared_router": told[1]}
    c.options |= {} if routes_once else {"router_input": ("node",)}


def define_feed_forward(
    model: BlockGNN,
    part: Any,
    rows: Tensor,
    routing: Routing | None,
    batch: Tensor | None,
    edge_index: Tensor,
) -> tuple[Tensor, Routing | None]:
    """The feed-forward part of a block, each expert on all rows; and its own router's decision.

    Args:
        model: which has the activation.
        part: an MLP, or a mixture of them.
        rows: (N, C) what the conv gave.
        routing: the decision of a common router.
        batch: (N,) the graph of each node.
        edge_index: the edges among the nodes.
    """
    if not isinstance(part, MoE):
        return part(rows), None
    own = None
    if routing is None:
        own = part.router(rows, batch, edge_index)
        routing = own
    weight_TE = routing.to_dense()
    up, down = part.experts.up, part.experts.down
    hidden = torch.einsum("ehc,tc->teh", up.weight, rows) + up.bias
    hidden = model.act(hidden)
    each = torch.einsum("eoh,teh->teo", down.weight, hidden) + down.bias
    y = torch.einsum("te,teo->to", weight_TE, each)
    shared: nn.Module | None = part.shared_expert
    return (y if shared is None else y + shared(rows)), own
