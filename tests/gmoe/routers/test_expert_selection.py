"""Running means of experts that choose. Shapes: T tokens, E experts."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gmoe import ExpertChoice, LinearExperts, MoE, MultiCentroid, Routing
from gmoe.routers.expert_choice import ExpertSelection, Normalize

RAGGED = [0, 1, 1, 1, 1, 0]


def selection(normalize: Normalize = "tokens", momentum: float = 0.5) -> ExpertSelection:
    return ExpertSelection(1, 1, 0.5, normalize, "threshold", momentum)


def step(router: ExpertSelection, logits: list[float], batch: list[int] | None = None) -> None:
    """A training step of the one expert, at half of its group's tokens."""
    group = len(logits) if batch is None else torch.tensor(batch)
    router.move(router(torch.tensor(logits)[:, None], group, "score")[1])


def logs(*values: float) -> list[float]:
    return [math.log(value) for value in values]


def test_the_threshold_by_hand() -> None:
    router = selection()
    step(router, [4.0, 1.0, 3.0, 2.0])  # takes 4 and 3: the cut is 3
    assert router.threshold_E.tolist() == [3.0]
    step(router, [8.0, 0.0, 7.0, 6.0])  # cut 7; the second step counts half: 5
    assert router.threshold_E.tolist() == [5.0]
    step(router, [1.0, 1.0, 0.0, 0.0])  # cut 1; momentum .5 > 1/3: .5 * 5 + .5 * 1 = 3
    assert router.threshold_E.tolist() == [3.0]
    router.eval()
    step(router, [9.0, 9.0, 9.0, 9.0])
    assert (router.steps.item(), router.threshold_E.item()) == (3, 3.0)  # nothing moves in evaluation


def test_the_first_steps_are_averaged_evenly() -> None:
    router = selection(momentum=0.1)
    for cut in (3.0, 6.0, 0.0):
        step(router, [cut + 1, cut, cut - 1, cut - 2])
    assert router.threshold_E.item() == pytest.approx((3 + 6 + 0) / 3)


def test_the_scale_by_hand() -> None:
    """What divides exp(logit): the sum over the group times the mean of the selected shares."""
    router = selection()
    step(router, logs(4, 1, 3, 2))  # sum 10; shares .4 and .3, mean .35: scale 3.5
    assert router.log_scale_E.exp().item() == pytest.approx(3.5)
    step(router, logs(1, 1, 5, 1))  # takes 5 and the first 1: sum 8, mean 3/8: scale 3; the logarithms are averaged
    assert router.log_scale_E.item() == pytest.approx((math.log(3.5) + math.log(3)) / 2)
    assert router.threshold_E.item() == pytest.approx((math.log(3) + math.log(1)) / 2)


def test_both_are_means_over_groups() -> None:
    router = selection()
    step(router, logs(6, 4, 1, 3, 2, 2), RAGGED)
    # group 0: (6, 2) takes 6: sum 8, share .75: scale 6. Group 1: (4, 1, 3, 2) takes 4 and 3: scale 3.5, as above
    assert router.threshold_E.item() == pytest.approx((math.log(6) + math.log(3)) / 2)
    assert router.log_scale_E.item() == pytest.approx((math.log(6) + math.log(3.5)) / 2)


def test_the_threshold_of_probabilities_is_a_logarithm() -> None:
    router = ExpertSelection(2, 1, 1.0, "experts", "threshold", 0.5)
    probs = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.1, 0.9], [0.5, 0.5]])
    router.move(router(probs.log(), 4, "score")[1])  # expert 0 takes .8 and .6, expert 1 .9 and .5
    torch.testing.assert_close(router.threshold_E.exp(), torch.tensor([0.6, 0.5]))


def test_group_inference_keeps_nothing() -> None:
    assert not dict(ExpertSelection(2, 1, 1.0, "tokens", "group", 0.1).named_buffers())
    assert "log_scale_E" not in dict(ExpertSelection(2, 1, 1.0, "experts", "threshold", 0.1).named_buffers())


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("normalize", ["experts", "tokens"])
@pytest.mark.parametrize("router", [ExpertChoice, MultiCentroid])
def test_checkpointing_counts_once(router: Any, normalize: Normalize, use_reentrant: bool) -> None:
    options: dict[str, Any] = {"choice": "experts"} if router is MultiCentroid else {}
    torch.manual_seed(0)
    plain = MoE(router(4, 3, normalize=normalize, inference="threshold", **options), LinearExperts(4, 4, 3))
    saved = copy.deepcopy(plain)
    for _ in range(3):
        x = torch.randn(12, 4, requires_grad=True)
        plain(x).sum().backward()
        y = checkpoint(saved, x, use_reentrant=use_reentrant)
        assert isinstance(y, Tensor)
        y.sum().backward()
    buffers = dict(saved.named_buffers())
    assert buffers["router.selection.steps"] == 3
    for name, value in plain.named_buffers():
        assert torch.equal(value, buffers[name]), name


def test_repr() -> None:
    text = "ExpertSelection(normalize='tokens', inference='threshold', capacity_factor=0.5)"
    assert repr(selection()) == text


@pytest.mark.parametrize("normalize", ["experts", "tokens"])
def test_scores_that_differ_by_rounding_are_ties_whatever_other_groups_hold(normalize: Normalize) -> None:
    router = ExpertSelection(2, 1, 1.0, normalize, "group", 0.5)

    def taken(gap: float, scale: float, mates: list[list[float]]) -> list[int]:
        logits = torch.tensor([[0.0, 0.0], [gap, 0.0], *mates])
        group = torch.arange(2).repeat_interleave(2)[: len(logits)]
        routing: Routing = router(logits, group, "score", torch.tensor(scale))[0]
        return routing.token.tolist()

    assert taken(1e-3, 1.0, []) == [1, 0]
    assert taken(1e-3, 1e-4, []) == [0, 0]  # logits times the scale are 1e-7 apart
    assert taken(1e-3, 1.0, [[1e6, 1e6], [1e6, 1e6]]) == [1, 2, 0, 2]
