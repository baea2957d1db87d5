"""Auxiliary losses on numbers worked by hand.

Shapes: T tokens, E experts, M centroids an expert, D width.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from gmoe import (
    TokenChoice,
    attach_aux_loss,
    aux_loss,
    moefy,
    record_routing,
)
from gmoe.losses import separation_loss, switch_loss
from tests.helpers.shrunk import moved
from tests.helpers.vits import timm_vit

PROBS = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.1, 0.9]], dtype=torch.float64)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def switch_of(probs_TE: Tensor, load: list[int]) -> Tensor:
    """The loss of tokens with these probabilities."""
    return switch_loss(probs_TE.sum(dim=0), torch.tensor(load), torch.tensor(len(probs_TE)))


def test_switch_loss() -> None:
    # argmax 0, 0, 1: f = (2/3, 1/3); P = (1.5/3, 1.5/3) = (.5, .5); 2 * (2/3 * .5 + 1/3 * .5) = 1
    torch.testing.assert_close(switch_of(PROBS, [2, 1]), scalar(1.0))
    # two tokens: f = (1, 0), P = (.7, .3); 2 * .7 = 1.4
    torch.testing.assert_close(switch_of(PROBS[:2], [2, 0]), scalar(1.4))
    # f sums to 1 at K = 2 too: load (2, 2), f = (.5, .5); 2 * (.5 * .7 + .5 * .3) = 1
    torch.testing.assert_close(switch_of(PROBS[:2], [2, 2]), scalar(1.0))
    # all on one of four with certainty: E
    one = torch.tensor([[0.0, 1, 0, 0]] * 5)
    torch.testing.assert_close(switch_of(one, [0, 5, 0, 0]), torch.tensor(4.0))


def z_of(logits_TE: Tensor) -> Tensor:
    """The loss of tokens with these logits, by any router."""
    return TokenChoice(1, num_experts=1).z_loss(logits_TE)


def test_z_loss() -> None:
    # logsumexp(0, 0) = log 2 and logsumexp(log 3, log 5) = log 8.
    # Their mean square is ((log 2)^2 + (log 8)^2) / 2 = 5 (log 2)^2.
    logits = torch.tensor([[0.0, 0.0], [math.log(3), math.log(5)]], dtype=torch.float64)
    torch.testing.assert_close(z_of(logits), scalar(5 * math.log(2) ** 2))


def test_separation_loss() -> None:
    # E = 2, M = 2. Unit vectors: a0 = (1, 0), a1 = (.6, .8); b0 = (0, 1), b1 = (-1, 0).
    unit = torch.tensor([[[1.0, 0], [0.6, 0.8]], [[0, 1.0], [-1.0, 0]]], dtype=torch.float64)
    # within: cos(a0, a1) = .6 -> .36; cos(b0, b1) = 0; mean over the two pairs .18
    # across: (a0, b0) 0; (a0, b1) -1 -> 0; (a1, b0) .8 -> .64; (a1, b1) -.6 -> 0.
    # The mean over the four pairs is .16.
    torch.testing.assert_close(separation_loss(unit), scalar(0.34))
    # All the same: 1 + 1
    torch.testing.assert_close(separation_loss(torch.full((3, 2, 4), 0.5)), torch.tensor(2.0))
    torch.testing.assert_close(separation_loss(torch.eye(4).view(2, 2, 4)), torch.tensor(0.0))
    # No pair within
    torch.testing.assert_close(separation_loss(torch.full((3, 1, 4), 0.5)), torch.tensor(1.0))
    # No pair across
    torch.testing.assert_close(separation_loss(torch.full((1, 3, 4), 0.5)), torch.tensor(1.0))
    assert separation_loss(torch.full((1, 1, 4), 0.5)) == 0


def test_losses_of_no_tokens_are_zero() -> None:
    none = torch.zeros(0, 3, requires_grad=True)
    losses = torch.stack([switch_of(none, [0, 0, 0]), z_of(none)])
    losses.sum().backward()
    assert losses.tolist() == [0, 0]
    assert none.grad is not None


# in any trainer -----------------------------------------------------------------------------------

WITH_LOSSES: dict[str, dict[str, Any]] = {
    "switch": {"router_kwargs": {"balance": "switch", "balance_coef": 0.5}},
    "switch and z": {"router_kwargs": {"balance": "switch", "z_coef": 0.1}},
    "capacity": {"k": 2, "router_kwargs": {"balance": "switch", "capacity_factor": 0.5}},
    "constant weights": {
        "start": "copies",
        "router_kwargs": {"balance": "switch", "weight": "straight_through"},
    },
    "expert choice": {"router": "expert_choice", "router_kwargs": {"z_coef": 0.1}},
    "centroids": {"router": "multi_centroid"},
}
"""Options of ``moefy`` under which layers make losses."""


def model_of(name: str = "switch", **options: Any) -> Any:
    """A ViT with experts that differ, without noise in its routers."""
    torch.manual_seed(0)
    options = {"num_experts": 4, "every": 1, **WITH_LOSSES[name], **options}
    return moved(moefy(timm_vit(2).double(), **options)).train()


def images(seed: int = 0) -> Tensor:
    drawn = torch.Generator().manual_seed(seed)
    return torch.randn(3, 3, 8, 8, dtype=torch.float64, generator=drawn)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """By name; 0 where there is none."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }


