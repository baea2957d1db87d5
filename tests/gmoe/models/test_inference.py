"""Layer-wise inference, in memory and on disk.

Here is what the composer does not draw, and what is refused by name.
"""

from __future__ import annotations

import copy
import multiprocessing
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch_geometric.data import Data
from torch_geometric.loader import NodeLoader

from gmoe import GNNMoE, NeighborSampler, Routing, StoredGraph, TokenChoice, neighbor_loader
from tests.helpers.conv_cases import GatedSum
from tests.helpers.equal import assert_same
from tests.helpers.sampled import graph
from tests.helpers.stored_files import store

NODES, OUT = 41, 5


class AlongEdges(TokenChoice):
    """A user's router that looks at the neighbors itself."""

    def route(self, x_TD: torch.Tensor, group: Any, edge_index: Any) -> Routing:
        src, dst = edge_index
        return super().route(x_TD.index_add(0, dst, x_TD[src]), group, edge_index)


def made_graph() -> Data:
    """With self-loops, some of them twice, parallel edges, and nodes without in-edges."""
    data = graph(NODES, 150)
    data.edge_index = data.edge_index[:, data.edge_index[1] % 6 != 2]
    loops = torch.tensor([[4, 4, 7, 2], [4, 4, 7, 3]])
    return Data(x=data.x.half().double(), edge_index=torch.cat([data.edge_index, loops], 1))


DATA = made_graph()


def trained(**kwargs: Any) -> GNNMoE:
    """With statistics of a few steps, gains that are not zero, and copies that differ."""
    torch.manual_seed(0)
    model = GNNMoE(4, 8, OUT, **({"num_layers": 3, "num_experts": 3} | kwargs)).double().train()
    with torch.no_grad():
        for _ in range(3):
            model(DATA.x, DATA.edge_index)
        for name, value in model.named_parameters():
            if name.endswith("gain"):
                value.fill_(3.0)
            if name.endswith("_difference"):
                value.normal_(std=0.3)
    return model.eval()


def test_of_a_loader_the_graph_and_the_batch_size_are_taken() -> None:
    model = trained(router="expert_choice")
    before = copy.deepcopy(model.state_dict())
    logits, routings = model(DATA.x, DATA.edge_index, return_routing=True)
    loader = NodeLoader(DATA, NeighborSampler(DATA, [2, 2, 2]), batch_size=7)
    found, again = model.inference(loader, progress_bar=True, return_routing=True)
    assert_same(found, logits)
    for one, other in zip(again, routings, strict=True):
        assert_same(one.to_dense(), other.to_dense())
    assert not found.requires_grad
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert_same(model(DATA.x, DATA.edge_index), logits)


@pytest.mark.parametrize("nodes", [23, 0])
def test_no_edges_and_no_nodes_and_features_that_no_conv_takes(nodes: int) -> None:
    data = Data(
        torch.randn(nodes, 4).double(),
        torch.empty(2, 0, dtype=torch.long),
        edge_attr=torch.empty(0, 2),
    )
    model = GNNMoE(4, 8, OUT, router="expert_choice").double().eval()
    assert_same(model.inference(data, batch_size=7), model(data.x, data.edge_index))


@pytest.mark.filterwarnings("ignore:.*runs on the whole graph")
def test_of_a_users_own_conv_and_router_and_what_looks_further() -> None:
    for options in ({"conv": GatedSum, "local": True}, {"router": AlongEdges}):
        model = trained(**options)
        assert_same(model.inference(DATA, batch_size=5), model(DATA.x, DATA.edge_index))
    for conv, router in (
        (GatedSum, "random"),
        ("tag", "random"),
        ("sg", None),
        ("sg", "random"),
    ):
        with pytest.raises(RuntimeError, match=r"inference: .* looks further than one hop"):
            GNNMoE(4, 8, OUT, conv=conv, router=router).inference(DATA)


@pytest.fixture
def stored(tmp_path: Path) -> StoredGraph:
    """Features in half precision."""
    store(tmp_path / "graph", DATA, half=True)
    return StoredGraph(tmp_path / "graph")


@pytest.mark.parametrize("start", ["shared", "copies"])
@pytest.mark.parametrize("shared_router", [False, True])
def test_it_equals_the_forward_on_the_whole_graph(
    stored: StoredGraph, tmp_path: Path, shared_router: bool, start: str
) -> None:
    """Whatever the size of the parts, and in float32; a run replaces the last one's file."""
    options = {"router_input": ("node", "neighbors", "degree"), "start": start}
    model = trained(k=2, shared_router=shared_router, **options)
    expected, out = model(DATA.x, DATA.edge_index), tmp_path / "out"
    for batch_size in (7, NODES):
        found = model.inference(stored, batch_size=batch_size, folder=out)
        assert_same(found, expected)
        assert [path.name for path in out.iterdir()] == ["logits.npy"]
        assert np.array_equal(np.load(out / "logits.npy"), found.numpy())
    found = model.float().inference(
        neighbor_loader(stored, [2, 2], batch_size=9), folder=str(out), progress_bar=True
    )
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-4)


