"""MoEConv on graphs of several node types: in HeteroConv, and made of modules by to_hetero."""

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
from tests.contract import opened
from tests.helpers.masked import features, random_graph, routing_of

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


def expected(convs: Convs, h: Nodes, routings: Mapping[Any, Routing] | None = None) -> Nodes:
    """The sum over relations of what their layers give; ``tests/compose`` defines a layer.

    Args:
        convs: the layers by relation.
        h: features by node type.
        routings: decisions by relation, in place of the layers' own.
    """
    out: Nodes = {}
    for relation, conv in convs.items():
        source, _, destination = relation
        given = {} if routings is None else {"routing": routings[relation]}
        y = conv((h[source], h[destination]), graph()[1][relation], **given)
        out[destination] = out[destination] + y if destination in out else y
    return out


def by_relation(model: nn.Module) -> list[Convs]:
    """The layers of a model by relation: of PyG's HeteroConv, or of what to_hetero made."""
    if isinstance(model, HeteroConv):
        held: Any = model.convs
        return [{relation: held[relation] for relation in RELATIONS}]
    layers: Any = [model.conv1, model.conv2]
    return [{relation: layer["__".join(relation)] for relation in RELATIONS} for layer in layers]


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


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", [{"k": 2}, {"router": "expert_choice"}], ids=str)
def test_a_type_gets_the_sum_of_its_relations(
    way: Callable[..., Any], options: dict[str, Any]
) -> None:
    model = filled_in(way(partial(moe, **options))).eval()
    h, edge_index_dict = graph()
    found = model(h, edge_index_dict)
    for convs in by_relation(model):
        h = expected(convs, h)
    torch.testing.assert_close(found, h)


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
    torch.testing.assert_close(found, expected(convs, x_dict, replayed))


def test_a_whole_model_is_refused_by_to_hetero() -> None:
    model = GNNMoE(4, 8, 3, num_experts=2)
    with pytest.raises(
        ValueError, match=r"^x: got Proxy, .* a MoEConv for each relation into PyG's HeteroConv"
    ):
        to_hetero(model, METADATA)


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
            model = by_to_hetero(partial(make, (-1, -1), OUT, **options))
        with torch.no_grad():
            model(x_dict, edge_index_dict)
            outputs.append(model.eval()(x_dict, edge_index_dict))
    dense, found = outputs
    for name, y in dense.items():
        torch.testing.assert_close(found[name], y)
