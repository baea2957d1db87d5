"""The common behavior of all routers. Shapes: T tokens, D width, E experts."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gmoe
from gmoe import (
    LinearExperts,
    MLPExperts,
    MoE,
    MultiCentroid,
    OracleRouter,
    RandomRouter,
    Router,
    SoftSlots,
    TokenChoice,
)
from gmoe.choices import SHORT, over_experts
from gmoe.routers import AttentionVote, ExpertChoice, Groups, build_router
from gmoe.routers.base import pair_weights
from tests.helpers.reference import (
    CASES,
    DTYPE,
    INPUTS,
    Case,
    D,
    assert_same_as_naive,
    graph_edges,
    group_lists,
)

E = 3


GROUPED = [case for case in CASES if not case.needs_edges]  # degrees set equal rows apart

ROW_WISE = [
    c
    for c in GROUPED
    if c.router not in (OracleRouter, AttentionVote) and "choice" not in c.options
]
"""Whose scores of equal tokens are equal to the last bit."""

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def tokens(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=DTYPE, generator=torch.Generator().manual_seed(seed))


def make_layer(
    case: Case, num_tokens: int, k: int = 2, weight: str = "default", training: bool = True
) -> MoE:
    torch.manual_seed(1)
    router = case.build(D, E, k, weight, num_tokens)
    return MoE(router, LinearExperts(D, 4, num_experts=E).to(DTYPE)).train(training)


def make_call(case: Case, name: str, seed: int = 0) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The arguments of a forward."""
    shape, ids = INPUTS[name]
    x = tokens(shape, seed)
    batch = None if ids is None else torch.tensor(ids).view(shape[:-1])
    return x, batch, graph_edges(group_lists(x, batch)) if case.needs_edges else None


# Equal to the naive reference


MODES = [
    (case, training)
    for case in CASES
    for training in (True, False)
    if training or case.differs_at_evaluation
]


def label(value: object) -> str:
    if isinstance(value, bool):
        return "train" if value else "eval"
    return value.name if isinstance(value, Case) else str(value)


SHAPES = [name for name in INPUTS if name != "ragged"]
"""Ragged groups are those of each weighting."""


@pytest.mark.parametrize(
    ("case", "training", "name"),
    [
        (case, training, name)
        for case, training in MODES
        for name in (SHAPES if training else ("one_group", "equal_unsorted"))
    ],
    ids=label,
)
def test_equals_naive_on_every_input(case: Case, training: bool, name: str) -> None:
    x, batch, edge_index = make_call(case, name)
    assert_same_as_naive(
        make_layer(case, x[..., 0].numel(), training=training), x, batch, edge_index
    )


@pytest.mark.parametrize(
    ("case", "training", "k", "weight"),
    [
        (case, training, k, weight)
        for case, training in MODES
        for k in (1, 2, E)
        for weight in case.weights(k)
        # In evaluation a weighting of another number of experts is as in training;
        # of all experts, what is left to compare is that none is lost.
        if k == 2 or (training and (k == 1 or weight in ("default", "normalized")))
    ],
    ids=label,
)
def test_equals_naive_in_every_weighting(case: Case, training: bool, k: int, weight: str) -> None:
    x, batch, edge_index = make_call(case, "ragged")
    assert_same_as_naive(make_layer(case, len(x), k, weight, training), x, batch, edge_index)


def tied(layer: MoE, x: Tensor) -> Tensor:
    """Two distinct rows, and parameters that are multiples of 1/4: scores tie exactly."""
    with torch.no_grad():
        for parameter in layer.router.parameters():
            parameter.copy_((parameter * 8).round() / 4)
    rows = torch.tensor([[1.0, 0, -1, 2, 0], [0, 1, 1, 0, -1]], dtype=DTYPE)
    return rows[torch.arange(x[..., 0].numel()) % 2].view_as(x)


@pytest.mark.parametrize("name", ["leading", "ragged"])  # groups of one size, and of several
@pytest.mark.parametrize("case", GROUPED, ids=label)
def test_ties_equal_naive(case: Case, name: str) -> None:
    x, batch, _ = make_call(case, name)
    layer = make_layer(case, x[..., 0].numel(), training=False)
    assert_same_as_naive(layer, tied(layer, x), batch)


