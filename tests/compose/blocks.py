"""Blocks with a feed-forward part, and experts whose weights are mixed: drawn, and by definition.

They are drawn last, of some cases: the numbers of the others stay the cases that they were.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gmoe import GNNMoE, MoE, Routing
from tests.compose.drawing import BY_EXPERTS, flip, without
from tests.helpers import masked as ref

BY_ROW = (None, "by node", "batch_norm")
"""Norms that blocks may have."""
TOKEN_WISE = ("token_choice", "random", "uniform")
"""Routers that a group may be routed by, with weights of all experts that sum to 1."""


def draw_blocks(random: Random, c: Any) -> None:
    """Turn the layers of some models into blocks, whose convs or feed-forward parts have experts.

    Args:
        random: what is drawn from.
        c: a case of graphs, drawn up to here. Options that blocks do not have are left out.
    """
    if c.way == "layer" or not flip(random, 0.3):
        return
    several = len(c.kinds) > 1
    ffn = "dense" if several else random.choice(("dense", "experts", "experts"))
    options = c.options
    routes_once = options["shared_router"]
    if routes_once is None:
        routes_once = c.start == "copies"
    norm = options.get("norm")
    c.options = without(options, "residual", "norm", *(["local"] if ffn == "experts" else []))
    c.options |= {"norm": norm} if norm in BY_ROW and norm is not None else {}
    c.options |= {"ffn": ffn, "jk": random.choice((None, "last"))}
    if ffn == "experts":  # all MLPs are stacked: of one decision, copies are the default
        is_default = c.start == "copies" and routes_once and flip(random)
        told = (None, None) if is_default else (c.start, routes_once)
        c.options |= {"start": told[0], "shared_router": told[1]}
        c.options |= {} if routes_once else {"router_input": ("node",)}


def draw_mixed(random: Random, c: Any) -> None:
    """Let some layers mix the weights of experts, by what a router says of each graph.

    Args:
        random: what is drawn from.
        c: a case of graphs, drawn up to here.
    """
    is_whole = c.way in ("layer", "forward", "inference") and not c.alone
    routes = c.options["router"] in TOKEN_WISE
    if not (is_whole and routes and len(c.kinds) == 1 and flip(random, 0.3)):
        return
    left_out = ("capacity_factor", *BY_EXPERTS)
    kwargs = without(c.options["router_kwargs"], "weight", "balance", "noise", *left_out)
    c.options |= {"mix": "weights", "k": random.choice((1, c.num_experts)), "router_kwargs": kwargs}
    c.options |= {"router_input": random.choice((None, "graph")), "start": c.start}
    c.options["shared_router"] = c.options.get("shared_router", False) or c.start == "copies"
    if c.way == "layer":
        del c.options["shared_router"]
    c.low = ""  # which runs by a decision for each token


def mixed_conv(
    convs: list[Any], x: Any, adj: Any, routing: Routing, group: Tensor, **args: Any
) -> Tensor:
    """A conv a group, of the weighted sum of the experts' tensors; each row is of its group's.

    Args:
        convs: the experts, one by one.
        x, adj: of the whole graph.
        routing: of each node; all nodes of a group have the same weights.
        group: (N,) the group of each node that gets an output.
        **args: edge arguments.
    """
    weight_TE = routing.to_dense()
    own = [{**dict(conv.named_parameters()), **dict(conv.named_buffers())} for conv in convs]
    rows = torch.zeros(0)
    for number in group.unique():
        is_own = group == number
        weight_E = weight_TE[is_own][0]
        of_group = {
            name: sum(weight * values[name] for weight, values in zip(weight_E, own, strict=True))
            for name in own[0]
        }
        y: Tensor = functional_call(convs[0], of_group, (x, adj), args)
        rows = y.new_zeros(y.shape) if not rows.numel() else rows
        rows = torch.where(is_own[:, None], y, rows)
    return rows


def define_feed_forward(
    model: GNNMoE,
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
        if model.router_input == ("graph",):
            own = routed_by_mean(part.router, rows, batch)
        else:
            own = part.router(rows, batch, edge_index)
        routing = own
    weight_TE = routing.to_dense()
    up, down = part.experts.up, part.experts.down
    if part.mix == "weights":
        hidden = torch.einsum("te,ehc,tc->th", weight_TE, up.weight, rows) + weight_TE @ up.bias
        hidden = model.act(hidden)
        y = torch.einsum("te,eoh,th->to", weight_TE, down.weight, hidden) + weight_TE @ down.bias
    else:
        hidden = torch.einsum("ehc,tc->teh", up.weight, rows) + up.bias
        hidden = model.act(hidden)
        each = torch.einsum("eoh,teh->teo", down.weight, hidden) + down.bias
        y = torch.einsum("te,teo->to", weight_TE, each)
    shared: nn.Module | None = part.shared_expert
    return (y if shared is None else y + shared(rows)), own


def routed_by_mean(router: Any, rows: Tensor, batch: Tensor | None) -> Routing:
    """A decision for the mean of each graph's nodes, given to all of them."""
    group = groups_of(rows, batch)
    means = torch.stack([rows[group == number].mean(dim=0) for number in group.unique()])
    found: Routing = router(means)
    return replace(ref.routing_of(found.to_dense()[group]), losses=found.losses)


def groups_of(rows: Tensor, batch: Tensor | None) -> Tensor:
    """(N,) the graph of each row, numbered from 0 without gaps."""
    if batch is None:
        return torch.zeros(len(rows), dtype=torch.long)
    group: Tensor = batch.unique(return_inverse=True)[1]
    return group
