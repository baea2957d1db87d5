"""``mix="weights"`` on graphs, beside the definition: a loop over graphs, each with its own W_g."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch_geometric.nn import MLP, GCNConv, GINConv

import gmoe
from gmoe import GNNMoE, MoEConv, count_flops
from gmoe.conv.base import GAIN_SCALE
from gmoe.stack import fold, stacks_in
from tests.helpers.masked import redrawn

E, D, OUT = 3, 5, 4
GROUP = torch.tensor([7, 2, 7, 2, 2, 9, 7, 9, 2, 7, 9, 4, 4, 7, 2])
"""The graph of each node: unsorted, with gaps, of different sizes; the last node is isolated."""
KINDS = ["gcn", "sage", "graph", "gin", "gat", "gatv2", "transformer"]
LINEAR = ["gcn", "sage", "graph"]


def nodes_and_edges() -> tuple[Tensor, Tensor]:
    """Features, and edges inside each graph."""
    generator = torch.Generator().manual_seed(3)
    nodes = torch.arange(len(GROUP) - 1)
    pairs = torch.cartesian_prod(nodes, nodes)
    within = pairs[(GROUP[pairs[:, 0]] == GROUP[pairs[:, 1]]) & (pairs[:, 0] != pairs[:, 1])]
    edge_index = within[torch.rand(len(within), generator=generator) < 0.6].t()
    x = torch.randn(len(GROUP), D, dtype=torch.float64, generator=generator)
    return x.requires_grad_(), edge_index


def layer(conv: Any, **options: Any) -> Any:
    defaults: dict[str, Any] = {"num_experts": E, "mix": "weights", "start": "plain"}
    return redrawn(MoEConv(conv, D, OUT, **(defaults | options)))


def mixture(experts: Any, weight_E: Tensor) -> dict[str, Tensor]:
    """The tensors of one conv, by PyG's paths, summed over the experts."""
    tensors = {}
    for path, stack in stacks_in(experts):
        for name in stack.names:
            value = getattr(stack, name)
            tensors[f"{path}.{name}".lstrip(".")] = sum(weight_E[e] * value[e] for e in range(E))
    return tensors


def defined(moe: Any, x: Tensor, edge_index: Tensor, group: Tensor) -> Tensor:
    """(T, O) graph by graph: route its mean node, mix, and run PyG's conv on it alone."""
    out: list[Any] = [None] * len(x)
    for graph in group.unique():
        nodes = (group == graph).nonzero()[:, 0]
        number = {int(node): place for place, node in enumerate(nodes)}
        edges = [(number[i], number[j]) for i, j in edge_index.t().tolist() if i in number]
        edge_index_g = torch.tensor(edges, dtype=torch.long).reshape(-1, 2).t()
        weight_E = moe.router.gate(x[nodes].mean(dim=0)).softmax(dim=0)
        conv = moe.experts.expert(0)
        y = torch.func.functional_call(
            conv, mixture(moe.experts, weight_E), (x[nodes], edge_index_g)
        )
        if moe.shared_expert is not None:
            tensors = {
                f"{path}.{name}".lstrip("."): getattr(stack, name)[0]
                for path, stack in stacks_in(moe.shared_expert)
                for name in stack.names
            }
            dense = moe.shared_expert.expert(0)
            shared = torch.func.functional_call(dense, tensors, (x[nodes], edge_index_g))
            y = shared + GAIN_SCALE * moe.gain * y
        for place, node in enumerate(nodes):
            out[int(node)] = y[place]
    return torch.stack(out)


def assert_same(model: Any, x: Tensor, out: Tensor, expected: Tensor, atol: float = 1e-11) -> None:
    """Equal outputs, and equal gradients of the nodes and of all parameters."""
    torch.testing.assert_close(out, expected, rtol=0, atol=atol)
    values = [x, *model.parameters()]
    options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
    found = torch.autograd.grad(out.square().sum(), values, **options)
    wanted = torch.autograd.grad(expected.square().sum(), values, **options)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("start", ["copies", "shared", "plain"])
@pytest.mark.parametrize("conv", KINDS)
@pytest.mark.parametrize("batch", [GROUP, None], ids=["graphs", "one graph"])
def test_each_graph_runs_its_own_mixture(conv: str, start: str, batch: Any) -> None:
    moe = layer(conv, start=start)
    x, edge_index = nodes_and_edges()
    group = torch.zeros_like(GROUP) if batch is None else batch
    assert_same(moe, x, moe(x, edge_index, batch=batch), defined(moe, x, edge_index, group))


