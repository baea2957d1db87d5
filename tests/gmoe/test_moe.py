"""MoE and record. Shapes: T tokens, D width, E experts, K experts a token."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gmoe
from gmoe import (
    AttentionVote,
    ExpertChoice,
    Experts,
    LinearExperts,
    MLPExperts,
    MoE,
    MultiCentroid,
    RandomRouter,
    Router,
    Routing,
    TokenChoice,
    UniformRouter,
    record,
)
from gmoe.dispatch import Backend
from tests.gmoe.reference import CASES, DTYPE, assert_same_as_naive, graph_edges, pool_lists

D, E = 5, 3
BACKENDS: list[Backend] = list(get_args(Backend))
each_backend = pytest.mark.parametrize("backend", BACKENDS)

EXPERTS: dict[str, Callable[[Backend], Experts]] = {
    "linear": lambda backend: LinearExperts(D, 4, E, backend=backend),
    "linear-no_bias": lambda backend: LinearExperts(D, 4, E, bias=False, backend=backend),
    "mlp": lambda backend: MLPExperts(D, 7, 4, E, backend=backend),
    "mlp-glu": lambda backend: MLPExperts(D, 7, D, E, glu=True, activation="silu", backend=backend),
    "mlp-no_bias": lambda backend: MLPExperts(D, 7, D, E, bias=False, activation="relu", backend=backend),
    "mlp-function": lambda backend: MLPExperts(D, 7, D, E, activation=torch.sin, backend=backend),
}
ROUTERS: dict[str, Callable[[], Router]] = {
    "token_choice": lambda: TokenChoice(D, E, k=2),
    "token_choice-all": lambda: TokenChoice(D, E, k=E, weight="score"),
    "token_choice-capacity": lambda: TokenChoice(D, E, k=2, capacity_factor=0.5),
    "expert_choice": lambda: ExpertChoice(D, E),
    "expert_choice-tokens": lambda: ExpertChoice(D, E, normalize="tokens", capacity_factor=0.5),
    "attention_vote": lambda: AttentionVote(D, E, k=2, weight="straight_through"),
    "multi_centroid": lambda: MultiCentroid(D, E),
}
INPUTS: dict[str, tuple[tuple[int, ...], list[int] | None]] = {
    "ragged": ((11, D), [5, 0, 5, 9, 0, 0, 5, 9, 9, 9, 2]),
    "leading": ((2, 4, D), None),
    "one_token": ((1, D), None),
}


def starving(num_experts: int = E, dim: int = D) -> TokenChoice:
    """Sends all positive tokens to the last expert."""
    router = TokenChoice(dim, num_experts)
    with torch.no_grad():
        router.gate.weight.copy_(torch.arange(float(num_experts))[:, None].expand(num_experts, dim))
    return router


# Equal to the naive reference


@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("experts", EXPERTS)
@each_backend
def test_experts_and_backends_equal_naive(backend: Backend, experts: str, inputs: str) -> None:
    shape, ids = INPUTS[inputs]
    for router in ROUTERS.values() if experts == "mlp" else [ROUTERS["token_choice"], ROUTERS["expert_choice"]]:
        torch.manual_seed(0)
        layer = MoE(router(), EXPERTS[experts](backend)).to(DTYPE)
        assert_same_as_naive(layer, torch.randn(shape, dtype=DTYPE), None if ids is None else torch.tensor(ids))


@each_backend
def test_empty_experts_equal_naive(backend: Backend) -> None:
    for experts in EXPERTS.values():
        layer = MoE(starving(), experts(backend)).to(DTYPE)
        assert_same_as_naive(layer, torch.rand(6, D, dtype=DTYPE) + 0.1)


@pytest.mark.parametrize("experts", EXPERTS)
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("backend", ["grouped", "padded", "auto"])
def test_backends_agree_in_float32(backend: Backend, router: str, experts: str) -> None:
    """The grouped kernel runs in float32 only."""
    torch.manual_seed(0)
    loop = MoE(ROUTERS[router](), EXPERTS[experts]("loop"))
    other = copy.deepcopy(loop)
    for module in other.modules():
        if isinstance(module, LinearExperts):
            module.backend = backend
    x, pool = torch.randn(11, D), torch.tensor(INPUTS["ragged"][1])
    results = []
    for layer in (loop, other):
        leaf = x.clone().requires_grad_()
        y, routing = layer(leaf, pool, return_routing=True)
        (y.square().sum() + routing.aux_loss).backward()
        results.append([y, leaf.grad, *(parameter.grad for parameter in layer.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@each_backend
def test_starved_experts_have_zero_gradients(backend: Backend) -> None:
    """None would make DDP hang."""
    for dtype in (torch.float32, torch.float64):
        layer = MoE(starving(), MLPExperts(D, 7, D, E, backend=backend)).to(dtype)
        layer(torch.rand(6, D, dtype=dtype) + 0.1).sum().backward()
        for name, parameter in layer.experts.named_parameters():
            assert parameter.grad is not None, name
            assert not parameter.grad[:-1].any(), name
            assert parameter.grad[-1].any(), name


# grouped_mm's traps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@each_backend
def test_widths_dtypes_and_an_expanded_gradient(backend: Backend, autocast: bool, dtype: torch.dtype) -> None:
    """Cora has 1,433 features and 7 classes; ``y.sum()`` has a gradient of strides (0, 0)."""
    torch.manual_seed(0)
    for experts in (LinearExperts(1433, 7, E, backend=backend), MLPExperts(1433, 7, 1433, E, backend=backend)):
        layer = MoE(TokenChoice(1433, E, k=2), experts).to(dtype)
        x = torch.randn(9, 1433, dtype=dtype, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y, routing = layer(x, return_routing=True)
        y.sum().backward()
        assert y.dtype == (torch.bfloat16 if autocast and dtype != torch.float64 else dtype)
        assert routing.scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        for parameter in layer.parameters():
            assert parameter.grad is not None
            assert parameter.grad.isfinite().all()
            assert parameter.grad.dtype == dtype


@each_backend
def test_float64_under_autocast_is_untouched(backend: Backend) -> None:
    layer = MoE(TokenChoice(D, E, k=2), MLPExperts(D, 7, 4, E, backend=backend)).double()
    x = torch.randn(9, D, dtype=DTYPE)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert torch.equal(y, layer(x))


@each_backend
def test_bfloat16_is_near_float32(backend: Backend) -> None:
    torch.manual_seed(0)
    layer = MoE(UniformRouter(D, E), MLPExperts(D, 16, 4, E, backend=backend))
    x = torch.randn(9, D)
    y = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer(x).float(), y, atol=0.03, rtol=0.03)
    torch.testing.assert_close(layer.bfloat16()(x.bfloat16()).float(), y, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_router_in_a_bfloat16_model(case: Any) -> None:
    torch.manual_seed(0)
    layer = MoE(case.build(D, E, 2, num_tokens=8), LinearExperts(D, 4, E)).bfloat16()
    x = torch.randn(8, D, dtype=torch.bfloat16)
    y, routing = layer(x, None, graph_edges(pool_lists(x, None)), return_routing=True)
    (y.sum() + routing.aux_loss).backward()
    assert y.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("shape", [(0, D), (3, 0, D), (0, 4, D), (2, 0, 3, D)], ids=str)
@each_backend
def test_zero_tokens(backend: Backend, shape: tuple[int, ...]) -> None:
    for experts in EXPERTS.values():
        layer = MoE(TokenChoice(D, E, k=2), experts(backend))
        x = torch.zeros(shape, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        assert y.shape == (*shape[:-1], layer.experts.out_features)
        assert x.grad is not None
        assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize(
    "backend", ["aot_eager", *(pytest.param(name, marks=pytest.mark.slow) for name in ("eager", "inductor"))]
)
@pytest.mark.parametrize("router", ["token_choice-bias", "expert_choice-tokens", "attention_vote"])
def test_compiled_equals_eager(router: str, backend: str) -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    build = {**ROUTERS, "token_choice-bias": lambda: TokenChoice(D, E, k=2, balance="bias", bias_rate=0.5)}[router]
    layer = MoE(build(), MLPExperts(D, 7, 4, E, backend="grouped"))
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, backend=backend)
    for num_tokens in (12, 12, 8):
        x = torch.randn(num_tokens, D)
        results = []
        for call, module in ((layer, layer), (compiled, twin)):
            leaf = x.clone().requires_grad_()
            y = call(leaf)
            y.square().sum().backward()
            results.append(
                [y, leaf.grad, *(p.grad for p in module.parameters()), *(b.clone() for b in module.buffers())]
            )
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_compiled_layer_is_recorded() -> None:
    torch.compiler.reset()
    layer = MoE(TokenChoice(D, E), LinearExperts(D, 4, E))
    compiled: Any = torch.compile(layer, backend="eager")
    with record(compiled) as routings:
        compiled(torch.randn(6, D))
    assert len(routings) == 1


def test_a_layer_that_was_traced_before_the_block_is_not_passed_over_in_silence() -> None:
    torch.compiler.reset()
    compiled: Any = torch.compile(MoE(TokenChoice(D, E), LinearExperts(D, 4, E)), backend="eager")
    compiled(torch.randn(6, D))
    with pytest.raises(RuntimeError, match="compiled and called before the block"), record(compiled):
        compiled(torch.randn(6, D))


# The module


def test_returns_the_routing_on_request() -> None:
    layer = MoE(TokenChoice(D, E, balance="switch"), LinearExperts(D, 4, E))
    x = torch.randn(2, 6, D)
    y = layer(x)
    again, routing = layer(x, return_routing=True)
    assert isinstance(y, Tensor)
    assert isinstance(routing, Routing)
    assert torch.equal(y, again)
    assert y.shape == (2, 6, 4)
    assert gmoe.aux_loss(routing) == routing.aux_loss > 0


def test_costs_and_parameters() -> None:
    layer = MoE(ExpertChoice(D, E, k=2, capacity_factor=0.5), LinearExperts(D, 4, E))
    assert layer.experts_per_token == 1.0
    assert list(layer.routed_parameters()) == list(layer.experts.parameters())


def test_reset_parameters() -> None:
    layer = MoE(TokenChoice(D, E, balance="bias"), LinearExperts(D, 4, E))
    for _ in range(2):
        layer(torch.randn(7, D))
    before = copy.deepcopy(layer.state_dict())
    layer.reset_parameters()
    assert not any(torch.equal(value, before[name]) for name, value in layer.named_parameters())
    assert not any(value.any() for value in layer.buffers())


def test_state_dict_copy_and_pickle() -> None:
    layer = MoE(TokenChoice(D, E, k=2), MLPExperts(D, 7, 4, E))
    other, x = MoE(TokenChoice(D, E, k=2), MLPExperts(D, 7, 4, E)), torch.randn(7, D)
    other.load_state_dict(layer.state_dict())
    for twin in (other, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))


def test_repr() -> None:
    text = repr(MoE(TokenChoice(D, E), LinearExperts(D, 4, E)))
    assert text.startswith("MoE(")
    assert "TokenChoice(" in text
    assert "LinearExperts(5, 4, num_experts=3)" in text


def test_router_and_experts_must_fit() -> None:
    with pytest.raises(ValueError, match=r"experts: got num_experts=4, .* num_experts=3, dim=5"):
        MoE(TokenChoice(D, E), LinearExperts(D, 4, 4))
    with pytest.raises(ValueError, match=r"experts: got .* in_features=6, expected .* dim=5"):
        MoE(TokenChoice(D, E), LinearExperts(6, 4, E))


def test_a_router_belongs_to_one_layer() -> None:
    router = RandomRouter(D, E)
    layer = MoE(router, LinearExperts(D, 4, E))
    with pytest.raises(
        ValueError, match="router: got an instance that another layer holds already, expected one of its"
    ):
        MoE(router, LinearExperts(D, 4, E))
    del layer
    gc.collect()
    MoE(router, LinearExperts(D, 4, E))  # its layer is gone


def test_a_refused_layer_does_not_keep_the_router() -> None:
    router = RandomRouter(D, E)
    with pytest.raises(ValueError, match="experts: got"):
        MoE(router, LinearExperts(D, 4, E + 1))
    MoE(router, LinearExperts(D, 4, E))


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copied_router_belongs_to_the_copied_layer(twin: Callable[[MoE], MoE]) -> None:
    copied = twin(MoE(RandomRouter(D, E), LinearExperts(D, 4, E)))
    with pytest.raises(ValueError, match="router: got an instance that another layer holds already"):
        MoE(copied.router, LinearExperts(D, 4, E))


# record


class Model(nn.Module):
    """Two MoE layers with other modules around, perhaps under checkpointing."""

    def __init__(self, use_reentrant: bool | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(D, D)
        self.layers = nn.ModuleList(
            MoE(TokenChoice(D, n, k=2, balance="switch", balance_coef=1.0), LinearExperts(D, D, n)) for n in (3, 4)
        )
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for layer in self.layers:
            if self.use_reentrant is None:
                x = x + layer(x)
            else:
                y = checkpoint(layer, x, use_reentrant=self.use_reentrant)
                assert isinstance(y, Tensor)
                x = x + y
        return x


def gate_gradients(model: Model, aux: Tensor) -> list[Tensor]:
    model.zero_grad()
    aux.backward()
    return [p.grad.clone() for n, p in model.named_parameters() if "gate" in n and p.grad is not None]


def test_record_collects_in_order() -> None:
    model, x = Model(), torch.randn(6, D)
    with record(model) as routings:
        model(x)
        assert [routing.num_experts for routing in routings] == [3, 4]
        model(x[:2])
    assert [routing.num_experts for routing in routings] == [3, 4, 3, 4]
    assert [routing.num_tokens for routing in routings] == [6, 6, 2, 2]
    model(x)
    assert len(routings) == 4  # the hooks are gone
    assert gate_gradients(model, gmoe.aux_loss(routings))[0].abs().max() > 0


def test_record_nests() -> None:
    model, x = Model(), torch.randn(6, D)
    with record(model) as outer, record(model.layers[1]) as inner:
        model(x)
    assert [routing.num_experts for routing in outer] == [3, 4]
    assert [routing.num_experts for routing in inner] == [4]


def test_record_one_layer_or_router() -> None:
    layer = MoE(TokenChoice(D, E), LinearExperts(D, 4, E))
    with record(layer) as routings:
        layer(torch.randn(3, D))
    with record(layer.router) as of_router:
        layer.router(torch.randn(3, D))
    assert len(routings) == len(of_router) == 1


def test_record_refuses_a_forward_without_routing() -> None:
    model = nn.Linear(D, D)
    with pytest.raises(RuntimeError, match="recorded no routing"), record(model):
        model(torch.randn(3, D))


def test_record_refuses_a_skipped_layer() -> None:
    """Stochastic depth that drops all layers: the second forward records nothing."""
    model, x = Model(), torch.randn(3, D)
    with record(model):
        model(x)
        model.layers = nn.ModuleList()
        with pytest.raises(RuntimeError, match="recorded no routing"):
            model(x)


def test_record_refuses_a_block_without_forward() -> None:
    with pytest.raises(RuntimeError, match="nothing was recorded; run the model inside the block"), record(Model()):
        pass


def test_record_leaves_no_hook_behind_an_error() -> None:
    model = Model()
    with pytest.raises(KeyError), record(model):
        raise KeyError
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_record_refuses_reentrant_checkpointing() -> None:
    model = Model(use_reentrant=True)
    with pytest.raises(RuntimeError, match=r"reentrant checkpointing.*use_reentrant=False"), record(model):
        model(torch.randn(3, D))


def test_record_without_gradients_is_fine() -> None:
    model = Model().eval()
    with torch.no_grad(), record(model) as routings:
        model(torch.randn(3, D))
    assert len(routings) == 2


def test_record_is_not_doubled_by_a_recomputation() -> None:
    torch.manual_seed(0)
    plain = Model()
    saved = copy.deepcopy(plain)
    saved.use_reentrant = False
    x = torch.randn(6, D)
    gradients = []
    for model in (plain, saved):
        with record(model) as routings:
            y = model(x)
            y.square().sum().backward(retain_graph=True)
            assert len(routings) == 2
        gradients.append(gate_gradients(model, model(x).sum() + gmoe.aux_loss(routings)))
    assert len(gradients[0]) == 2
    torch.testing.assert_close(*gradients)
