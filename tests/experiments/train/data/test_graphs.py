"""From a graph, of one type or several, to batches: who counts, and what edges the convs get.

The ROC curve's area.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning_fabric import Fabric
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch_geometric.data import HeteroData
from torch_geometric.utils import add_self_loops

from experiments.train.build import build_model
from experiments.train.config import TypedConfig
from experiments.train.data.graphs import MULTIPLYING, TwoClassAUROC, directed
from experiments.train.data.named import load_graph
from experiments.train.data.task import GraphData, Split, Task
from experiments.train.training import set_up
from gmoe.conv.kinds import KINDS, factory_of
from tests.helpers.made_graph import (
    NODES,
    PARTS,
    double,
    logits_of,
    make_config,
    make_graph,
    make_split,
    make_task,
    model_of,
)
from tests.helpers.ogb_data import write_nodes


def counted(task: Task, part: Split, batch_size: int = 7, seed: int | None = None) -> list[int]:
    """The nodes that count, in order; checks that their targets are their own."""
    assert task.graph is not None
    nodes = []
    for batch in task.loader(part, batch_size, seed):
        ids = batch.counted(batch.inputs[0])[:, 0].long()
        assert torch.equal(batch.target, task.graph.y[ids])
        nodes += ids.tolist()
    return nodes


@pytest.mark.parametrize("sampling", ["full", "neighbor"])
@pytest.mark.parametrize("binary", [False, True])
def test_each_seed_counts_once_and_no_other_node(sampling: Any, binary: bool) -> None:
    task = make_task(make_config(sampling=sampling), make_graph(binary=binary))
    for part in PARTS:
        for batch_size in (1, 7, 1000):
            for seed in (None, 4):
                assert (
                    sorted(counted(task, part, batch_size, seed))
                    == make_split()[part].sort().values.tolist()
                )


def test_shuffling_follows_the_seed() -> None:
    task = make_task(make_config(sampling="neighbor"))

    def epoch(seed: int | None) -> list[list[list[float]]]:
        torch.manual_seed(0)
        return [
            part.tolist() for batch in task.loader("train", 7, seed) for part in batch.inputs[:2]
        ]

    assert epoch(1) == epoch(1) != epoch(2)
    assert counted(task, "train", seed=1) != counted(task, "train", seed=2)
    assert counted(task, "train") == counted(task, "train")


@pytest.mark.parametrize(
    ("conv", "changes"),
    [
        ("sage", {}),
        ("sage", {"jk": "cat", "undirected": True}),
        ("graph", {}),
        ("gat", {"undirected": True}),
    ],
)
def test_all_neighbors_give_the_logits_of_the_whole_graph(
    conv: str, changes: dict[str, Any]
) -> None:
    """Of convs that look at no degrees; edge weights (of graph) come along."""
    graph = make_graph(weights=conv == "graph")
    config = make_config(
        router="dense",
        conv=(conv,),
        sampling="neighbor",
        fanout=(-1, -1),
        **changes,
    )
    task = make_task(config, graph)
    full, model = logits_of(config, task), model_of(config, task)
    sizes = []
    for batch in task.loader("train", 7, 1):
        ids = batch.counted(batch.inputs[0])[:, 0].long()
        with torch.no_grad():
            torch.testing.assert_close(batch.counted(model(*map(double, batch.inputs))), full[ids])
        assert len(batch.inputs) == 8  # the layers are trimmed
        sizes.append(len(batch.inputs[0]))
    assert min(sizes) < NODES
    # Than there are layers: not trimmed
    deeper = make_task(replace(config, fanout=(2, 2, 2)), graph)
    assert {len(batch.inputs) for batch in deeper.loader("train", 7, 1)} == {
        3 if conv == "graph" else 2
    }


@pytest.mark.filterwarnings("ignore:edge_weight. made has some")
@pytest.mark.parametrize(
    ("conv", "changes"),
    [
        (("gcn",), {"start": "shared", "undirected": True}),
        (("gatv2",), {}),
        (
            ("graph", "sage"),
            {"shared_router": True, "router_input": ("node", "neighbors", "degree")},
        ),
        (("gcn", "graph"), {"experts": 4, "jk": "last"}),
    ],
)
@pytest.mark.parametrize("router", ["expert_choice", "dense"])
def test_layerwise_evaluation_equals_full(
    conv: tuple[str, ...], changes: dict[str, Any], router: Any
) -> None:
    graph = make_graph(weights=conv != ("gatv2",))
    graph.data.x[:, 0] /= NODES
    config = make_config(conv=conv, router=router, **changes)
    full, layerwise = (
        make_task(replace(config, evaluation=how), graph) for how in ("full", "layerwise")
    )
    with set_up(
        Fabric(accelerator="cpu", devices=1), model_of(config, full).float(), config, full
    ) as training:
        by_pieces = replace(
            training, config=replace(config, evaluation="layerwise"), task=layerwise
        )
        for part in PARTS[1:]:
            two, pieces = by_pieces.evaluate(part)
            one, routings = training.evaluate(part)
            assert one == two
            assert [r.token.tolist() for r in routings[0]] == [r.token.tolist() for r in pieces[0]]


MIXED: Any = "bf16-mixed"


def adjacency_of(task: Task) -> Tensor:
    adj: Tensor = next(iter(task.loader("val", 1, None))).inputs[1]
    return adj


@pytest.mark.filterwarnings("ignore:edge_weight. made has some")
@pytest.mark.parametrize(
    ("conv", "changes"),
    [
        (("gcn",), {}),
        (("graph",), {}),
        (("gin",), {}),
        (("gin", "sage"), {}),
        (("gcn", "graph"), {"start": "shared", "shared_router": True}),
    ],
)
@pytest.mark.parametrize(("router", "undirected"), [("dense", True), ("token_choice", False)])
@pytest.mark.parametrize("weights", [False, True])
def test_a_matrix_gives_the_logits_of_edge_index(
    conv: tuple[str, ...], changes: dict[str, Any], router: str, undirected: bool, weights: bool
) -> None:
    config = make_config(
        conv=conv,
        router=router,
        router_input=("node", "neighbors", "degree"),
        undirected=undirected,
        **changes,
    )
    graph = make_graph(weights, simple=True)
    # in mixed precision there is no matrix
    matrix, plain = (make_task(one, graph) for one in (config, replace(config, precision=MIXED)))
    assert adjacency_of(matrix).is_sparse_csr
    assert not adjacency_of(plain).is_sparse_csr
    torch.testing.assert_close(logits_of(config, matrix), logits_of(config, plain))


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        (
            {"conv": ("gcn",)},
            "self-loops",
        ),  # PyG adds one to each node of a matrix, of edges only where there is none
        ({"conv": ("sage", "gcn")}, "self-loops"),
        ({}, "parallel"),
        ({"precision": "bf16-mixed"}, "simple"),
        ({"conv": ("gcn", "sage")}, "weights"),
        ({"conv": ("gat",)}, "simple"),
        ({"sampling": "neighbor"}, "simple"),
        ({"model": "mine:Net"}, "simple"),
    ],
)
def test_where_there_is_no_matrix(changes: dict[str, Any], kind: str) -> None:
    graph = make_graph(weights=kind == "weights", simple=kind != "parallel")
    if kind == "self-loops":
        graph.data.edge_index = add_self_loops(graph.data.edge_index)[0]
    assert torch.equal(
        adjacency_of(make_task(make_config(**changes), graph)), graph.data.edge_index
    )


@pytest.mark.parametrize("router", ["dense", "expert_choice"])
@pytest.mark.parametrize(
    ("conv", "takes"),
    [
        (("gcn",), True),
        (("graph",), True),
        (("sage",), False),
        (("gat",), False),
        (("gcn", "sage"), True),
    ],
)
def test_weights_reach_the_convs_that_take_them(conv: Any, takes: bool, router: Any) -> None:
    config = make_config(conv=conv, router=router)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        weighted = make_task(config, make_graph(weights=True, simple=True))
    bare = make_task(config, make_graph(simple=True))
    told = [str(w.message) for w in caught if "edge_weight" in str(w.message)]
    assert told == ([] if takes else [f"edge_weight: made has some, {conv[0]} takes none"])
    assert torch.equal(logits_of(config, weighted), logits_of(config, bare)) != takes


def test_directions() -> None:
    graph = make_graph(weights=True)
    assert directed(graph, undirected=False) is graph
    before = graph.data.edge_index.clone()
    data = directed(graph, undirected=True).data
    assert torch.equal(graph.data.edge_index, before)  # the next run begins with the same
    pairs = list(map(tuple, data.edge_index.T.tolist()))
    given = set(map(tuple, before.T.tolist()))
    assert len(pairs) == len(set(pairs)) == len(data.edge_weight)
    assert set(pairs) == given | {(b, a) for a, b in given}
    # of both directions, so that the mean of them is the same
    torch.testing.assert_close(data.edge_weight, 1 + data.edge_index.sum(dim=0) / NODES)


scores = st.tuples(
    st.integers(0, 1),
    st.floats(-1e3, 1e3, width=32),
    st.sampled_from([-60.0, 0.0, 0.25, 50.0, 2e4]),
)


@settings(deadline=None, max_examples=60)
@given(st.lists(scores, min_size=4, max_size=40), st.integers(1, 39))
def test_roc_auc_is_exact(rows: list[tuple[int, float, float]], cut: int) -> None:
    target = torch.tensor([0, 1, *(label for label, _, _ in rows)])
    logits = torch.tensor([[0.0, 0.5], [0.5, 0.0], *([low, high] for _, low, high in rows)])
    metric = TwoClassAUROC()
    for part in (slice(0, cut), slice(cut, None)):
        if len(target[part]):
            metric.update(logits[part], target[part])
    score = logits.double()[:, 1] - logits.double()[:, 0]
    assert float(metric.compute()) == pytest.approx(roc_auc_score(target, score), abs=1e-6)
    metric.update(torch.tensor([[0.0, torch.nan]]), target[:1])
    assert metric.compute().isnan()


@pytest.fixture(scope="module")
def mag(tmp_path_factory: pytest.TempPathFactory) -> GraphData:
    """Papers whose first feature is their number."""
    root = tmp_path_factory.mktemp("ogb")
    write_nodes("ogbn-mag", root, nodes=130)
    graph = load_graph("ogbn-mag", root, offline=True)
    graph.data["paper"].x[:, 0] = torch.arange(130)
    return graph


def mag_config(data_root: Path = Path("data"), **changes: Any) -> TypedConfig:
    return TypedConfig(dataset="ogbn-mag", data_root=data_root, hidden=8, experts=2, **changes)


def mag_task(mag: GraphData, **changes: Any) -> Task:
    return make_task(mag_config(**changes), mag)


@pytest.mark.parametrize("router", ["dense", "token_choice"])
def test_each_paper_counts_once(mag: GraphData, router: Any) -> None:
    task = mag_task(mag, router=router)
    model = build_model(mag_config(router=router), task).eval()
    for part in PARTS:
        (batch,) = task.loader(part, 16, 2)
        nodes = batch.counted(batch.inputs[0]["paper"])[:, 0].long()
        assert nodes.tolist() == mag.splits(0)[part].tolist()
        assert torch.equal(batch.target, mag.data["paper"].y[nodes])
        assert batch.counted(model(*batch.inputs)).shape == (len(nodes), mag.num_outputs)


@pytest.mark.parametrize("undirected", [True, False])
def test_relations_have_reverses(mag: GraphData, undirected: bool) -> None:
    graph = mag_task(mag, undirected=undirected).graph
    assert isinstance(graph, HeteroData)
    assert len(graph.edge_types) == (7 if undirected else 4)
    cites = set(map(tuple, graph["paper", "cites", "paper"].edge_index.T.tolist()))
    assert (cites == {(b, a) for a, b in cites}) == undirected
    assert len(mag.data.edge_types) == 4


@pytest.mark.parametrize("cls", [cls for cls, kind in KINDS.items() if kind.stack])
def test_convs_get_a_matrix_where_pyg_multiplies_by_it(cls: Any) -> None:
    assert factory_of(cls)(4, 4).fuse == (cls in MULTIPLYING)
