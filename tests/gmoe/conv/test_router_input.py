"""What a router sees of a node; the layers' own tests compare it with a definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gmoe import GNNMoE, MoEConv, TokenChoice
from gmoe.conv.router_input import router_parts


def test_the_router_of_copies_in_a_layer_sees_node_and_neighbors_by_default() -> None:
    both = ("node", "neighbors")
    assert router_parts(None, "copies", "token_choice") == both
    assert router_parts(None, "copies", TokenChoice) == both
    # An instance has a width of its own. Without a router nothing is seen. Of other routers, the
    # studies measured the node.
    assert router_parts(None, "copies", TokenChoice(4, num_experts=3)) == ("node",)
    assert router_parts(None, "copies", None) == ("node",)
    assert router_parts(None, "copies", "token_choice", is_shared=True) == ("node",)
    assert router_parts(None, "shared", "token_choice") == ("node",)
    assert MoEConv("gcn", 4, 4, start="copies").router_input == both
    assert MoEConv("gcn", 4, 4, start="copies", router_input="node").router_input == ("node",)
    assert MoEConv("gcn", 4, 4).router_input == ("node",)
    assert GNNMoE(4, 4, 4).router_input == ("node",)
    by_layer = GNNMoE(4, 4, 4, start="copies", shared_router=False)
    assert by_layer.router_input == both
    assert by_layer.config["router_input"] == list(both)


@pytest.mark.parametrize("router_input", [[], "edges", "graph", ["node", "edges"]], ids=str)
def test_an_unknown_part_or_none_is_refused(router_input: Any) -> None:
    with pytest.raises(ValueError, match="router_input: got"):
        router_parts(router_input, "copies", "token_choice")


def test_the_degree_of_a_hub_is_finite_in_half_precision() -> None:
    """It has more in-edges than half precision counts."""
    hub = torch.zeros(2, 70_000, dtype=torch.int64)
    layer = MoEConv("gcn", 4, 4, router_input="degree", num_experts=2).half()
    assert layer(torch.randn(2, 4).half(), hub)[0].isfinite().all()
