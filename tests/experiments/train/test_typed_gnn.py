"""A GNN of HeteroConv layers on the layout of ogbn-mag: papers have features and labels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch_geometric.data import HeteroData
from torch_geometric.nn import HeteroConv, SAGEConv
from torch_geometric.transforms import ToUndirected

from experiments.train.typed_gnn import TypedGNN, relations_by_layer
from gmoe import MoEConv, aux_loss, record_routing
from tests.helpers.masked import features, random_graph

COUNTS = {"paper": 12, "author": 9, "institution": 4, "field": 5}
CITES = ("paper", "cites", "paper")
WRITES = ("author", "writes", "paper")
AT = ("author", "at", "institution")
HAS = ("paper", "has", "field")
IN, HIDDEN, OUT = 4, 6, 3


def graph(is_undirected: bool = True) -> HeteroData:
    data = HeteroData()
    for name, count in COUNTS.items():
        data[name].num_nodes = count
    data["paper"].x = features(COUNTS["paper"], IN).float()
    for seed, relation in enumerate((CITES, WRITES, AT, HAS)):
        sizes = COUNTS[relation[0]], COUNTS[relation[-1]]
        data[relation].edge_index = random_graph(*sizes, 20, seed=seed)
    return ToUndirected(merge=False)(data) if is_undirected else data


DATA = graph()


def model(data: HeteroData = DATA, **changes: Any) -> TypedGNN:
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "router": "token_choice",
        "num_experts": 3,
        "every": 1,
        "dropout": 0.0,
    }
    options |= changes
    if options["router"] is None:
        del options["num_experts"]
    num_layers = options.pop("num_layers", 2)
    return TypedGNN(data, "paper", HIDDEN, OUT, num_layers, **options)


def call(gnn: TypedGNN, data: HeteroData = DATA) -> torch.Tensor:
    logits: torch.Tensor = gnn(data.collect("x"), data.edge_index_dict)
    return logits


@pytest.mark.parametrize(
    ("changes", "moe_layers"),
    [({}, [0]), ({"num_layers": 5, "every": 2}, [1, 3]), ({"router": None}, [])],
    ids=str,
)
def test_which_layers_hold_experts(changes: dict[str, Any], moe_layers: list[int]) -> None:
    gnn = model(**changes)
    kinds = [{type(conv) for conv in layer.convs.values()} for layer in gnn.convs]  # type: ignore
    is_moe = [number in moe_layers for number in range(len(kinds))]
    assert kinds == [{MoEConv if has_experts else SAGEConv} for has_experts in is_moe]
    assert call(gnn).shape == (COUNTS["paper"], OUT)


def test_with_one_seed_it_starts_as_the_dense_model() -> None:
    moe, dense = (model(router=router) for router in ("token_choice", None))
    torch.testing.assert_close(call(moe), call(dense))


def test_forward_by_hand() -> None:
    """Conv and activation; the last layer is dense. Embeddings are features."""
    gnn = model(num_layers=3).eval()
    h: Any = {"paper": DATA["paper"].x}
    h |= {name: embedding.weight for name, embedding in gnn.embeddings.items()}
    *hidden, last = gnn.convs
    assert isinstance(last, HeteroConv)
    for conv in hidden:
        h = h | {name: y.relu() for name, y in conv(h, DATA.edge_index_dict).items()}
    torch.testing.assert_close(call(gnn), last(h, DATA.edge_index_dict)["paper"])
    assert set(gnn.embeddings.keys()) == {"author", "institution", "field"}


def test_every_parameter_gets_a_gradient() -> None:
    """Those that the target's logits do not depend on are not there."""
    gnn = model(num_layers=3)
    with record_routing(gnn) as routings:
        logits = call(gnn)
    (logits.square().sum() + aux_loss(routings)).backward()
    assert [name for name, p in gnn.named_parameters() if p.grad is None] == []


def test_layers_run_what_the_logits_depend_on() -> None:
    """A type in which no relation ends stays as it is."""
    assert relations_by_layer([CITES, WRITES, AT, HAS], "paper", 2) == [[CITES, WRITES]] * 2
    gnn = model(graph(is_undirected=False), num_layers=3)
    assert set(gnn.embeddings.keys()) == {"author"}
    assert call(gnn, graph(is_undirected=False)).isfinite().all()
    back = [("paper", "by", "author"), WRITES]
    assert relations_by_layer([*back, AT], "paper", 2) == [back, [WRITES]]


def test_labels_without_edges_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^data: got no edges into 'paper', .* expected some"):
        relations_by_layer([AT, HAS], "paper", 2)
