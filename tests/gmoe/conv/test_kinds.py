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

from gmoe import GNNMoE, MoEConv
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
    "gine": lambda i, o: pyg.GINEConv(nn.Linear(i, o)),
    "nn": lambda i, o: pyg.NNConv(i, o, nn.Linear(WIDTH, i * o)),
}
"""Convs that are not built as ``(in, out)``."""

OPTIONS: dict[str, dict[str, Any]] = {
    "cheb": {"K": 3},
    "ssg": {"alpha": 0.1},
    "gcn": {"improved": True},
    "pna": {
        "aggregators": ["mean", "max"],
        "scalers": ["identity", "amplification"],
        "deg": torch.tensor([1, 3, 4, 2]),
    },
    "arma": {"num_stacks": 2, "num_layers": 2},
    **{name: {"heads": 2} for name in ("gat", "gatv2", "transformer")},
    "general": {"attention": True},
    "gen": {"norm": None},
}

NOT_LOCAL = [
    *("agnn", "appnp", "arma", "cheb", "edge", "eg", "gatedgraph", "gen", "lg", "mixhop", "nn", "pna"),
    *("sg", "ssg", "supergat", "tag"),
]
"""Some of them are (edge, gen, nn, ...), but not registered as such."""

LOCAL_BY_NAME = {name: cls for name, cls in CONVS.items() if cls in LOCAL}
SWEEP = ["gcn", *LOCAL_BY_NAME, *NOT_LOCAL]


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
        ("gcn", pyg.GCNConv),
        ("GCNConv", pyg.GCNConv),
        ("gat_v2", pyg.GATv2Conv),
        ("SAGE", pyg.SAGEConv),
        ("res_gated_graph_conv", pyg.ResGatedGraphConv),
        ("cg", pyg.CGConv),
        ("simple", pyg.SimpleConv),
    ],
)
def test_names(text: str, cls: type) -> None:
    layer = MoEConv(text, 4, 4, num_experts=2, shared_expert=False)
    assert type(layer.expert(0)) is cls
    assert layer(torch.randn(5, 4), random_graph(5, 5, 9)).shape == (5, 4)


@pytest.mark.parametrize(
    ("text", "nearest"), [("gcnn", "gcn"), ("gatt", "gat"), ("sagee", "sage"), ("lowpass_", "low_pass")]
)
def test_an_unknown_name_suggests_the_nearest(text: str, nearest: str) -> None:
    if text == "lowpass_":  # spelled otherwise, but known
        assert MoEConv(text, 4, 4, shared_expert=False).expert(0).filter == "low_pass"
        return
    for build in (
        lambda: MoEConv(text, 4, 4, shared_expert=False),
        lambda: MoEConv(["gcn", text], 4, 4, shared_expert=False),
        lambda: GNNMoE(4, 4, 4, conv=text),
    ):
        with pytest.raises(ValueError, match=f"conv: got {text!r}, expected one of 'agnn', .*did you mean {nearest!r}"):
            build()


@pytest.mark.parametrize("cls", [pyg.GINConv, pyg.GINEConv])
def test_gin_gets_the_mlp_of_pygs_model(cls: Any) -> None:
    conv: Any = factory_of(cls)(4, 6, train_eps=True)
    assert [tuple(lin.weight.shape) for lin in conv.nn.lins] == [(6, 4), (6, 6)]
    assert conv.eps.requires_grad


NOT_WIDTHS = [
    "AGNNConv",
    "APPNP",
    "GatedGraphConv",
    "GCN2Conv",
    "FAConv",
    "EdgeConv",
    "LGConv",
    "PointNetConv",
    "DNAConv",
]
OTHER_FORWARD: dict[str, Any] = {
    "GCN2Conv": lambda i, _: pyg.GCN2Conv(i, 0.1),
    "FAConv": lambda i, _: pyg.FAConv(i),
    "RGCNConv": lambda i, o: pyg.RGCNConv(i, o, num_relations=2),
    "PointNetConv": lambda *_: pyg.PointNetConv(),
    "HypergraphConv": pyg.HypergraphConv,
    "PointTransformerConv": pyg.PointTransformerConv,
    "SplineConv": lambda i, o: pyg.SignedConv(i, o, first_aggr=True),
}


@pytest.mark.parametrize("name", NOT_WIDTHS)
def test_classes_whose_first_arguments_are_no_widths_are_refused(name: str) -> None:
    """``APPNP(16, 8)`` would be 16 steps with a teleport probability of 8."""
    kinds: list[Any] = [getattr(pyg, name)] + ([name] if name.endswith("Conv") else [])
    for kind in kinds:
        for conv in (kind, ["gcn", kind]):
            with pytest.raises(ValueError, match=f"conv: got {name}, which is built with"):
                MoEConv(conv, 8, 8, shared_expert=False)


