"""Kinds of convs: names, factories, refusals, what is known of PyG's convs, and how it is found out who is local."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_geometric import nn as pyg
from torch_geometric.nn import MessagePassing
from torch_geometric.utils import degree

from gmoe import FilterConv, GNNMoE, MoEConv
from gmoe.conv.aggregate import GCNExperts
from gmoe.conv.base import StackedExperts
from gmoe.conv.kinds import CONVS, LOCAL, Trial, factory_of
from gmoe.conv.separate import SeparateExperts
from tests.gmoe.conv.masked import GRAPHS, assert_equals_masked, features, random_graph

WIDTH, NODES, EDGES = 8, 11, 40
SHARED: Any = pyg.GINConv(nn.Linear(4, 4))

FACTORIES: dict[str, Any] = {
    "edge": lambda i, o: pyg.EdgeConv(nn.Linear(2 * i, o)),
    "lg": lambda *_: pyg.LGConv(),
    "agnn": lambda *_: pyg.AGNNConv(),
    "appnp": lambda *_: pyg.APPNP(K=2, alpha=0.1),
    "gatedgraph": lambda _, o: pyg.GatedGraphConv(o, num_layers=2),
    "nn": lambda i, o: pyg.NNConv(i, o, nn.Linear(WIDTH, i * o)),
}
"""Convs that are not built as ``(in, out)``."""

OPTIONS: dict[str, dict[str, Any]] = {
    "cheb": {"K": 3},
    "ssg": {"alpha": 0.1},
    "gcn": {"improved": True},
    "pna": {"aggregators": ["mean", "max"], "scalers": ["amplification"], "deg": torch.tensor([1, 3, 4, 2])},
    "arma": {"num_stacks": 2, "num_layers": 2},
    **{name: {"heads": 2} for name in ("gat", "gatv2", "transformer")},
    "general": {"attention": True},
    "gen": {"norm": None},
}

_NOT_LOCAL = "agnn appnp arma cheb edge eg gatedgraph gen lg mixhop nn sg ssg supergat tag"
"""Some of them are (edge, gen, nn, ...), but not registered as such."""

LOCAL_BY_NAME = {name: cls for name, cls in CONVS.items() if cls in LOCAL}
SWEEP = ["gcn", *LOCAL_BY_NAME, *_NOT_LOCAL.split()]


@pytest.mark.filterwarnings("ignore:.*runs on the whole graph")
@pytest.mark.parametrize("name", SWEEP)
def test_all_convs_equal_masked(name: str) -> None:
    torch.manual_seed(0)
    kind = FACTORIES.get(name, name)
    layer = MoEConv(kind, WIDTH, WIDTH, num_experts=3, k=2, **OPTIONS.get(name, {}), shared_expert=False).double()
    layer.train(name != "supergat")  # which keeps what it was called with, in training
    edge_index, x = random_graph(NODES, NODES, EDGES), features(NODES, WIDTH)
    args: dict[str, Any] = {}
    if "edge_weight" in layer.edge_names and name != "appnp":
        args["edge_weight"] = features(EDGES, seed=1).abs() + 0.1
    if name in ("gine", "nn"):
        args["edge_attr"] = features(EDGES, WIDTH, seed=1)
    assert_equals_masked(layer, x, edge_index, **args)
    if isinstance(layer.experts, SeparateExperts):
        assert layer.experts.is_local == [name in LOCAL_BY_NAME] * 3
    else:
        assert isinstance(layer.experts, StackedExperts)


def test_the_sweep_covers_what_can_be_built() -> None:
    """A conv of another PyG version that is built and called as (in, out), (x, edge_index) belongs into the sweep."""
    left_out = []
    for name in sorted(CONVS.keys() - set(SWEEP) - {"meshcnn"}):  # which needs a regular graph
        try:
            factory_of(name)(WIDTH, WIDTH)(features(NODES, WIDTH).float(), random_graph(NODES, NODES, EDGES))
        except Exception:
            continue
        left_out.append(name)
    assert left_out == ["hypergraph"]  # which calls the edges otherwise
    assert set(LOCAL_BY_NAME.values()) == set(LOCAL)
    assert all(name == name.lower() and not name.endswith("conv") for name in CONVS)
    assert all(inspect.isclass(cls) and issubclass(cls, MessagePassing) for cls in LOCAL)


@pytest.mark.parametrize(
    ("text", "cls"),
    [
        *(("GCNConv", pyg.GCNConv), ("gat_v2", pyg.GATv2Conv), ("SAGE", pyg.SAGEConv), ("lowpass_", FilterConv)),
        *(("res_gated_graph_conv", pyg.ResGatedGraphConv), ("cg", pyg.CGConv), ("simple", pyg.SimpleConv)),
    ],
)
def test_names(text: str, cls: type) -> None:
    layer = MoEConv(text, 4, 4, num_experts=2, shared_expert=False)
    assert type(layer.expert(0)) is cls
    assert layer(torch.randn(5, 4), random_graph(5, 5, 9)).shape == (5, 4)


@pytest.mark.parametrize(("text", "nearest"), [("gcnn", "gcn"), ("gatt", "gat"), ("sagee", "sage")])
def test_an_unknown_name_suggests_the_nearest(text: str, nearest: str) -> None:
    builds: list[Any] = [partial(MoEConv, text), partial(MoEConv, ["gcn", text]), partial(GNNMoE, 4, conv=text)]
    for build in builds:
        with pytest.raises(ValueError, match=f"conv: got {text!r}, .*did you mean {nearest!r}"):
            build(4, 4)


@pytest.mark.parametrize("cls", [pyg.GINConv, pyg.GINEConv])
def test_gin_gets_the_mlp_of_pygs_model(cls: Any) -> None:
    conv: Any = factory_of(cls)(4, 6, train_eps=True)
    assert [tuple(lin.weight.shape) for lin in conv.nn.lins] == [(6, 4), (6, 6)]
    assert conv.eps.requires_grad


NOT_WIDTHS = [pyg.AGNNConv, pyg.APPNP, pyg.GatedGraphConv, pyg.FAConv, pyg.EdgeConv, pyg.DNAConv, "agnn"]
"""``APPNP(16, 8)`` would be 16 steps with a teleport probability of 8."""
OTHER_FORWARD: list[Any] = [
    lambda i, _: pyg.GCN2Conv(i, 0.1),
    lambda i, o: pyg.RGCNConv(i, o, num_relations=2),
    lambda *_: pyg.PointNetConv(),
    pyg.HypergraphConv,
    lambda i, o: pyg.SignedConv(i, o, first_aggr=True),
]
TURNED = partial(pyg.SAGEConv, flow="target_to_source")


@pytest.mark.parametrize(
    ("conv", "kwargs", "message"),
    [
        *((conv, {}, r"conv: got \w+, which is built with") for conv in (*NOT_WIDTHS, ["gcn", pyg.APPNP])),
        *((conv, {}, r"conv: got \w+, whose forward takes") for conv in (*OTHER_FORWARD, ["gcn", *OTHER_FORWARD[:1]])),
        ([lambda i, _: pyg.FiLMConv(i, 8), lambda i, _: pyg.FiLMConv(i, 1)], {}, r"conv: got .* widths \[1, 8\]"),
        (["gcn", partial(pyg.GATConv, heads=2)], {}, r"conv: got .* widths \[8, 16\]"),
        (["sage", TURNED], {}, "conv: got experts of flows"),
        ("gcn", {"shared_expert": TURNED}, "shared_expert: got a conv of flow='target_to_source'"),
        (lambda i, _: pyg.GINConv(nn.Linear(i, 3)), {}, "out_channels: got 8, but <lambda> gives 3"),
        (lambda *_: pyg.APPNP(2, 0.1), {}, "out_channels: got 8, but <lambda> gives 4"),
        ("gat", {"heads": 2, "shared_expert": lambda i, o, **_: pyg.GCNConv(i, o)}, "shared_expert: got 8 columns"),
        ("simple", {}, "out_channels: got 8 for SimpleConv"),
        ("cg", {}, "out_channels: got 8 for CGConv"),
        *((wrong, {}, "conv: got ") for wrong in (None, 3, [], [None, "gcn"])),
        (["gcn", "gat"], {"num_experts": 3}, "conv: got a list of 2 convs"),
        (lambda i, o: nn.Linear(i, o), {}, "conv: got a factory of Linear"),
        (lambda *_: SHARED, {}, "conv: got a factory whose convs share parameters"),
        (lambda *_: pyg.GINConv(SHARED.nn), {}, "conv: got a factory whose convs share parameters"),
        ("gcn", {"hops": 2}, "conv: got GCNConv, which cannot be built as"),
        ("pna", {}, "conv: got PNAConv, which cannot be built as"),
    ],
)
def test_refusals(conv: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoEConv(conv, 4, 8, **{"shared_expert": False, **kwargs})


@pytest.mark.parametrize("value", [6.0, "6", None, (6,), True, 0, -2, (3, 0), (6, 2.0)])
def test_bad_widths(value: Any) -> None:
    with pytest.raises(ValueError, match="in_channels: got "):
        MoEConv("sage", value, 4, shared_expert=False)
    if not isinstance(value, tuple):
        with pytest.raises(ValueError, match="out_channels: got "):
            MoEConv("sage", 4, value, shared_expert=False)


def test_output_widths() -> None:
    assert Trial(FACTORIES["nn"](WIDTH, 5), WIDTH).width is None  # asks for edge features
    for heads, concat, width in ((3, True, 15), (3, False, 5), (1, True, 5)):
        assert Trial(pyg.GATConv(4, 5, heads=heads, concat=concat), 4).width == width
    assert Trial(pyg.GINConv(nn.Linear(4, 7)), 4).width == 7
    assert Trial(pyg.SuperGATConv(4, 5, heads=2), 4).width == 10


def test_how_many_experts_there_are() -> None:
    layer = MoEConv(["gcn", pyg.GCNConv, "GCNConv"], 4, 4, shared_expert=False)
    assert isinstance(layer.experts, GCNExperts)  # one group
    assert layer.num_experts == 3
    assert MoEConv("gcn", 4, 4, shared_expert=False).num_experts == 8


def spectral(i: int, o: int) -> pyg.SAGEConv:
    conv = pyg.SAGEConv(i, o)
    conv.lin_l = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(i, o))
    return conv


def hooked(i: int, o: int) -> pyg.GCNConv:
    conv = pyg.GCNConv(i, o)
    conv.lin.register_forward_hook(lambda *_: None)
    return conv


def frozen(i: int, o: int) -> pyg.GCNConv:
    conv = pyg.GCNConv(i, o)
    conv.lin.weight.requires_grad_(False)
    return conv


class Own(pyg.GATConv):
    """A subclass may compute something else."""


@pytest.mark.filterwarnings("ignore:.*runs on the whole graph")
@pytest.mark.parametrize("kind", [spectral, hooked, frozen, Own], ids=lambda kind: kind.__name__)
def test_what_a_factory_adds_survives(kind: Any) -> None:
    """Parametrizations, hooks and frozen parameters: stacking would lose them."""
    layer = MoEConv(kind, 4, 4, num_experts=2, shared_expert=False).double()
    assert isinstance(layer.experts, SeparateExperts)
    assert_equals_masked(layer, features(9, 4), random_graph(9, 9, 30))
    assert [p.requires_grad for p in layer.experts.parameters()].count(False) == (2 if kind is frozen else 0)


# who is local


class GatedSum(MessagePassing):
    """Local: a sum over in-edges, gated by both ends."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(aggr="add")
        self.lin = nn.Linear(in_channels, out_channels)
        self.gate = nn.Linear(2 * in_channels, 1)

    def reset_parameters(self) -> None:
        self.lin.reset_parameters()
        self.gate.reset_parameters()

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        out: Tensor = self.propagate(edge_index, x=x)
        return out

    def message(self, x_i: Tensor, x_j: Tensor) -> Tensor:
        return torch.sigmoid(self.gate(torch.cat([x_i, x_j], dim=-1))) * self.lin(x_j)