def backward(model: Any, x: Tensor, *, adds: bool, share: float = 1.0) -> None:
    """The step of a loop that adds the losses, or of one that does not know them."""
    torch.manual_seed(7)  # for the noise
    if not adds:
        (share * model(x).square().mean()).backward()
        return
    with record_routing(model) as routings:
        loss = model(x).square().mean()
    (share * (loss + aux_loss(routings))).backward()


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12, msg=name)


def off(found: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((found[name] - value).abs().max()) for name, value in other.items())


@pytest.mark.parametrize("name", WITH_LOSSES)
def test_attached_losses_have_the_gradient_of_added_ones(name: str) -> None:
    added, alone, attached = (model_of(name) for _ in range(3))
    backward(added, images(), adds=True)
    backward(alone, images(), adds=False)
    attach_aux_loss(attached)
    backward(attached, images(), adds=False)
    assert off(gradients(alone), gradients(added)) > 1e-6  # the losses are there
    assert_same(gradients(attached), gradients(added))


@pytest.mark.parametrize("reentrant", [False, True])
def test_attached_losses_pass_checkpoints(reentrant: bool) -> None:
    """Under reentrant ones, losses cannot be added: their forward has no gradient."""
    added, attached = model_of(), model_of()
    backward(added, images(), adds=True)
    attach_aux_loss(attached)
    for block in attached.blocks:
        forward = block.forward
        block.forward = partial(checkpoint, forward, use_reentrant=reentrant)
    x = images().requires_grad_()
    backward(attached, x, adds=False)
    assert_same(gradients(attached), gradients(added))


def test_attached_losses_are_compiled() -> None:
    added, attached = model_of(), model_of()
    backward(added, images(), adds=True)
    attach_aux_loss(attached)
    torch._dynamo.reset()
    backward(torch.compile(attached, backend="aot_eager"), images(), adds=False)
    assert_same(gradients(attached), gradients(added))


@pytest.mark.parametrize("is_function", [False, True])
def test_a_scale_is_that_of_accumulated_batches(is_function: bool) -> None:
    added, attached = model_of(), model_of()
    share = 0.25
    handle = attach_aux_loss(attached, scale=(lambda: share) if is_function else share)
    for seed in range(4):
        backward(added, images(seed), adds=True, share=share)
        backward(attached, images(seed), adds=False, share=share)
    assert_same(gradients(attached), gradients(added))
    # It is asked in each backward pass.
    share = 0.5
    if not is_function:
        handle.scale = share
    backward(added, images(), adds=True, share=share)
    backward(attached, images(), adds=False, share=share)
    assert_same(gradients(attached), gradients(added))


def test_a_pass_that_is_differentiated_itself_adds_no_attached_loss() -> None:
    """As forces do: the loss of a gradient of the output."""
    added, attached = model_of(), model_of()
    attach_aux_loss(attached)
    slopes = []
    for model in (added, attached):
        torch.manual_seed(7)
        with record_routing(model) as routings, sdpa_kernel(SDPBackend.MATH):
            pixels = images().requires_grad_()
            energy = model(pixels).square().sum()
        (slope,) = torch.autograd.grad(energy, pixels, create_graph=True)
        slopes.append(slope.detach())
        (slope.square().sum() + aux_loss(routings)).backward()
    torch.testing.assert_close(slopes[1], slopes[0])
    assert_same(gradients(attached), gradients(added))


def test_attached_losses_go_away_again_and_are_there_once() -> None:
    added, alone, twice = model_of(), model_of(), model_of()
    backward(added, images(), adds=True)
    backward(alone, images(), adds=False)
    handles = attach_aux_loss(twice), attach_aux_loss(twice)
    backward(twice, images(), adds=True)  # a third time: what is recorded has no gradient
    assert_same(gradients(twice), gradients(added))
    for handle in handles:
        handle.remove()
    twice.zero_grad()
    copied = copy.deepcopy(twice)
    backward(twice, images(), adds=False)
    with pytest.warns(UserWarning, match="attach_aux_loss"):
        backward(twice, images(), adds=False)
    backward(copied, images(), adds=False)
    assert_same(gradients(copied), gradients(alone))


