"""Tokens and their pairs, by places. Shapes: T tokens, P pairs, I, O features."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gmoe import MoEConv
from gmoe.places import ToPairs, ToTokens
from gmoe.products import combine, dispatch
from gmoe.routing import Routing
from tests.helpers.kernels import Noted, gradients, routings
from tests.helpers.masked import features


@pytest.mark.parametrize(
    "routing", routings(), ids=["K=1", "K=3", "K=0", "no tokens", "any number"]
)
def test_tokens_and_pairs_on_cuda_as_on_the_cpu(routing: Routing) -> None:
    x_TI = features(routing.num_tokens, 5).requires_grad_()
    y_PO = features(len(routing.token), 5, seed=2).requires_grad_()
    gathered, expected = (
        ToPairs.apply(x_TI, routing.token, routing.place),
        x_TI[routing.token],
    )
    torch.testing.assert_close(
        [gathered, *gradients(gathered, [x_TI])], [expected, *gradients(expected, [x_TI])]
    )
    summed = ToTokens.apply(y_PO, routing.token, routing.place, routing.num_tokens)
    expected = torch.zeros(x_TI.shape, dtype=torch.float64).index_add(0, routing.token, y_PO)
    torch.testing.assert_close(
        [summed, *gradients(summed, [y_PO])], [expected, *gradients(expected, [y_PO])]
    )


def test_compiled_code_takes_rows_of_tokens_of_one_pair() -> None:
    """Their slots are the tokens themselves, and the compiler takes no tensor twice."""
    layer = MoEConv("gin", 8, 8, start="copies")
    x, edge_index = torch.randn(30, 8), torch.randint(30, (2, 120))
    compiled = torch.compile(layer.eval(), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, edge_index), layer(x, edge_index))


def test_nothing_is_added_to_tokens_of_one_pair() -> None:
    (one_each, _, _, _, any_number) = routings()
    for routing, adds in ((one_each, False), (any_number, True)):
        x_TI = features(9, 3).requires_grad_()
        with Noted() as noted:
            rows_PI = dispatch(x_TI, routing)
            combine(rows_PI, routing).sum().backward()
        added = [name for name in noted.names if "index_add" in name or "index_put" in name]
        assert bool(added) == adds


@pytest.mark.parametrize("routing", routings())
def test_rows_that_move_by_places_have_second_gradients(routing: Routing) -> None:
    places = routing.place

    def to_pairs(x: Tensor) -> Tensor:
        return ToPairs.apply(x.sin(), routing.token, places).square()

    def to_tokens(y: Tensor) -> Tensor:
        return ToTokens.apply(y.sin(), routing.token, places, routing.num_tokens).square()

    x = features(routing.num_tokens, 3).requires_grad_()
    y = features(len(routing.token), 3).requires_grad_()
    assert torch.autograd.gradgradcheck(to_pairs, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(to_tokens, y, fast_mode=True)


def test_places_that_inference_read_first_serve_training() -> None:
    routing = Routing.from_choices(torch.tensor([[1], [0], [1]]), torch.ones(3, 1), num_experts=2)
    with torch.inference_mode():
        assert routing.place.tolist() == [1, 0, 2]
    x = torch.randn(3, 4, requires_grad=True)
    ToPairs.apply(x, routing.token, routing.place).sum().backward()
    assert x.grad is not None
