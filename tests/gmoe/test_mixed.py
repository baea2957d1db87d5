"""``MixedWeights`` beside the definition: a loop over groups, each with its own W_g."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from gmoe import (
    LinearExperts,
    MLPExperts,
    MoE,
    RandomRouter,
    SoftMoE,
    SoftSlots,
    TokenChoice,
    UniformRouter,
    active_parameters,
    aux_loss,
    count_flops,
    unstack,
)
from gmoe.losses import attach_aux_loss
from gmoe.mixed import MixedWeights
from gmoe.stack import share_base
from tests.helpers.folded import fold

E, D, H, OUT = 4, 6, 5, 3
BATCH = torch.tensor([7, 2, 7, 2, 2, 9, 7, 9, 2, 7, 9, 4])
"""Unsorted groups of different sizes, with gaps; one has a single token."""


def experts(kind: str) -> Any:
    if kind == "linear":
        return LinearExperts(D, OUT, num_experts=E)
    if kind == "no bias":
        return LinearExperts(D, OUT, num_experts=E, bias=False)
    options: dict[str, Any] = {"glu": {"glu": True}, "norms": {"hidden_norm": nn.LayerNorm(H)}}
    if kind == "norms":
        options["norms"]["hidden_norm"] = nn.LayerNorm(H, elementwise_affine=False)
    return MLPExperts(D, H, OUT, num_experts=E, **options.get(kind, {}))


class ByMean(nn.Module):
    """A layer whose weights are mixed by what a router says of the mean of each group."""

    def __init__(self, moe: MoE, router: Any) -> None:
        super().__init__()
        self.moe, self.router = moe, router

    @property
    def stacked(self) -> Any:
        return self.moe.experts.stacked

    def forward(self, x: Tensor, group: Tensor | None = None) -> Tensor:
        """``group`` is that of each token; by default the leading dimension of (B, T, D)."""
        if group is None:
            mean = x.mean(dim=-2).view(-1, D)
            group_T = torch.arange(len(mean)).repeat_interleave(x.size(-2))
        else:
            _, group_T = group.unique(return_inverse=True)
            mean = torch.stack([x[group_T == one].mean(dim=0) for one in group_T.unique()])
        out: Tensor = self.moe(x, routing=self.router(mean).expand(group_T))
        return out


def soft_router(**options: Any) -> TokenChoice:
    options = {"balance": None, "k": E, "weight": "score"} | options
    with patch("gmoe.routers.base.INIT_SCALE", 3.0):  # so that groups differ in their weights
        return TokenChoice(D, num_experts=E, **options)


def layer(kind: str = "mlp", *, base: bool = False, shared: bool = False) -> ByMean:
    torch.manual_seed(0)
    stacked = experts(kind)
    if base:
        share_base(stacked)
    shared_expert = nn.Linear(D, OUT) if shared else None
    return ByMean(MoE(None, MixedWeights(stacked), shared_expert), soft_router()).double()


def tokens(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, D, generator=generator, dtype=torch.float64, requires_grad=True)


def test_a_summary_has_the_weights_of_the_experts() -> None:
    """All experts have all tokens, so that loads say nothing."""
    groups = soft_router()(tokens(3).float())
    weight_E = groups.to_dense().mean(dim=0).tolist()
    routing = groups.expand(torch.tensor([0, 1, 1, 2]))
    assert len({f"{weight:.3g}" for weight in weight_E}) > 1
    shares = ", ".join(f"{weight:.3g}" for weight in weight_E)
    assert f"mean weight of each expert in a group: {shares}" in routing.summary()


def linear(stacked: Any, x: Tensor, weight_E: Tensor) -> Tensor:
    """A linear layer of mixed weights, number by number of experts."""
    weight = sum(weight_E[e] * stacked.weight[e] for e in range(E))
    bias = None if stacked.bias is None else sum(weight_E[e] * stacked.bias[e] for e in range(E))
    return F.linear(x, weight, bias)


def defined(model: ByMean, x: Tensor, group: Tensor) -> Tensor:
    """(T, O) the definition, token by token: route the group's mean, mix, and run."""
    out = []
    gate, stacked, shared = model.router.gate, model.stacked, model.moe.shared_expert
    for token in range(len(x)):
        mean = x[group == group[token]].mean(dim=0)
        weight_E = gate(mean).softmax(dim=0)
        if isinstance(stacked, LinearExperts):
            y = linear(stacked, x[token], weight_E)
        else:
            h = linear(stacked.up, x[token], weight_E)
            h = F.gelu(h[:H]) * h[H:] if stacked.glu else F.gelu(h)
            y = linear(stacked.down, stacked.hidden_norm(h), weight_E)
        if shared is not None:
            y = y + shared(x[token])
        out.append(y)
    return torch.stack(out)