@pytest.mark.parametrize("name", OTHER_FORWARD)
def test_convs_with_another_forward_are_refused_by_name(name: str) -> None:
    name_got = "SignedConv" if name == "SplineConv" else name
    for conv in (OTHER_FORWARD[name], ["gcn", OTHER_FORWARD[name]]):
        with pytest.raises(ValueError, match=f"conv: got {name_got}, whose forward takes"):
            MoEConv(conv, 8, 8, shared_expert=False)


@pytest.mark.parametrize(
    ("conv", "kwargs", "message"),
    [
        (
            [lambda i, _: pyg.SAGEConv(i, 8), lambda i, _: pyg.SAGEConv(i, 1)],
            {},
            r"output widths \[1, 8\], expected one width",
        ),
        (
            [lambda i, _: pyg.FiLMConv(i, 8), lambda i, _: pyg.FiLMConv(i, 1)],
            {},
            r"output widths \[1, 8\], expected one width",
        ),
        (["gcn", partial(pyg.GATConv, heads=2)], {}, r"output widths \[8, 16\], expected one width"),
        (lambda i, _: pyg.SAGEConv(i, 3), {}, "out_channels: got 8, but <lambda> gives 3 columns"),
        (lambda i, _: pyg.GINConv(nn.Linear(i, 3)), {}, "out_channels: got 8, but <lambda> gives 3 columns"),
        (lambda *_: pyg.APPNP(2, 0.1), {}, "out_channels: got 8, but <lambda> gives 4 columns"),
        (
            "gat",
            {"heads": 2, "shared_expert": lambda i, o, **_: pyg.GCNConv(i, o)},
            "shared_expert: got 8 columns, expected 16",
        ),
        ("simple", {}, r"out_channels: got 8 for SimpleConv, expected in_channels=4"),
        ("cg", {}, r"out_channels: got 8 for CGConv, expected in_channels=4"),
        (None, {}, "conv: got None, expected a name"),
        (3, {}, "conv: got 3, expected a name"),
        ([], {}, r"conv: got \[\], expected a name"),
        ([None, "gcn"], {}, "conv: got None, expected a name"),
        (["gcn", "gat"], {"num_experts": 3}, "conv: got a list of 2 convs, expected num_experts=3"),
        (lambda i, o: nn.Linear(i, o), {}, "conv: got a factory of Linear, expected one of PyG's MessagePassing"),
        (lambda *_: SHARED, {}, "conv: got a factory whose convs share parameters"),
        (lambda *_: pyg.GINConv(SHARED.nn), {}, "conv: got a factory whose convs share parameters"),
        ("gcn", {"hops": 2}, r"conv: got GCNConv, which cannot be built as conv\(4, 8, ...\)"),
        ("pna", {}, "conv: got PNAConv, which cannot be built as conv"),
    ],
)
def test_refusals(conv: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoEConv(conv, 4, 8, **{"shared_expert": False, **kwargs})


@pytest.mark.parametrize("value", [6.0, "6", None, (6,), (6, 6, 6), True, 0, -2, (3, 0), (6, 2.0)])
def test_bad_widths(value: Any) -> None:
    with pytest.raises(ValueError, match="in_channels: got "):
        MoEConv("sage", value, 4, shared_expert=False)
    if not isinstance(value, tuple):
        with pytest.raises(ValueError, match="out_channels: got "):
            MoEConv("sage", 4, value, shared_expert=False)


def test_output_widths_of_what_cannot_be_tried_out_are_unknown() -> None:
    """NNConv asks for edge features; GAT's follows its heads."""
    assert Trial(FACTORIES["nn"](WIDTH, 5), WIDTH).width is None
    for heads, concat, width in ((3, True, 15), (3, False, 5), (1, True, 5)):
        assert Trial(pyg.GATConv(4, 5, heads=heads, concat=concat), 4).width == width
    assert Trial(pyg.GINConv(nn.Linear(4, 7)), 4).width == 7
    assert Trial(pyg.SuperGATConv(4, 5, heads=2), 4).width == 10


def test_one_kind_in_a_list_is_one_group() -> None:
    layer = MoEConv(["gcn", pyg.GCNConv, "GCNConv"], 4, 4, shared_expert=False)
    assert isinstance(layer.experts, GCNExperts)
    assert layer.num_experts == 3
    assert MoEConv("gcn", 4, 4, shared_expert=False).num_experts == 8
    assert GNNMoE(4, 8, 3, conv=["gcn", "mlp"], num_layers=3).convs[0].num_experts == 2


class Spectral(pyg.SAGEConv):
    """A subclass may compute something else."""


def spectral(i: int, o: int) -> pyg.SAGEConv:
    conv = pyg.SAGEConv(i, o)
    conv.lin_l = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(i, o))
    return conv


