"""The operators of attention; experts are compared with PyG's convs in ``test_experts.py``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from gmoe import MoEConv
from gmoe.conv import attention
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
    return features(EXPERTS, WIDTH, HEADS), *ends, *of_edges, 0.2, sender, receiver, offsets


@pytest.mark.parametrize("with_edges", [False, True])
def test_operators_keep_torchs_rules(with_edges: bool) -> None:
    """Schema, fake kernel, tracing: what ``torch.compile`` needs."""
    inputs = scored(with_edges)
    grad = features(MESSAGES, HEADS)
    torch.library.opcheck(torch.ops.gmoe.score_additively.default, inputs)
    torch.library.opcheck(torch.ops.gmoe.score_additively_backward.default, (grad, *inputs))


@pytest.mark.parametrize("start", ["copies", "shared"])
@pytest.mark.parametrize("conv", ["gat", "gatv2"])
def test_features_of_replaced_loops_may_be_anything(conv: str, start: Any) -> None:
    """Such as a direction, which is 0/0 on a loop: PyG removes it before it looks."""
    torch.manual_seed(0)
    edge_index = torch.tensor([[0, 1, 2, 2, 0], [1, 2, 2, 0, 0]])
    direction = torch.randn(5, 2)
    direction[[2, 4]] = torch.tensor([[torch.nan, torch.inf], [torch.nan, torch.nan]])
    layer = MoEConv(conv, 4, 3, edge_dim=2, num_experts=2, start=start)
    x = torch.randn(3, 4, requires_grad=True)
    y = layer(x, edge_index, edge_attr=direction)
    y.square().sum().backward()
    assert y.isfinite().all()
    grads = [parameter.grad for parameter in [x, *layer.parameters()]]
    assert all(grad is None or grad.isfinite().all() for grad in grads)


def in_mixed_blocks(offsets: Tensor, number: int, _: Tensor) -> Iterator[attention._MixedBlock]:
    """Blocks of seven messages, as off the CPU."""
    for start in range(0, number, 7):
        place = slice(start, min(start + 7, number))
        yield attention._MixedBlock(place, offsets.clamp(place.start, place.stop) - place.start)


@pytest.mark.parametrize("with_edges", [False, True])
def test_blocks_of_any_experts_give_what_blocks_of_one_give(
    with_edges: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores and gradients."""
    inputs, grad = scored(with_edges), features(MESSAGES, HEADS)

    def found() -> list[Tensor]:
        scores = attention._score_additively(*inputs)
        return [scores, *attention._score_additively_backward(grad, *inputs)]

    expected = found()
    monkeypatch.setattr(attention, "_blocks", in_mixed_blocks)
    torch.testing.assert_close(found(), expected)


def test_off_the_cpu_blocks_are_cut_without_the_ends_of_experts() -> None:
    """The device of no values stands for a GPU."""
    like = torch.empty(EXPERTS, WIDTH, HEADS, device="meta")
    offsets = torch.empty(EXPERTS, dtype=torch.int32, device="meta")
    (block,) = attention._blocks(offsets, MESSAGES, like)
    assert block.place == slice(0, MESSAGES)


@pytest.mark.parametrize("hooked", ["lin_src", "lin_dst"])
def test_a_hook_on_either_end_runs_though_inputs_could_be_summed_first(hooked: str) -> None:
    torch.manual_seed(0)
    layer = MoEConv("gat", (3, 3), 8, add_self_loops=False, num_experts=2, start="plain").eval()
    x, edge_index = (torch.randn(6, 3), torch.randn(4, 3)), torch.tensor([[0, 5, 3], [1, 2, 3]])
    expected = layer(x, edge_index)
    called = []
    layer.experts.get_submodule(hooked).register_forward_hook(lambda *_: called.append(hooked))
    torch.testing.assert_close(layer(x, edge_index), expected)
    assert called