def assert_same(
    model: nn.Module, x: Tensor, out: Tensor, expected: Tensor, atol: float = 1e-12
) -> None:
    """Equal outputs, and equal gradients of the tokens and of all parameters."""
    torch.testing.assert_close(out, expected, rtol=0, atol=atol)
    values = [x, *model.parameters()]
    found = torch.autograd.grad(out.square().sum(), values)
    wanted = torch.autograd.grad(expected.square().sum(), values)
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol * 10)


@pytest.mark.parametrize(
    ("kind", "base", "shared", "groups"),
    [
        *((kind, False, False, "batch") for kind in ("linear", "no bias", "mlp", "glu", "norms")),
        # A base is part of each mixture, and a shared expert of none.
        *((kind, True, False, "batch") for kind in ("no bias", "glu")),
        *((kind, False, True, "batch") for kind in ("linear", "norms")),
        # One group, and a group for each image.
        ("linear", True, False, "one"),
        ("mlp", False, True, "one"),
        ("mlp", True, False, "images"),
        ("norms", False, True, "images"),
    ],
)
def test_each_group_runs_its_own_mixture(kind: str, base: bool, shared: bool, groups: str) -> None:
    moe = layer(kind, base=base, shared=shared)
    if groups == "images":
        x = tokens(3, 4)
        group = torch.arange(3).repeat_interleave(4)
        assert_same(moe, x, moe(x), defined(moe, x.flatten(0, 1), group).unflatten(0, (3, 4)))
        return
    x = tokens(len(BATCH))
    group = BATCH if groups == "batch" else torch.zeros_like(BATCH)
    assert_same(moe, x, moe(x, group), defined(moe, x, group))


@pytest.mark.parametrize("kind", ["linear", "no bias"])
@pytest.mark.parametrize("router", ["learned", "random", "uniform", "top two"])
def test_of_linear_experts_it_is_the_mixture_of_outputs(kind: str, router: str) -> None:
    torch.manual_seed(0)
    routers: dict[str, Any] = {
        "learned": soft_router(),
        "random": RandomRouter(D, num_experts=E, k=E),
        "uniform": UniformRouter(D, num_experts=E),
        "top two": soft_router(k=2, weight="normalized"),
    }
    model = ByMean(MoE(None, MixedWeights(experts(kind))), routers[router]).double()
    outputs = ByMean(MoE(None, model.stacked), model.router)
    x = tokens(len(BATCH))
    assert_same(model, x, model(x, BATCH), outputs(x, BATCH))


@pytest.mark.parametrize("glu", [False, True])
def test_it_is_differentiated_twice(glu: bool) -> None:
    torch.manual_seed(0)
    stacked = MLPExperts(D, 2, 1, num_experts=E, glu=glu)
    share_base(stacked)
    model = ByMean(MoE(None, MixedWeights(stacked)), soft_router()).double()
    x = tokens(3)
    names = [name for name, _ in model.named_parameters()]
    values = [parameter.detach().requires_grad_() for parameter in model.parameters()]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        state = dict(zip(names, values, strict=True))
        return torch.func.functional_call(model, state, (x, torch.tensor([1, 0, 1])))

    assert torch.autograd.gradcheck(run, (x, *values), fast_mode=True)
    assert torch.autograd.gradgradcheck(run, (x, *values), fast_mode=True)


@pytest.mark.parametrize("groups", [0, 2])
def test_without_tokens_all_experts_get_zero_gradients(groups: int) -> None:
    model = layer("mlp", base=True)
    decided = model.router(tokens(groups))
    out = model.moe(tokens(0), routing=decided.expand(torch.zeros(0, dtype=torch.long)))
    assert out.shape == (0, OUT)
    out.sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(grad is not None and not grad.any() for grad in gradients)


def test_a_step_costs_the_mixing_and_one_expert() -> None:
    moe = layer("linear")
    x = tokens(len(BATCH))
    groups = len(BATCH.unique())
    mixing = 2 * groups * E * (D * OUT + OUT)
    rows = groups * int(BATCH.bincount().max())  # all groups are filled up to the largest
    one_expert = 2 * rows * D * OUT
    routing = 2 * groups * D * E
    assert count_flops(moe, x, BATCH) == mixing + one_expert + routing
    moe.moe.take_costs(moe.router)
    assert moe.moe.experts_per_token == 1.0
    assert active_parameters(moe) == D * OUT + OUT + D * E


def test_folded_it_stays_and_unstacked_it_is_refused() -> None:
    moe = layer("mlp", base=True)
    x = tokens(len(BATCH))
    before = moe(x, BATCH)
    torch.testing.assert_close(fold(moe)(x, BATCH), before, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="experts with mix='weights', expected mix='outputs'"):
        unstack(moe)


