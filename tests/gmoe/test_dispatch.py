"""Every kernel equals the formula. Shapes: T tokens, E experts, P pairs sorted by expert, I in, H hidden, O out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gmoe import LinearExperts, MLPExperts, MoE, Routing, TokenChoice, combine, dispatch, grouped_linear
from gmoe.dispatch import FUSED, Backend, resolve_backend, rounded, routed_linear, routed_mlp
from tests.gmoe.conv.masked import features, routing_of

BACKENDS: list[Backend] = list(get_args(Backend))
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)

CASES = {
    "tokens": st.integers(0, 9),
    "experts": st.integers(1, 4),
    "bias": st.booleans(),
    "share": st.sampled_from([0.0, 0.4, 1.0]),
    "seed": st.integers(0, 99),
}


def ends(loads: Sequence[int]) -> Tensor:
    return torch.tensor(loads).cumsum(0).to(torch.int32)


def gradients(y: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    cotangent = features(*y.shape, seed=9).to(y.dtype)
    found = torch.autograd.grad(y, leaves, cotangent, retain_graph=True, allow_unused=True, materialize_grads=True)
    return list(found)


def assert_same(ours: Tensor, theirs: Tensor, leaves: Sequence[Tensor], tolerance: float = 1e-10) -> None:
    """Outputs and gradients."""
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)
    for own, other in zip(gradients(ours, leaves), gradients(theirs, leaves), strict=True):
        torch.testing.assert_close(own, other, atol=tolerance, rtol=0)


def choices(tokens: int, experts: int, share: float, seed: int) -> Tensor:
    """(T, E) weights, 0 where a token does not go to the expert."""
    chosen = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed)) < share
    return (features(tokens, experts, seed=seed + 9) * chosen).requires_grad_()


# grouped_linear


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("loads", [[3, 0, 2, 4], [0, 0, 5, 0], [9, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]], ids=str)
@each_dtype
@each_backend
def test_each_row_meets_its_expert(backend: Backend, dtype: torch.dtype, loads: list[int], bias: bool) -> None:
    """Float32 and bfloat16 run the real ``grouped_mm``; the reference is float64 on the same rounded numbers."""
    shapes = [(sum(loads), 7), (4, 7, 5), (4, 5)][: 2 + bias]
    leaves = [features(*shape, seed=i).to(dtype).requires_grad_() for i, shape in enumerate(shapes)]
    y = grouped_linear(leaves[0], leaves[1], leaves[2] if bias else None, ends(loads), backend)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    owner = torch.arange(4).repeat_interleave(torch.tensor(loads))
    expected = torch.einsum("pi,pio->po", exact[0], exact[1][owner])
    expected = expected + exact[2][owner] if bias else expected
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.15}[dtype]
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, atol=tolerance, rtol=0)
    for own, other in zip(gradients(y, leaves), gradients(expected, exact), strict=True):
        assert own.dtype == dtype
        torch.testing.assert_close(own.double(), other, atol=tolerance, rtol=0)


@each_backend
def test_gradcheck(backend: Backend) -> None:
    leaves = [features(*shape).requires_grad_() for shape in ((5, 3), (3, 3, 2), (3, 2))]
    assert torch.autograd.gradcheck(lambda x, w, b: grouped_linear(x, w, b, ends([2, 0, 3]), backend), leaves)


@pytest.mark.parametrize("frozen", range(3))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@each_backend
def test_a_frozen_input_gets_no_gradient(backend: Backend, dtype: torch.dtype, frozen: int) -> None:
    leaves = [features(*shape).to(dtype).requires_grad_() for shape in ((4, 7), (3, 7, 5), (3, 5))]
    leaves[frozen].requires_grad_(False)
    x, weight, bias = leaves
    grouped_linear(x, weight, bias, ends([1, 0, 3]), backend).sum().backward()
    assert [leaf.grad is None for leaf in leaves] == [i == frozen for i in range(3)]


@each_dtype
@pytest.mark.parametrize(("width", "out"), [(1433, 7), (7, 1433), (8, 8), (1, 1)])
@each_backend
def test_any_width_and_an_expanded_gradient(backend: Backend, width: int, out: int, dtype: torch.dtype) -> None:
    """What ``grouped_mm`` refuses: rows that are no multiple of 16 bytes, strides of 0."""
    x = features(6, width).to(dtype).requires_grad_()
    weight = (features(3, width, out, seed=1) / width**0.5).to(dtype).requires_grad_()
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
    assert (plain.dtype, low.dtype, double.dtype) == (torch.float32, torch.bfloat16, torch.float64)
    torch.testing.assert_close(low.float(), plain, atol=0.1, rtol=0.05)
    torch.testing.assert_close(double.float(), plain)


@each_backend
def test_strided_rows(backend: Backend) -> None:
    x, weight = torch.randn(7, 4).T, torch.randn(2, 5, 7).transpose(1, 2)
    expected = grouped_linear(x.contiguous(), weight.contiguous(), None, ends([1, 3]), "loop")
    torch.testing.assert_close(grouped_linear(x, weight, None, ends([1, 3]), backend), expected)


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"backend: got 'fast', expected one of 'auto', 'grouped', 'padded', 'loop'"):
        grouped_linear(torch.zeros(1, 2), torch.zeros(1, 2, 2), None, ends([1]), "fast")  # type: ignore[arg-type]


def test_where_a_backend_has_no_kernel_another_stands_in() -> None:
    on_meta = torch.zeros(1, device="meta")
    assert [resolve_backend(backend, on_meta) for backend in BACKENDS] == ["loop", "grouped", "padded", "loop"]
    assert resolve_backend("grouped", on_meta.double()) == "loop"


# dispatch and combine


def test_dispatch_and_combine_by_hand() -> None:
    """Expert 0 doubles, expert 1 negates; token 0 goes to both, token 1 to none, token 2 to expert 1."""
    token, weight = torch.tensor([0, 0, 2]), torch.tensor([0.5, 0.25, 2.0])
    routing = Routing(token, ends([1, 2]), weight, torch.zeros(3, 2), num_tokens=3)
    rows = dispatch(torch.tensor([[4.0], [5.0], [6.0]]), routing)
    assert rows.tolist() == [[4.0], [4.0], [6.0]]
    y = combine(rows * torch.tensor([[2.0], [-1.0], [-1.0]]), routing)
    # token 0: 0.5 * 2 * 4 + 0.25 * -4 = 3; token 1: nothing; token 2: 2 * -6 = -12
    assert y.tolist() == [[3.0], [0.0], [-12.0]]


# routed_linear and routed_mlp


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=20, deadline=None)
@given(widths=st.lists(st.integers(1, 4), min_size=1, max_size=3), **CASES)
def test_routed_linear_is_the_mixture(
    backend: Backend, tokens: int, experts: int, widths: list[int], bias: bool, share: float, seed: int
) -> None:
    parts = [features(tokens, width, seed=seed + i).requires_grad_() for i, width in enumerate(widths)]
    weight = features(experts, sum(widths), 3, seed=seed + 7).requires_grad_()
    bias_EO = features(experts, 3, seed=seed + 8).requires_grad_()
    gate = choices(tokens, experts, share, seed)
    ours = routed_linear(parts, weight, bias_EO if bias else None, routing_of(gate), backend)
    of_each = torch.einsum("ti,eio->teo", torch.cat(parts, dim=1), weight) + bias * bias_EO
    theirs = torch.einsum("te,teo->to", gate, of_each)
    if share < 1:  # where a weight is no pair's, the formula's gradient is not zero
        gate = gate.detach()
    assert_same(ours, theirs, [*parts, weight, bias_EO, *([gate] if gate.requires_grad else [])])


@settings(max_examples=40, deadline=None)
@given(activation=st.sampled_from(sorted(FUSED)), glu=st.booleans(), **CASES)
def test_routed_mlp_is_the_mixture(
    tokens: int, experts: int, activation: str, glu: bool, bias: bool, share: float, seed: int
) -> None:
    shapes = [(tokens, 3), (experts, 3, 10 if glu else 5), (experts, 10 if glu else 5), (experts, 5, 2), (experts, 2)]
    leaves = [features(*shape, seed=seed + i).requires_grad_() for i, shape in enumerate(shapes)]
    x, up, up_bias, down, down_bias = leaves
    gate, activate = choices(tokens, experts, share, seed), FUSED[activation][0]
    biases = (up_bias, down_bias) if bias else (None, None)
    ours = routed_mlp(x, up, biases[0], down, biases[1], activation, glu, routing_of(gate))
    u = torch.einsum("ti,eiu->teu", x, up) + bias * up_bias
    h = activate(u[..., :5]) * u[..., 5:] if glu else activate(u)
    theirs = torch.einsum("te,teo->to", gate, torch.einsum("teh,eho->teo", h, down) + bias * down_bias)
    assert_same(ours, theirs, [*leaves, gate] if share == 1 else leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=20, deadline=None)
@given(
    loads=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    widths=st.lists(st.integers(1, 4), min_size=1, max_size=2),
    kernel=st.sampled_from(["linear", "mlp", "glu"]),
    bias=st.booleans(),
    out=st.sampled_from([2, 6]),
)
def test_slices_of_tokens_are_a_routing_like_any_other(
    backend: Backend, loads: list[int], widths: list[int], kernel: str, bias: bool, out: int
) -> None:
    """Tokens sorted by expert; and what a caller holds stays as it is."""
    tokens, experts, hidden = sum(loads), len(loads), out // 2 if kernel == "glu" else out
    parts, gate_P = [features(tokens, width, seed=i) for i, width in enumerate(widths)], features(tokens, seed=7)
    up, up_bias = features(experts, sum(widths), out, seed=3), features(experts, out, seed=4)
    down, down_bias = features(experts, hidden, 2, seed=5), features(experts, 2, seed=6)
    weights = [up, up_bias, down, down_bias][:: 1 if bias else 2][: 2 * (1 + bias) if kernel != "linear" else 1 + bias]
    leaves = [leaf.requires_grad_() for leaf in (*parts, gate_P, *weights)]
    before = [leaf.detach().clone() for leaf in leaves]

    def mixture(contiguous: bool) -> Tensor:
        token, scores = torch.arange(tokens), torch.zeros(tokens, experts)
        routing = Routing(token, ends(loads), gate_P, scores, tokens, contiguous=contiguous)
        if kernel == "linear":
            return routed_linear(parts, up, up_bias if bias else None, routing, backend)
        x, biases = torch.cat(parts, dim=1), (up_bias, down_bias) if bias else (None, None)
        return routed_mlp(x, up, biases[0], down, biases[1], "silu", kernel == "glu", routing)

    assert_same(mixture(True), mixture(False), leaves)
    assert all(torch.equal(leaf, kept) for leaf, kept in zip(leaves, before, strict=True))


def test_slices_of_parts_of_several_types() -> None:
    routing = Routing(torch.arange(5), ends([2, 3]), features(5), torch.zeros(5, 2), 5, contiguous=True)
    parts = [features(5, 3), features(5, 2, seed=1).float()]
    weight = features(2, 5, 4)
    plain = routed_linear(parts, weight, None, replace(routing, contiguous=False))
    torch.testing.assert_close(routed_linear(parts, weight, None, routing), plain)


@pytest.mark.parametrize("frozen", range(6))
@pytest.mark.parametrize("kernel", ["linear", "mlp"])
def test_gradients_are_only_made_where_they_are_needed(kernel: str, frozen: int) -> None:
    leaves = [features(*s, seed=i) for i, s in enumerate([(6, 3), (6, 4), (4, 3, 5), (4, 5), (4, 5, 2), (4, 2)])]
    for index, leaf in enumerate(leaves):
        leaf.requires_grad_(index != frozen)
    x, gate, up, up_bias, down, down_bias = leaves
    u = torch.einsum("ti,eiu->teu", x, up) + up_bias
    if kernel == "linear":
        ours, theirs = routed_linear([x], up, up_bias, routing_of(gate)), torch.einsum("te,teu->tu", gate, u)
    else:
        ours = routed_mlp(x, up, up_bias, down, down_bias, "silu", False, routing_of(gate))
        of_each = torch.einsum("teh,eho->teo", torch.nn.functional.silu(u), down) + down_bias
        theirs = torch.einsum("te,teo->to", gate, of_each)
    assert_same(ours, theirs, [leaf for leaf in leaves if leaf.requires_grad])


def test_routed_linear_follows_autocast_and_takes_mixed_parts() -> None:
    routing, weight = routing_of(torch.ones(5, 2)), features(2, 5, 3).float().requires_grad_()
    parts = [features(5, 2).float(), features(5, 3).bfloat16()]
    with torch.autocast("cpu", torch.bfloat16):
        y = routed_linear(parts, weight, None, routing)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32
    assert routed_linear(parts, weight, None, routing).dtype == torch.float32


def test_routed_mlp_refuses_types_that_do_not_match() -> None:
    with pytest.raises(RuntimeError, match="dtype"):
        MLPExperts(3, 5, 2, 4).bfloat16()(torch.randn(5, 3), routing_of(torch.ones(5, 4)))


def test_routed_mlp_keeps_only_the_hidden_layer() -> None:
    """No (P, I) or (P, O) tensor, and only one of (P, H)."""
    mlp, routing = MLPExperts(3, 50, 7, 4), routing_of(torch.ones(11, 4))
    kept: list[torch.Size] = []

    def pack(saved: Tensor) -> Tensor:
        kept.append(saved.shape)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        mlp(torch.randn(11, 3, requires_grad=True), routing)
    assert [shape for shape in kept if shape[0] in (11, 44) and len(shape) == 2] == [(11, 3), (44, 50)]


# The operators


def operator_calls() -> dict[str, tuple[Any, ...]]:
    """Arguments of each operator, differentiable in all that it has a gradient for."""
    x, up, up_bias, down, down_bias = (
        features(*shape, seed=i).requires_grad_()
        for i, shape in enumerate([(6, 3), (4, 3, 5), (4, 5), (4, 5, 2), (4, 2)])
    )
    routing = routing_of(choices(6, 4, 0.4, 0))
    rows = features(routing.token.numel(), 3).requires_grad_()
    gate, token, offsets = routing.weight.detach().requires_grad_(), routing.token, routing.offsets
    return {
        "grouped_linear": (rows, up, up_bias, offsets, "loop"),
        "routed_linear": (x[:, :1], x[:, 1:], gate, up, up_bias, token, offsets, 6, True),
        "routed_mlp": (x, gate, up, up_bias, down, down_bias, token, offsets, "gelu", False),
    }


@pytest.mark.parametrize("name", operator_calls())
def test_operators_keep_torchs_rules(name: str) -> None:
    """Schema, fake kernel, autograd, tracing."""
    torch.library.opcheck(getattr(torch.ops.gmoe, name).default, operator_calls()[name])


@pytest.mark.parametrize("kind", ["linear", "mlp"])
@each_backend
def test_second_order_gradients_are_refused(backend: Backend, kind: str) -> None:
    """Rather than some of their terms lost in silence."""
    experts = LinearExperts(4, 4, 3, backend=backend) if kind == "linear" else MLPExperts(4, 4, 4, 3, backend=backend)
    layer, x = MoE(TokenChoice(4, 3, k=2), experts), torch.randn(9, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"backward through gmoe.\w+_backward.default but no autograd formula"):
        grad.square().sum().backward()


# bfloat16 on the CPU


@settings(max_examples=60, deadline=None)
@given(loads=st.lists(st.integers(0, 200), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_rounded_loads_change_no_result(loads: list[int], seed: int) -> None:
    """In bfloat16 only; here that routing runs experts in float64."""
    torch.manual_seed(seed)
    token = torch.cat([torch.randperm(200)[:load].sort()[0] for load in loads])
    gate = torch.randn(len(token), dtype=torch.float64, requires_grad=True)
    even = rounded(token, ends(loads), gate)
    step = max(sum(loads) // (16 * len(loads)), 1)
    if step == 1 or len(set(loads)) == 1:
        assert even[0] is token
    else:
        largest = max(2**n for n in range(9) if 2**n <= step)
        assert even[1].tolist() == ends([-(-load // largest) * largest for load in loads]).tolist()
    assert len(even[0]) <= sum(loads) + sum(loads) // 16
    weight = features(len(loads), 3, 2).requires_grad_()
    x = features(200, 3, seed=1).requires_grad_()
    found, expected = (
        x.new_zeros(200, 2).index_add(
            0, token, gate[:, None] * torch.einsum("pi,pio->po", x[token], weight.repeat_interleave(load, dim=0))
        )
        for token, offsets, gate in (even, (token, ends(loads), gate))
        for load in [offsets.diff(prepend=offsets.new_zeros(1)).long()]
    )
    assert_same(found, expected, [x, gate, weight])


@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_bfloat16_sees_few_sizes(kind: str) -> None:
    """Sizes of the products in training, forward and backward, over steps with new loads each."""
    torch.manual_seed(0)
    experts = MLPExperts(8, 16, 8, 4) if kind == "mlp" else LinearExperts(8, 8, 4)
    layer = MoE(TokenChoice(8, 4, 1, init_scale=1.0, balance=None), experts)
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
