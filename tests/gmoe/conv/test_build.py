"""How experts are built: which convs are stacked, and which are local."""

from __future__ import annotations

import copy
import pickle
from functools import partial, wraps
from types import MethodType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch_geometric import nn as pyg
from torch_geometric.nn import Aggregation, MessagePassing

from gmoe import MoEConv, moefy
from gmoe.conv.separate import SeparateExperts
from tests.helpers.conv_cases import GatedSum
from tests.helpers.masked import GRAPHS, assert_equals_masked, features, random_graph

WIDTH = 8


def hooked(i: int, o: int) -> pyg.GCNConv:
    conv = pyg.GCNConv(i, o)
    conv.lin.register_forward_hook(lambda *_: None)
    return conv


class Own(pyg.GATConv):
    """A subclass may compute something else."""


class LoRA(nn.Linear):
    """A linear layer with more than its weight."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.down = nn.Parameter(torch.randn(1, in_features))
        self.up = nn.Parameter(torch.randn(out_features, 1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.down.T @ self.up.T


def lora_gcn(i: int, o: int) -> pyg.GCNConv:
    conv = pyg.GCNConv(i, o)
    conv.lin = LoRA(i, o)
    return conv


def lora_sage(i: int, o: int) -> pyg.SAGEConv:
    conv = pyg.SAGEConv(i, o)
    conv.lin_r = LoRA(i, o)
    return conv


def lora_gat(i: int, o: int) -> pyg.GATConv:
    conv = pyg.GATConv(i, o)
    conv.lin = LoRA(i, o)
    return conv


def patched(i: int, o: int) -> pyg.SAGEConv:
    conv = pyg.SAGEConv(i, o)
    conv.lin_l.forward = MethodType(twice, conv.lin_l)
    return conv


def twice(linear: Any, x: Tensor) -> Tensor:
    return 2 * x @ linear.weight.T


ADDED: list[Any] = [hooked, Own, lora_gcn, lora_sage, lora_gat, patched]


@pytest.mark.filterwarnings("ignore:.*runs on the whole graph")
@pytest.mark.parametrize("start", ["shared", "copies"])
@pytest.mark.parametrize("kind", ADDED, ids=lambda kind: kind.__name__)
def test_what_somebody_put_into_a_conv_survives_a_swap(kind: Any, start: Any) -> None:
    """The first forward of a layer built by a factory, and of one that moefy swaps in."""
    torch.manual_seed(0)
    conv = kind(4, 4).eval()
    x, edge_index = torch.randn(9, 4), random_graph(9, 9, 30)
    model = pyg.Sequential("x, edge_index", [(copy.deepcopy(conv), "x, edge_index -> x")])
    torch.testing.assert_close(
        moefy(model, num_experts=2, targets="module_0", start=start)(x, edge_index),
        conv(x, edge_index),
    )
    torch.manual_seed(0)
    layer = MoEConv(kind, 4, 4, num_experts=2, start=start).eval()
    torch.testing.assert_close(layer(x, edge_index), conv(x, edge_index))
    # Such convs run one by one, and copies of them share no base.
    assert sum(p.numel() for p in layer.experts.parameters()) == 2 * sum(
        p.numel() for p in conv.parameters()
    )


def doubled(i: int, o: int) -> pyg.SAGEConv:
    """The forward of its linear layer is a function, which holds that layer."""
    conv = pyg.SAGEConv(i, o)
    before = conv.lin_l.forward
    conv.lin_l.forward = lambda x: 2 * before(x)
    return conv


def test_a_conv_with_a_function_as_a_forward_is_refused_where_experts_are_copies() -> None:
    with pytest.raises(ValueError, match=r"^conv: got SAGEConv.lin_l with a function as its forw"):
        MoEConv(doubled, 4, 4, num_experts=2, start="copies")
    torch.manual_seed(0)
    layer: Any = MoEConv(doubled, 4, 4, num_experts=2, start="shared")
    torch.manual_seed(0)
    conv, x, edge_index = doubled(4, 4), torch.randn(9, 4), random_graph(9, 9, 30)
    torch.testing.assert_close(layer(x, edge_index), conv(x, edge_index))


def test_a_conv_with_a_function_as_its_forward_is_refused_by_moefy() -> None:
    """The function holds the conv, which would run in place of every copy."""
    conv = pyg.SAGEConv(4, 4)
    before = conv.forward
    conv.forward = lambda *args: 2 * before(*args)
    model = pyg.Sequential("x, edge_index", [(conv, "x, edge_index -> x")])
    with pytest.raises(ValueError, match=r"^model: got \w+ with a function as its forward"):
        moefy(model, num_experts=2, targets="module_0")


class Scaled(Aggregation):
    """A sum times what the aggregation holds."""

    def __init__(self, held: Any) -> None:
        super().__init__()
        if isinstance(held, Tensor):
            self.register_buffer("held", held)
        else:
            self.held = held

    def forward(
        self, x: Tensor, index: Any = None, ptr: Any = None, dim_size: Any = None, dim: int = -2
    ) -> Tensor:
        factor: Any = self.held
        if isinstance(factor, dict | set):
            factor = sum(factor)
        return self.reduce(x, index, ptr, dim_size, dim, reduce="sum") * factor


class Hidden(Scaled):
    """The same, of an attribute that is nobody else's."""

    def __init__(self, held: float) -> None:
        super().__init__(1.0)
        self._factor = held

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(*args, **kwargs) * self._factor


