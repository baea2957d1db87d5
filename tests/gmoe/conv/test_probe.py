"""Whether a conv is local is found out, and ``local=True`` is not taken on trust."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_geometric.nn import GATConv, GCNConv, GINConv, MessagePassing, SAGEConv
from torch_geometric.utils import degree

from gmoe import MoEConv
from gmoe.conv.kinds import is_local
from gmoe.conv.separate import SeparateExperts
from tests.gmoe.conv.masked import GRAPHS, assert_equals_masked, features


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
        scaled = x / (1 + degree(edge_index[1], x.size(0), dtype=x.dtype))[:, None]
        return super().forward(scaled, edge_index)


class TwoHops(GatedSum):
    """Not local: looks two hops far."""

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        near: Tensor = self.propagate(edge_index, x=x)
        out: Tensor = (
            self.propagate(edge_index, x=x) if near.size(1) != x.size(1) else self.propagate(edge_index, x=near)
        )
        return out


class Normed(GatedSum):
    """Not local in training: batch norm."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels)
        self.norm = nn.BatchNorm1d(out_channels)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        out: Tensor = self.norm(super().forward(x, edge_index))
        return out


class Centred(GatedSum):
    """Not local: subtracts the mean of all nodes."""

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        return super().forward(x - x.mean(dim=0), edge_index)


@pytest.mark.parametrize("cls", [SourceDegrees, TwoHops, Normed, Centred, GCNConv], ids=lambda cls: cls.__name__)
def test_local_is_refused_where_it_is_not_true(cls: Any) -> None:
    with pytest.raises(ValueError, match=f"local: got True, but {cls.__name__} .*expected None or False"):
        MoEConv(cls, 4, 4, local=True)
    assert not is_local(cls(4, 4), 4)


def test_local_user_conv_takes_the_local_path() -> None:
    num_nodes, edge_index = GRAPHS["mixed"]
    conv = MoEConv(GatedSum, 4, 4, num_experts=3, k=2, local=True).double()
    assert isinstance(conv.experts, SeparateExperts)
    assert conv.experts.local == [True] * 3
    assert_equals_masked(conv, features(num_nodes, 4), edge_index)


@pytest.mark.parametrize("cls", [GatedSum, SourceDegrees, TwoHops, Normed, Centred], ids=lambda cls: cls.__name__)
def test_user_conv_that_says_nothing_runs_in_full_with_a_warning(cls: Any) -> None:
    num_nodes, edge_index = GRAPHS["mixed"]
    with pytest.warns(UserWarning, match=f"{cls.__name__} runs on the whole graph.*pass local=True") as caught:
        conv = MoEConv(cls, 4, 4, num_experts=3, k=2).double()
    assert caught[0].filename == __file__  # points to the line of the user
    assert_equals_masked(conv, features(num_nodes, 4), edge_index)


def test_local_true_for_a_conv_that_cannot_run_on_the_probe() -> None:
    class Picky(GatedSum):
        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            raise RuntimeError("only on Tuesdays")

    with pytest.raises(ValueError, match=r"local: got True, but Picky fails on a small random graph: only on Tuesdays"):
        MoEConv(Picky, 4, 4, local=True)


@pytest.mark.parametrize("cls", [SAGEConv, GATConv])
def test_local_false_forbids_the_local_path(cls: Any) -> None:
    num_nodes, edge_index = GRAPHS["mixed"]
    with pytest.warns(UserWarning, match="whole graph"):
        conv = MoEConv(cls, 4, 4, num_experts=3, local=False).double()
    assert isinstance(conv.experts, SeparateExperts)
    assert conv.experts.local == [False] * 3
    assert_equals_masked(conv, features(num_nodes, 4), edge_index)


def test_is_local_leaves_the_conv_alone() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    conv = GINConv(network).eval()
    before = {name: value.clone() for name, value in conv.state_dict().items()}
    assert not is_local(conv, 4)
    assert not conv.training
    assert network[2].p == 0.5
    assert all(torch.equal(value, before[name]) for name, value in conv.state_dict().items())


def test_is_local_ignores_dropout_and_draws_nothing() -> None:
    torch.manual_seed(0)
    conv = GATConv(4, 4, dropout=0.6)
    state = torch.get_rng_state()
    assert is_local(conv, 4)
    assert torch.equal(torch.get_rng_state(), state)
    assert conv.dropout == 0.6


def test_is_local_takes_edge_features_and_bipartite_input() -> None:
    assert is_local(GATConv(4, 4, edge_dim=3), 4)
    assert is_local(SAGEConv((3, 5), 4), (3, 5))