class SourceDegrees(GatedSum):
    """Divides by the in-degree of the source, as GCN does."""

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return super().forward(x / (1 + degree(edge_index[1], x.size(0), dtype=x.dtype))[:, None], edge_index)


class TwoHops(GatedSum):
    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return super().forward(super().forward(x, edge_index), edge_index)


class CenteredWhereNegative(GatedSum):
    """Local only for positive features."""

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return super().forward(x - x.clamp(max=0).mean(dim=0), edge_index)


@pytest.mark.parametrize("cls", [SourceDegrees, TwoHops, CenteredWhereNegative, pyg.GCNConv])
def test_local_is_refused_where_it_is_not_true(cls: Any) -> None:
    with pytest.raises(ValueError, match=f"local: got True, but {cls.__name__} .*expected None or False"):
        MoEConv(cls, 4, 4, local=True, shared_expert=False)
    assert not Trial(cls(4, 4), 4).is_local


def test_a_conv_of_ones_own_that_is_local_takes_the_local_path() -> None:
    num_nodes, edge_index = GRAPHS["mixed"]
    layer = MoEConv(GatedSum, 4, 4, num_experts=3, k=2, local=True, shared_expert=False).double()
    assert layer.experts.is_local == [True] * 3
    assert_equals_masked(layer, features(num_nodes, 4), edge_index)
    rows: list[tuple[int, int]] = []
    for expert in layer.experts.convs():
        expert.register_forward_hook(lambda _, args, __: rows.append((args[0].size(0), args[1].size(1))))
    layer(features(6, 4), torch.stack([torch.arange(6), torch.arange(6).roll(1)]))
    assert sum(edges for _, edges in rows) == 2 * 6  # K messages an edge


