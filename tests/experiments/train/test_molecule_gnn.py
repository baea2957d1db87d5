"""The GNN of molecules: OGB's layers to the bit, experts exact, and molecules that do not meet."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch_geometric.nn import MessagePassing
from torch_geometric.utils import degree

import gmoe
from experiments.train.molecule_gnn import BondGCNConv, MoleculeGNN, conv_of, ogb_gin
from tests.helpers.masked import redrawn, weighted

BATCH = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 3, 3])
"""The molecule of each atom; the third has one atom."""
BONDS = torch.tensor(
    [[0, 1, 1, 2, 2, 0, 3, 4, 4, 5, 5, 6, 8, 9], [1, 0, 2, 1, 0, 2, 4, 3, 5, 4, 6, 5, 9, 8]]
)


def molecule_batch() -> tuple[Any, ...]:
    """The inputs of a model."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(2, (len(BATCH), 9), generator=generator)
    attr = torch.randint(2, (BONDS.size(1), 3), generator=generator)
    return x, BONDS, attr, BATCH, 4


class TheirGCN(MessagePassing):
    """``GCNConv`` of ogb's ``examples/graphproppred/mol/conv.py``; bonds are embedded before."""

    def __init__(self, width: int) -> None:
        super().__init__(aggr="add")
        self.linear = nn.Linear(width, width)
        self.root_emb = nn.Embedding(1, width)

    def forward(self, x: Tensor, edge_index: Tensor, edge_embedding: Tensor) -> Tensor:
        x = self.linear(x)
        row, col = edge_index
        deg = degree(row, x.size(0), dtype=x.dtype) + 1
        deg_inv_sqrt = deg.pow(-0.5)
        norm = deg_inv_sqrt[row] * deg_inv_sqrt[col]
        out = self.propagate(edge_index, x=x, edge_attr=edge_embedding, norm=norm)
        return out + torch.relu(x + self.root_emb.weight) * 1.0 / deg.view(-1, 1)

    def message(self, x_j: Tensor, edge_attr: Tensor, norm: Tensor) -> Tensor:
        return norm.view(-1, 1) * torch.relu(x_j + edge_attr)


def their_forward(model: Any, convs: Any, inputs: Any) -> Tensor:
    """``GNN_node`` of ogb's examples in training."""
    x, edge_index, attr, batch, _ = inputs
    h = model.atoms(x)
    for layer in range(model.num_layers):
        out = model.norms[layer](convs[layer](h, edge_index, model.bonds[layer](attr)))
        if layer < model.num_layers - 1:
            out = out.relu()
        h = out
    means = torch.stack([h[batch == graph].mean(dim=0) for graph in range(4)])
    return model.lin(means)


def test_the_dense_model_is_that_of_the_ogb_examples() -> None:
    torch.manual_seed(0)
    model: Any = MoleculeGNN(
        8, 2, 3, conv=BondGCNConv, router=None, norm="batch_norm", residual="none"
    )
    theirs = [TheirGCN(8) for _ in range(3)]
    for conv, their in zip(model.convs, theirs, strict=True):
        their.linear.load_state_dict(conv.lin.state_dict())
        their.root_emb.weight.data[0] = conv.root.data
    model.train()
    inputs = molecule_batch()
    torch.testing.assert_close(model(*inputs), their_forward(model, theirs, inputs))