LIMITED = [
    case
    for case in CASES
    if case.name in ("token_choice-capacity", "expert_choice-capacity", "attention_vote")
]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    ids=st.lists(st.sampled_from([0, 2, 3, 9]), min_size=1, max_size=16),
    dtype=st.sampled_from([torch.int64, torch.int32, torch.uint8]),
    case=st.sampled_from(LIMITED),
    k=st.integers(1, E),
    factor=st.sampled_from([0.001, 0.1, 0.3, 0.5, 0.7, 1.0, 1.05, 1.1, 1.25, 2.0, 100.0]),
    ties=st.booleans(),
)
@example(
    [0] * 10, torch.int64, LIMITED[1], 3, 0.1, False
)  # .1 * 3 / 3 * 10 is more than 1 in floating point
@example([0] * 10 + [2] * 2, torch.int64, LIMITED[1], 3, 0.1, False)
def test_any_groups_and_capacities_equal_naive(
    ids: list[int], dtype: torch.dtype, case: Case, k: int, factor: float, ties: bool
) -> None:
    case = Case(case.name, case.router, {**case.options, "capacity_factor": factor})
    x, layer = tokens((len(ids), D), seed=len(ids)), make_layer(case, len(ids), k)
    assert_same_as_naive(layer, tied(layer, x) if ties else x, torch.tensor(ids, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("token_choice", {}),
        ("expert_choice", {"inference": "threshold"}),
        ("multi_centroid", {}),
        ("random", {}),
    ],
)
def test_counters_are_float32_under_a_default_of_half_precision(
    name: str, kwargs: dict[str, Any], dtype: torch.dtype
) -> None:
    torch.set_default_dtype(dtype)
    try:
        router = build_router(name, D, num_experts=E, k=1, kwargs=kwargs)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in router.parameters()} <= {dtype}
    assert {b.dtype for b in router.buffers()} <= {torch.float32, torch.long}
    assert len(list(router.buffers())) > 0


def test_weights_of_tiny_gates_sum_to_one() -> None:
    """They are relative to a token's best pair: exp(-200) is zero in float32."""
    log_gate_P, token_P = torch.tensor([-200.0, -201.0, -300.0]), torch.tensor([0, 0, 1])
    found = pair_weights("normalized", log_gate_P, token_P, 2)
    best = 1 / (1 + math.exp(-1))
    torch.testing.assert_close(found, torch.tensor([best, 1 - best, 1.0]))


def test_a_router_refuses_a_transform_of_torch_func() -> None:
    router = TokenChoice(D, num_experts=E)
    with pytest.raises(RuntimeError, match=r"torch\.func transforms"):
        torch.func.vmap(lambda x: router(x).weight_P)(torch.randn(2, 4, D))


@pytest.mark.parametrize("ragged", [False, True], ids=["one_group", "ragged"])
@pytest.mark.parametrize("case", ROW_WISE, ids=label)
def test_of_many_equal_rows_the_lowest_tokens_are_taken(case: Case, ragged: bool) -> None:
    """Seven distinct rows, as on minesweeper: among equal tokens the earlier ones win."""
    torch.manual_seed(0)
    which_T, group_T = torch.randint(7, (1003,)), torch.randint(3 if ragged else 1, (1003,))
    for dtype in (torch.float32, torch.float64):
        router = case.build(D, E, 1).to(dtype).eval()
        taken_TE = router(torch.randn(7, D, dtype=dtype)[which_T], batch=group_T).to_dense() != 0
        for kind in range(21):
            mine_TE = taken_TE[which_T + 7 * group_T == kind].int()
            assert bool((mine_TE.diff(dim=0) <= 0).all()), (
                f"kind {kind}: a later token was taken first"
            )


# Gradients


@pytest.mark.filterwarnings("ignore:Error detected")
@pytest.mark.parametrize("k", [1, 2])
@each_case
def test_the_task_reaches_the_router_and_no_gradient_is_nan(case: Case, k: int) -> None:
    """Not even one that is thrown away: tokens without an expert take part."""
    x, batch, edge_index = make_call(case, "ragged")
    for weight in case.weights(k):
        layer = make_layer(case, len(x), k, weight)
        with torch.autograd.set_detect_anomaly(True):
            y, routing = layer(x, batch, edge_index, return_routing=True)
            of_task = torch.autograd.grad(
                y.square().sum(), list(layer.parameters()), retain_graph=True
            )
            (y.sum() + routing.aux_loss).backward()
        for (name, _), gradient in zip(layer.named_parameters(), of_task, strict=True):
            assert gradient.abs().max() > 1e-8 or k > 1, name


@each_case
def test_large_tokens_give_finite_weights_and_gradients(case: Case) -> None:
    x, batch, edge_index = make_call(case, "ragged")
    layer = make_layer(case, len(x))
    y, routing = layer(1e4 * x, batch, edge_index, return_routing=True)
    (y.sum() + routing.aux_loss).backward()
    assert all(
        value.grad is not None and value.grad.isfinite().all() for value in layer.parameters()
    )
    assert y.isfinite().all()


# What a router returns