def frozen(i: int, o: int) -> pyg.GCNConv:
    conv = pyg.GCNConv(i, o)
    conv.lin.weight.requires_grad_(False)
    return conv


class Hooked:
    """GCN with a hook on its linear layer."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, i: int, o: int) -> pyg.GCNConv:
        conv = pyg.GCNConv(i, o)
        conv.lin.register_forward_hook(self.hook)
        return conv

    def hook(self, *_: Any) -> None:
        self.calls += 1


@pytest.mark.filterwarnings("ignore:.*runs on the whole graph")
def test_what_a_factory_adds_survives() -> None:
    """Spectral norm is still that, frozen parameters stay frozen, hooks run."""
    x, edge_index = features(9, 4), random_graph(9, 9, 30)
    layer = MoEConv(spectral, 4, 4, num_experts=2, shared_expert=False).double()
    with torch.no_grad():
        for name, parameter in layer.experts.named_parameters():
            parameter.mul_(50.0 if "original" in name else 1.0)
    for _ in range(30):  # power iterations
        layer(x, edge_index)
    for plain in layer.experts.convs():
        assert float(torch.linalg.matrix_norm(plain.lin_l.weight, 2)) == pytest.approx(1.0, rel=0.05)
    layer = MoEConv(frozen, 4, 4, num_experts=2, shared_expert=False).double()
    assert_equals_masked(layer, x, edge_index)
    layer(x, edge_index).sum().backward()
    assert [p.requires_grad for p in layer.experts.parameters()].count(False) == 2
    assert all((p.grad is None) is not p.requires_grad for p in layer.experts.parameters())
    hooked = Hooked()
    layer = MoEConv(hooked, 4, 4, num_experts=2, router="uniform", k=2, shared_expert=False).double()
    before = hooked.calls
    layer(x, edge_index)
    assert hooked.calls == before + 2


# who is local -------------------------------------------------------------------------------------------------------


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
    """Not local: divides by the in-degree of the source, as GCN does."""

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return super().forward(x / (1 + degree(edge_index[1], x.size(0), dtype=x.dtype))[:, None], edge_index)


class TwoHops(GatedSum):
    """Not local: looks two hops far."""

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return super().forward(super().forward(x, edge_index), edge_index)


class Normed(GatedSum):
    """Not local in training: batch norm."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels)
        self.norm = nn.BatchNorm1d(out_channels)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        out: Tensor = self.norm(super().forward(x, edge_index))
        return out


class Centered(GatedSum):
    """Not local: subtracts the mean of all nodes."""

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return super().forward(x - x.mean(dim=0), edge_index)


class CenteredWhereNegative(GatedSum):
    """Local only for positive features."""

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return super().forward(x - x.clamp(max=0).mean(dim=0), edge_index)


FAR: list[Any] = [SourceDegrees, TwoHops, Normed, Centered, CenteredWhereNegative]


@pytest.mark.parametrize("cls", [*FAR, pyg.GCNConv], ids=lambda cls: cls.__name__)
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
    layer(features(6, 4), torch.tensor([[0, 2, 4], [1, 3, 5]]))
    assert sum(edges for _, edges in rows) == 2 * 3  # K messages an edge


@pytest.mark.parametrize("cls", [GatedSum, *FAR], ids=lambda cls: cls.__name__)
def test_a_conv_that_says_nothing_runs_in_full_with_a_warning(cls: Any) -> None:
    num_nodes, edge_index = GRAPHS["mixed"]
    with pytest.warns(UserWarning, match=f"{cls.__name__} runs on the whole graph.*pass local=True") as caught:
        layer = MoEConv(cls, 4, 4, num_experts=3, k=2).double()
    assert [warning.filename for warning in caught] == [__file__]  # once, and points to the line of the user
    assert_equals_masked(layer, features(num_nodes, 4), edge_index)


def test_local_true_for_a_conv_that_cannot_run_on_the_probe() -> None:
    class Picky(GatedSum):
        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            raise RuntimeError("only on Tuesdays")

    with pytest.raises(ValueError, match=r"local: got True, but Picky fails on a small random graph: only on Tuesdays"):
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
