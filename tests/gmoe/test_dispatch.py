"""Dispatch. Shapes: T tokens, E experts, P pairs sorted by expert, I in, O out features."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gmoe import LinearExperts, MLPExperts, MoE, Routing, TokenChoice, dispatch, grouped_linear
from gmoe.dispatch import Backend, rounded

BACKENDS: list[Backend] = list(get_args(Backend))
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def naive_grouped_linear(x_PI: Tensor, weight_EIO: Tensor, bias_EO: Tensor | None, loads: list[int]) -> Tensor:
    owner = [e for e, load in enumerate(loads) for _ in range(load)]
    rows = [
        x @ weight_EIO[e] if bias_EO is None else x @ weight_EIO[e] + bias_EO[e]
        for x, e in zip(x_PI, owner, strict=True)
    ]
    return torch.stack(rows) if rows else x_PI.new_zeros(0, weight_EIO.size(2))


def ends(loads: list[int]) -> Tensor:
    return torch.tensor(loads).cumsum(0).to(torch.int32)


LOADS = [[3, 0, 2, 4], [0, 0, 5, 0], [9, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1]]


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("loads", LOADS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@each_backend
def test_equals_a_row_at_a_time(backend: Backend, dtype: torch.dtype, loads: list[int], bias: bool) -> None:
    """Float32 and bfloat16 run the real ``grouped_mm``; the reference is float64 on the same rounded numbers."""
    torch.manual_seed(0)
    x = torch.randn(sum(loads), 7, dtype=dtype).requires_grad_()
    weight = torch.randn(4, 7, 5, dtype=dtype).requires_grad_()
    bias_EO = torch.randn(4, 5, dtype=dtype).requires_grad_() if bias else None
    cotangent = torch.randn(sum(loads), 5, dtype=dtype)
    leaves = [x, weight, *([] if bias_EO is None else [bias_EO])]
    y = grouped_linear(x, weight, bias_EO, ends(loads), backend)
    actual = torch.autograd.grad(y, leaves, cotangent)

    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = naive_grouped_linear(exact[0], exact[1], exact[2] if bias else None, loads)
    wanted = (
        torch.autograd.grad(expected, exact, cotangent.double(), allow_unused=True, materialize_grads=True)
        if sum(loads)
        else [torch.zeros_like(leaf) for leaf in exact]
    )
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.15}[dtype]
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, atol=tolerance, rtol=0)
    for a, w in zip(actual, wanted, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), w, atol=tolerance, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@each_backend
def test_a_frozen_side_gets_no_gradient(backend: Backend, dtype: torch.dtype) -> None:
    x, weight = torch.randn(4, 7, dtype=dtype), torch.randn(3, 7, 5, dtype=dtype)
    grouped_linear(x, weight.requires_grad_(), None, ends([1, 0, 3]), backend).sum().backward()
    assert x.grad is None
    assert weight.grad is not None
    grouped_linear(x.requires_grad_(), weight.detach(), None, ends([1, 0, 3]), backend).sum().backward()
    assert x.grad is not None


@each_backend
def test_gradcheck(backend: Backend) -> None:
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((5, 3), (3, 3, 2), (3, 2))]
    assert torch.autograd.gradcheck(lambda x, w, b: grouped_linear(x, w, b, ends([2, 0, 3]), backend), leaves)


# grouped_mm's traps, on every backend


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("width", "out"), [(1433, 7), (7, 1433), (8, 8), (1, 1)])
@each_backend
def test_any_width_and_an_expanded_gradient(backend: Backend, width: int, out: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, width, dtype=dtype, requires_grad=True)
    weight = (torch.randn(3, width, out, dtype=dtype) / width**0.5).requires_grad_()
    y = grouped_linear(x, weight, None, ends([4, 0, 2]), backend)
    y.sum().backward()
    exact = torch.cat([x[:4].double() @ weight[0].double(), x[4:].double() @ weight[2].double()])
    tolerance = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(y.double(), exact, atol=tolerance, rtol=0)
    assert x.grad is not None
    assert weight.grad is not None
    by_row = torch.cat([weight[0].double().sum(1).expand(4, -1), weight[2].double().sum(1).expand(2, -1)])
    torch.testing.assert_close(x.grad.double(), by_row, atol=tolerance * 3, rtol=1e-2 if dtype == torch.bfloat16 else 0)
    assert not weight.grad[1].any()


@each_backend
def test_autocast_as_in_linear(backend: Backend) -> None:
    x, weight, bias = torch.randn(4, 7), torch.randn(2, 7, 5), torch.randn(2, 5)
    plain = grouped_linear(x, weight, bias, ends([1, 3]), backend)
    with torch.autocast("cpu", torch.bfloat16):
        low = grouped_linear(x, weight, bias, ends([1, 3]), backend)
        double = grouped_linear(x.double(), weight.double(), bias.double(), ends([1, 3]), backend)
    assert plain.dtype == torch.float32
    assert low.dtype == torch.bfloat16
    assert double.dtype == torch.float64
    torch.testing.assert_close(low.float(), plain, atol=0.1, rtol=0.05)
    torch.testing.assert_close(double.float(), plain)


@each_backend
def test_strided_rows(backend: Backend) -> None:
    x, weight = torch.randn(7, 4).T, torch.randn(2, 5, 7).transpose(1, 2)
    expected = grouped_linear(x.contiguous(), weight.contiguous(), None, ends([1, 3]), "loop")
    torch.testing.assert_close(grouped_linear(x, weight, None, ends([1, 3]), backend), expected)


def test_unknown_backend() -> None:
    message = "backend: got 'fast', expected one of 'auto', 'grouped', 'padded', 'loop'"
    with pytest.raises(ValueError, match=message):
        grouped_linear(torch.zeros(1, 2), torch.zeros(1, 2, 2), None, ends([1]), "fast")  # type: ignore[arg-type]


# dispatch


def test_dispatch_by_hand() -> None:
    """Expert 0 doubles, expert 1 negates; token 0 goes to both, token 1 to none, token 2 to expert 1."""
    routing = Routing(
        token=torch.tensor([0, 0, 2]),
        offsets=torch.tensor([1, 3], dtype=torch.int32),
        weight=torch.tensor([0.5, 0.25, 2.0]),
        scores=torch.zeros(3, 2),
        num_tokens=3,
    )
    factor = torch.tensor([2.0, -1.0, -1.0])[:, None]
    y = dispatch(torch.tensor([[4.0], [5.0], [6.0]]), routing, lambda x_PI, _: x_PI * factor)
    # token 0: 0.5 * 2 * 4 + 0.25 * -4 = 3; token 1: nothing; token 2: 2 * -6 = -12
    assert y.tolist() == [[3.0], [0.0], [-12.0]]


def test_experts_run_on_their_pairs_only() -> None:
    """Cost follows K, not E."""
    rows: list[int] = []

    def experts(x_PI: Tensor, offsets_E: Tensor) -> Tensor:
        rows.append(x_PI.size(0))
        return x_PI

    dispatch(torch.randn(10, 4), TokenChoice(4, 8, k=2)(torch.randn(10, 4)), experts)
    assert rows == [20]


@each_backend
def test_experts_without_tokens_have_zero_gradients(backend: Backend) -> None:
    router = TokenChoice(4, 3)
    with torch.no_grad():
        router.gate.weight.copy_(torch.tensor([[1.0] * 4, [2.0] * 4, [3.0] * 4]))
    layer = MoE(router, LinearExperts(4, 4, 3, backend=backend))
    layer(torch.rand(6, 4) + 0.1).sum().backward()
    assert isinstance(layer.experts, LinearExperts)
    for parameter in (layer.experts.weight, layer.experts.bias):
        assert parameter is not None
        assert parameter.grad is not None
        assert not parameter.grad[:2].any()
        assert parameter.grad[2].any()


@settings(max_examples=60, deadline=None)
@given(
    loads=st.lists(st.integers(0, 200), min_size=1, max_size=5),
    backend=st.sampled_from(["mlp", "linear"]),
    seed=st.integers(0, 99),
)
def test_rounded_loads_change_no_result(loads: list[int], backend: str, seed: int) -> None:
    """In bfloat16 only; here that routing runs experts in float64."""
    torch.manual_seed(seed)
    tokens, num_experts = 200, len(loads)
    token = torch.cat([torch.randperm(tokens)[:load].sort()[0] for load in loads])
    gate = torch.randn(len(token), dtype=torch.float64, requires_grad=True)
    scores = torch.zeros(tokens, num_experts, dtype=torch.float64)
    routing = Routing(token, ends(loads), gate, scores, tokens)
    even = rounded(routing, torch.zeros(1, dtype=torch.bfloat16))
    step = max(sum(loads) // (16 * num_experts), 1)
    if step == 1 or len(set(loads)) == 1:
        assert even is routing
    else:
        largest = max(2**n for n in range(9) if 2**n <= step)
        assert even.load.tolist() == [-(-load // largest) * largest for load in loads]
    assert even.token.numel() <= sum(loads) + sum(loads) // 16
    experts = MLPExperts(3, 4, 2, num_experts) if backend == "mlp" else LinearExperts(3, 2, num_experts)
    experts = experts.double()
    x = torch.randn(tokens, 3, dtype=torch.float64, requires_grad=True)
    leaves = [x, gate, *experts.parameters()]
    found, expected = (experts.mix(x, one) for one in (even, routing))
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
    grad = torch.randn_like(found)
    for own, other in zip(
        torch.autograd.grad(found, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True
    ):
        torch.testing.assert_close(own, other, atol=1e-10, rtol=0)


def test_only_bfloat16_on_the_cpu_is_rounded() -> None:
    routing = Routing(torch.arange(64), ends([63, 1]), torch.ones(64), torch.zeros(64, 2), 64)
    assert rounded(routing, torch.zeros(1)) is routing
    assert rounded(routing, torch.zeros(1, dtype=torch.float16)) is routing
    assert rounded(routing, torch.zeros(1, dtype=torch.bfloat16, device="meta")) is routing
    assert rounded(routing, torch.zeros(1, dtype=torch.bfloat16)).load.tolist() == [64, 2]


@pytest.mark.parametrize("parts", ["mlp", "linear"])
def test_bfloat16_sees_few_sizes(parts: str) -> None:
    """Sizes of the products in training, forward and backward, over steps with new loads each."""
    torch.manual_seed(0)
    experts = MLPExperts(8, 16, 8, 4) if parts == "mlp" else LinearExperts(8, 8, 4)
    layer = MoE(TokenChoice(8, 4, 1, init_scale=1.0), experts)
    rows, loads = set[int](), set[int]()
    for _ in range(20):
        with torch.autocast("cpu", torch.bfloat16), Sizes() as sizes:
            y, routing = layer(torch.randn(1000, 8, requires_grad=True), return_routing=True)
            y.sum().backward()
        rows |= sizes.rows
        loads |= set(routing.load.tolist())
    assert len(loads) > 40
    assert {size for size in rows if size % 8} <= {1000}, "the router's own"
    assert len(rows) < 30


class Sizes(TorchDispatchMode):
    """The larger sides of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = set[int]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.rows |= {max(arg.shape) for arg in args if isinstance(arg, Tensor) and arg.dim() == 2}
        return func(*args, **(kwargs or {}))
