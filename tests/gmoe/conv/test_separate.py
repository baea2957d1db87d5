"""Experts that run one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch_geometric import nn as pyg

from gmoe import Graph, Routing
from gmoe.conv.call import Call
from gmoe.conv.separate import SeparateExperts
from tests.helpers.masked import random_graph

N, WIDTH = 9, 4
EDGES = random_graph(N, N, 30)


def experts(is_local: bool) -> SeparateExperts:
    torch.manual_seed(0)
    return SeparateExperts([pyg.LEConv(WIDTH, 3) for _ in range(3)], [is_local] * 3)


def run(layer: SeparateExperts, edge_index: Tensor, expert_N: Tensor) -> Tensor:
    """(N, 3) the outputs on a graph whose nodes have one expert each."""
    x = torch.ones(N, WIDTH)
    routing = Routing.from_choices(expert_N[:, None], torch.ones(N, 1), num_experts=3)
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
