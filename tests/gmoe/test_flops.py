"""Costs, against arithmetic by hand.

Shapes: T tokens, D, O widths, E experts, K experts a token, M edges.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.nn import GCNConv
from torch_geometric.utils import spmm

from gmoe import (
    GNNMoE,
    LinearExperts,
    MLPExperts,
    MoE,
    MoEConv,
    OracleRouter,
    active_parameters,
    count_flops,
)
from gmoe.routers import build_router
from tests.helpers.kernels import kernel_is
from tests.helpers.masked import random_graph, routing_of

T, D, O, E = 10, 8, 4, 4  # noqa: E741
LINEAR = D * O + O


def moe(
    router: str = "token_choice", k: int = 1, experts: nn.Module | None = None, **kwargs: Any
) -> MoE:
    kwargs = {"balance": None, **kwargs} if router == "token_choice" else kwargs
    return MoE(
        build_router(router, D, num_experts=E, k=k, kwargs=kwargs),
        experts or LinearExperts(D, O, num_experts=E),  # type: ignore[arg-type]
    )


def test_a_sampled_product_costs_what_its_entries_cost() -> None:
    pattern = torch.eye(3, 4).to_sparse_csr()
    factors = torch.ones(3, 7), torch.ones(7, 4)
    assert count_flops(torch.sparse.sampled_addmm, pattern, *factors) == 2 * 3 * 7


def test_counting_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert count_flops(nn.Linear(D, O), torch.ones(T, D)) == 2 * T * D * O
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("router", "k", "kwargs", "per_token"),
    [
        ("token_choice", 3, {}, 3),
        ("token_choice", 2, {"balance": "switch"}, 2),
        *(
            ("expert_choice", 2, {"capacity_factor": factor}, taken)
            for factor, taken in ((0.5, 1), (5.0, E))
        ),
        *(
            ("attention_vote", 1, {}, 1),
            ("multi_centroid", 1, {}, 1),
            ("random", 2, {}, 2),
            ("uniform", 1, {}, E),
        ),
    ],
)
def test_active_parameters_are_those_of_a_token(
    router: str, k: int, kwargs: dict[str, Any], per_token: int
) -> None:
    options: dict[str, Any] = {"num_experts": E, "router": router, "k": k, "router_kwargs": kwargs}
    layers: list[Any] = [
        MoEConv(conv, D, O, start=start, **options)
        for conv in ("gcn", "sage", "gat", "gin")
        for start in ("shared", None)  # the default is copies for some of the routers
    ]
    for layer in (moe(router, k, **kwargs), *layers):
        every = sum(p.numel() for p in layer.parameters())
        routed = sum(p.numel() for p in layer.routed_parameters())
        assert active_parameters(layer) == every - routed * (E - per_token) / E


@pytest.mark.parametrize("shared_router", [False, True])
def test_active_parameters_of_gnn_moe(shared_router: bool) -> None:
    """Two MoE layers of (D, D), a dense (D, O), identity residuals."""
    model = GNNMoE(D, D, O, 3, num_experts=E, k=2, shared_router=shared_router, start="plain")
    routers = (1 if shared_router else 2) * D * E
    assert active_parameters(model) == routers + 2 * 2 * (D * D + D) + LINEAR
    model.convs[1].experts = model.convs[0].experts  # which count once
    assert active_parameters(model) == routers + 2 * (D * D + D) + LINEAR


ASSIGNMENT = torch.tensor([0, 0, 0, 0, 0, 1, 1, 3, 3, 3])  # loads 5, 2, 0, 3


def planted(experts: nn.Module) -> MoE:
    return MoE(OracleRouter(D, num_experts=E, assignment=ASSIGNMENT), experts)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kernel", "rows"),
    [("loop", T), ("grouped", T), ("padded", E * 16)],  # padded: blocks of 16
)
def test_flops_of_moe(kernel: Any, rows: int) -> None:
    layer = planted(MLPExperts(D, 16, O, num_experts=E))
    with kernel_is(kernel):
        # A token of one pair fetches its row: nothing is added.
        assert count_flops(layer, torch.randn(T, D)) == 2 * rows * (D * 16 + 16 * O)
    gate, product = 2 * T * D * E, 2 * 2 * T * D * O
    added = 2 * T * O  # the weighted sum, one add an element
    assert count_flops(moe(k=2), torch.randn(T, D)) == gate + product + added


@pytest.mark.parametrize("most", [2**14, -1], ids=["at once", "expert by expert"])
@pytest.mark.parametrize("width", [4, 7], ids=["fills 16 bytes", "does not"])
def test_flops_of_a_conv_are_those_of_its_roads(
    most: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each computes a token's own experts only, in columns of no other width."""
    monkeypatch.setattr("gmoe.routed.AT_ONCE", most)
    layer = MoEConv("gcn", D, width, num_experts=E, router=None, normalize=False, start="plain")
    routing = OracleRouter(D, num_experts=E, assignment=ASSIGNMENT)(torch.randn(T, D))
    edge_index, _, edges = sparse_graph()
    call = partial(layer, routing=routing)
    assert count_flops(call, torch.randn(T, D), edge_index) == edges * D + 2 * T * D * width