@pytest.mark.parametrize("attached", [True, False])
def test_losses_of_the_router_train(attached: bool) -> None:
    """The gradient of ``loss + aux_loss``, by hand or by ``attach_aux_loss``."""
    model = layer("mlp")
    model.router = soft_router(balance="switch", z_coef=0.5).double()
    x = tokens(3, 4)
    with torch.no_grad():
        groups = model.router(x.mean(dim=1))
    assert set(groups.losses) == {"switch", "z"}

    def gradient(scale: float) -> Tensor:
        routing = model.router(x.mean(dim=1))
        loss = model.moe(x, routing=routing.expand(torch.arange(3).repeat_interleave(4))).sum()
        (found,) = torch.autograd.grad(loss + scale * aux_loss(routing), model.router.gate.weight)
        return found

    expected = gradient(1.0)
    assert not torch.allclose(expected, gradient(0.0))
    if attached:
        attach_aux_loss(model)
        torch.testing.assert_close(gradient(0.0), expected)
        torch.testing.assert_close(gradient(1.0), expected)


def test_what_is_no_decision_of_groups_is_refused() -> None:
    model, x = layer(), tokens(len(BATCH))
    with pytest.raises(ValueError, match=r"^routing: got a decision for each token, expected one"):
        model.moe(x, routing=model.router(x))
    part = model.router(x).expand(BATCH).select(slice(3, 9))
    with pytest.raises(ValueError, match=r"^routing: got a decision for each token, expected one"):
        model.moe(x[3:9], routing=part)
    with pytest.raises(ValueError, match=r"^routing: got rows of each expert, expected a Routing"):
        SoftMoE(SoftSlots(D, num_experts=E), MixedWeights(experts("mlp")))(x.float())
    for group in (BATCH + 5, BATCH.float(), BATCH[None]):
        with pytest.raises(ValueError, match=r"^group_T: got .* expected"):
            model.router(x).expand(group)


def test_experts_that_are_more_than_stacks_are_refused() -> None:
    changed = experts("mlp")
    changed.down = nn.Linear(H, OUT)
    affine = MLPExperts(D, H, OUT, num_experts=E, hidden_norm=nn.LayerNorm(H))
    parametrized = experts("mlp")
    parametrizations.weight_norm(parametrized.up)
    for stacked, got in (
        (changed, "experts with a Linear in place of a part"),
        (affine, "experts with a LayerNorm in place of a part"),
        (parametrized, "a parametrized weight"),
    ):
        with pytest.raises(ValueError, match=got):
            MixedWeights(stacked)
    model = layer()
    model.stacked.down = nn.Linear(H, OUT)
    with pytest.raises(ValueError, match="experts with a Linear in place of a part"):
        model(tokens(5, 1))


def test_a_reset_draws_the_experts_as_they_are_drawn_alone() -> None:
    mixed, alone = MixedWeights(experts("mlp")), experts("mlp")
    for part in (mixed, alone):
        torch.manual_seed(3)
        part.reset_parameters()
    for one, other in zip(mixed.parameters(), alone.parameters(), strict=True):
        assert torch.equal(one, other)


def test_it_is_not_exported() -> None:
    model = layer().eval()
    with pytest.raises(ValueError, match=r"torch\.export: got mix='weights', expected .*merge"):
        torch.export.export(model, (tokens(3, 4),))


@pytest.mark.parametrize("options", [{}, {"k": 2}, {"k": E}, {"k": 2, "capacity_factor": 0.4}])
def test_an_expanded_routing_gives_each_token_the_pairs_of_its_group(options: Any) -> None:
    torch.manual_seed(0)
    router = TokenChoice(D, num_experts=E, balance="switch", noise=False, **options)
    x = torch.randn(5, D)
    group = torch.tensor([4, 4, 0, 2, 0, 3])
    groups = router(x)
    routing = groups.expand(group)
    replace(routing, validate=True)
    torch.testing.assert_close(routing.to_dense(), groups.to_dense()[group])
    assert routing.token.numel() == int((groups.to_dense()[group] > 0).sum())
    torch.testing.assert_close(routing.scores, groups.scores[group])
    torch.testing.assert_close(aux_loss(routing), aux_loss(groups))
    if "capacity_factor" in options:
        assert groups.dropped_T is not None
        assert int(groups.dropped)
        assert routing.dropped_T.tolist() == groups.dropped_T[group].tolist()
    found, expected = (
        torch.autograd.grad(weight.square().sum(), router.gate.weight, retain_graph=True)
        for weight in (routing.to_dense(), groups.to_dense()[group])
    )
    torch.testing.assert_close(found, expected)