def test_the_gin_is_that_of_the_ogb_examples() -> None:
    torch.manual_seed(0)
    conv: Any = ogb_gin(6, 6)
    x, edge_index, *_ = molecule_batch()
    h, bonds = torch.randn(len(x), 6), torch.randn(edge_index.size(1), 6)
    heard = torch.zeros_like(h).index_add(0, edge_index[1], (h[edge_index[0]] + bonds).relu())
    torch.testing.assert_close(conv(h, edge_index, bonds), conv.nn((1 + conv.eps) * h + heard))


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("start", ["copies", "shared", "plain"])
def test_stacked_experts_are_masked_convs(start: Any, k: int) -> None:
    x = torch.randn(len(BATCH), 5, dtype=torch.float64, requires_grad=True)
    bonds = torch.randn(BONDS.size(1), 7, dtype=torch.float64, requires_grad=True)
    layer = redrawn(gmoe.MoEConv(BondGCNConv, 5, 7, num_experts=4, k=k, start=start))

    class Bonded(nn.Module):  # a conv with its bonds, as ``masked`` calls it
        def __init__(self, conv: Any) -> None:
            super().__init__()
            self.conv = conv

        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            out: Tensor = self.conv(x, edge_index, bonds)
            return out

    class BondedLayer:
        num_experts = 4
        shared_expert: Any = None

        def expert(self, index: int) -> Any:
            return Bonded(layer.expert(index))

    out, routing = layer(x, BONDS, edge_attr=bonds, return_routing=True)
    expected = weighted(BondedLayer(), x, BONDS, routing.to_dense())
    if layer.shared_expert is not None:
        expected = expected + layer.shared_expert.expert(0)(x, BONDS, bonds)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    found = torch.autograd.grad(out.square().sum(), [x, bonds], retain_graph=True)
    wanted = torch.autograd.grad(expected.square().sum(), [x, bonds])
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def options_of(conv: str, **options: Any) -> dict[str, Any]:
    return {"conv": conv_of(conv, 8), "num_experts": 4, "norm": "batch_norm"} | options


@pytest.mark.filterwarnings("ignore:GINEConv runs on the whole graph")
@pytest.mark.parametrize("conv", ["gcn", "gin", "gine", "gat", "transformer", "sage"])
def test_molecules_do_not_meet(conv: str) -> None:
    torch.manual_seed(2)
    options = options_of(conv, start="plain", shared_router=conv in ("gcn", "gat"))
    with patch("gmoe.routers.base.INIT_SCALE", 5.0):  # so that molecules differ in their experts
        model = MoleculeGNN(8, 3, 2, **options).eval()
    x, edge_index, attr, batch, graphs = molecule_batch()
    logits, routings = model(x, edge_index, attr, batch, graphs, return_routing=True)
    for routing in routings:
        assert routing.num_tokens == len(x)
    for graph in range(graphs):
        atoms, bonds = batch == graph, batch[edge_index[0]] == graph
        own = edge_index[:, bonds] - int(atoms.nonzero()[0])
        alone = model(x[atoms], own, attr[bonds], batch[atoms] * 0, 1)
        torch.testing.assert_close(alone[0], logits[graph])


@pytest.mark.parametrize("router", ["expert_choice", "attention_vote", "token_choice"])
def test_molecules_do_not_compete_for_experts(router: str) -> None:
    torch.manual_seed(2)
    model = MoleculeGNN(8, 3, 2, **options_of("gine"), router=router, start="plain").eval()
    x, edge_index, attr, batch, graphs = molecule_batch()
    logits: Any = model(x, edge_index, attr, batch, graphs)
    first = (batch < 2).nonzero().view(-1)
    bonds = batch[edge_index[0]] < 2
    two = model(x[first], edge_index[:, bonds], attr[bonds], batch[first], 2)
    torch.testing.assert_close(two, logits[:2])


@pytest.mark.parametrize("conv", ["gcn", "gine"])
def test_experts_start_as_the_dense_model_and_route_once(conv: str) -> None:
    outputs = []
    for router in (None, "token_choice"):
        torch.manual_seed(0)
        model = MoleculeGNN(8, 2, 3, **options_of(conv), router=router)
        outputs.append(model(*molecule_batch()))
    torch.testing.assert_close(*outputs)
    assert model.shared_router is not None
    assert model.config["start"] == "copies"


def test_every_parameter_learns() -> None:
    torch.manual_seed(0)
    model: Any = MoleculeGNN(8, 2, 2, **options_of("gcn"))
    model(*molecule_batch()).square().sum().backward()
    idle = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert idle == []
