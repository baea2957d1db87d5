"""The bias per expert that balances the load, and the mean token that is taken away."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from gmoe import TokenChoice
from tests.helpers.reference import with_gate


def test_bias_by_hand() -> None:
    """Four tokens, three for expert 0.

    A step is at most half of the logits' spread, and acts on the next forward.
    """
    x = torch.tensor([[3.0, 0.0], [3.0, 0.0], [3.0, 0.0], [-1.0, 0.0]])
    router = with_gate(
        TokenChoice(2, num_experts=2, bias_rate=0.5, noise=False), [[3.0, 0.0], [0.0, 0.0]]
    )
    assert router(x).load.tolist() == [3, 1]  # logits 3 x, 0: nothing was known yet
    assert not router.bias_E.any()
    assert not router.mean_D.any()
    spread = (27.0 / 2) ** 0.5  # 9, 9, 9 and -3 vary by 27, the zeros by 0
    weight = router(x).weight  # logits 3 (x - 2), 0: 3, 3, 3 and -9
    assert router.mean_D.tolist() == [2.0, 0.0]
    torch.testing.assert_close(router.bias_E, 0.5 * spread * torch.tensor([-0.5, 0.5]))
    # Which do not see the bias
    torch.testing.assert_close(weight, torch.tensor([3.0, 3.0, 3.0, 9.0]).sigmoid())


def test_the_mean_token_is_taken_away() -> None:
    """The first step's as it is, a tenth of each later one's; evaluation leaves it alone."""
    torch.manual_seed(0)
    router, x = (
        TokenChoice(4, num_experts=3, noise=False).double(),
        torch.randn(20, 4, dtype=torch.float64),
    )
    mean = 100 + x.mean(dim=0)
    router(100 + x)
    router(50 + x)
    torch.testing.assert_close(router.mean_D, mean)
    mean = 0.9 * mean + 0.1 * (50 + x.mean(dim=0))
    router(x)
    torch.testing.assert_close(router.mean_D, mean)
    expected = ((70 + x - mean) @ router.gate.weight.T).softmax(dim=1)
    torch.testing.assert_close(router.eval()(70 + x).scores, expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(router.mean_D, mean)


def test_two_forwards_before_their_backward() -> None:
    """As in contrastive learning: the second moves a mean that the first still needs."""
    torch.manual_seed(0)
    router, x = (
        TokenChoice(4, num_experts=3, noise=False).double(),
        torch.randn(2, 20, 4, dtype=torch.float64) + 1,
    )
    router(x[0])
    router.next_bias_E.zero_()
    means = [router.next_mean_D.clone()]
    routings = [router(x[0])]
    means.append(router.next_mean_D.clone())
    routings.append(router(x[1]))
    loss = sum(routing.scores[:, 0].sum() for routing in routings)
    (actual,) = torch.autograd.grad(loss, router.gate.weight)
    pairs = zip(x, means, strict=True)
    expected = sum(
        ((part - mean) @ router.gate.weight.T).softmax(dim=1)[:, 0].sum() for part, mean in pairs
    )
    (wanted,) = torch.autograd.grad(expected, router.gate.weight)
    torch.testing.assert_close(actual, wanted, atol=1e-10, rtol=0)


def test_bias_of_one_token_and_of_equal_tokens_rests() -> None:
    for x in (torch.randn(1, 4), torch.ones(9, 4), torch.zeros(0, 4)):
        router = TokenChoice(4, num_experts=3)
        for _ in range(3):
            assert torch.isfinite(router(x).weight).all()
        assert router.bias_E.abs().max() < 1e-8  # the mean of equal numbers is rounded
        assert router.mean_D.isfinite().all()


def loaded(router: TokenChoice, _: torch.Tensor) -> TokenChoice:
    """Another router, from the state of this one."""
    other = TokenChoice(4, num_experts=3, noise=False).double()
    other.load_state_dict(router.state_dict())
    return other


def evaluated(router: TokenChoice, x: torch.Tensor) -> TokenChoice:
    router.eval()(x)
    return router.train()


BETWEEN = {
    "a copy": lambda router, _: copy.deepcopy(router),
    "saved and loaded": loaded,
    "an evaluation": evaluated,
}


@pytest.mark.parametrize("name", BETWEEN)
def test_what_comes_between_two_steps_moves_nothing(name: str) -> None:
    torch.manual_seed(0)
    router = TokenChoice(4, num_experts=3, noise=False).double()
    steps = torch.randn(4, 20, 4, dtype=torch.float64)
    plain = copy.deepcopy(router)
    for x in steps:
        expected = plain(x)
        found = router(x)
        assert torch.equal(found.token, expected.token)
        torch.testing.assert_close(found.weight, expected.weight, rtol=0, atol=0)
        router = BETWEEN[name](router, x)
    for counter, other in zip(router.buffers(), plain.buffers(), strict=True):
        assert torch.equal(counter, other)


def test_accumulated_gradients_are_those_of_the_selections_that_were_made() -> None:
    """Each part of a batch is a step of the balance; a part that runs again selects as it did."""
    torch.manual_seed(0)
    router = TokenChoice(4, num_experts=3, noise=False, bias_rate=1.0).double()
    plain = copy.deepcopy(router)
    for x in torch.randn(5, 20, 4, dtype=torch.float64):
        x = x.requires_grad_()
        checkpoint(lambda x: router(x).weight, x, use_reentrant=False).square().sum().backward()
        plain(x).weight.square().sum().backward()
    torch.testing.assert_close(router.gate.weight.grad, plain.gate.weight.grad, rtol=0, atol=1e-12)
    for counter, other in zip(router.buffers(), plain.buffers(), strict=True):
        assert torch.equal(counter, other)
