"""What a router returns. Shapes: T tokens, E experts, P pairs."""

from __future__ import annotations

import dataclasses
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gmoe import AuxLoss, Routing, aux_loss
from gmoe.routing.select import pairs_of_mask


def example() -> Routing:
    """Four tokens, three experts: 0 has token 1; 1 has none; 2 has 0, 1 and 3."""
    return Routing(
        token=torch.tensor([1, 0, 1, 3]),
        offsets=torch.tensor([1, 1, 4], dtype=torch.int32),
        weight=torch.tensor([0.5, 1.0, 0.25, 2.0], requires_grad=True),
        scores=torch.tensor([[0.5, 0.5, 0.0], [2.0, 2.0, 4.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]),
        num_tokens=4,
        losses={"a": AuxLoss(torch.tensor(3.0), 0.5), "b": AuxLoss(torch.tensor(2.0), 0.25)},
    )


def test_derived_properties() -> None:
    routing = example()
    assert routing.num_experts == 3
    assert routing.load.tolist() == [1, 0, 3]
    assert routing.load.dtype == routing.expert.dtype == torch.int64
    assert routing.expert.tolist() == [0, 2, 2, 2]
    assert routing.coverage.item() == 0.75  # token 2 has no expert
    # entropies log 2; of (1/4, 1/4, 1/2) 1.5 log 2; 0; 0 for all-zero scores. Mean 2.5 / 4 log 2
    assert routing.entropy.item() == pytest.approx(2.5 / 4 * math.log(2))
    assert routing.to_dense().tolist() == [[0, 0, 1.0], [0.5, 0, 0.25], [0, 0, 0], [0, 0, 2.0]]


def test_to_dense_is_differentiable() -> None:
    routing = example()
    (routing.to_dense() * torch.arange(12.0).view(4, 3)).sum().backward()
    assert routing.weight.grad is not None
    assert routing.weight.grad.tolist() == [3, 2, 5, 11]  # 3 t + e


def test_first_keeps_the_first_tokens() -> None:
    first = example().first(2)
    assert first.to_dense().tolist() == [[0, 0, 1.0], [0.5, 0, 0.25]]
    assert first.offsets.tolist() == [1, 1, 3]
    assert first.offsets.dtype == torch.int32
    assert first.scores.shape == (2, 3)
    assert first.num_tokens == 2
    assert first.aux_loss == example().aux_loss
    routing = example()
    assert routing.first(4) is routing
    assert routing.first(0).to_dense().shape == (0, 3)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(mask=st.lists(st.lists(st.booleans(), min_size=3, max_size=3), max_size=9), data=st.data())
def test_parts_of_a_routing(mask: list[list[bool]], data: st.DataObject) -> None:
    chosen_TE = torch.tensor(mask, dtype=torch.bool).view(-1, 3)
    token, offsets = pairs_of_mask(chosen_TE)
    scores = torch.rand(len(mask), 3)
    whole = Routing(token, offsets, torch.rand(len(token)), scores, len(mask), example().losses)
    order = data.draw(st.permutations(range(len(mask))))
    tokens = torch.tensor(order[: data.draw(st.integers(0, len(mask)))], dtype=torch.int64)
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(mask))] * 2)))
    for part, rows in ((whole.select(tokens), tokens), (whole.between(start, end), torch.arange(start, end))):
        assert torch.equal(part.to_dense(), whole.to_dense()[rows])
        assert torch.equal(part.scores, scores[rows])
        assert part.num_tokens == len(rows)
        assert (part.offsets.dtype, part.losses) == (torch.int32, whole.losses)
        pairs = list(zip(part.expert.tolist(), part.token.tolist(), strict=True))
        assert pairs == sorted(pairs)


def test_aux_loss_is_the_weighted_sum() -> None:
    # 0.5 * 3 + 0.25 * 2 = 2 a layer
    assert example().aux_loss.item() == 2.0
    assert aux_loss(example()).item() == 2.0
    assert aux_loss([example(), example()]).item() == 4.0
    assert aux_loss(iter([example()])).item() == 2.0
    assert aux_loss([]).item() == 0.0
    assert dataclasses.replace(example(), losses={}).aux_loss.item() == 0.0


def test_aux_loss_carries_gradients() -> None:
    value = torch.tensor(3.0, requires_grad=True)
    routing = dataclasses.replace(example(), losses={"a": AuxLoss(value, 0.5), "b": AuxLoss(2 * value, 0.25)})
    aux_loss([routing, routing]).backward()
    assert value.grad is not None
    assert value.grad.item() == 2.0  # twice (0.5 + 2 * 0.25)


def test_no_tokens() -> None:
    empty = torch.zeros(0)
    routing = Routing(empty.long(), torch.zeros(2, dtype=torch.int32), empty, torch.zeros(0, 2), 0)
    assert routing.load.tolist() == [0, 0]
    assert routing.expert.tolist() == []
    assert routing.coverage == 1
    assert routing.entropy == 0
    assert routing.aux_loss == 0
    assert routing.to_dense().shape == (0, 2)


def test_frozen_and_picklable() -> None:
    routing = dataclasses.replace(example(), weight=torch.ones(4))
    with pytest.raises(dataclasses.FrozenInstanceError):
        routing.num_tokens = 3  # type: ignore[misc]
    assert torch.equal(pickle.loads(pickle.dumps(routing)).to_dense(), routing.to_dense())
