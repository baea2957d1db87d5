"""Running means of experts that choose. Shapes: T tokens, E experts."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gmoe import ExpertChoice, LinearExperts, MoE, MultiCentroid, Router
from gmoe.routers.expert_choice import ExpertSelection, Normalize


def selection(normalize: Normalize, momentum: float = 0.5) -> ExpertSelection:
    return ExpertSelection(1, 1, 0.5, normalize, "threshold", momentum)


def step(router: ExpertSelection, logits: list[float], batch: list[int] | None = None) -> None:
    """A training step of the one expert, at half of its group's tokens."""
    router(torch.tensor(logits)[:, None], len(logits) if batch is None else torch.tensor(batch))


def test_the_threshold_by_hand() -> None:
    router = selection("tokens")
    step(router, [4.0, 1.0, 3.0, 2.0])  # takes 4 and 3: the cut is 3
    assert router.threshold_E.tolist() == [3.0]
    step(router, [8.0, 0.0, 7.0, 6.0])  # cut 7; the second step counts half: 5
    assert router.threshold_E.tolist() == [5.0]
    step(router, [1.0, 1.0, 0.0, 0.0])  # cut 1; momentum .5 > 1/3: .5 * 5 + .5 * 1 = 3
    assert router.threshold_E.tolist() == [3.0]
    assert router.steps == 3


def test_the_first_steps_are_averaged_evenly() -> None:
    router = selection("tokens", momentum=0.1)
    for cut in (3.0, 6.0, 0.0):
        step(router, [cut + 1, cut, cut - 1, cut - 2])
    assert router.threshold_E.item() == pytest.approx((3 + 6 + 0) / 3)


def test_the_scale_by_hand() -> None:
    """What divides exp(logit): the sum over the group times the mean of the selected shares."""
    router = selection("tokens")
    step(router, torch.tensor([4.0, 1.0, 3.0, 2.0]).log().tolist())
    # sum 10; shares .4 and .3, mean .35: scale 3.5
    assert router.log_scale_E.exp().item() == pytest.approx(3.5)
    step(router, torch.tensor([1.0, 1.0, 5.0, 1.0]).log().tolist())
    # takes 5 and the first 1: sum 8, mean 3/8: scale 3; the logarithms are averaged
    assert router.log_scale_E.item() == pytest.approx((math.log(3.5) + math.log(3)) / 2)
    assert router.threshold_E.item() == pytest.approx((math.log(3) + math.log(1)) / 2)


RAGGED = [0, 1, 1, 1, 1, 0]


def test_the_threshold_is_the_mean_over_groups() -> None:
    router = selection("tokens")
    step(router, [9.0, 4.0, 1.0, 3.0, 2.0, 5.0], RAGGED)
    # group 0: (9, 5) takes 9; group 1: (4, 1, 3, 2) takes 4, 3, cut 3; mean (9 + 3) / 2
    assert router.threshold_E.item() == pytest.approx(6.0)


def test_the_scale_is_the_mean_over_groups() -> None:
    router = selection("tokens")
    step(router, torch.tensor([6.0, 4.0, 1.0, 3.0, 2.0, 2.0]).log().tolist(), RAGGED)
    # group 0: (6, 2) takes 6: sum 8, share .75: scale 6. Group 1: as above 3.5. Their logarithms' mean
    assert router.log_scale_E.item() == pytest.approx((math.log(6) + math.log(3.5)) / 2)


def test_the_threshold_of_probabilities_is_a_logarithm() -> None:
    router = ExpertSelection(2, 1, 1.0, "experts", "threshold", 0.5)
    probs = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.1, 0.9], [0.5, 0.5]])
    router(probs.log(), 4)  # expert 0 takes .8 and .6, expert 1 .9 and .5
    torch.testing.assert_close(router.threshold_E.exp(), torch.tensor([0.6, 0.5]))


def test_nothing_moves_in_evaluation() -> None:
    router = selection("tokens")
    step(router, [4.0, 1.0, 3.0, 2.0])
    router.eval()
    step(router, [9.0, 9.0, 9.0, 9.0])
    assert router.steps == 1
    assert router.threshold_E.tolist() == [3.0]


def test_group_inference_keeps_nothing() -> None:
    assert not dict(ExpertSelection(2, 1, 1.0, "tokens", "group", 0.1).named_buffers())
    assert "log_scale_E" not in dict(ExpertSelection(2, 1, 1.0, "experts", "threshold", 0.1).named_buffers())


ROUTERS: list[Callable[[], Router]] = [
    lambda: ExpertChoice(4, 3, normalize="tokens", inference="threshold"),
    lambda: ExpertChoice(4, 3, inference="threshold"),
    lambda: MultiCentroid(4, 3, choice="experts", normalize="tokens", inference="threshold"),
]


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("build", ROUTERS)
def test_checkpointing_counts_once(build: Callable[[], Router], use_reentrant: bool) -> None:
    torch.manual_seed(0)
    plain = MoE(build(), LinearExperts(4, 4, 3))
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


def test_counters_survive_a_state_dict() -> None:
    router, twin = selection("tokens"), selection("tokens")
    step(router, [4.0, 1.0, 3.0, 2.0])
    twin.load_state_dict(router.state_dict())
    step(router, [8.0, 0.0, 7.0, 6.0])
    step(twin, [8.0, 0.0, 7.0, 6.0])
    assert torch.equal(router.threshold_E, twin.threshold_E)
    assert twin.steps == 2


def test_repr() -> None:
    text = "ExpertSelection(normalize='tokens', inference='threshold', capacity_factor=0.5)"
    assert repr(selection("tokens")) == text


@pytest.mark.parametrize("normalize", ["experts", "tokens"])
def test_ties_do_not_depend_on_other_groups(normalize: Normalize) -> None:
    router = ExpertSelection(2, 1, 1.0, normalize, "group", 0.5)
    alone = router(torch.tensor([[0.0, 0.0], [1e-3, 0.0]]), torch.tensor([0, 0]), 1e-6)
    assert alone.token_P.tolist() == [1, 0]
    mates = torch.tensor([[0.0, 0.0], [1e-3, 0.0], [1e6, 1e6], [1e6, 1e6]])
    together = router(mates, torch.tensor([0, 0, 1, 1]), 1e-6)
    assert together.token_P.tolist() == [1, 2, 0, 2]


def test_the_scale_of_ties() -> None:
    router = ExpertSelection(2, 1, 1.0, "tokens", "group", 0.5)
    logits = torch.tensor([[0.0, 0.0], [1e-3, 0.0]])
    assert router(logits, 2, 1e-4).token_P.tolist() == [1, 0]
    assert router(logits, 2, 1e-4, torch.tensor(0.01)).token_P.tolist() == [0, 0]