def test_flops_are_those_of_the_experts_that_tokens_take() -> None:
    """Which are fewer where a capacity drops some."""
    torch.manual_seed(0)
    layer, x = moe(k=2, capacity_factor=0.5), torch.randn(T, D)
    routing = layer.router(x)
    pairs = len(routing.token)
    assert 0 < pairs < 2 * T
    assert count_flops(partial(layer, routing=routing), x) == 2 * pairs * D * O + pairs * O


def stepped(call: Any) -> Any:
    """A call and its backward pass."""
    return lambda *args: call(*args).sum().backward()


@pytest.mark.parametrize(
    ("kernel", "adds_biases"),
    [("loop", True), ("grouped", False)],  # their gradient is an index_add, or a sum over blocks
)
def test_flops_of_the_backward_pass(kernel: Any, adds_biases: bool) -> None:
    x = torch.randn(T, D, requires_grad=True)
    products = 2 * T * (D * 16 + 16 * O)
    experts = MLPExperts(D, 16, O, num_experts=E)
    biases = adds_biases * T * (16 + O)
    with kernel_is(kernel):
        assert count_flops(stepped(planted(experts)), x) == 3 * products + biases
        assert count_flops(stepped(planted(experts.requires_grad_(False))), x) == 2 * products


def sparse_graph() -> tuple[Tensor, Tensor, int]:
    """Edges, the same as a sparse matrix, and their number."""
    edge_index = random_graph(T, T, 30).unique(dim=1)
    adj = torch.sparse_coo_tensor(
        edge_index.flip(0), torch.ones(edge_index.size(1)), (T, T), check_invariants=True
    )
    return edge_index, adj.to_sparse_csr(), edge_index.size(1)


PRODUCTS = [
    torch.sparse.mm,
    lambda adj, x: adj @ x,
    partial(spmm, reduce="sum"),
    partial(spmm, reduce="mean"),
]


@pytest.mark.parametrize("product", PRODUCTS)
def test_flops_of_a_sparse_product(product: Any) -> None:
    """One FLOP an edge and channel, as for gathered messages.

    The gradient of the dense side takes as many again.
    """
    _, adj, edges = sparse_graph()
    x = torch.randn(T, D, requires_grad=True)
    call = partial(product, adj)
    assert count_flops(call, x) == edges * D
    assert count_flops(stepped(call), x) == 2 * edges * D


@pytest.mark.parametrize("form", [0, 1], ids=["edges", "csr"])
def test_flops_of_aggregation(form: int) -> None:
    *forms, edges = sparse_graph()
    graph = forms[form]
    x = torch.randn(T, D)
    assert count_flops(GCNConv(D, O, normalize=False), x, graph) == 2 * T * D * O + edges * O
    # aggregated once, D wide, for two experts a node
    layer = MoEConv("gcn", D, O, num_experts=E, router=None, normalize=False, start="plain")
    routing = routing_of(torch.ones(T, E) * torch.tensor([1.0, 1.0, 0.0, 0.0]))
    experts = 2 * 2 * T * D * O + 2 * T * O
    assert count_flops(layer, x, graph, routing=routing) == edges * D + experts


def test_flops_of_attention_on_the_cpu() -> None:
    batch, heads, tokens, width = 2, 3, 5, 8
    q, k, v = (torch.randn(batch, heads, tokens, width, requires_grad=True) for _ in range(3))
    scores = 2 * batch * heads * tokens * tokens * width
    assert count_flops(F.scaled_dot_product_attention, q, k, v) == 2 * scores
    # backward: the scores again, and the gradients of v, of the scores, of q and of k
    assert count_flops(stepped(F.scaled_dot_product_attention), q, k, v) == 7 * scores