@each_case
def test_scores_are_float32_under_autocast_and_in_a_bfloat16_model(case: Case) -> None:
    x, batch, edge_index = make_call(case, "ragged")
    layer, x = make_layer(case, len(x), training=False).float(), x.float()
    scores = layer.router(x, batch, edge_index).scores
    with torch.autocast("cpu", torch.bfloat16):
        routing = layer.router(x, batch, edge_index)
    assert routing.scores.dtype == routing.weight.dtype == torch.float32
    assert torch.equal(routing.scores, scores)
    y, routing = layer.bfloat16().train()(x.bfloat16(), batch, edge_index, return_routing=True)
    assert (y.dtype, routing.scores.dtype) == (torch.bfloat16, torch.float32)
    (y.sum() + routing.aux_loss).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


# Modules


@each_case
def test_reset_parameters_draws_anew_and_forgets_counters(case: Case) -> None:
    x, batch, edge_index = make_call(case, "ragged")
    router = make_layer(case, len(x)).router
    states = []
    for seed in (4, 4, 5):
        router(x, batch, edge_index)
        torch.manual_seed(seed)
        router.reset_parameters()
        states.append(copy.deepcopy(router.state_dict()))
    fixed = {"log_temperature", "assignment_T", *dict(router.named_buffers())} - {"projection_DE"}
    for name, value in states[0].items():
        assert torch.equal(states[1][name], value), name
        assert torch.equal(states[2][name], value) == (name in fixed), name
        assert (
            name in dict(router.named_parameters())
            or name in ("projection_DE", "assignment_T")
            or not value.any()
        )


# Bad input


@pytest.mark.parametrize(
    "bad",
    [
        {"k": 4},
        {"k": 0},
        {"num_experts": 0},
        {"dim": 0},
        {"weight": "mean"},
        {"weight": "normalized"},
    ],
    ids=str,
)
def test_bad_sizes_and_weights(bad: dict[str, Any]) -> None:
    for router in (TokenChoice, ExpertChoice, AttentionVote, MultiCentroid, RandomRouter):
        with pytest.raises(ValueError, match=f"^{next(iter(bad))}: got"):
            router(**{"dim": D, "num_experts": E, **bad})


