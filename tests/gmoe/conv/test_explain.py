"""What explainers need of layers: masks, hidden prototypes, hooks that are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch_geometric.explain.algorithm.utils import set_masks
from torch_geometric.nn import GCNConv, MessagePassing

from gmoe import MoEConv
from gmoe.conv.explain import mask_of, with_mask
from tests.helpers.masked import features

EDGES = torch.tensor([[0, 1, 2, 2], [1, 2, 0, 1]])
STEPS = ("propagate", "message", "aggregate", "message_and_aggregate", "edge_update")


@pytest.mark.parametrize("apply_sigmoid", [True, False])
def test_a_mask_is_read_from_a_conv_as_its_messages_get_it(apply_sigmoid: bool) -> None:
    conv = GCNConv(2, 3, normalize=False).double()
    mask = features(4)
    set_masks(conv, mask, EDGES, apply_sigmoid=apply_sigmoid)
    found = mask_of(conv, 4)
    assert torch.equal(found, mask.sigmoid() if apply_sigmoid else mask)
    plain = GCNConv(2, 3, normalize=False).double()
    plain.load_state_dict(conv.state_dict())
    x = features(3, 2)
    torch.testing.assert_close(with_mask(plain, found, EDGES)(x, EDGES), conv(x, EDGES))
    assert not plain.explain


@pytest.mark.parametrize("mask", [None, torch.ones(3)])
def test_an_explainer_without_a_mask_of_all_edges_is_refused(mask: Any) -> None:
    conv = GCNConv(2, 3)
    conv._edge_mask = mask
    with pytest.raises(ValueError, match=r"^explain: got .* expected one of the 4 edges"):
        mask_of(conv, 4)


@pytest.mark.parametrize("conv", ["gcn", "gat", "gin"])
def test_a_layer_is_one_message_passing_module(conv: str) -> None:
    layer: Any = MoEConv(conv, 4, 4, num_experts=3)
    assert [part for part in layer.modules() if isinstance(part, MessagePassing)] == [layer]
    prototype = layer.experts.prototype
    assert prototype.training
    assert not layer.eval().experts.prototype.training


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("when", ["forward_pre", "forward"])
def test_a_hook_of_message_passing_is_refused(step: str, when: str) -> None:
    register = getattr(MoEConv("gcn", 4, 4, num_experts=2), f"register_{step}_{when}_hook")
    with pytest.raises(ValueError, match=r"^hook: got .*sends no messages"):
        register(print)
