"""``mix="weights"`` on tokens, beside the definition: a loop over groups, each with its own W_g."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from gmoe import (
    ExpertChoice,
    LinearExperts,
    MLPExperts,
    MoE,
    RandomRouter,
    TokenChoice,
    UniformRouter,
    count_flops,
    densify,
    fold,
    restack,
    unstack,
)
from gmoe.mixed_weights import mixed
from gmoe.stack import share_base

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


def layer(kind: str = "mlp", *, base: bool = False, shared: bool = False) -> MoE:
    torch.manual_seed(0)
    stacked = experts(kind)
    if base:
        share_base(stacked)
    router = TokenChoice(D, num_experts=E, k=E, balance=None, init_scale=3.0)
    shared_expert = nn.Linear(D, OUT) if shared else None
    return MoE(router, stacked, shared_expert, mix="weights").double()


def tokens(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, D, generator=generator, dtype=torch.float64, requires_grad=True)


def test_a_summary_has_the_weights_of_the_experts() -> None:
    """All experts have all tokens, so that loads say nothing."""
    _, routing = layer()(tokens(12), BATCH, return_routing=True)
    weight_E = routing.by_group.weight_GE.mean(dim=0).tolist()
    assert len({f"{weight:.3g}" for weight in weight_E}) > 1
    shares = ", ".join(f"{weight:.3g}" for weight in weight_E)
    assert f"mean weight of each expert in a group: {shares}" in routing.summary()


def linear(stacked: Any, x: Tensor, weight_E: Tensor) -> Tensor:
    """A linear layer of mixed weights, number by number of experts."""
    weight = sum(weight_E[e] * stacked.weight[e] for e in range(E))
    bias = None if stacked.bias is None else sum(weight_E[e] * stacked.bias[e] for e in range(E))
    return F.linear(x, weight, bias)


def defined(moe: MoE, x: Tensor, group: Tensor) -> Tensor:
    """(T, O) the definition, token by token: route the group's mean, mix, and run."""
    out = []
    gate: Any = moe.router.gate
    for token in range(len(x)):
        mean = x[group == group[token]].mean(dim=0)
        weight_E = gate(mean).softmax(dim=0)
        stacked: Any = moe.experts
        if isinstance(stacked, LinearExperts):
            y = linear(stacked, x[token], weight_E)
        else:
            h = linear(stacked.up, x[token], weight_E)
            h = F.gelu(h[:H]) * h[H:] if stacked.glu else F.gelu(h)
            y = linear(stacked.down, stacked.hidden_norm(h), weight_E)
        if moe.shared_expert is not None:
            y = y + moe.shared_expert(x[token])
        out.append(y)
    return torch.stack(out)


def assert_same(moe: MoE, x: Tensor, out: Tensor, expected: Tensor, atol: float = 1e-12) -> None:
    """Equal outputs, and equal gradients of the tokens and of all parameters."""
    torch.testing.assert_close(out, expected, rtol=0, atol=atol)
    values = [x, *moe.parameters()]
    found = torch.autograd.grad(out.square().sum(), values)
    wanted = torch.autograd.grad(expected.square().sum(), values)
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol * 10)


