"""Soft MoE's slots equal the dense formula.

Shapes: T tokens, D width, E experts, S slots, N = E * S.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gmoe import SoftSlots
from gmoe.routers import SoftRouting
from tests.helpers.reference import INPUTS, group_lists

D, E, O = 5, 3, 4  # noqa: E741

SHAPES = {**INPUTS, "no_tokens": ((0, 4, D), None), "empty_groups": ((2, 0, D), None)}


class Layer(nn.Module):
    """A layer of affine experts on the slots of a router."""

    def __init__(self, slots: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = SoftSlots(D, num_experts=E, slots=slots)
        self.weight = nn.Parameter(torch.randn(E, D, O))
        self.bias = nn.Parameter(torch.randn(E, O))
        self.double()
        nn.init.constant_(self.router.scale, 1.7)

    def experts(self, x_RD: Tensor, offsets_E: Tensor) -> Tensor:
        load = offsets_E.diff(prepend=offsets_E.new_zeros(1)).tolist()
        parts = zip(x_RD.split(load), self.weight, self.bias, strict=True)
        return torch.cat([(rows @ weight + bias).tanh() for rows, weight, bias in parts])

    def forward(self, x: Tensor, batch: Tensor | None = None) -> tuple[Tensor, SoftRouting]:
        routing: SoftRouting = self.router(x, batch)
        y_TO = routing.combine(
            self.experts(routing.dispatch(x.reshape(-1, D)), routing.slot_offsets)
        )
        return y_TO.view(*x.shape[:-1], O), routing


def reference(layer: Layer, x: Tensor, batch: Tensor | None) -> tuple[Tensor, Tensor]:
    """The paper's algorithm 1 (and 2, normalization), a group at a time.

    Also (T, E) the combine weights.
    """
    x_TD, router = x.reshape(-1, D), layer.router
    y_TO = torch.zeros(len(x_TD), O, dtype=x.dtype)
    dense_TE = torch.zeros(len(x_TD), E, dtype=x.dtype)
    phi_NO = router.phi.flatten(0, 1)
    for tokens in group_lists(x, batch):
        x_SD = x_TD[tokens]
        logits_x = x_SD / (x_SD.square().sum(-1, keepdim=True).sqrt() + 1e-6)
        phi = router.scale * phi_NO / (phi_NO.square().sum(-1, keepdim=True).sqrt() + 1e-6)
        logits = logits_x @ phi.T
        slots_ESD = (logits.softmax(dim=0).T @ x_SD).view(E, -1, D)
        out_ESO = torch.stack(
            [(slots_ESD[e] @ layer.weight[e] + layer.bias[e]).tanh() for e in range(E)]
        )
        combine = logits.softmax(dim=1)
        y_TO = y_TO.index_copy(0, torch.tensor(tokens), combine @ out_ESO.flatten(0, 1))
        dense_TE = dense_TE.index_copy(
            0, torch.tensor(tokens), combine.view(len(tokens), E, -1).sum(-1)
        )
    return y_TO.view(*x.shape[:-1], O), dense_TE


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("name", SHAPES)
def test_equals_the_dense_formula_with_gradients(name: str, slots: int) -> None:
    shape, ids = SHAPES[name]
    layer = Layer(slots)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    batch = None if ids is None else torch.tensor(ids).view(shape[:-1])
    y, routing = layer(x, batch)
    expected, dense = reference(layer, x, batch)
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(routing.to_dense(), dense, atol=1e-12, rtol=0)
    wanted = [x, *layer.parameters()]
    grads = torch.autograd.grad(y.square().sum(), wanted)
    if x.numel():
        for found, right in zip(
            grads, torch.autograd.grad(expected.square().sum(), wanted), strict=True
        ):
            torch.testing.assert_close(found, right, atol=1e-12, rtol=0)
    assert all(grad.isfinite().all() for grad in grads)


def test_slots_start_at_the_size_of_one_row() -> None:
    """A normal distribution whose D values have a norm of about 1."""
    torch.manual_seed(0)
    phi = SoftSlots(64, num_experts=8, slots=8).phi
    assert float(phi.std()) == pytest.approx(1 / 8, rel=0.05)


def test_the_record_holds_all_pairs() -> None:
    routing = SoftSlots(D, num_experts=E, slots=2)(torch.randn(2, 6, D))
    assert routing.load.tolist() == [12] * E
    assert routing.coverage == 1
    torch.testing.assert_close(routing.to_dense().sum(-1), torch.ones(12))
    assert repr(routing) == "SoftRouting(12 tokens, 3 experts, load 12…12)"
    assert routing.select(slice(2)).num_tokens == 2


def test_a_bfloat16_model_has_slots_in_float32() -> None:
    routing = SoftSlots(D, num_experts=E).bfloat16()(torch.randn(6, D).bfloat16())
    assert routing.dispatch_TES.dtype == torch.float32
    assert routing.combine(routing.dispatch(torch.randn(6, D).bfloat16())).dtype == torch.bfloat16
