"""Experts that run one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_geometric import nn as pyg
from torch_geometric.nn import MessagePassing
from torch_geometric.utils import to_torch_csc_tensor

from gmoe import Graph, MoEConv, Routing
from gmoe.conv.call import Call
from gmoe.conv.separate import SeparateExperts, Way
from tests.helpers.masked import assert_equals_masked, features, random_graph

N, WIDTH = 9, 4
EDGES = random_graph(N, N, 30)


def experts(is_local: bool) -> SeparateExperts:
    torch.manual_seed(0)
    ways: list[Way] = ["part" if is_local else "whole"] * 3
    return SeparateExperts([pyg.LEConv(WIDTH, 3) for _ in range(3)], ways)


def run(
    layer: SeparateExperts, edge_index: Tensor, expert_N: Tensor, *, scale: float = 1.0
) -> Tensor:
    """(N, O) the outputs on a graph whose nodes have one expert each."""
    x = torch.full((N, WIDTH), scale)
    number = len(layer.members)
    routing = Routing.from_choices(expert_N[:, None], torch.ones(N, 1), num_experts=number)
    out: Tensor = layer(Call(Graph(edge_index, N), x, x), routing)
    return out


@pytest.mark.parametrize(("is_local", "rows"), [(True, 9), (False, 27)])
def test_a_local_conv_sees_its_own_nodes_and_any_other_the_whole_graph(
    is_local: bool, rows: int
) -> None:
    layer = experts(is_local)
    seen: list[int] = []
    for conv in layer.members:
        conv.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    no_edges = torch.empty(2, 0, dtype=torch.long)  # so that no conv needs another node
    run(layer, no_edges, torch.arange(N) % 3)
    assert sum(seen) == rows


def test_an_export_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, expert_N = experts(is_local=True), torch.arange(N) % 3
    expected = run(layer, EDGES, expert_N)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    torch.testing.assert_close(run(layer, EDGES, expert_N), expected)


def test_experts_become_copies_of_one_conv_and_part_when_they_are_reset() -> None:
    layer = experts(is_local=True)
    layer.become(pyg.LEConv(WIDTH, 3))
    first, second = layer.members[0].lin1.weight, layer.members[1].lin1.weight
    assert torch.equal(first, second)
    layer.reset_parameters()
    assert not torch.equal(first, second)


class Own(MessagePassing):
    """A local conv of one's own: a sum over in-edges, then a network of each node."""

    def __init__(self, *_: object, flow: str = "source_to_target") -> None:
        super().__init__(aggr="add", flow=flow)
        self.lin: nn.Module = nn.Linear(WIDTH, WIDTH)
        self.calls = 0

    def forward(self, x: Tensor, edge_index: Any) -> Tensor:
        out: Tensor = self.lin(x + self.propagate(edge_index, x=x))
        self.calls += 1
        return out


class OfAPair(Own):
    """As many of PyG's convs: nodes of one set become a pair."""

    def forward(self, x: Tensor, edge_index: Any) -> Tensor:
        out: Tensor = self.lin(x + self.propagate(edge_index, x=(x, x), size=None))
        return out


class Two(Own):
    """It sends its nodes as they are, and beside them something that it made of them."""

    def forward(self, x: Tensor, edge_index: Any) -> Tensor:
        out: Tensor = x + self.propagate(edge_index, x=x, h=self.lin(x))
        return out

    def message(self, x_j: Tensor, h_j: Tensor) -> Tensor:
        return x_j * h_j


class Reads(Own):
    """It reads its senders before it sends."""

    def forward(self, x: Tensor, edge_index: Any) -> Tensor:
        out: Tensor = self.lin(self.propagate(edge_index, x=x, seen=x[edge_index[0]]))
        return out

    def message(self, x_j: Tensor, seen: Tensor) -> Tensor:
        return x_j * seen


class Normed(Own):
    """A batch norm takes no single row in training."""

    def __init__(self, *_: object) -> None:
        super().__init__()
        self.lin = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH))