@pytest.mark.parametrize("kind", ["linear", "no bias", "mlp", "glu", "norms"])
@pytest.mark.parametrize(("base", "shared"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("groups", ["batch", "one", "images"])
def test_each_group_runs_its_own_mixture(kind: str, base: bool, shared: bool, groups: str) -> None:
    moe = layer(kind, base=base, shared=shared)
    if groups == "images":
        x = tokens(3, 4)
        group = torch.arange(3).repeat_interleave(4)
        assert_same(moe, x, moe(x), defined(moe, x.flatten(0, 1), group).unflatten(0, (3, 4)))
        return
    x = tokens(len(BATCH))
    batch = BATCH if groups == "batch" else None
    group = BATCH if groups == "batch" else torch.zeros_like(BATCH)
    assert_same(moe, x, moe(x, batch), defined(moe, x, group))


@pytest.mark.parametrize("kind", ["linear", "no bias"])
@pytest.mark.parametrize("router", ["learned", "random", "uniform", "top two"])
def test_of_linear_experts_it_is_the_mixture_of_outputs(kind: str, router: str) -> None:
    torch.manual_seed(0)
    routers: dict[str, Any] = {
        "learned": TokenChoice(D, num_experts=E, k=E, balance=None, init_scale=3.0),
        "random": RandomRouter(D, num_experts=E, k=E),
        "uniform": UniformRouter(D, num_experts=E),
        "top two": TokenChoice(D, num_experts=E, k=2, balance=None, init_scale=3.0),
    }
    moe = MoE(routers[router], experts(kind), mix="weights").double()
    soft = MoE(moe.router, moe.experts, router_input="image")
    x = tokens(len(BATCH))
    assert_same(moe, x, moe(x, BATCH), soft(x, BATCH))


@pytest.mark.parametrize("glu", [False, True])
def test_it_is_differentiated_twice(glu: bool) -> None:
    torch.manual_seed(0)
    stacked = MLPExperts(2, 2, 1, num_experts=2, glu=glu)
    share_base(stacked)
    router = TokenChoice(2, num_experts=2, k=2, balance=None, init_scale=3.0)
    moe = MoE(router, stacked, mix="weights").double()
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in moe.named_parameters()]
    values = [parameter.detach().requires_grad_() for parameter in moe.parameters()]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        state = dict(zip(names, values, strict=True))
        return torch.func.functional_call(moe, state, (x, torch.tensor([1, 0, 1])))

    assert torch.autograd.gradcheck(run, (x, *values))
    assert torch.autograd.gradgradcheck(run, (x, *values))


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4)], ids=str)
def test_without_tokens_all_experts_get_zero_gradients(shape: tuple[int, ...]) -> None:
    moe = layer("mlp", base=True)
    out = moe(tokens(*shape))
    assert out.shape == (*shape, OUT)
    out.sum().backward()
    gradients = [parameter.grad for parameter in moe.parameters()]
    assert all(grad is not None and not grad.any() for grad in gradients)


def test_groups_do_not_see_each_other_and_order_does_not_matter() -> None:
    moe = layer("glu")
    x = tokens(len(BATCH))
    out = moe(x, BATCH)
    order = torch.randperm(len(BATCH))
    torch.testing.assert_close(moe(x[order], BATCH[order]), out[order])
    alone = BATCH == 2
    torch.testing.assert_close(moe(x[alone]), out[alone])


def test_equal_experts_are_the_dense_layer() -> None:
    moe = layer("mlp")
    with torch.no_grad():
        for parameter in moe.experts.parameters():
            parameter.copy_(parameter[:1].expand_as(parameter))
    x = tokens(len(BATCH))
    out = moe(x, BATCH)
    dense = densify(moe).model
    torch.testing.assert_close(dense(x), out, rtol=0, atol=1e-12)


def test_a_step_costs_the_mixing_and_one_expert() -> None:
    moe = layer("linear")
    x = tokens(len(BATCH))
    groups = len(BATCH.unique())
    mixing = 2 * groups * E * (D * OUT + OUT)
    one_expert = 2 * len(x) * D * OUT
    routing = 2 * groups * D * E
    sums = x.numel()  # of the means; a token with one expert has no sum
    assert count_flops(moe, x, BATCH) == mixing + one_expert + routing + sums
    assert moe.experts_per_token == 1.0


def test_folded_it_stays_and_unstacked_it_is_refused_until_it_is_stacked_again() -> None:
    moe = layer("mlp", base=True)
    x = tokens(len(BATCH))
    before = moe(x, BATCH)
    torch.testing.assert_close(fold(moe)(x, BATCH), before, rtol=0, atol=1e-12)
    unstack(moe)
    with pytest.raises(ValueError, match=r"got experts that are unstacked, .*gmoe\.restack"):
        moe(x, BATCH)
    torch.testing.assert_close(restack(moe)(x, BATCH), before, rtol=0, atol=1e-12)


def test_along_a_path_mixed_weights_do_not_jump_as_a_choice_does() -> None:
    """The largest step of the output, over the mean step, where the choice changes on the way."""
    mixed_layer = layer("mlp")
    hard_router = TokenChoice(D, num_experts=E, balance=None, weight="straight_through")
    hard_router.gate = mixed_layer.router.gate
    hard = MoE(hard_router, mixed_layer.experts, router_input="image").double()
    start, end = tokens(2, 5).detach()
    path = torch.linspace(0, 1, 400, dtype=torch.float64)[:, None, None]
    images = start + path * (end - start)
    _, routing = hard(images, return_routing=True)
    assert len(routing.top_expert.unique()) > 1
    largest = []
    for moe in (mixed_layer, hard):
        steps = moe(images).sum(dim=(1, 2)).diff().abs()
        largest.append(float(steps.max() / steps.mean()))
    assert largest[0] < 5
    assert largest[1] > 20


