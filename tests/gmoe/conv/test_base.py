"""What all experts of a graph layer have in common, stacked or mixed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch_geometric import nn as pyg

from gmoe import LinearExperts, MoEConv
from gmoe.conv.aggregate import AggregateOnce
from gmoe.conv.attention import AttentionExperts
from gmoe.conv.base import MixedExperts, StackedExperts, is_plain, refuse_far
from gmoe.conv.kinds import Make

WIDTH = 4


def experts(conv: Any, **options: Any) -> Any:
    """The experts of a layer, without what stands beside them."""
    return MoEConv(conv, WIDTH, WIDTH, start="plain", **options).experts


def test_experts_of_several_kinds_are_given_by_their_place_in_the_list() -> None:
    mixed = experts(["gcn", "sage", "gcn", "tag"], local=None)
    assert isinstance(mixed, MixedExperts)
    classes = [type(mixed.expert(index)).__name__ for index in range(4)]
    assert classes == ["GCNConv", "SAGEConv", "GCNConv", "TAGConv"]
    assert not torch.equal(mixed.expert(0).lin.weight, mixed.expert(2).lin.weight)
    with pytest.raises(ValueError, match=r"^index: got 4, expected"):
        mixed.expert(4)
    assert [type(conv) for conv in mixed.too_far] == [pyg.TAGConv]


def test_copies_of_a_conv_that_holds_an_object_are_one_stack() -> None:
    """No copy of the object equals another, but all experts are copies of one conv."""

    def noted(i: int, o: int) -> pyg.GCNConv:
        conv = pyg.GCNConv(i, o)
        conv.note = object()
        return conv

    layer: Any = MoEConv(noted, WIDTH, WIDTH, num_experts=3, start="copies")
    assert not isinstance(layer.experts, MixedExperts)
    layer.reset_parameters()
    weights = [layer.expert(index).lin.weight for index in range(3)]
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


def test_convs_that_look_far_are_refused_by_name() -> None:
    refuse_far([])
    with pytest.raises(RuntimeError, match=r"^inference: SGConv, TAGConv looks further"):
        refuse_far([pyg.TAGConv(1, 1), pyg.SGConv(1, 1), pyg.TAGConv(1, 1)])


def test_a_kernel_may_read_a_layer_that_nobody_hooked_or_replaced() -> None:
    class Own(LinearExperts):
        pass

    linear = LinearExperts(2, 2, num_experts=3)
    assert is_plain(linear)
    assert not is_plain(Own(2, 2, num_experts=3))
    linear.register_forward_hook(lambda *_: None)
    assert not is_plain(linear)


@pytest.mark.parametrize("cls", [AggregateOnce, AttentionExperts])
def test_a_stack_that_lacks_its_forward_is_not_built(cls: Any) -> None:
    """As told where it is built, not where it first runs."""
    with pytest.raises(TypeError, match="abstract"):
        cls([pyg.GCNConv(2, 2)], None)


class Forgetful(StackedExperts):
    """Experts whose author forgot the map of the root."""

    parts = ("lin_rel",)

    def forward(self, call: Any, routing: Any) -> Any: ...


def test_a_parameter_that_no_part_names_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden in the prototype, it would be neither trained nor saved by its name."""
    convs = [pyg.GraphConv(2, 2)]
    make = Make([pyg.GraphConv], 2, 2, (), {})
    with pytest.raises(ValueError, match=r"^parts: got .*Forgetful, expected .*lin_root.weight"):
        Forgetful(convs, make)
    monkeypatch.setattr(Forgetful, "parts", ("lin_rel", "lin_root"))
    assert Forgetful(convs, make).paths[-1] == "lin_root.weight"
