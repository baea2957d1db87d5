"""What follows from choices is computed when it is asked for, and once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gmoe import MoEConv, Routing
from tests.helpers.kernels import gradients, kernel_is
from tests.helpers.masked import features

LATE = ("token", "offsets", "weight", "slot", "expert", "scores")


def chosen(k: int = 2, requires_grad: bool = True) -> tuple[Routing, Tensor, Tensor]:
    """A routing of choices, their weights, and the logits of its scores."""
    expert_TK = torch.tensor([[1, 0], [2, 1], [0, 2], [1, 2]])[:, :k]
    weight_TK = features(4, k).requires_grad_(requires_grad)
    logits_TE = features(4, 3, seed=1).requires_grad_(requires_grad)
    routing = Routing.from_choices(expert_TK, weight_TK, num_experts=3, logits=logits_TE)
    return routing, weight_TK, logits_TE


@pytest.mark.parametrize("name", LATE)
def test_nothing_is_known_before_it_is_asked_for(name: str) -> None:
    routing, *_ = chosen()
    assert name not in vars(routing)
    assert getattr(routing, name) is getattr(routing, name)


def test_an_attribute_that_no_routing_has_is_named() -> None:
    routing, *_ = chosen()
    with pytest.raises(AttributeError, match="Routing: got expert_index"):
        _ = routing.expert_index


@pytest.mark.parametrize("k", [1, 2])
def test_the_pairs_are_the_choices_sorted_by_expert(k: int) -> None:
    routing, weight_TK, logits_TE = chosen(k)
    dense_TE = torch.zeros(4, 3, dtype=torch.float64)
    assert routing.choices is not None
    expected = dense_TE.scatter(1, routing.choices.expert_TK, weight_TK)
    pairs = dense_TE.index_put((routing.token, routing.expert), routing.weight)
    for found in (pairs, routing.to_dense()):
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*(gradients(y, [weight_TK]) for y in (found, expected)))
    places = routing.expert * 4 + routing.token
    assert torch.equal(places, places.sort().values)
    torch.testing.assert_close(routing.scores, logits_TE.softmax(dim=-1))


@pytest.mark.parametrize("which", ["weight", "scores"])
def test_who_asks_without_gradients_takes_none_from_who_asks_later(which: str) -> None:
    for mode in (torch.no_grad, torch.inference_mode):
        routing, *_ = chosen()
        with mode():
            _ = getattr(routing, which)
        assert getattr(routing, which).requires_grad


def test_what_is_kept_has_second_gradients() -> None:
    _, weight_TK, logits_TE = chosen()

    def values(weight_TK: Tensor, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        expert_TK = torch.tensor([[1, 0], [2, 1], [0, 2], [1, 2]])
        routing = Routing.from_choices(expert_TK, weight_TK.sin(), num_experts=3, logits=logits_TE)
        return routing.weight.square(), routing.scores

    assert torch.autograd.gradgradcheck(values, (weight_TK, logits_TE))


@pytest.mark.parametrize("name", ["gcn", "gin", "gat"])
def test_a_decision_outside_of_a_checkpoint_serves_layers_inside(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recomputation finds what the forward computed, and saves as many tensors."""
    monkeypatch.setattr("gmoe.routed.FEW_NUMBERS", 0)
    layer = MoEConv(name, 3, 3, num_experts=3, router=None, start="plain")
    x, edge_index = torch.randn(4, 3), torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])
    gradients = []
    with kernel_is("padded"):
        for runs_again in (False, True):
            routing, weight_TK, _ = chosen()
            if runs_again:
                y = checkpoint(layer, x, edge_index, routing=routing, use_reentrant=False)
            else:
                y = layer(x, edge_index, routing=routing)
            leaves = [weight_TK, *layer.parameters()]
            gradients.append(torch.autograd.grad(y.square().sum(), leaves))
    torch.testing.assert_close(*gradients)