@pytest.mark.parametrize("start", ["copies", "shared", "plain"])
@pytest.mark.parametrize("conv", LINEAR)
def test_of_linear_convs_it_is_the_mixture_of_outputs(conv: str, start: str) -> None:
    moe = layer(conv, start=start)
    soft = MoEConv(
        conv,
        D,
        OUT,
        num_experts=E,
        k=E,
        start=start,  # type: ignore[arg-type]
        router_input="graph",
        router_kwargs={"balance": None},
    ).double()
    soft.load_state_dict(moe.state_dict())
    x, edge_index = nodes_and_edges()
    out = moe(x, edge_index, batch=GROUP)
    expected = soft(x, edge_index, batch=GROUP)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    found = torch.autograd.grad(out.square().sum(), [x, *moe.parameters()])
    wanted = torch.autograd.grad(expected.square().sum(), [x, *soft.parameters()])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-11)


@pytest.mark.parametrize("start", ["copies", "shared"])
@pytest.mark.parametrize("conv", KINDS)
def test_a_new_layer_is_the_conv_that_it_replaces(conv: str, start: Any) -> None:
    torch.manual_seed(0)
    moe: Any = MoEConv(conv, D, OUT, num_experts=E, mix="weights", start=start).double()
    dense = (moe.experts if start == "copies" else moe.shared_expert).expert(0)
    x, edge_index = nodes_and_edges()
    out = moe(x, edge_index, batch=GROUP)
    torch.testing.assert_close(out, dense(x, edge_index), rtol=0, atol=1e-12)
    assert (moe.k, moe.experts_per_token) == (E, 1.0)
    assert moe.router.balance is None
    assert not moe.router.noise


@pytest.mark.parametrize("conv", ["gcn", "sage", "gin", "gat"])
def test_it_is_differentiated_twice(conv: str) -> None:
    moe: Any = redrawn(MoEConv(conv, 2, 1, num_experts=2, mix="weights", start="copies"))
    if conv == "gin":  # away from the kinks of relu
        moe.experts.nn.act = torch.nn.Tanh()
    batch = torch.tensor([0, 1, 0, 1])
    edge_index = torch.tensor([[0, 2, 1, 3, 1], [2, 0, 3, 1, 1]])
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    names = [name for name, parameter in moe.named_parameters()]
    values = [parameter.detach().requires_grad_() for parameter in moe.parameters()]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        state = dict(zip(names, values, strict=True))
        return torch.func.functional_call(moe, state, (x, edge_index), {"batch": batch})

    assert torch.autograd.gradcheck(run, (x, *values))
    assert torch.autograd.gradgradcheck(run, (x, *values))


@pytest.mark.parametrize("num_nodes", [0, 1])
def test_a_graph_may_be_empty_or_a_node(num_nodes: int) -> None:
    moe = layer("gcn", start="copies")
    x = torch.randn(num_nodes, D, dtype=torch.float64, requires_grad=True)
    edge_index = torch.zeros(2, 0, dtype=torch.long)
    out = moe(x, edge_index)
    assert out.shape == (num_nodes, OUT)
    out.sum().backward()
    assert all(parameter.grad is not None for parameter in moe.parameters())


@pytest.mark.parametrize("conv", ["gcn", "sage", "gat"])
@pytest.mark.parametrize("shared_router", [True, False])
def test_a_model_mixes_once_for_all_layers_or_in_each(conv: str, shared_router: bool) -> None:
    options: dict[str, Any] = {"num_experts": E, "mix": "weights", "start": "copies"}
    model = redrawn(GNNMoE(D, 8, 2, 3, conv=conv, shared_router=shared_router, **options))
    x, edge_index = nodes_and_edges()
    out, routings = model(x, edge_index, batch=GROUP, return_routing=True)
    assert len(routings) == (1 if shared_router else 2)
    torch.testing.assert_close(model(x, edge_index, batch=GROUP, routings=routings), out)
    # A graph by itself gets what it gets among others.
    own = GROUP == 7
    number = torch.full_like(GROUP, -1)
    number[own] = torch.arange(int(own.sum()))
    edges = number[edge_index[:, own[edge_index[0]]]]
    torch.testing.assert_close(model(x[own], edges), out[own])

    def run() -> Tensor:
        return checkpoint(model, x, edge_index, None, None, GROUP, use_reentrant=False)

    assert_same(model, x, run(), model(x, edge_index, batch=GROUP))


def test_trimmed_graphs_keep_the_decision_of_the_whole() -> None:
    model = redrawn(GNNMoE(D, 8, 2, 2, conv="sage", num_experts=E, mix="weights", jk="last"))
    x = torch.randn(6, D, dtype=torch.float64)
    edge_index = torch.tensor([[1, 2, 3, 4, 5], [0, 0, 1, 1, 2]])
    sampled = {"num_sampled_nodes_per_hop": [1, 2, 3], "num_sampled_edges_per_hop": [2, 3]}
    torch.testing.assert_close(model(x, edge_index, **sampled)[:1], model(x, edge_index)[:1])


