"""Additive scores: blocks of messages give what each message by itself gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from gmoe.conv import additive
from tests.gmoe.conv.masked import features

EXPERTS, ROWS, PAIRS, MESSAGES, WIDTH, HEADS = 3, 7, 5, 20, 4, 2


def scored(with_edges: bool) -> tuple[Any, ...]:
    """Arguments of the scores of messages; the second expert has none."""
    expert = torch.arange(MESSAGES) // (MESSAGES // 2) * 2  # ascending
    sender = torch.randint(ROWS, (MESSAGES,), generator=torch.Generator().manual_seed(0))
    receiver = torch.arange(MESSAGES) * PAIRS // MESSAGES
    edge_features = features(MESSAGES, 3), features(EXPERTS, 3, WIDTH)
    of_edges = edge_features if with_edges else (None, None)
    ends = features(ROWS, WIDTH), features(PAIRS, WIDTH)
    offsets = expert.bincount(minlength=EXPERTS).cumsum(0).to(torch.int32)
    attention = features(EXPERTS, WIDTH, HEADS)
    return *ends, *of_edges, attention, 0.2, sender, receiver, offsets


@pytest.mark.parametrize("with_edges", [False, True])
def test_operators_keep_torchs_rules(with_edges: bool) -> None:
    """Schema, fake kernel, tracing: what ``torch.compile`` needs."""
    inputs = scored(with_edges)
    grad = features(MESSAGES, HEADS)
    torch.library.opcheck(torch.ops.gmoe.score_additively.default, inputs)
    torch.library.opcheck(torch.ops.gmoe.score_additively_backward.default, (grad, *inputs))


def in_mixed_blocks(offsets: Tensor, number: int, _: Tensor) -> Iterator[additive._MixedBlock]:
    """Blocks of seven messages, as off the CPU."""
    for start in range(0, number, 7):
        place = slice(start, min(start + 7, number))
        yield additive._MixedBlock(place, offsets.clamp(place.start, place.stop) - place.start)


@pytest.mark.parametrize("with_edges", [False, True])
def test_blocks_of_any_experts_give_what_blocks_of_one_give(
    with_edges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores and gradients."""
    inputs, grad = scored(with_edges), features(MESSAGES, HEADS)

    def found() -> list[Tensor]:
        scores = additive._score_additively(*inputs)
        return [scores, *additive._score_additively_backward(grad, *inputs)]

    expected = found()
    monkeypatch.setattr(additive, "_blocks", in_mixed_blocks)
    torch.testing.assert_close(found(), expected)


def test_off_the_cpu_blocks_are_cut_without_the_ends_of_experts() -> None:
    """The device of no values stands for a GPU."""
    like = torch.empty(EXPERTS, WIDTH, HEADS, device="meta")
    offsets = torch.empty(EXPERTS, dtype=torch.int32, device="meta")
    (block,) = additive._blocks(offsets, MESSAGES, like)
    assert block.place == slice(0, MESSAGES)