def test_a_conv_that_says_nothing_runs_in_full_with_a_warning() -> None:
    num_nodes, edge_index = GRAPHS["mixed"]
    with pytest.warns(UserWarning, match=r"TwoHops runs on the whole graph.*pass local=True") as caught:
        layer = MoEConv(TwoHops, 4, 4, num_experts=3, k=2).double()
    assert [warning.filename for warning in caught] == [__file__]  # once, and points to the line of the user
    assert_equals_masked(layer, features(num_nodes, 4), edge_index)


def test_local_true_for_a_conv_that_cannot_run_on_the_probe() -> None:
    class Picky(GatedSum):
        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            raise RuntimeError("only on Tuesdays")

    with pytest.raises(ValueError, match="local: got True, but Picky fails on a small random graph: only on Tuesdays"):
        MoEConv(Picky, 4, 4, local=True, shared_expert=False)


def test_trying_a_conv_out_leaves_it_alone_and_draws_nothing() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    gin, gat = pyg.GINConv(network).eval(), pyg.GATConv(4, 4, dropout=0.6)
    before, drawn = {name: value.clone() for name, value in gin.state_dict().items()}, torch.get_rng_state()
    assert (Trial(gin, 4).is_local, Trial(gat, 4).is_local) == (False, True)
    assert (Trial(gin, 4).width, Trial(gat, 4).width) == (4, 4)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert [gin.training, network[2].p, gat.dropout] == [False, 0.5, 0.6]
    assert all(torch.equal(value, before[name]) for name, value in gin.state_dict().items())
    assert Trial(pyg.GATConv(4, 4, edge_dim=3), 4).is_local
    assert Trial(pyg.SAGEConv((3, 5), 4), (3, 5)).is_local