def infer_in_step(number: int, calls: int, meet: Any, graph_folder: Path, out: Path) -> None:
    """One of several processes: infer as the others do at the same time, and compare."""
    model, graph = trained(num_layers=4), StoredGraph(graph_folder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + number / 10)  # each process has other logits
    expected = model(DATA.x, DATA.edge_index)

    def wait(*_: Any) -> None:
        meet.wait(20)

    for conv in model.convs:
        conv.register_forward_hook(wait)
    for _ in range(calls):
        found = model.inference(graph, batch_size=7, folder=out)
        assert_same(found, expected)
        wait()  # until all of them have put their file in place
        assert_same(found, expected)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts processes by fork")
def test_processes_may_share_a_folder(stored: StoredGraph, tmp_path: Path) -> None:
    """They meet after each part of each layer, so that all have the same layer's files open."""
    fork, out = multiprocessing.get_context("fork"), tmp_path / "out"
    meet = fork.Barrier(5)
    processes = [
        fork.Process(target=infer_in_step, args=(i, 3, meet, stored.folder, out), daemon=True)
        for i in range(meet.parties)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * meet.parties
    assert [path.name for path in out.iterdir()] == ["logits.npy"]


@pytest.mark.parametrize("layer", [0, 2])
def test_an_error_leaves_no_new_file(stored: StoredGraph, tmp_path: Path, layer: int) -> None:
    """The error comes in the second part of a layer, whose file is written in half."""
    model, out, calls = trained(), tmp_path / "out", list[int]()

    def fail(*_: Any) -> None:
        calls.append(layer)
        if len(calls) == 2:
            raise KeyboardInterrupt

    before = model.inference(stored, folder=out)
    expected = before.clone()
    model.convs[layer].register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model.inference(stored, batch_size=7, folder=out)
    assert [path.name for path in out.iterdir()] == ["logits.npy"]
    assert np.array_equal(np.load(out / "logits.npy"), expected.numpy())
    assert_same(before, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("conv", ["gcn", "gat", ["sage", "le"]], ids=str)
def test_on_a_gpu_with_the_graph_in_main_memory_or_on_disk(
    stored: StoredGraph, tmp_path: Path, conv: Any
) -> None:
    model = trained(conv=conv, num_experts=None if isinstance(conv, list) else 3)
    expected = model(DATA.x, DATA.edge_index)
    assert_same(model.cuda().inference(DATA, batch_size=7), expected)
    assert_same(model.inference(stored, batch_size=7, folder=tmp_path / "out"), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router": "expert_choice"}, "router: got ExpertChoice"),
        ({"router": "attention_vote"}, "router: got AttentionVote"),
        (
            {"router": "multi_centroid", "router_kwargs": {"choice": "experts"}},
            "router: got MultiCentroid",
        ),
        ({"norm": "layer_norm"}, "norm: got LayerNorm"),
        ({"jk": "cat"}, "jk: got 'cat'"),
        ({"flow": "target_to_source"}, "flow: got 'target_to_source'"),
    ],
)
def test_what_needs_all_nodes_is_refused_on_disk(
    stored: StoredGraph, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        GNNMoE(4, 8, OUT, num_experts=3, **options).eval().inference(
            stored, folder=tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


def test_arguments_that_do_not_fit(stored: StoredGraph, tmp_path: Path) -> None:
    model, to = GNNMoE(4, 8, OUT).eval(), {"folder": tmp_path / "out"}
    calls: list[tuple[GNNMoE, Any, dict[str, Any], str]] = [
        (model, DATA, {"batch_size": 0}, "batch_size: got 0"),
        (model, Data(edge_index=DATA.edge_index, num_nodes=NODES), {}, "loader: got a Data"),
        (model, DATA.x, {"device": DATA.edge_index}, "loader: got one over Tensor"),
        (model, DATA, to, "folder: got .* for a graph in memory"),
        (model, stored, {}, "folder: got None"),
        (model, stored, {**to, "return_routing": True}, "return_routing: got True"),
        (GNNMoE(3, 8, OUT).eval(), stored, to, "x: got"),
        (GNNMoE(4, 8, OUT).train(), stored, to, "model: got one in training mode"),
        (GNNMoE(4, 8, OUT).eval().bfloat16(), stored, to, r"model: got torch\.bfloat16"),
    ]
    for one, given, options, message in calls:
        with pytest.raises(ValueError, match=message):
            one.inference(given, **options)


@pytest.mark.parametrize("router", [None, "token_choice"])
def test_in_half_precision_layers_without_experts_stay_in_it(router: Any) -> None:
    """Norms have float32 at least, messages the type of the features."""
    torch.manual_seed(0)
    data = Data(x=torch.randn(20, 8).bfloat16(), edge_index=torch.randint(20, (2, 60)))
    model = GNNMoE(8, 16, 3, num_layers=3, conv="gcn", router=router).bfloat16().eval()
    with torch.no_grad():
        expected = model(data.x, data.edge_index)
    found = model.inference(data)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)