ROWS_OF: dict[type[Own], Way] = {
    Own: "rows",
    OfAPair: "rows",
    Normed: "rows",
    Two: "part",
    Reads: "part",
}
"""What a conv gets of the nodes of an expert, by how it hands them over."""


@pytest.mark.parametrize("number", [1, 4])  # of nodes of the first expert
@pytest.mark.parametrize(("conv", "way"), ROWS_OF.items())
def test_a_conv_that_sends_its_nodes_as_they_are_computes_of_its_tokens_alone(
    conv: type[Own], way: Way, number: int
) -> None:
    torch.manual_seed(0)
    layer = MoEConv(conv, WIDTH, WIDTH, num_experts=2, start="plain", router=None, local=True)
    layer = layer.double().eval()
    assert layer.experts.ways == [way] * 2
    expert_N = (torch.arange(N) >= number).long()
    weight_NE = torch.eye(2, dtype=torch.float64)[expert_N]
    assert_equals_masked(layer, features(N, WIDTH), EDGES, weight_TE=weight_NE)

    rows: list[int] = []
    for member in layer.experts.members:
        member.lin.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    run(layer.float().experts, EDGES, expert_N)
    # A single token gets the ends of its edges, too: a batch norm in training takes no single row.
    assert rows[1] == N - number if way == "rows" else rows[1] > N - number
    assert (rows[0] == number) == (way == "rows" and number > 1)


@pytest.mark.parametrize("adj", ["sparse", "target_to_source", "no edges", "one edge"])
def test_edges_of_other_forms_give_the_same(adj: str) -> None:
    torch.manual_seed(0)
    flow = adj if adj == "target_to_source" else "source_to_target"
    kwargs: Any = {"num_experts": 3, "start": "plain", "router": "random", "local": True}
    layer = MoEConv(Own, WIDTH, WIDTH, flow=flow, **kwargs).double().eval()
    number = {"no edges": 0, "one edge": 1}.get(adj, 30)
    edges = EDGES[:, :number]
    given: Any = edges
    if adj == "sparse":
        edges = edges.unique(dim=1)
        given = to_torch_csc_tensor(edges, size=(N, N)).double().t()
    assert_equals_masked(layer, features(N, WIDTH), given, reference_adj=edges)


def test_a_norm_in_training_sees_the_tokens_alone_and_what_a_conv_notes_stays() -> None:
    torch.manual_seed(0)
    kwargs: Any = {"num_experts": 2, "start": "plain", "router": None, "local": True}
    layer = MoEConv(Normed, WIDTH, WIDTH, **kwargs).double()
    expert_N = torch.arange(N) % 2
    routing = Routing.from_choices(expert_N[:, None], torch.ones(N, 1), num_experts=2)
    x = features(N, WIDTH)
    dense: list[Any] = [layer.expert(0), layer.expert(1)]
    y = layer(x, EDGES, routing=routing)
    for expert, conv in enumerate(dense):
        sums = x + conv.propagate(EDGES, x=x)
        torch.testing.assert_close(y[expert_N == expert], conv.lin(sums[expert_N == expert]))
    assert [conv.calls for conv in layer.experts.members] == [1, 1]
    assert all("propagate" not in vars(conv) for conv in layer.experts.members)


def test_a_hook_may_change_the_nodes_of_a_conv() -> None:
    torch.manual_seed(0)
    kwargs: Any = {"num_experts": 2, "start": "plain", "router": None, "local": True}
    layer = MoEConv(Own, WIDTH, WIDTH, **kwargs)
    expert_N = torch.arange(N) % 2
    expected = run(layer.experts, EDGES, expert_N, scale=2.0)
    for conv in layer.experts.members:
        conv.register_forward_pre_hook(lambda _, args: (2 * args[0], *args[1:]))
    torch.testing.assert_close(run(layer.experts, EDGES, expert_N), expected)
