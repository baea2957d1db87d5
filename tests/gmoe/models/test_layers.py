"""The convs of layers: how many columns they give, and what a common router costs them."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn
from torch_geometric.nn import GATConv

from gmoe import MoEConv, TokenChoice
from gmoe.models.layers import build_conv, columns_of, take_costs

MOE: dict[str, Any] = {"num_experts": 3, "k": 1, "router": "token_choice"}


@pytest.mark.parametrize("moe_kwargs", [None, MOE], ids=str)
def test_a_free_conv_may_give_any_number_of_columns(moe_kwargs: dict[str, Any] | None) -> None:
    def wide(width: int, out: int) -> GATConv:
        return GATConv(width, out, heads=2)

    built = build_conv(wide, 4, 5, True, moe_kwargs, {}, is_free=True)
    assert columns_of(built, 4, wide) == 10
    with pytest.raises(ValueError, match=r"^conv: got GATConv, which gives 10 columns for .*=5"):
        build_conv(wide, 4, 5, True, moe_kwargs, {})
    assert columns_of(build_conv("gat", 4, 6, True, moe_kwargs, {"heads": 2}), 4, "gat") == 6


def test_layers_cost_what_their_common_router_says() -> None:
    layer = MoEConv("gcn", 4, 4, num_experts=5, router=None)
    take_costs(TokenChoice(4, num_experts=5, k=3), [layer, nn.Linear(4, 4)])
    assert (layer.k, layer.experts_per_token) == (3, 3.0)