def test_hooks_run_and_nothing_on_the_experts_changes() -> None:
    moe: Any = layer("mlp", base=True)
    x = tokens(len(BATCH))
    state = {name: copy.copy(vars(part)) for name, part in moe.experts.named_modules()}
    calls: list[torch.Size] = []
    handle = moe.experts.up.register_forward_hook(lambda *args: calls.append(args[2].shape))
    moe(x, BATCH)
    handle.remove()
    assert calls == [(len(BATCH), H)]
    after = {name: vars(part) for name, part in moe.experts.named_modules()}
    assert state.keys() == after.keys()
    assert all(state[name].keys() == after[name].keys() for name in state)
    assert mixed(moe.experts, torch.ones(1, E).double()).up is not moe.experts.up


def test_threads_may_run_the_same_layer() -> None:
    moe = layer("mlp")
    inputs = [tokens(size, 4) for size in (1, 2, 3, 5)]
    expected = [moe(x).detach() for x in inputs]
    wrong: list[int] = []

    def serve(number: int) -> None:
        for _ in range(30):
            if not torch.equal(moe(inputs[number]), expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_gives_the_same_gradients(use_reentrant: bool) -> None:
    moe = layer("mlp", base=True)
    x = tokens(len(BATCH))
    values = [x, *moe.parameters()]
    wanted = torch.autograd.grad(moe(x, BATCH).square().sum(), values)
    checkpoint(moe, x, BATCH, use_reentrant=use_reentrant).square().sum().backward()
    torch.testing.assert_close(tuple(value.grad for value in values), wanted)


def test_compiled_it_is_the_same() -> None:
    moe = layer("mlp", base=True)
    x = tokens(3, 4)
    compiled = torch.compile(moe, backend="aot_eager", fullgraph=True)
    assert_same(moe, x, compiled(x), moe(x))


def test_in_half_precision_the_sum_of_weights_is_not() -> None:
    moe = layer("mlp").float()
    x = tokens(3, 4).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = moe(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), moe(x), rtol=0.05, atol=0.05)


def test_what_is_no_decision_of_groups_is_refused() -> None:
    moe = layer()
    x = tokens(len(BATCH))
    by_token = moe.router(x)
    with pytest.raises(ValueError, match=r"^routing: got a decision for each token, expected one"):
        moe(x, BATCH, routing=by_token)
    by_group = moe.router.route_groups(x, BATCH, "image")
    torch.testing.assert_close(moe(x, routing=by_group), moe(x, BATCH))
    part = by_group.select(slice(3, 9))
    torch.testing.assert_close(moe(x[3:9], routing=part), moe(x, BATCH)[3:9])
    with pytest.raises(ValueError, match="router_input: got 'image' with ExpertChoice, expected"):
        MoE(ExpertChoice(D, num_experts=E), experts("mlp"), mix="weights")(tokens(5).float())
    with pytest.raises(ValueError, match="mix: got 'sum', expected one of"):
        MoE(moe.router, moe.experts, mix="sum")  # type: ignore[arg-type]


def test_experts_that_are_more_than_stacks_are_refused() -> None:
    changed = experts("mlp")
    changed.down = nn.Linear(H, OUT)
    affine = MLPExperts(D, H, OUT, num_experts=E, hidden_norm=nn.LayerNorm(H))
    parametrized = experts("mlp")
    parametrizations.weight_norm(parametrized.up)
    router = TokenChoice(D, num_experts=E, k=E)
    for stacked, got in (
        (changed, "experts that hold a Linear"),
        (affine, "experts that hold a LayerNorm"),
        (parametrized, "a parametrized weight"),
    ):
        with pytest.raises(ValueError, match=got):
            MoE(router, stacked, mix="weights")
    moe = layer()
    moe.experts.down = nn.Linear(H, OUT)
    with pytest.raises(ValueError, match="experts that hold a Linear"):
        moe(tokens(5))


def test_it_is_not_exported() -> None:
    moe = layer().eval()
    with pytest.raises(ValueError, match=r"torch\.export: got mix='weights', expected .*merge"):
        torch.export.export(moe, (tokens(3, 4),))