def test_saved_pruned_folded_and_loaded_it_is_the_same(tmp_path: Any) -> None:
    model = GNNMoE(D, 8, 2, 3, num_experts=E, mix="weights")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    x, edge_index = nodes_and_edges()
    x = x.detach().float()
    expected = model.eval()(x, edge_index, batch=GROUP)
    gmoe.save(model, tmp_path)
    loaded: Any = gmoe.load(tmp_path)
    assert loaded.convs[0].mix == "weights"
    assert loaded.convs[0].experts_per_token == 1.0
    torch.testing.assert_close(loaded.eval()(x, edge_index, batch=GROUP), expected)
    pruned = gmoe.prune(loaded, (x, edge_index))
    assert [layer.kept for layer in pruned.layers] == [(0, 1, 2)]
    assert pruned.change == 0.0
    folded: Any = fold(loaded)
    torch.testing.assert_close(folded(x, edge_index, batch=GROUP), expected)
    assert [layer.is_dense for layer in gmoe.densify(folded).layers] == [False, False]
    gmoe.unstack(folded)
    with pytest.raises(ValueError, match=r"got experts that are unstacked, .*gmoe\.restack"):
        folded(x, edge_index)
    torch.testing.assert_close(gmoe.restack(folded)(x, edge_index, batch=GROUP), expected)


def test_compiled_it_is_the_same() -> None:
    model = redrawn(GNNMoE(D, 8, 2, 2, num_experts=E, mix="weights"))
    x, edge_index = nodes_and_edges()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(x, edge_index), model(x, edge_index))


def test_a_call_costs_one_conv_and_the_mixing() -> None:
    options: dict[str, Any] = {"num_experts": E, "start": "plain"}
    moe = layer("gcn")
    options |= {"router_input": "graph", "router_kwargs": {"balance": None}}
    hard: Any = MoEConv("gcn", D, OUT, **options).double()
    x, edge_index = nodes_and_edges()
    graphs = len(GROUP.unique())
    mixing = 2 * graphs * E * (D * OUT + OUT)
    assert count_flops(moe, x, edge_index, batch=GROUP) == mixing + count_flops(
        hard, x, edge_index, batch=GROUP
    )


@pytest.mark.parametrize(
    ("conv", "options", "message"),
    [
        ("res_gated_graph", {}, "mix: got 'weights' with ResGatedGraphConv, run one by one"),
        (["gcn", "sage", "gcn"], {}, "mix: got 'weights' with GCNConv, SAGEConv, run one by one"),
        (lambda i, o: GINConv(MLP([i, o, o])), {}, "that hold a BatchNormExperts"),
        ("gcn", {"k": 2}, "k: got 2, expected none with mix='weights', or 3"),
        ("gcn", {"mix": "sum"}, "mix: got 'sum', expected one of"),
    ],
)
def test_what_cannot_be_mixed_is_refused(conv: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer(conv, **options)


def test_a_decision_for_each_node_is_refused() -> None:
    x, edge_index = nodes_and_edges()
    message = "router_input: got 'node' with mix='weights', expected 'graph'"
    with pytest.raises(ValueError, match=message):
        layer("gcn", router_input="node")
    with pytest.raises(ValueError, match=message):
        gmoe.GNNMoE(D, 8, 2, 2, num_experts=E, mix="weights", router_input="node")
    # An instance may be of a router that decides for groups by itself
    router = gmoe.TokenChoice(D, num_experts=E, k=E)
    moe = layer("gcn", router=router, router_input="node")
    with pytest.raises(ValueError, match=r"routing: got a decision for each token, .*'graph'"):
        moe(x, edge_index)


def test_attention_weights_are_those_of_the_mixture() -> None:
    moe = layer("gat")
    x, edge_index = nodes_and_edges()
    out, (edges, alpha) = moe(x, edge_index, batch=GROUP, return_attention_weights=True)
    torch.testing.assert_close(out, moe(x, edge_index, batch=GROUP))
    assert alpha.shape == (edges.size(1), 1)
    total = torch.zeros(len(x), 1, dtype=torch.float64).index_add(0, edges[1], alpha)
    torch.testing.assert_close(total, torch.ones_like(total))


def test_moefied_convs_mix() -> None:
    dense: Any = torch.nn.Module()
    dense.conv = GCNConv(D, OUT)
    model: Any = gmoe.moefy(dense, targets="conv", mix="weights", start="copies", num_experts=E)
    assert model.conv.mix == "weights"
    assert model.conv.router_input == ("graph",)
