"""Auxiliary losses on numbers worked by hand.

Shapes: T tokens, E experts, M centroids an expert, D width.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from gmoe import cv_squared, importance_loss, load_loss, separation_loss, switch_loss, z_loss
from gmoe.losses import expected_load

PROBS = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.1, 0.9]], dtype=torch.float64)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def test_cv_squared() -> None:
    # mean 2, population variance ((1-2)^2 + 0 + (3-2)^2) / 3 = 2/3, CV^2 = (2/3) / 4 = 1/6
    torch.testing.assert_close(
        cv_squared(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)), scalar(1 / 6)
    )
    assert cv_squared(torch.full((4,), 7.0)) == 0
    # one of E has everything: mean 1/E, variance (1/E)(1 - 1/E), CV^2 = E - 1
    torch.testing.assert_close(cv_squared(torch.tensor([0.0, 5, 0, 0])), torch.tensor(3.0))
    assert cv_squared(torch.zeros(3)) == 0


def test_importance_loss() -> None:
    # sums .8+.6+.1 = 1.5 and .2+.4+.9 = 1.5: even
    torch.testing.assert_close(importance_loss(PROBS), scalar(0.0))
    # without the last token: 1.4 and .6; mean 1, variance .16, CV^2 .16
    torch.testing.assert_close(importance_loss(PROBS[:2]), scalar(0.16))


def test_load_loss() -> None:
    # E = 3, K = 1, one token. The threshold of an expert is the best noisy logit of the others.
    clean = torch.tensor([[1.0, 0.0, 0.5]], dtype=torch.float64)
    noisy = torch.tensor([[1.2, 0.1, 0.7]], dtype=torch.float64)
    std = torch.tensor([[0.5, 1.0, 2.0]], dtype=torch.float64)
    # The others' best, and the margin to it:
    # e=0: .7, (1 - .7) / .5 = .6; e=1: 1.2, (0 - 1.2) / 1 = -1.2; e=2: 1.2, (.5 - 1.2) / 2 = -.35
    phi = NormalDist().cdf
    load = [phi(0.6), phi(-1.2), phi(-0.35)]  # .7257, .1151, .3632
    mean = sum(load) / 3  # .4013
    variance = sum((p - mean) ** 2 for p in load) / 3  # .0629
    torch.testing.assert_close(load_loss(clean, noisy, std, 1), scalar(variance / mean**2))
    assert variance / mean**2 == pytest.approx(0.3905, abs=2e-4)


def test_load_loss_at_two_experts_a_token() -> None:
    # K = 2: the threshold is the second best noisy logit of the others
    clean = noisy = torch.tensor([[3.0, 2.0, 1.0]], dtype=torch.float64)
    std = torch.ones(1, 3, dtype=torch.float64)
    # e=0: others 2, 1 -> 1, Phi(2); e=1: others 3, 1 -> 1, Phi(1); e=2: others 3, 2 -> 2, Phi(-1)
    phi = NormalDist().cdf
    load = torch.tensor([phi(2), phi(1), phi(-1)], dtype=torch.float64)
    torch.testing.assert_close(load_loss(clean, noisy, std, 2), cv_squared(load))
    assert load_loss(clean, noisy, std, 3) == 0  # K = E: every load is T
    assert expected_load(clean, noisy, std, 3).tolist() == [1, 1, 1]


def test_switch_loss() -> None:
    # argmax 0, 0, 1: f = (2/3, 1/3); P = (1.5/3, 1.5/3) = (.5, .5); 2 * (2/3 * .5 + 1/3 * .5) = 1
    torch.testing.assert_close(switch_loss(PROBS, torch.tensor([2, 1])), scalar(1.0))
    # two tokens: f = (1, 0), P = (.7, .3); 2 * .7 = 1.4
    torch.testing.assert_close(switch_loss(PROBS[:2], torch.tensor([2, 0])), scalar(1.4))
    # f sums to 1 at K = 2 too: load (2, 2), f = (.5, .5); 2 * (.5 * .7 + .5 * .3) = 1
    torch.testing.assert_close(switch_loss(PROBS[:2], torch.tensor([2, 2])), scalar(1.0))
    # all on one of four with certainty: E
    one = torch.tensor([[0.0, 1, 0, 0]] * 5)
    torch.testing.assert_close(switch_loss(one, torch.tensor([0, 5, 0, 0])), torch.tensor(4.0))


def test_z_loss() -> None:
    # logsumexp(0, 0) = log 2 and logsumexp(log 3, log 5) = log 8.
    # Their mean square is ((log 2)^2 + (log 8)^2) / 2 = 5 (log 2)^2.
    logits = torch.tensor([[0.0, 0.0], [math.log(3), math.log(5)]], dtype=torch.float64)
    torch.testing.assert_close(z_loss(logits), scalar(5 * math.log(2) ** 2))


def test_separation_loss() -> None:
    # E = 2, M = 2. Unit vectors: a0 = (1, 0), a1 = (.6, .8); b0 = (0, 1), b1 = (-1, 0).
    # Lengths do not matter.
    centroid = torch.tensor([[[2.0, 0], [0.6, 0.8]], [[0, 3.0], [-1.0, 0]]], dtype=torch.float64)
    # within: cos(a0, a1) = .6 -> .36; cos(b0, b1) = 0; mean over the two pairs .18
    # across: (a0, b0) 0; (a0, b1) -1 -> 0; (a1, b0) .8 -> .64; (a1, b1) -.6 -> 0.
    # The mean over the four pairs is .16.
    torch.testing.assert_close(separation_loss(centroid), scalar(0.34))
    # All the same: 1 + 1
    torch.testing.assert_close(separation_loss(torch.ones(3, 2, 4)), torch.tensor(2.0))
    torch.testing.assert_close(separation_loss(torch.eye(4).view(2, 2, 4)), torch.tensor(0.0))
    # No pair within
    torch.testing.assert_close(separation_loss(torch.ones(3, 1, 4)), torch.tensor(1.0))
    # No pair across
    torch.testing.assert_close(separation_loss(torch.ones(1, 3, 4)), torch.tensor(1.0))
    assert separation_loss(torch.ones(1, 1, 4)) == 0


def test_losses_of_no_tokens_are_zero() -> None:
    none = torch.zeros(0, 3, requires_grad=True)
    of_load = (
        load_loss(none, none, none + 1, 1),
        switch_loss(none, torch.zeros(3, dtype=torch.long)),
    )
    losses = torch.stack([importance_loss(none), *of_load, z_loss(none)])
    losses.sum().backward()
    assert losses.tolist() == [0, 0, 0, 0]
    assert none.grad is not None


def test_gradients_by_finite_differences() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    noise, std = (
        torch.randn(4, 3, dtype=torch.float64),
        (torch.rand(4, 3, dtype=torch.float64) + 0.5).requires_grad_(),
    )
    centroid = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    load = torch.tensor([1, 3, 0])
    assert torch.autograd.gradcheck(lambda x: importance_loss(x.softmax(-1)), logits)
    assert torch.autograd.gradcheck(lambda x, s: load_loss(x, x + noise * s, s, 1), (logits, std))
    assert torch.autograd.gradcheck(lambda x: switch_loss(x.softmax(-1), load), logits)
    assert torch.autograd.gradcheck(z_loss, logits)
    assert torch.autograd.gradcheck(separation_loss, centroid)
