"""Running means of experts that choose. Shapes: T tokens, E experts."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch

from gmoe import ExpertChoice
from gmoe.routers.expert_choice import ExpertSelection

RAGGED = [0, 1, 1, 1, 1, 0]


class Chooser(NamedTuple):
    """A router for one expert that takes half of its group's tokens, called with logits."""

    router: ExpertChoice

    def __call__(self, logits: list[float], batch: list[int] | None = None) -> None:
        self.router(torch.tensor(logits)[:, None], None if batch is None else torch.tensor(batch))


def chooser() -> tuple[Chooser, ExpertSelection]:
    router = ExpertChoice(1, 1, capacity_factor=0.5, normalize="tokens", inference="threshold", momentum=0.5)
    torch.nn.init.ones_(router.gate.weight)
    return Chooser(router), router.selection


def logs(*values: float) -> list[float]:
    return [math.log(value) for value in values]


def test_the_threshold_by_hand() -> None:
    step, router = chooser()
    step([4.0, 1.0, 3.0, 2.0])  # takes 4 and 3: the cut is 3
    assert router.threshold_E.tolist() == [3.0]
    step([8.0, 0.0, 7.0, 6.0])  # cut 7; the second step counts half: 5
    assert router.threshold_E.tolist() == [5.0]
    step([1.0, 1.0, 0.0, 0.0])  # cut 1; momentum .5 > 1/3: .5 * 5 + .5 * 1 = 3
    assert router.threshold_E.tolist() == [3.0]
    step.router.eval()
    step([9.0, 9.0, 9.0, 9.0])
    assert (router.steps.item(), router.threshold_E.item()) == (3, 3.0)  # nothing moves in evaluation


def test_the_scale_by_hand() -> None:
    """The divisor of exp(logit): the sum over the group times the mean of the selected shares."""
    step, router = chooser()
    step(logs(4, 1, 3, 2))  # sum 10; shares .4 and .3, mean .35: scale 3.5
    assert router.log_scale_E.exp().item() == pytest.approx(3.5)
    step(logs(1, 1, 5, 1))  # takes 5 and the first 1: sum 8, mean 3/8: scale 3; the logarithms are averaged
    assert router.log_scale_E.item() == pytest.approx((math.log(3.5) + math.log(3)) / 2)
    assert router.threshold_E.item() == pytest.approx((math.log(3) + math.log(1)) / 2)


def test_both_are_means_over_groups() -> None:
    step, router = chooser()
    step(logs(6, 4, 1, 3, 2, 2), RAGGED)
    # group 0: (6, 2) takes 6: sum 8, share .75: scale 6. Group 1: (4, 1, 3, 2) takes 4 and 3: scale 3.5, as above
    assert router.threshold_E.item() == pytest.approx((math.log(6) + math.log(3)) / 2)
    assert router.log_scale_E.item() == pytest.approx((math.log(6) + math.log(3.5)) / 2)
