"""``router_input="graph"``: each graph of a batch goes to the experts of its mean node."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gmoe import GNNMoE, Graph, MoEConv, TokenChoice, aux_loss
from tests.helpers.masked import redrawn, weighted

GROUP = torch.tensor([7, 2, 7, 2, 2, 9, 7, 9, 2, 7, 9, 4, 4, 7])
"""The graph of each node: unsorted, with gaps, of different sizes."""
KINDS: list[Any] = ["gcn", "sage", "gin", "gat", "res_gated_graph", ["gcn", "gat", "le"]]


def nodes_and_edges() -> tuple[Tensor, Tensor]:
    """Features, and edges inside each graph."""
    torch.manual_seed(3)
    pairs = torch.cartesian_prod(torch.arange(len(GROUP)), torch.arange(len(GROUP)))
    within = pairs[(GROUP[pairs[:, 0]] == GROUP[pairs[:, 1]]) & (pairs[:, 0] != pairs[:, 1])]
    edge_index = within[torch.rand(len(within)) < 0.6].t()
    return torch.randn(len(GROUP), 6, dtype=torch.float64, requires_grad=True), edge_index


def weights(router: Any, x: Tensor, batch: Tensor | None) -> Tensor:
    """(T, E) the definition: route the mean node of each graph, and give it to all its nodes."""
    group = torch.zeros(len(x)) if batch is None else batch
    rows: list[Any] = [None] * len(x)
    for graph in group.unique():
        mean = torch.stack([x[node] for node in range(len(x)) if group[node] == graph]).mean(dim=0)
        weight_E = router(mean[None]).to_dense()[0]
        rows = [weight_E if group[node] == graph else rows[node] for node in range(len(x))]
    return torch.stack(rows)


def assert_same(model: Any, x: Tensor, out: Tensor, expected: Tensor) -> None:
    """Equal outputs, and equal gradients of the nodes and of the routers."""
    seen = [x, *(p for name, p in model.named_parameters() if "gate" in name)]
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    found = torch.autograd.grad(out.square().sum(), seen)
    wanted = torch.autograd.grad(expected.square().sum(), seen)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("start", ["copies", "shared", "plain"])
@pytest.mark.parametrize("conv", KINDS, ids=str)
@pytest.mark.parametrize("batch", [GROUP, None], ids=["graphs", "one graph"])
def test_a_layer_routes_the_mean_node_of_each_graph(conv: Any, start: Any, batch: Any) -> None:
    if start == "copies" and isinstance(conv, list):
        pytest.skip("kinds that differ are no copies")
    x, edge_index = nodes_and_edges()
    count = len(conv) if isinstance(conv, list) else 4
    layer = redrawn(MoEConv(conv, 6, 5, num_experts=count, router_input="graph", start=start))
    out, routing = layer(x, edge_index, batch=batch, return_routing=True)
    weight_TE = weights(layer.router, x, batch)
    torch.testing.assert_close(routing.to_dense(), weight_TE)
    assert_same(layer, x, out, weighted(layer, x, edge_index, weight_TE))


@pytest.mark.parametrize(
    ("conv", "start"),
    [("gcn", "copies"), ("sage", "shared"), ("gat", "plain"), ("res_gated_graph", "shared")],
)
@pytest.mark.parametrize("shared_router", [True, False], ids=["one router", "a router a layer"])
def test_a_model_routes_graphs_once_or_in_each_layer(
    conv: str, shared_router: bool, start: Any
) -> None:
    x, edge_index = nodes_and_edges()
    options: dict[str, Any] = {"router_input": "graph", "jk": "last", "conv": conv, "k": 2}
    options |= {"shared_router": shared_router, "start": start, "num_experts": 4}
    model = redrawn(GNNMoE(6, 8, 3, 2, **options))
    h, decided = x, None
    if shared_router:
        decided = weights(model.shared_router, x, GROUP)
    assert list(model.residuals) == ["1"]  # the second layer's input is as wide as its output
    for number, layer in enumerate(model.convs):
        weight_TE = weights(layer.router, h, GROUP) if decided is None else decided
        h = (weighted(layer, h, edge_index, weight_TE) + (h if number == 1 else 0)).relu()
    out = model(x, edge_index, batch=GROUP)
    assert_same(model, x, out, model.lin(h))
    # Layer by layer in pieces, whose graphs are cut apart.
    from torch_geometric.data import Data

    data = Data(x=x.detach(), edge_index=edge_index, batch=GROUP)
    torch.testing.assert_close(model.inference(data, batch_size=5), out.detach())


def test_noise_and_counters_are_those_of_graphs() -> None:
    x, edge_index = nodes_and_edges()
    layer: Any = MoEConv("gcn", 6, 5, num_experts=3, router_input="graph", start="shared").double()
    for _ in range(20):
        _, routing = layer.train()(x, edge_index, batch=GROUP, return_routing=True)
        for graph in GROUP.unique():  # in spite of the noise
            assert len(routing.top_expert[graph == GROUP].unique()) == 1
    means = torch.stack([x[graph == GROUP].mean(dim=0) for graph in GROUP.unique()])
    torch.testing.assert_close(layer.router.next_mean_D.double(), means.mean(dim=0).detach())


def test_losses_and_dropped_pairs_go_with_the_graphs() -> None:
    x, edge_index = nodes_and_edges()
    kwargs = {"balance": "switch", "capacity_factor": 1.0}
    layer: Any = MoEConv(
        "gcn", 6, 5, num_experts=3, router_input="graph", start="plain", router_kwargs=kwargs
    ).double()
    _, routing = layer(x, edge_index, batch=GROUP, return_routing=True)
    assert float(aux_loss(routing).detach()) > 0
    assert routing.dropped_T.tolist() == [0] * len(GROUP)  # graphs do not compete for places
    router = TokenChoice(6, num_experts=3, capacity_factor=0.4, noise=False, balance="switch")
    tokens, members = torch.randn(4, 6), torch.tensor([0, 0, 3, 1])
    one, of_members = router(tokens), router(tokens, members=members)
    torch.testing.assert_close(of_members.to_dense(), one.to_dense()[members])
    assert one.dropped_T is not None
    assert of_members.dropped_T.tolist() == one.dropped_T[members].tolist()
    torch.testing.assert_close(of_members.aux_loss, one.aux_loss)


def test_no_nodes_are_no_graphs() -> None:
    layer: Any = MoEConv("gcn", 6, 5, num_experts=3, router_input="graph")
    out, routing = layer(
        torch.zeros(0, 6), torch.zeros(2, 0, dtype=torch.long), return_routing=True
    )
    assert (len(out), routing.num_tokens) == (0, 0)


def test_what_does_not_fit_is_refused() -> None:
    x, edge_index = nodes_and_edges()
    with pytest.raises(ValueError, match="router_input: got 'graph' with ExpertChoice, expected"):
        MoEConv("gcn", 6, 5, router_input="graph", router="expert_choice")
    with pytest.raises(ValueError, match=r"router_input: got .*'graph' by itself"):
        MoEConv("gcn", 6, 5, router_input=("node", "graph"))
    layer: Any = MoEConv("gcn", 6, 5, router_input="graph").double()
    with pytest.raises(ValueError, match="batch: got"):
        layer(x, Graph(edge_index, len(x)), batch=GROUP[:3])
