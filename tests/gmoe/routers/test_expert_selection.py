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
from gmoe.routing.expert_side import ExpertSide, Normalize
from gmoe.routing.groups import Groups


def side(normalize: Normalize, momentum: float = 0.5) -> ExpertSide:
    return ExpertSide(1, 1, 0.5, normalize, "threshold", momentum)


def step(router: ExpertSide, logits: list[float], pool: list[int] | None = None) -> None:
    """A training step of the one expert, at half of its pool's tokens."""
    groups = Groups.equal(1, len(logits)) if pool is None else Groups.from_segments(torch.tensor(pool))
    router(torch.tensor(logits)[:, None], groups, True)


def test_the_cut_by_hand() -> None:
    router = side("tokens")
    step(router, [4.0, 1.0, 3.0, 2.0])  # takes 4 and 3: the cut is 3
    assert router.cut_E.tolist() == [3.0]
    step(router, [8.0, 0.0, 7.0, 6.0])  # cut 7; the second step counts half: 5
    assert router.cut_E.tolist() == [5.0]
    step(router, [1.0, 1.0, 0.0, 0.0])  # cut 1; momentum .5 > 1/3: .5 * 5 + .5 * 1 = 3
    assert router.cut_E.tolist() == [3.0]
    assert router.steps == 3


def test_the_first_steps_are_averaged_evenly() -> None:
    router = side("tokens", momentum=0.1)
    for cut in (3.0, 6.0, 0.0):
        step(router, [cut + 1, cut, cut - 1, cut - 2])
    assert router.cut_E.item() == pytest.approx((3 + 6 + 0) / 3)


def test_the_scale_by_hand() -> None:
    """What divides exp(logit): the sum over the pool times the mean of the selected shares."""
    router = side("tokens")
    step(router, torch.tensor([4.0, 1.0, 3.0, 2.0]).log().tolist())
    # sum 10; shares .4 and .3, mean .35: scale 3.5
    assert router.log_scale_E.exp().item() == pytest.approx(3.5)
    step(router, torch.tensor([1.0, 1.0, 5.0, 1.0]).log().tolist())
    # takes 5 and the first 1: sum 8, mean 3/8: scale 3; the logarithms are averaged
    assert router.log_scale_E.item() == pytest.approx((math.log(3.5) + math.log(3)) / 2)
    assert router.cut_E.item() == pytest.approx((math.log(3) + math.log(1)) / 2)


RAGGED = [0, 1, 1, 1, 1, 0]


def test_the_cut_is_the_mean_over_groups() -> None:
    router = side("tokens")
    step(router, [9.0, 4.0, 1.0, 3.0, 2.0, 5.0], RAGGED)
    # pool 0: (9, 5) takes 9; pool 1: (4, 1, 3, 2) takes 4, 3, cut 3; mean (9 + 3) / 2
    assert router.cut_E.item() == pytest.approx(6.0)


def test_the_scale_is_the_mean_over_groups() -> None:
    router = side("tokens")
    step(router, torch.tensor([6.0, 4.0, 1.0, 3.0, 2.0, 2.0]).log().tolist(), RAGGED)
    # pool 0: (6, 2) takes 6: sum 8, share .75: scale 6. Pool 1: as above 3.5. Mean of the logarithms over the two groups
    assert router.log_scale_E.item() == pytest.approx((math.log(6) + math.log(3.5)) / 2)


def test_the_cut_of_probabilities_is_a_logarithm() -> None:
    router = ExpertSide(2, 1, 1.0, "experts", "threshold", 0.5)
    probs = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.1, 0.9], [0.5, 0.5]])
    router(probs.log(), Groups.equal(1, 4), True)  # expert 0 takes .8 and .6, expert 1 .9 and .5
    torch.testing.assert_close(router.cut_E.exp(), torch.tensor([0.6, 0.5]))


def test_nothing_moves_without_advance() -> None:
    router = side("tokens")
    router(torch.randn(4, 1), Groups.equal(1, 4), False)
    assert router.steps == 0
    router.eval()
    with pytest.raises(RuntimeError, match="no cut scores"):
        router(torch.randn(4, 1), Groups.equal(1, 4), False)


def test_pool_inference_keeps_nothing() -> None:
    assert not dict(ExpertSide(2, 1, 1.0, "tokens", "pool", 0.1).named_buffers())
    assert "log_scale_E" not in dict(ExpertSide(2, 1, 1.0, "experts", "threshold", 0.1).named_buffers())


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
    assert buffers["router.side.steps"] == 3
    for name, value in plain.named_buffers():
        assert torch.equal(value, buffers[name]), name


def test_counters_survive_a_state_dict() -> None:
    router, twin = side("tokens"), side("tokens")
    step(router, [4.0, 1.0, 3.0, 2.0])
    twin.load_state_dict(router.state_dict())
    step(router, [8.0, 0.0, 7.0, 6.0])
    step(twin, [8.0, 0.0, 7.0, 6.0])
    assert torch.equal(router.cut_E, twin.cut_E)
    assert twin.steps == 2


def test_repr() -> None:
    assert repr(side("tokens")) == "ExpertSide(normalize='tokens', inference='threshold', capacity_factor=0.5)"


@pytest.mark.parametrize("normalize", ["experts", "tokens"])
def test_ties_do_not_depend_on_other_groups(normalize: Normalize) -> None:
    router = ExpertSide(2, 1, 1.0, normalize, "pool", 0.5)
    logits = torch.tensor([[0.0, 0.0], [1e-3, 0.0]])
    alone = router(logits, Groups.from_segments(torch.tensor([0, 0])), False, 1e-6)
    assert alone.token_P.tolist() == [1, 0]
    mates = torch.tensor([[0.0, 0.0], [1e-3, 0.0], [1e6, 1e6], [1e6, 1e6]])
    together = router(mates, Groups.from_segments(torch.tensor([0, 0, 1, 1])), False, 1e-6)
    assert together.token_P.tolist() == [1, 2, 0, 2]


def test_the_scale_of_ties() -> None:
    router = ExpertSide(2, 1, 1.0, "tokens", "pool", 0.5)
    logits, groups = torch.tensor([[0.0, 0.0], [1e-3, 0.0]]), Groups.from_segments(torch.tensor([0, 0]))
    assert router(logits, groups, False, 1e-4).token_P.tolist() == [1, 0]
    assert router(logits, groups, False, 1e-4, torch.tensor(0.01)).token_P.tolist() == [0, 0]
