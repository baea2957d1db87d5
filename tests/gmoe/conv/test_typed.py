"""MoEConv on graphs of several node types: in PyG's HeteroConv, and made of modules by to_hetero.

A slow reference runs every expert of every relation on the whole graph, and masks it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.nn import GATConv, HeteroConv, SAGEConv, to_hetero

from gmoe import GNNMoE, MoEConv, Routing, record_routing
from gmoe.conv.base import GAIN_SCALE
from tests.contract import opened
from tests.helpers.masked import as_convs, features, gradient, masked, random_graph, routing_of

EXPERTS = 3
OUT = 6
COUNTS = {"paper": 9, "author": 5, "venue": 3}
WIDTHS = {"paper": 4, "author": 3, "venue": 2}
RELATIONS = [
    ("author", "writes", "paper"),
    ("paper", "cites", "paper"),
    ("paper", "rev_writes", "author"),
    ("paper", "in", "venue"),
    ("venue", "rev_in", "paper"),
]
METADATA = (list(COUNTS), RELATIONS)

Nodes = dict[str, Tensor]
Convs = dict[Any, MoEConv]
Dense = dict[Any, list[Any]]


def graph() -> tuple[Nodes, dict[Any, Tensor]]:
    """Each type with a width of its own; some nodes hear nobody."""
    x_dict = {name: features(COUNTS[name], width) for name, width in WIDTHS.items()}
    edge_index_dict = {
        relation: random_graph(COUNTS[relation[0]], COUNTS[relation[-1]], 12, seed=seed)
        for seed, relation in enumerate(RELATIONS)
    }
    return x_dict, edge_index_dict


def moe(conv: Any = "sage", **options: Any) -> MoEConv:
    """A layer of open widths, without noise, which would differ from call to call."""
    router = options.setdefault("router", "token_choice")
    if router == "token_choice":
        options.setdefault("router_kwargs", {"balance": None})
    return MoEConv(conv, (-1, -1), OUT, num_experts=EXPERTS, **options)


def filled_in(model: Any, seed: int = 0) -> Any:
    """The model with the widths of the graph and gains that are not zero, in float64."""
    torch.manual_seed(seed)
    with torch.no_grad():
        model.double()(*graph())
    return opened(model)


def expected(
    convs: Convs, dense: Dense, h: Nodes, routings: Mapping[Any, Routing] | None = None
) -> Nodes:
    """The sum over relations of each layer's definition, expert by expert.

    Args:
        convs: the layers, of which decisions and gains are taken.
        dense: what :func:`as_dense` makes of each.
        h: features by node type.
        routings: decisions by relation, in place of the layers' own.
    """
    out: Nodes = {}
    for relation, (*experts, shared) in dense.items():
        source, _, destination = relation
        pair, edges = (h[source], h[destination]), graph()[1][relation]
        if routings is None:
            _, routing = convs[relation](pair, edges, return_routing=True)
        else:
            routing = routings[relation]
        y = masked(experts, pair, edges, routing)
        if shared is not None:
            y = shared(pair, edges) + GAIN_SCALE * convs[relation].gain * y
        out[destination] = out[destination] + y if destination in out else y
    return out


def as_dense(conv: MoEConv) -> list[Any]:
    """Copies of the experts, and of the shared expert, as PyG's convs."""
    shared = None if conv.shared_expert is None else conv.shared_expert.expert(0)
    return [*map(conv.experts.expert, range(EXPERTS)), shared]


def by_relation(model: nn.Module) -> list[Convs]:
    """The layers of a model by relation: of PyG's HeteroConv, or of what to_hetero made."""
    if isinstance(model, HeteroConv):
        held: Any = model.convs
        return [{relation: held[relation] for relation in RELATIONS}]
    layers: Any = [model.conv1, model.conv2]
    return [{relation: layer["__".join(relation)] for relation in RELATIONS} for layer in layers]


def backward(y_dict: Nodes) -> None:
    """Gradients of a sum in which each output has a factor of its own."""
    terms = [(y * features(*y.shape, seed=5)).sum() for y in y_dict.values()]
    torch.stack(terms).sum().backward()


