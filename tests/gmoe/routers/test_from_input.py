"""A learned mixture of experts, from a vector that the model is called with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import gmoe
from gmoe.routers import FromInput
from tests.helpers.sources import (
    BATCH,
    BY_VECTOR,
    Net,
    atoms,
    equal_with_gradients,
    naive,
    net,
    systems,
)


def test_a_vector_for_each_molecule_mixes_the_weights() -> None:
    model, x = net(BY_VECTOR, num_experts=5), atoms()
    weight_GE = torch.softmax(model.router_of_system(systems()), dim=1)
    assert weight_GE.shape == (4, 5)
    expected = naive(model, x, weight_GE)
    equal_with_gradients(model, model(x, BATCH, system=systems()), expected, x)


def test_without_a_batch_each_token_has_its_vector() -> None:
    model, x = net(FromInput("system", dim=4), mix="outputs"), atoms()
    weight_TE = torch.softmax(model.router_of_system(x.detach()), dim=1)
    out = model(x, system=x.detach())
    y_TEO = torch.einsum("ti,eoi->teo", x, model.lin1.experts.weight) + model.lin1.experts.bias
    h = torch.einsum("te,teo->to", weight_TE, y_TEO).tanh()
    second = model.lin2.experts
    up = torch.einsum("ti,eoi->teo", h, second.up.weight) + second.up.bias
    down = torch.einsum("teo,epo->tep", nn.functional.silu(up), second.down.weight)
    expected = torch.einsum("te,teo->to", weight_TE, down + second.down.bias)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("is_cast", [True, False])
def test_weights_sum_to_one_in_half_precision(is_cast: bool) -> None:
    """Under autocast they are those of float32; a model that was cast rounds its logits."""
    dtype = torch.bfloat16 if is_cast else torch.float32
    model, system = net(BY_VECTOR).to(dtype), 9 * systems()
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=not is_cast),
        gmoe.record_routing(model) as routings,
    ):
        model(atoms().to(dtype), BATCH, system=system)
    of_groups: Any = routings[0].by_group
    weight_GE = of_groups.routing.to_dense()
    torch.testing.assert_close(weight_GE.sum(dim=1), torch.ones(4), rtol=0, atol=1e-6)
    if not is_cast:
        expected = torch.softmax(model.router_of_system(system.float()), dim=1)
        torch.testing.assert_close(weight_GE, expected, rtol=0, atol=1e-6)


def test_vectors_of_several_groups_need_their_batch() -> None:
    with pytest.raises(ValueError, match=r"^system: got 4 vectors without a batch"):
        net(BY_VECTOR)(atoms(), system=systems())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FromInput("system", dim=0), "dim: got 0"),
        (lambda: FromInput("a b", dim=2), "argument: got 'a b', expected the name"),
        (lambda: FromInput("data.", dim=2), "argument: got 'data.', expected the name"),
        (lambda: FromInput("other", dim=2).attach(net(BY_VECTOR)), "argument: got 'other', exp"),
        (lambda: FromInput("system", dim=2).attach(Net()), r"model: got layers of \[\] experts"),
    ],
)
def test_what_does_not_fit_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{message}"):
        make()