@pytest.mark.parametrize(
    ("router", "bad"),
    [
        *(
            (TokenChoice, {name: value})
            for name, value in (("balance", "even"), ("noise", "spreads"), ("noise", 1))
        ),
        *((TokenChoice, {"capacity_factor": value}) for value in (0, -1.0, math.nan)),
        *((TokenChoice, {name: -1}) for name in ("balance_coef", "bias_rate", "z_coef")),
        (ExpertChoice, {"z_coef": -1}),
        *(
            (router, {"capacity_factor": 0})
            for router in (ExpertChoice, AttentionVote, MultiCentroid)
        ),
        *((router, {"inference": "batch"}) for router in (ExpertChoice, MultiCentroid)),
        *((AttentionVote, {name: value}) for name, value in (("scope", "graph"), ("head_dim", 0))),
        (MultiCentroid, {"choice": "both"}),
        (MultiCentroid, {"num_centroids": 0}),
        (MultiCentroid, {"separation_coef": -1}),
        (SoftSlots, {"slots": 0}),
    ],
    ids=str,
)
def test_bad_options(router: type[Router], bad: dict[str, Any]) -> None:
    name, value = next(iter(bad.items()))
    with pytest.raises(ValueError, match=f"^{name}: got {value!r}, expected"):
        router(D, num_experts=E, **bad)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        *(
            ({"x": x}, "x")
            for x in (None, torch.zeros(11, 4), torch.zeros(D), torch.zeros(11, D).long())
        ),
        *(
            ({"batch": batch}, "batch")
            for batch in (*(torch.zeros(n).long() for n in (10, 12)), [0] * 11, torch.zeros(11))
        ),
        *(
            ({"edge_index": torch.tensor(edges)}, "edge_index")
            for edges in ([[0, 1], [2, 11]], [[-1, 1], [2, 3]])
        ),
        *(
            ({"edge_index": edges}, "edge_index")
            for edges in (None, torch.zeros(3, 2).long(), torch.zeros(2, 2))
        ),
    ],
)
def test_bad_calls(changes: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: got .*expected"):
        AttentionVote(D, num_experts=E, scope="neighbors")(**{"x": torch.zeros(11, D), **changes})


def test_the_noise_of_a_token_does_not_follow_from_a_nan_in_another() -> None:
    x = tokens((11, D)).float()
    x[3, 2] = math.nan
    weight = TokenChoice(D, num_experts=E)(x).to_dense().isfinite().all(dim=1)
    assert weight.tolist() == [token != 3 for token in range(11)]


class Wrong(Router):
    """Gives what ``answer`` makes of its tokens."""

    answer: Any = None

    def reset_parameters(self) -> None: ...

    def route(self, x_TD: Tensor, group: Any, edge_index: Any) -> Any:
        return type(self).answer(x_TD)


@pytest.mark.parametrize(
    "answer", [lambda x: routing_of(x[:1], E), lambda x: routing_of(x, 2), lambda x: x]
)
def test_what_a_users_router_gives_is_checked(answer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Wrong, "answer", staticmethod(answer))
    with pytest.raises(ValueError, match=r"^route: got .* from Wrong"):
        Wrong(D, num_experts=E)(torch.randn(30, D))


@each_case
def test_what_a_router_of_gmoe_gives_is_right_by_construction_and_not_checked_again(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, batch, edge_index = make_call(case, "ragged")
    layer = make_layer(case, len(x))
    checked: list[object] = []
    monkeypatch.setattr(gmoe.Routing, "_check_shapes", lambda routing: checked.append(routing))
    monkeypatch.setattr("gmoe.routing.check_choices", lambda *choices: checked.append(choices))
    layer.router(x, batch, edge_index)
    # An oracle's assignment is the user's.
    assert bool(checked) == isinstance(layer.router, OracleRouter)


def routing_of(x: Tensor, num_experts: int) -> gmoe.Routing:
    expert = torch.arange(len(x))[:, None] % num_experts
    return gmoe.Routing.from_choices(expert, torch.ones(len(x), 1), num_experts=num_experts)


# Where routers run


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(
    "router",
    [TokenChoice(D, num_experts=E, k=2), ExpertChoice(D, num_experts=E)],
    ids=["token", "expert"],
)
def test_a_traced_router_routes_other_tokens(router: Router) -> None:
    layer = MoE(router, LinearExperts(D, 2, num_experts=E)).eval()
    traced = torch.jit.trace(layer, torch.randn(9, D), check_trace=False)
    for x in torch.randn(3, 9, D):
        torch.testing.assert_close(traced(x), layer(x))
    # The sizes of ragged groups would be those of the first call
    if isinstance(router, ExpertChoice):
        with pytest.raises(RuntimeError, match=r"batch: torch.jit.trace would freeze"):
            torch.jit.trace(layer, (torch.randn(9, D), torch.tensor([0] * 4 + [1] * 5)))


def test_token_choice_builds_no_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which would cost host syncs on a GPU."""
    monkeypatch.setattr(Groups, "of", None)
    x, batch, _ = make_call(CASES[0], "ragged")
    for router in (
        TokenChoice(D, num_experts=E),
        MultiCentroid(D, num_experts=E),
        RandomRouter(D, num_experts=E),
    ):
        router(x, batch)


@pytest.mark.parametrize("tokens", [0, 1, 300])
@pytest.mark.parametrize("experts", [1, 8, SHORT])
@pytest.mark.parametrize("function", [torch.softmax, torch.log_softmax])
def test_a_softmax_over_experts_is_that_of_each_token(
    function: Any, tokens: int, experts: int
) -> None:
    """Values and gradient; and experts lie in columns if there are few."""
    logits = torch.randn(tokens, experts, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn_like(logits)
    found, expected = over_experts(function, logits), function(logits, dim=-1)
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found, logits, cotangent)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits, cotangent)[0])
    assert found.T.is_contiguous() if experts < SHORT else found.is_contiguous()


class Checkpointed(nn.Module):
    """A module whose backward pass runs the forward again."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.module, x, use_reentrant=False)


COUNTING = {
    "bias": TokenChoice(D, num_experts=E, noise=False),
    "bias of two": TokenChoice(D, num_experts=E, k=2, noise=False),
    "threshold": ExpertChoice(D, num_experts=E, inference="threshold"),
}
QUICK = [("bias", "compiled inside"), ("threshold", "compiled outside")]


@pytest.mark.parametrize(
    ("counting", "order"),
    [
        pytest.param(counting, order, marks=[pytest.mark.slow] * ((counting, order) not in QUICK))
        for counting in COUNTING
        for order in ("compiled inside", "compiled outside")
    ],
)
def test_a_compiled_forward_that_runs_again_moves_no_counter(counting: str, order: str) -> None:
    """It computes what it computed, from counters that its own step has moved since."""
    torch.manual_seed(0)
    layer = nn.Sequential(
        nn.Linear(D, D), MoE(copy.deepcopy(COUNTING[counting]), MLPExperts(D, 8, D, num_experts=E))
    ).double()
    twin = copy.deepcopy(layer)

    both = partial(zip, strict=True)

    def compiled(module: Any) -> Any:
        return torch.compile(module, backend="aot_eager", fullgraph=True)

    inside = order == "compiled inside"
    run = Checkpointed(compiled(twin)) if inside else compiled(Checkpointed(twin))
    for _ in range(3):
        x = torch.randn(20, D, dtype=torch.float64)
        for part in (layer, run):
            part.zero_grad()
            part(x).sin().sum().backward()
        pairs = [
            *((one.grad, other.grad) for one, other in both(layer.parameters(), twin.parameters())),
            *both(layer.buffers(), twin.buffers()),
        ]
        for expected, found in pairs:
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