def assert_equals_reference(model: Any) -> None:
    """Outputs and gradients, of inputs, routers, gains and experts, are those of the definition."""
    layers = by_relation(model)
    convs = [conv for layer in layers for conv in layer.values()]
    dense = [{relation: as_dense(conv) for relation, conv in layer.items()} for layer in layers]

    def run(reference: bool) -> tuple[dict[str, Tensor], list[Any]]:
        model.zero_grad(set_to_none=True)
        x_dict = {name: x.requires_grad_() for name, x in graph()[0].items()}
        y_dict = x_dict
        if reference:
            for layer, plain in zip(layers, dense, strict=True):
                y_dict = expected(layer, plain, y_dict)
        else:
            y_dict = model(x_dict, graph()[1])
        backward(y_dict)
        found = {f"y {name}": y.detach() for name, y in y_dict.items()}
        found |= {f"x {name}": gradient(x) for name, x in x_dict.items()}
        for number, conv in enumerate(convs):
            assert conv.router is not None
            held = {f"router {name}": p for name, p in conv.router.named_parameters()}
            held |= {} if conv.gain is None else {"gain": conv.gain}
            found |= {f"{number} {name}": gradient(value).clone() for name, value in held.items()}
        if reference:
            plain_convs = [conv for layer in dense for parts in layer.values() for conv in parts]
            return found, [
                {name: gradient(p) for name, p in conv.named_parameters()}
                for conv in plain_convs
                if conv is not None
            ]
        of_experts: list[Any] = []
        for conv in convs:
            of_experts += as_convs(conv.experts, EXPERTS)
            of_experts += as_convs(conv.shared_expert, 1) if conv.shared_expert is not None else []
        return found, of_experts

    ours, theirs = run(reference=False), run(reference=True)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


class Two(nn.Module):
    """Two layers, as in PyG's tutorial of to_hetero."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.conv1, self.conv2 = make(), make()

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        h: Tensor = self.conv2(self.conv1(x, edge_index), edge_index)
        return h


def in_hetero_conv(make: Callable[[], nn.Module]) -> HeteroConv:
    return HeteroConv({relation: make() for relation in RELATIONS})


def by_to_hetero(make: Callable[[], nn.Module]) -> nn.Module:
    return to_hetero(Two(make), METADATA)


WAYS = [in_hetero_conv, by_to_hetero]
OPTIONS: list[tuple[Any, dict[str, Any]]] = [
    ("sage", {"k": 2}),
    ("sage", {"start": "copies"}),
    ("sage", {"start": "plain", "router": "expert_choice"}),
    ("graph", {"router": "attention_vote", "aggr": "mean"}),
    ("gat", {"router": "multi_centroid", "heads": 2, "concat": False, "add_self_loops": False}),
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("conv", "options"), OPTIONS, ids=str)
def test_relations_equal_their_experts_masked(
    way: Callable[..., Any], conv: str, options: dict[str, Any]
) -> None:
    assert_equals_reference(filled_in(way(partial(moe, conv, **options))))


def test_a_decision_made_elsewhere_is_passed_by_relation() -> None:
    """As HeteroConv passes every argument: by its name and ``_dict``."""
    x_dict, edge_index_dict = graph()
    model = filled_in(in_hetero_conv(moe))
    with record_routing(model) as routings:
        before = model(x_dict, edge_index_dict)
    replayed = dict(zip(RELATIONS, routings, strict=True))
    again = model(x_dict, edge_index_dict, routing_dict=replayed)
    torch.testing.assert_close(again, before)
    for relation in RELATIONS:
        first = F.one_hot(torch.zeros(COUNTS[relation[-1]], dtype=torch.long), EXPERTS)
        replayed[relation] = routing_of(first.double())
    found = model(x_dict, edge_index_dict, routing_dict=replayed)
    (convs,) = by_relation(model)
    dense = {relation: as_dense(conv) for relation, conv in convs.items()}
    torch.testing.assert_close(found, expected(convs, dense, x_dict, replayed))


def test_a_whole_model_is_refused_by_to_hetero() -> None:
    model = GNNMoE(4, 8, 3, num_experts=2)
    with pytest.raises(
        ValueError, match=r"^x: got Proxy, .* a MoEConv for each relation into PyG's HeteroConv"
    ):
        to_hetero(model, METADATA)


class _Lazy(nn.Module):
    """Two lazy layers of a kind, as PyG's examples of typed graphs have them."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.conv1 = make()
        self.conv2 = make()

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        h: Tensor = self.conv1(x, edge_index).relu()
        return self.conv2(h, edge_index)


@pytest.mark.parametrize("kind", ["HeteroConv", "to_hetero"])
@pytest.mark.parametrize("conv", [SAGEConv, GATConv])
def test_with_the_same_seed_lazy_layers_start_as_lazy_convs(conv: Any, kind: str) -> None:
    x_dict, edge_index_dict = graph()
    x_dict = {name: x.float() for name, x in x_dict.items()}
    options: dict[str, Any] = {"add_self_loops": False} if conv is GATConv else {}
    outputs: list[Nodes] = []
    for make in (conv, partial(MoEConv, conv, num_experts=EXPERTS)):
        torch.manual_seed(0)
        model: Any
        if kind == "HeteroConv":
            convs = {relation: make((-1, -1), OUT, **options) for relation in RELATIONS}
            model = HeteroConv(convs)
        else:
            model = to_hetero(_Lazy(partial(make, (-1, -1), OUT, **options)), METADATA)
        with torch.no_grad():
            model(x_dict, edge_index_dict)
            outputs.append(model.eval()(x_dict, edge_index_dict))
    dense, found = outputs
    for name, y in dense.items():
        torch.testing.assert_close(found[name], y)
