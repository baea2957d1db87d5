"""Routings, their losses, and recording.

Shapes: T tokens, E experts, K experts a token, P pairs.
"""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gmoe import AuxLoss, Routing, TokenChoice, aux_loss


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def example() -> Routing:
    """Four tokens, three experts: 0 has token 1; 1 has none; 2 has 0, 1 and 3."""
    return Routing(
        token=torch.tensor([1, 0, 1, 3]),
        offsets=int32(1, 1, 4),
        weight=torch.tensor([0.5, 1.0, 0.25, 2.0], requires_grad=True),
        scores=torch.tensor([[0.5, 0.5, 0.0], [2.0, 2.0, 4.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]),
        num_tokens=4,
        losses={"a": AuxLoss(torch.tensor(3.0), 0.5), "b": AuxLoss(torch.tensor(2.0), 0.25)},
    )


def test_a_routing_equals_only_itself_and_may_be_a_key() -> None:
    routing = example()
    assert routing == routing
    assert routing != dataclasses.replace(routing)
    assert {routing: "kept"}[routing] == "kept"


def test_derived_properties() -> None:
    routing = example()
    assert (routing.num_experts, routing.load.tolist()) == (3, [1, 0, 3])
    assert routing.load.dtype == routing.expert.dtype == torch.int64
    assert routing.expert.tolist() == [0, 2, 2, 2]
    assert routing.coverage.item() == 0.75  # token 2 has no expert
    # entropies log 2; of (1/4, 1/4, 1/2) 1.5 log 2; 0; 0 for all-zero scores. Mean 2.5 / 4 log 2
    assert routing.entropy.item() == pytest.approx(2.5 / 4 * math.log(2))
    assert routing.to_dense().tolist() == [[0, 0, 1.0], [0.5, 0, 0.25], [0, 0, 0], [0, 0, 2.0]]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(mask=st.lists(st.lists(st.booleans(), min_size=3, max_size=3), max_size=9), data=st.data())
def test_parts_of_a_routing(mask: list[list[bool]], data: Any) -> None:
    chosen_TE = torch.tensor(mask, dtype=torch.bool).view(-1, 3)
    _, token = chosen_TE.T.nonzero().T
    offsets = chosen_TE.sum(dim=0).cumsum(0).to(torch.int32)
    scores = torch.rand(len(mask), 3)
    dropped = torch.arange(len(mask))
    whole = Routing(
        token, offsets, torch.rand(len(token)), scores, len(mask), example().losses, dropped
    )
    whole = dataclasses.replace(whole, detached=True)  # its losses train nothing
    start, end = sorted(data.draw(st.tuples(*[st.integers(0, len(mask))] * 2)))
    experts = data.draw(st.permutations(range(3)))[: data.draw(st.integers(1, 3))]
    rows = slice(start, end)
    for part, columns in ((whole.select(rows), [0, 1, 2]), (whole.select(rows, experts), experts)):
        dataclasses.replace(part)  # which checks the pairs
        assert torch.equal(part.to_dense(), whole.to_dense()[rows][:, columns])
        assert torch.equal(part.scores, scores[rows][:, columns])
        assert (part.dropped, part.num_tokens, part.losses) == (
            dropped[rows].sum(),
            end - start,
            whole.losses,
        )
        assert part.detached
    assert whole.select(slice(len(mask))) is whole
    assert torch.equal(whole.select(experts=experts).to_dense(), whole.to_dense()[:, experts])


def test_aux_loss_is_the_weighted_sum() -> None:
    value = torch.tensor(3.0, requires_grad=True)
    routing = dataclasses.replace(
        example(), losses={"a": AuxLoss(value, 0.5), "b": AuxLoss(2 * value, 0.25)}
    )
    found = [
        aux_loss(routings).item() for routings in (routing, [routing, routing], iter([routing]), [])
    ]
    assert found == [3.0, 6.0, 3.0, 0.0]  # 0.5 * 3 + 0.25 * 6 a layer
    (grad,) = torch.autograd.grad(aux_loss([routing, routing]), value)
    assert grad.item() == 2.0  # twice (0.5 + 2 * 0.25)
    with pytest.raises(ValueError, match=r"^routings: got a dictionary, expected its values\(\)"):
        aux_loss({"relation": routing})  # type: ignore[dict-item]


def test_no_tokens() -> None:
    empty = torch.zeros(0)
    routing = Routing(empty.long(), int32(0, 0), empty, torch.zeros(0, 2), 0)
    assert (routing.load.tolist(), routing.expert.tolist()) == ([0, 0], [])
    assert [value.item() for value in (routing.coverage, routing.entropy, routing.aux_loss)] == [
        1,
        0,
        0,
    ]
    assert "0 tokens" in routing.summary()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data(), num_tokens=st.integers(0, 7), k=st.integers(1, 4))
