"""Experts of attention; they are compared with PyG's convs in ``test_experts.py``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gmoe import MoEConv, Routing
from tests.helpers.masked import assert_equals_masked, features, random_graph


@pytest.mark.parametrize("start", ["copies", "shared"])
@pytest.mark.parametrize("conv", ["gat", "gatv2"])
def test_features_of_replaced_loops_may_be_anything(conv: str, start: Any) -> None:
    """Such as a direction, which is 0/0 on a loop: PyG removes it before it looks."""
    torch.manual_seed(0)
    edge_index = torch.tensor([[0, 1, 2, 2, 0], [1, 2, 2, 0, 0]])
    direction = torch.randn(5, 2)
    direction[[2, 4]] = torch.tensor([[torch.nan, torch.inf], [torch.nan, torch.nan]])
    layer = MoEConv(conv, 4, 3, edge_dim=2, num_experts=2, start=start)
    x = torch.randn(3, 4, requires_grad=True)
    y = layer(x, edge_index, edge_attr=direction)
    y.square().sum().backward()
    assert y.isfinite().all()
    grads = [parameter.grad for parameter in [x, *layer.parameters()]]
    assert all(grad is None or grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("hooked", ["lin_src", "lin_dst"])
def test_a_hook_on_either_end_runs_though_inputs_could_be_summed_first(hooked: str) -> None:
    torch.manual_seed(0)
    layer = MoEConv("gat", (3, 3), 8, add_self_loops=False, num_experts=2, start="plain").eval()
    x, edge_index = (torch.randn(6, 3), torch.randn(4, 3)), torch.tensor([[0, 5, 3], [1, 2, 3]])
    expected = layer(x, edge_index)
    called = []
    layer.experts.get_submodule(hooked).register_forward_hook(lambda *_: called.append(hooked))
    torch.testing.assert_close(layer(x, edge_index), expected)
    assert called


@pytest.mark.filterwarnings("ignore:.*runs on the whole graph")
@pytest.mark.parametrize("conv", ["gat", "gatv2"])
def test_loops_among_turned_edges_have_the_features_that_pyg_gives_them(conv: str) -> None:
    """PyG averages the features of in-edges over the second row, whatever the flow."""
    layer = MoEConv(
        conv, 4, 3, edge_dim=2, flow="target_to_source", num_experts=2, k=2, start="plain"
    )
    attr = features(20, 2)
    assert_equals_masked(layer.double(), features(7, 4), random_graph(7, 7, 20), edge_attr=attr)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("conv", ["gat", "gatv2", "transformer"])
@pytest.mark.parametrize("start", ["copies", "shared"])
def test_rows_that_are_gathered_in_blocks_give_the_same(
    conv: str, start: Any, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = MoEConv(conv, 12, 4, heads=2, num_experts=3, start=start, k=2).double()
    for name, parameter in layer.named_parameters():
        if name.endswith(("_difference", "gain")):
            torch.nn.init.normal_(parameter)
    x, edge_index = features(20, 12).requires_grad_(), random_graph(20, 20, 60)
    expert_TK = features(20, 3).topk(2).indices
    routing = Routing.from_choices(expert_TK, features(20, 2), num_experts=3)
    wanted = [x, *layer.experts.parameters()]
    found = []
    for numbers in (30, 2**20):
        monkeypatch.setattr("gmoe.products.NUMBERS", numbers)
        torch.compiler.reset()
        run = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
        y = run(x, edge_index, routing=routing)
        # Compiled code runs one backward pass alone.
        found.append([y, *torch.autograd.grad(y, wanted, features(*y.shape, seed=9))])
    torch.testing.assert_close(*found)