DIFFERENT: dict[str, tuple[Any, Any, Any]] = {
    "a NumPy float": (Scaled, np.float32(1.0), np.float32(2.0)),
    "a buffer": (Scaled, torch.tensor(1.0), torch.tensor(2.0)),
    "a dict": (Scaled, {1: "a"}, {2: "a"}),
    "a set": (Scaled, {1}, {2}),
    "a private attribute": (Hidden, 1.0, 2.0),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_convs_of_a_list_that_hold_different_values_are_not_one_stack(what: str) -> None:
    aggr, *values = DIFFERENT[what]
    convs = [lambda i, o, held=held: pyg.SAGEConv(i, o, aggr=aggr(held)) for held in values]
    layer = MoEConv(convs, 4, 4, start="plain").double()
    assert len(layer.experts.groups) == 2
    assert_equals_masked(layer, features(9, 4), random_graph(9, 9, 30))


def test_convs_that_hold_equal_values_are_one_stack() -> None:
    convs = [lambda i, o: pyg.SAGEConv(i, o, aggr=Scaled({np.float32(2.0): {"a"}}))] * 3
    layer = MoEConv(convs, 4, 4, start="plain").double()
    assert layer.experts.num_experts == 3
    assert_equals_masked(layer, features(9, 4), random_graph(9, 9, 30))


class TwoHops(GatedSum):
    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return super().forward(super().forward(x, edge_index), edge_index)


class CenteredWhereNegative(GatedSum):
    """Local only for positive features."""

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return super().forward(x - x.clamp(max=0).mean(dim=0), edge_index)


NOT_LOCAL: dict[str, Any] = {
    **{cls.__name__: cls for cls in (TwoHops, CenteredWhereNegative)},
    **{name: name for name in ("gcn", "tag", "sg", "arma", "mixhop", "eg")},
    "cheb": partial(pyg.ChebConv, K=3),
    "ssg": partial(pyg.SSGConv, alpha=0.1),
    "appnp": lambda *_: pyg.APPNP(K=2, alpha=0.1),
    "gatedgraph": lambda _, o: pyg.GatedGraphConv(o, num_layers=2),
}


@pytest.mark.filterwarnings("ignore:.*runs on the whole graph")
@pytest.mark.parametrize("name", NOT_LOCAL)
def test_local_is_refused_where_it_is_not_true(name: str) -> None:
    with pytest.raises(ValueError, match=r"local: got True, but \w+ .*expected None or False"):
        MoEConv(NOT_LOCAL[name], WIDTH, WIDTH, local=True, start="plain")
    layer = MoEConv(NOT_LOCAL[name], WIDTH, WIDTH, num_experts=3, k=2, start="plain").double()
    assert_equals_masked(layer, features(11, WIDTH), random_graph(11, 11, 40))


def test_a_conv_of_ones_own_that_is_local_takes_the_local_path() -> None:
    num_nodes, edge_index = GRAPHS["mixed"]
    layer = MoEConv(GatedSum, 4, 4, num_experts=3, k=2, local=True, start="plain").double()
    assert_equals_masked(layer, features(num_nodes, 4), edge_index)
    rows: list[tuple[int, int]] = []
    for expert in layer.experts.convs():
        expert.register_forward_hook(
            lambda _, args, __: rows.append((args[0].size(0), args[1].size(1)))
        )
    layer(features(6, 4), torch.stack([torch.arange(6), torch.arange(6).roll(1)]))
    assert sum(edges for _, edges in rows) == 2 * 6  # K messages an edge


def deep_gine(inputs: Any, outputs: int) -> MessagePassing:
    widths = [inputs if isinstance(inputs, int) else inputs[0], 4, 4, outputs]
    return pyg.GINEConv(pyg.MLP(widths, norm=None))


def frozen_sage(inputs: Any, outputs: int) -> MessagePassing:
    conv = pyg.SAGEConv(inputs, outputs)
    conv.lin_r.requires_grad_(requires_grad=False)
    return conv


@pytest.mark.filterwarnings("error:.*runs on the whole graph")
@pytest.mark.parametrize("conv", [deep_gine, frozen_sage])
def test_what_cannot_be_stacked_is_local_all_the_same(conv: Any) -> None:
    layer = MoEConv(conv, (6, 6), 5, num_experts=3, k=2).double()
    pair, edge_index = (features(9, 6), features(7, 6)), random_graph(9, 7, 30)
    kwargs = {"edge_attr": features(30, 6)} if conv is deep_gine else {}
    assert_equals_masked(layer, pair, edge_index, **kwargs)


def test_a_conv_that_says_nothing_runs_in_full_with_a_warning() -> None:
    num_nodes, edge_index = GRAPHS["mixed"]
    with pytest.warns(
        UserWarning, match=r"TwoHops runs on the whole graph.*pass local=True"
    ) as caught:
        layer = MoEConv(TwoHops, 4, 4, num_experts=3, k=2).double()
    # Once, and points to the line of the user. On new Pythons PyG warns, too, of itself
    ours = [warning for warning in caught if "TwoHops" in str(warning.message)]
    assert [warning.filename for warning in ours] == [__file__]
    assert_equals_masked(layer, features(num_nodes, 4), edge_index)


class OfMolecules(MessagePassing):
    """As OGB's examples have it: types of bonds are whole numbers, and the network has a norm."""

    def __init__(self, *_: Any) -> None:
        super().__init__(aggr="add")
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
        self.bonds = nn.Embedding(3, 4)

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor) -> Tensor:
        bonds = self.bonds(edge_attr)
        out: Tensor = self.mlp(x + self.propagate(edge_index, x=x, bonds=bonds))
        return out

    def message(self, x_j: Tensor, bonds: Tensor) -> Tensor:
        return (x_j + bonds).relu()