def test_attaching_to_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"^model: got Linear without a router"):
        attach_aux_loss(nn.Linear(2, 2))
    for scale in (0.0, -1.0, float("inf"), "x"):
        with pytest.raises(ValueError, match=r"^scale: got .*, expected a positive number"):
            attach_aux_loss(model_of(), scale)  # type: ignore[arg-type]


def test_half_precision_needs_the_scale_of_its_scaler() -> None:
    """Gradients are multiplied there: a scale of 1 would be next to nothing."""
    model = model_of().float()
    handle = attach_aux_loss(model)
    x = images().float()
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    with torch.autocast("cpu", torch.float16):
        with pytest.raises(ValueError, match=r"^scale: got 1\.0 under autocast to float16"):
            model(x)
        handle.scale = lambda: 65536.0
        model(x)
        model.eval()(x)


def warned(model: Any, loop: Callable[[Any], object]) -> int:
    """How often a training of four steps says that losses are not trained."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")  # the filter would hide what is told again
        for _ in range(4):
            loop(model)
            optimizer.step()
            optimizer.zero_grad()
    return sum("attach_aux_loss" in str(warning.message) for warning in found)


def checkpointed(model: Any, reentrant: bool) -> None:
    """A step with each block run again in the backward pass."""
    x = images().requires_grad_()
    for block in model.blocks:
        x = checkpoint(block, model.patch_embed(x) if x.dim() == 4 else x, use_reentrant=reentrant)
    x.square().mean().backward()


def added_later(model: Any) -> None:
    """Two passes, and one backward pass for the losses of both."""
    with record_routing(model) as routings:
        loss = model(images(0)).square().mean() + model(images(1)).square().mean()
    (loss + aux_loss(routings)).backward()


def added_apart(model: Any) -> None:
    """A backward pass of the model's loss, and one of the routers' losses."""
    with record_routing(model) as routings:
        loss = model(images()).square().mean()
    loss.backward(retain_graph=True)
    aux_loss(routings).backward()


def attached_first(model: Any) -> None:
    attach_aux_loss(model)  # what is attached is so once
    backward(model, images(), adds=False)


def no_training(model: Any) -> None:
    """Steps in which the losses train nothing, and nothing else does."""
    model(images())
    with torch.no_grad():
        model(images())
    model.eval()(images()).square().mean().backward()
    model.train()


LOOPS: dict[str, tuple[Callable[[Any], object], bool]] = {
    "forgotten": (partial(backward, x=images(), adds=False), True),
    "forgotten, checkpointed": (partial(checkpointed, reentrant=False), True),
    "forgotten, reentrant": (partial(checkpointed, reentrant=True), True),
    "added": (partial(backward, x=images(), adds=True), False),
    "added later": (added_later, False),
    "added apart": (added_apart, False),
    "attached": (attached_first, False),
    "not trained": (no_training, False),
}


@pytest.mark.parametrize(
    ("name", "loop"),
    [
        *((name, loop) for name in WITH_LOSSES for loop in ("forgotten", "added")),
        *((next(iter(WITH_LOSSES)), loop) for loop in LOOPS if loop not in ("forgotten", "added")),
    ],
)
def test_losses_that_nobody_adds_are_told_of_once(name: str, loop: str) -> None:
    run, is_forgotten = LOOPS[loop]
    model = model_of(name, every=2)
    assert warned(model, run) == is_forgotten


@pytest.mark.parametrize("router", ["token_choice", "expert_choice", "random"])
def test_nothing_is_told_of_routers_without_losses(router: str) -> None:
    torch.manual_seed(0)
    model = moefy(timm_vit(2).double(), num_experts=4, router=router).train()
    assert warned(model, LOOPS["forgotten"][0]) == 0


def test_several_layers_tell_it_once_under_the_usual_filters() -> None:
    model = model_of(every=1)
    script = partial(backward, x=images(), adds=False)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("default")
        for _ in range(3):
            script(model)
    assert sum("attach_aux_loss" in str(warning.message) for warning in found) == 1


@pytest.mark.parametrize("options", [{"num_experts": 1}, {"balance_coef": 0.0}])
def test_a_loss_without_a_gradient_is_not_missed(options: dict[str, Any]) -> None:
    sizes: dict[str, Any] = {"num_experts": 4, "balance": "switch"} | options
    router = TokenChoice(4, **sizes).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            router(torch.randn(6, 4)).weight.sum().backward()
