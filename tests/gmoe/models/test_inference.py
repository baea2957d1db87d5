"""Layer-wise inference of graphs in memory and in mapped files.

Here is what the composer does not draw, and what is refused by name.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch_geometric.data import Data

from gmoe import GNNMoE, Routing, TokenChoice, neighbor_loader
from tests.helpers.conv_cases import GatedSum
from tests.helpers.equal import assert_same
from tests.helpers.mapped import create_mapped, map_to
from tests.helpers.masked import csr
from tests.helpers.sampled import graph

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
ADJ_T = csr(DATA.edge_index.unique(dim=1), (NODES, NODES))


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
    loader = neighbor_loader(DATA, [2, 2, 2], batch_size=7)
    found, again = model.inference(loader, return_routing=True)
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
def mapped(tmp_path: Path) -> Data:
    """In files, features in half precision."""
    return map_to(tmp_path / "graph", DATA, half=True)


@pytest.mark.parametrize("start", ["shared", "copies"])
@pytest.mark.parametrize("shared_router", [False, True])
@pytest.mark.parametrize("conv", ["gcn", "gat"])
def test_it_equals_the_forward_on_the_whole_graph(
    mapped: Data, tmp_path: Path, shared_router: bool, start: str, conv: str
) -> None:
    """Whatever the size of the parts; a mapped ``out`` is a file of the logits."""
    options = {"router_input": ("node", "neighbors", "degree"), "start": start, "conv": conv}
    model = trained(k=2, shared_router=shared_router, **options)
    expected = model(DATA.x, DATA.edge_index)
    for batch_size in (7, NODES):
        out = torch.empty(NODES, OUT).double()
        assert model.inference(mapped, batch_size=batch_size, out=out) is out
        assert_same(out, expected)
    assert_same(model.inference(mapped, batch_size=7), expected)
    loader = neighbor_loader(mapped, [2, 2], batch_size=9)
    in_file = create_mapped(tmp_path / "logits.npy", (NODES, OUT))
    model.inference(loader, out=in_file)
    assert np.array_equal(np.load(tmp_path / "logits.npy"), expected.detach().float().numpy())


@pytest.mark.parametrize("name", ["edge_weight", "edge_attr"])
def test_edge_arguments_stay_in_their_files(tmp_path: Path, name: str) -> None:
    """GCN's degrees are sums of weights in the whole graph; edges in no order are sorted."""
    data = DATA.clone()
    shape = (data.num_edges,) if name == "edge_weight" else (data.num_edges, 3)
    data[name] = torch.rand(shape, dtype=torch.float64)
    torch.manual_seed(0)
    options = {"conv": "gcn"} if name == "edge_weight" else {"conv": "gat", "edge_dim": 3}
    model = GNNMoE(4, 8, OUT, num_layers=3, **options).double().eval()
    expected = model(data.x, data.edge_index, **{name: data[name]})
    for given in (data, map_to(tmp_path, data)):
        for out in (None, torch.empty(NODES, OUT).double()):
            assert_same(model.inference(given, batch_size=7, out=out), expected)


def test_out_of_edges_by_source_and_of_no_nodes() -> None:
    model = trained(flow="target_to_source")
    out = torch.empty(NODES, OUT).double()
    assert_same(model.inference(DATA, out=out, batch_size=7), model(DATA.x, DATA.edge_index))
    empty = Data(DATA.x[:0], DATA.edge_index[:, :0])
    assert model.inference(empty, out=out[:0]).shape == (0, OUT)


def test_an_error_leaves_no_file(
    mapped: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden features are in a file without a name, whose content goes with the tensor."""
    model = trained()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "hidden"))
    (tmp_path / "hidden").mkdir()
    found: list[list[Path]] = []

    def fail(*_: Any) -> None:
        found.append(list((tmp_path / "hidden").iterdir()))
        raise KeyboardInterrupt

    model.convs[2].register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model.inference(mapped, out=torch.empty(NODES, OUT).double())
    assert found == [[]]


@pytest.mark.skipif(sys.platform != "linux", reason="limits anonymous memory alone")
@pytest.mark.parametrize("conv", ["gcn", pytest.param("gat", marks=pytest.mark.slow)])
def test_a_mapped_graph_is_not_read_into_memory(tmp_path: Path, conv: str) -> None:
    """Features of 96 MB, edges of 8 and hidden features of 15, in 64 MB."""
    nodes = 60_000
    x = create_mapped(tmp_path / "x.npy", (nodes, 400))
    x[:] = torch.randn(nodes, 1)
    edge_index = torch.randint(nodes, (2, 500_000))
    edge_index[1] = edge_index[1].sort().values
    np.save(tmp_path / "edge_index.npy", edge_index.numpy())
    command = [sys.executable, "-m", "tests.helpers.bounded", str(tmp_path), conv, "64"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("conv", ["gcn", "gat", ["sage", "le"]], ids=str)
def test_on_a_gpu_with_the_graph_in_main_memory_or_in_files(mapped: Data, conv: Any) -> None:
    model = trained(conv=conv, num_experts=None if isinstance(conv, list) else 3)
    expected = model(DATA.x, DATA.edge_index)
    assert_same(model.cuda().inference(DATA, batch_size=7), expected)
    out = torch.empty(NODES, OUT).double()
    assert_same(model.inference(mapped, batch_size=7, out=out), expected)


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
    ],
)
def test_what_needs_all_nodes_is_refused_with_out(options: dict[str, Any], message: str) -> None:
    model = GNNMoE(4, 8, OUT, num_experts=3, **options).double().eval()
    with pytest.raises(ValueError, match=message):
        model.inference(DATA, out=torch.empty(NODES, OUT))


def test_arguments_that_do_not_fit() -> None:
    model, out = GNNMoE(4, 8, OUT).double().eval(), torch.empty(NODES, OUT)
    calls: list[tuple[GNNMoE, Any, dict[str, Any], str]] = [
        (model, DATA, {"batch_size": 0}, "batch_size: got 0"),
        (model, Data(edge_index=DATA.edge_index, num_nodes=NODES), {}, "loader: got a Data"),
        (model, Data(DATA.x), {}, "loader: got neither"),
        (model, Data(DATA.x, DATA.edge_index, adj_t=ADJ_T), {}, "loader: got edge_index and adj_t"),
        (model, DATA.x, {"device": DATA.edge_index}, "loader: got one over Tensor"),
        (model, DATA, {"out": out[:, 1:]}, rf"out: got .*, expected .* shape \({NODES}, {OUT}\)"),
        (model, DATA, {"out": out.long()}, "out: got .* torch.int64, expected floating-point"),
        (model, DATA, {"out": "logits.npy"}, "out: got"),
        (model, DATA, {"out": out, "return_routing": True}, "return_routing: got True"),
        (GNNMoE(3, 8, OUT).double().eval(), DATA, {"out": out}, "x: got"),
        (GNNMoE(4, 8, OUT).eval(), DATA, {}, "x: got .*float64"),
        (GNNMoE(4, 8, OUT).train(), DATA, {"out": out}, "model: got one in training mode"),
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