class ByDegreeOfSenders(OfMolecules):
    """As OGB's GCN: what a node sends follows from all of its edges."""

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor) -> Tensor:
        sent = torch.bincount(edge_index[0], minlength=len(x)) + 1
        return super().forward(x / sent[:, None], edge_index, edge_attr)


class Normed(GatedSum):
    """The small random graph will do for it, but for the norm in training."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__(i, o)
        self.norm = nn.BatchNorm1d(o)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        out: Tensor = self.norm(super().forward(x, edge_index))
        return out


@pytest.mark.filterwarnings("error:.*runs on the whole graph")
@pytest.mark.parametrize("start", ["shared", "copies", "plain"])
@pytest.mark.parametrize("conv", [OfMolecules, Normed])
def test_a_local_conv_may_take_any_edge_features_and_have_batch_norms(
    conv: Any, start: Any
) -> None:
    layer = MoEConv(conv, 4, 4, num_experts=3, start=start, local=True, router="random")
    layer = layer.double().eval()
    kwargs = {"edge_attr": torch.arange(40) % 3} if conv is OfMolecules else {}
    x, edge_index = features(11, 4), random_graph(11, 11, 40)
    layer(x, edge_index, **kwargs)  # which tries the convs out
    num_edges: list[int] = []
    for expert in layer.experts.convs():
        expert.register_forward_hook(lambda _, args, __: num_edges.append(args[1].size(1)))
    layer(x, edge_index, **kwargs)
    assert sum(num_edges) == 40
    assert_equals_masked(layer, x, edge_index, **kwargs)


@pytest.mark.parametrize("start", ["shared", "copies", "plain"])
def test_a_conv_that_is_not_local_is_refused_by_its_first_call(start: Any) -> None:
    layer = MoEConv(
        ByDegreeOfSenders, 4, 4, num_experts=3, start=start, local=True, router="random"
    )
    layer = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"but ByDegreeOfSenders .*come with"):
            layer(
                features(11, 4).float(), random_graph(11, 11, 40), edge_attr=torch.zeros(40).long()
            )


def test_a_conv_that_no_copy_runs_is_believed_to_be_local() -> None:
    class Picky(GatedSum):
        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            if x.dtype == torch.float64:
                raise RuntimeError("only singles")
            return super().forward(x, edge_index)

    layer = MoEConv(Picky, 4, 4, num_experts=2, local=True)
    x, edge_index = features(11, 4).float(), random_graph(11, 11, 40)
    with pytest.warns(UserWarning, match=r"local: got True, which is believed: .*only singles"):
        y = layer.eval()(x, edge_index)
    torch.testing.assert_close(y, layer.shared_expert.expert(0)(x, edge_index))


def of_other_aggregation() -> Any:
    conv = pyg.SAGEConv(4, 4)
    conv.aggr_module = pyg.aggr.MaxAggregation()  # conv.aggr still says "mean"
    return conv


def with_tied_weights() -> Any:
    conv = pyg.SAGEConv(4, 4)
    conv.lin_r.weight = conv.lin_l.weight
    return conv


def with_a_buffer_as_weight() -> Any:
    conv = pyg.SAGEConv(4, 4)
    weight = conv.lin_r.weight.detach()
    del conv.lin_r.weight
    conv.lin_r.register_buffer("weight", weight)
    return conv


CHANGED = [
    of_other_aggregation,
    with_tied_weights,
    with_a_buffer_as_weight,
]


@pytest.mark.parametrize("build", CHANGED, ids=lambda build: build.__name__)
def test_a_conv_that_was_changed_after_it_was_built_runs_by_itself(build: Any) -> None:
    torch.manual_seed(0)
    conv = build().double()
    model = nn.ModuleDict({"conv": conv})
    moe: Any = moefy(model, targets="conv", num_experts=2, start="copies")
    layer = moe["conv"]
    x = torch.randn(6, 4, dtype=torch.float64)
    edge_index = torch.tensor([[0, 1, 2, 3, 4, 0, 2], [1, 2, 3, 4, 5, 5, 5]])
    assert isinstance(layer.experts, SeparateExperts)
    torch.testing.assert_close(layer(x, edge_index), conv(x, edge_index))
    trained = sum(parameter.numel() for parameter in conv.parameters())
    assert sum(parameter.numel() for parameter in layer.experts.parameters()) == 2 * trained


@pytest.mark.parametrize("start", ["copies", "shared", "plain"])
def test_a_layer_of_a_class_builds_two_convs_at_most(
    start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are alike: the experts' parameters are drawn by resets of one conv."""
    built: list[None] = []
    init = pyg.GCNConv.__init__

    @wraps(init)
    def counted(self: Any, *args: Any, **kwargs: Any) -> None:
        built.append(None)
        init(self, *args, **kwargs)

    monkeypatch.setattr(pyg.GCNConv, "__init__", counted)
    layer: Any = MoEConv(pyg.GCNConv, 4, 4, num_experts=8, start=start)
    assert len(built) <= 2
    weights = {tuple(layer.expert(index).lin.weight.flatten().tolist()) for index in range(8)}
    assert len(weights) == (1 if start == "copies" else 8)