def test_from_choices_puts_each_weight_at_its_pair(data: Any, num_tokens: int, k: int) -> None:
    rows = [data.draw(st.permutations(range(4)))[:k] for _ in range(num_tokens)]
    expert = torch.tensor(rows, dtype=torch.int32).view(num_tokens, k)
    weight = torch.rand(num_tokens, k, requires_grad=True)
    routing = Routing.from_choices(expert, weight, num_experts=4, losses=example().losses)
    expected = torch.zeros(num_tokens, 4).scatter(1, expert.long(), weight.detach())
    assert torch.equal(routing.to_dense(), expected)
    assert torch.equal(routing.scores, expected)
    assert Routing.from_choices(expert, weight, num_experts=4, scores=expected).scores is expected
    assert routing.losses == example().losses
    (grad,) = torch.autograd.grad((routing.to_dense() * expected).sum(), weight)
    assert torch.equal(grad, weight)


@pytest.mark.parametrize(
    ("expert", "weight", "name"),
    [
        ([[0, 3]], [[0.5, 0.5]], "expert_TK"),
        ([[-1, 2]], [[0.5, 0.5]], "expert_TK"),
        ([[1, 1]], [[0.5, 0.5]], "expert_TK"),
        ([[0, 1]], [[0.5]], "weight_TK"),
        ([0, 1], [0.5, 0.5], "expert_TK"),
        ([[0.0, 1.0]], [[0.5, 0.5]], "expert_TK"),
        ([[0, 1]], [[1, 2]], "weight_TK"),
        ([[0, 1]], [[0.5, 0.5]], "scores"),
    ],
    ids=str,
)
def test_from_choices_refuses(expert: list[Any], weight: list[Any], name: str) -> None:
    scores = torch.ones(1, 4) if name == "scores" else None
    with pytest.raises(ValueError, match=f"^{name}: got"):
        Routing.from_choices(
            torch.tensor(expert), torch.tensor(weight), num_experts=3, scores=scores
        )


def test_of_doubled_rows_the_first_is_named() -> None:
    expert_TK = torch.tensor([[0, 1], [2, 2], [1, 1]])
    with pytest.raises(ValueError, match=r"^expert_TK: got a row \[2, 2\], expected distinct"):
        Routing.from_choices(expert_TK, torch.ones(3, 2), num_experts=3)


def test_the_top_expert_is_that_of_the_largest_weight_whatever_its_sign() -> None:
    expert, weight = (
        torch.tensor([[0, 1], [1, 2], [0, 2]]),
        torch.tensor([[-1.0, -2.0], [-3.0, 0.0], [0.5, 0.7]]),
    )
    assert Routing.from_choices(expert, weight, num_experts=4).top_expert.tolist() == [0, 2, 2]
    assert Routing.from_choices(
        expert[:, :0], weight[:, :0], num_experts=4
    ).top_expert.tolist() == [4, 4, 4]


@pytest.mark.parametrize(
    "changes",
    [
        *(
            {"offsets": int32(*ends)} for ends in ((1, 0, 3), (1, 1, 3), (-1, 1, 4), ())
        ),  # the first are loads
        {"offsets": torch.tensor([1, 1, 4])},
        *(
            {"token": torch.tensor(token)}
            for token in ([1, 0, 3, 1], [1, 0, 1, 1], [1, 0, 1, 4], [1, -1, 1, 3])
        ),
        {"token": torch.tensor([1, 0, 1, 3]).int()},
        {"weight": torch.ones(3)},
        {"scores": torch.ones(4, 2)},
        {"slot": torch.tensor([1, 0, 2])},
        {"slot": torch.tensor([1, 0, 1, 3])},  # twice
        {"slot": torch.tensor([1, 0, 2, 3])},  # of other tokens
        {"slot": torch.tensor([1, 0, 2, 3]).int()},
    ],
    ids=str,
)
def test_what_is_no_routing_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(changes))}: got"):
        dataclasses.replace(example(), **changes)


