"""Additive scores: blocks of messages give what each message by itself gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gmoe import sums
from gmoe.conv import additive
from tests.helpers.masked import features

EXPERTS, ROWS, PAIRS, MESSAGES, WIDTH, HEADS = 3, 7, 5, 20, 4, 2


def scored(with_edges: bool, slope: float = 0.2) -> tuple[Any, ...]:
    """Arguments of the scores of messages; the second expert has none."""
    expert = torch.arange(MESSAGES) // (MESSAGES // 2) * 2  # ascending
    sender = torch.randint(ROWS, (MESSAGES,), generator=torch.Generator().manual_seed(0))
    receiver = torch.arange(MESSAGES) * PAIRS // MESSAGES
    edge_features = features(MESSAGES, 3), features(EXPERTS, 3, WIDTH)
    of_edges = edge_features if with_edges else (None, None)
    ends = features(ROWS, WIDTH), features(PAIRS, WIDTH)
    offsets = expert.bincount(minlength=EXPERTS).cumsum(0).to(torch.int32)
    attention = features(EXPERTS, WIDTH, HEADS)
    return *ends, *of_edges, attention, slope, sender, receiver, offsets


def test_on_the_cpu_a_block_is_of_one_expert_and_fits_its_caches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sums, "NUMBERS", 6 * WIDTH)
    *_, offsets = scored(with_edges=False)
    experts, blocks = zip(*additive._blocks(offsets, WIDTH), strict=True)
    assert experts == (0, 0, 2, 2)
    places = [range(MESSAGES)[block] for block in blocks]
    assert places == [range(6), range(6, 10), range(10, 16), range(16, 20)]


@pytest.mark.parametrize("with_edges", [False, True])
def test_second_gradients_are_those_of_the_scores(with_edges: bool) -> None:
    inputs = scored(with_edges=with_edges)
    *values, slope, sender, receiver, offsets = inputs
    leaves = [value for value in values if value is not None]

    def run(*leaves: Tensor) -> Any:
        given = iter(leaves)
        used = (None if value is None else next(given) for value in values)
        return additive._AdditiveScores.apply(*used, slope, sender, receiver, offsets).square()

    assert torch.autograd.gradgradcheck(run, [leaf.requires_grad_() for leaf in leaves])
