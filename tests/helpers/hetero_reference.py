"""The references of relational layers; not a test itself.

They are PyG's HeteroConv of SAGEConvs, and E dense layers.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch_geometric.nn import HeteroConv, SAGEConv

from gmoe import Routing, aux_loss
from gmoe.conv.base import GAIN_SCALE
from gmoe.conv.hetero import HeteroMoEConv, RelationalConv
from tests.helpers.masked import features, gradient, random_graph

EdgeType = tuple[str, str, str]
Nodes = dict[str, Tensor]
Edges = dict[EdgeType, Any]

METADATA: tuple[list[str], list[EdgeType]] = (
    ["paper", "author", "field", "venue"],
    [
        ("author", "writes", "paper"),
        ("paper", "cites", "paper"),
        ("paper", "rev_writes", "author"),
        ("paper", "has", "field"),
        ("venue", "prints", "paper"),  # nothing ends in a venue
    ],
)
COUNTS = {"paper": 7, "author": 5, "field": 3, "venue": 4}
WIDTHS = {"paper": 4, "author": 3, "field": 5, "venue": 2}
OUT = 3


def nodes(
    widths: Mapping[str, int] | int = WIDTHS, counts: Mapping[str, int] = COUNTS, seed: int = 0
) -> Nodes:
    width_of = dict.fromkeys(counts, widths) if isinstance(widths, int) else widths
    return {t: features(counts[t], width_of[t], seed=seed + i) for i, t in enumerate(counts)}


def edges(counts: Mapping[str, int] = COUNTS, seed: int = 0) -> Edges:
    """Of each relation; the last node of either type stays isolated in it."""
    return {
        r: random_graph(counts[r[0]], counts[r[-1]], 3 * counts[r[0]], seed=seed + i)
        for i, r in enumerate(METADATA[1])
    }


def by_pyg(dense: RelationalConv, x_dict: Nodes, edge_index_dict: Edges) -> Nodes:
    """PyG's HeteroConv of SAGEConvs around the layer's linear maps, and the roots."""
    convs = {}
    for relation in (r for into in dense.relations_into.values() for r in into):
        convs[relation] = SAGEConv((1, 1), 1, root_weight=False, bias=False)
        convs[relation].lin_l = dense.relation[relation]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of types that nothing ends in
        summed = HeteroConv(convs)(x_dict, {r: edge_index_dict[r] for r in convs})
    return {t: dense.root[t](x_dict[t]) + summed.get(t, 0.0) for t in dense.relations_into}


def masked(
    experts: list[RelationalConv],
    x_dict: Nodes,
    edge_index_dict: Edges,
    routings: Mapping[str, Routing],
) -> Nodes:
    """sum_e w_e * expert_e(x, A) of each node type."""
    outs = [expert(x_dict, edge_index_dict) for expert in experts]
    return {
        t: torch.stack(
            [routings[t].to_dense()[:, e, None] * out[t] for e, out in enumerate(outs)]
        ).sum(dim=0)
        for t in outs[0]
    }


def backward(y_dict: Nodes, extra: Tensor | None = None) -> None:
    total = sum(
        ((y * features(*y.shape, seed=50 + i)).sum() for i, y in enumerate(y_dict.values())),
        torch.zeros(()),
    )
    (total if extra is None else total + extra).backward()


def assert_equals_masked(conv: HeteroMoEConv, x_dict: Nodes, edge_index_dict: Edges) -> None:
    """Outputs and gradients of inputs, routers and experts equal those of the masked reference."""
    gain, shared = conv.gain, conv.shared_expert
    conv.gain = None
    experts = [conv.expert(index) for index in range(conv.num_experts)]
    conv.gain = gain

    def run(reference: bool) -> Nodes:
        conv.zero_grad(set_to_none=True)
        xs = {t: x.detach().clone().requires_grad_() for t, x in x_dict.items()}
        y_dict, routings = conv(xs, edge_index_dict, return_routing=True)
        if reference:
            y_dict = masked(experts, xs, edge_index_dict, routings)
            if gain is not None:
                y_dict = {t: GAIN_SCALE * gain * y for t, y in y_dict.items()}
            if shared is not None:
                always = shared(xs, edge_index_dict)
                y_dict = {t: y + always[t] for t, y in y_dict.items()}
        backward(y_dict, aux_loss(routings.values()))
        found = {f"y.{t}": y.detach() for t, y in y_dict.items()}
        found |= {f"x.{t}": gradient(x) for t, x in xs.items()}
        found |= {
            name: gradient(p)
            for name, p in conv.named_parameters()
            if not name.startswith("experts.")
        }
        if not reference:
            # Zeros where nothing came
            assert all(p.grad is not None for p in conv.experts.parameters())
            return found | {
                f"experts.{name}": gradient(p) for name, p in conv.experts.named_parameters()
            }
        for name, _ in experts[0].named_parameters():
            g = torch.stack([gradient(expert.get_parameter(name)) for expert in experts])
            found[f"experts.{name}"] = g
        return found

    assert_all_close(run(reference=False), run(reference=True))


def assert_all_close(ours: Nodes, theirs: Nodes, atol: float = 1e-10) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)