def test_values_of_fake_and_meta_tensors_are_not_read() -> None:
    with FakeTensorMode():
        fake = Routing.from_choices(
            torch.zeros(4, 1, dtype=torch.long), torch.ones(4, 1), num_experts=3
        )
    meta = Routing.from_choices(
        torch.zeros(4, 1, dtype=torch.long, device="meta"),
        torch.ones(4, 1, device="meta"),
        num_experts=3,
    )
    assert repr(fake) == repr(meta) == "Routing(4 tokens, 3 experts)"


def test_summary_names_loads_and_losses() -> None:
    text = dataclasses.replace(example(), dropped_T=torch.tensor([0, 0, 2, 0])).summary()
    for line in (
        "expert 2: 3 tokens (75.0%",
        "coverage: 75.0%",
        "dropped pairs: 2",
        "loss b: 2 (coefficient 0.25)",
    ):
        assert line in text


def test_losses_computed_without_gradients_in_training_warn() -> None:
    router, x = TokenChoice(4, num_experts=3, balance="switch"), torch.randn(6, 4)
    with torch.no_grad():
        routing, bare = router(x), TokenChoice(4, num_experts=3)(x)
        evaluated = router.eval()(x)
        aux_loss(routing)  # nothing is to be trained
    frozen = router.train().requires_grad_(False)(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        aux_loss([bare, evaluated, frozen])
    with pytest.warns(UserWarning, match="use_reentrant=False"):
        aux_loss([frozen, routing])


@pytest.mark.parametrize("wrong", [None, [[]], ["routing"], torch.ones(2)], ids=str)
def test_losses_are_those_of_routings(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"^routings: got \w+, expected a Routing, or one of each"):
        aux_loss(wrong)


@pytest.mark.parametrize("experts", [[], [0, 0], [-1], [1, 4]])
def test_select_refuses_experts_that_are_not_distinct_or_not_there(experts: list[int]) -> None:
    routing = Routing.from_choices(torch.tensor([[0], [3]]), torch.ones(2, 1), num_experts=4)
    with pytest.raises(ValueError, match=rf"^experts: got {re.escape(str(experts))}, expected dis"):
        routing.select(experts=experts)


def test_a_part_of_a_routing_is_not_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    routing = example()
    monkeypatch.setattr(Routing, "_check_shapes", None)
    assert routing.select(slice(2)).num_tokens == 2


def test_a_slice_with_a_step_is_refused() -> None:
    expert = torch.tensor([[0], [1], [0], [1]])
    routing = Routing.from_choices(expert, torch.ones(4, 1), num_experts=2)
    for step in (2, -1):
        with pytest.raises(ValueError, match=r"^tokens: got slice.*expected a slice of step 1"):
            routing.select(slice(None, None, step))


@given(data=st.data(), k=st.integers(1, 3), num_tokens=st.integers(1, 9))
def test_a_slice_of_tokens_of_k_experts_keeps_their_slots(
    data: Any, k: int, num_tokens: int
) -> None:
    start = data.draw(st.integers(0, num_tokens))
    stop = data.draw(st.integers(start, num_tokens))
    expert_TK = torch.rand(num_tokens, 4).argsort(dim=1)[:, :k]
    weight_TK = torch.rand(num_tokens, k, requires_grad=True)
    whole = Routing.from_choices(expert_TK, weight_TK, num_experts=4)
    part = whole.select(slice(start, stop))
    assert torch.equal(part.to_dense(), whole.to_dense()[start:stop])
    dataclasses.replace(part, validate=True)
    if start < stop:
        assert part.slot is not None
        (grad_TK,) = torch.autograd.grad(part.weight.sum(), weight_TK)
        assert grad_TK[start:stop].eq(1).all()
        assert grad_TK.sum() == (stop - start) * k
