"""``gmoe.merge``: the plain dense model of one decision."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_geometric.nn import SchNet

import gmoe
from gmoe import GNNMoE, LinearExperts, MLPExperts, MoE, MoEConv, TokenChoice, UniformRouter
from gmoe.candidates import MLP
from gmoe.routers import ByType
from tests.helpers.masked import redrawn

E, D = 3, 6


def graph(num_nodes: int = 9) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_nodes)
    x = torch.randn(num_nodes, D, dtype=torch.float64, generator=generator)
    return x, torch.randint(num_nodes, (2, 3 * num_nodes), generator=generator)


def all_pairs(pos: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs of atoms of a molecule, and their distances."""
    is_pair = (batch[:, None] == batch) & ~torch.eye(len(pos), dtype=torch.bool)
    sender, receiver = is_pair.nonzero().T
    return torch.stack([sender, receiver]), (pos[sender] - pos[receiver]).norm(dim=-1)


def schnet(**options: Any) -> Any:
    """A SchNet mixed by composition, its experts drawn at random."""
    torch.manual_seed(0)
    dense = SchNet(8, 8, num_interactions=1, num_gaussians=5, interaction_graph=all_pairs)
    layers = ["interactions.*.conv.lin*", "interactions.*.lin", "lin1", "lin2"]
    router = ByType("z", [1, 6, 8], batch="batch")
    model = gmoe.moefy(
        dense, targets=layers, router=router, mix="weights", start="copies", **options
    ).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "difference" in name:
                parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize("start", ["copies", "plain", "shared"])
@pytest.mark.parametrize("conv", ["gcn", "sage", "graph"])
@pytest.mark.parametrize("shared_router", [True, False])
def test_a_gnn_becomes_pygs_convs(conv: str, start: Any, shared_router: bool) -> None:
    options: dict[str, Any] = {"num_experts": E, "mix": "weights", "start": start}
    model = redrawn(GNNMoE(D, 8, 2, 3, conv=conv, shared_router=shared_router, **options))
    state = copy.deepcopy(model.state_dict())
    data = graph()
    dense: Any = gmoe.merge(model, data)
    torch.testing.assert_close(dense(*data), model(*data), rtol=0, atol=1e-11)
    assert not any(isinstance(part, MoEConv | gmoe.Router) for part in dense.modules())
    assert type(dense.convs[0]) is type(model.convs[0].experts.expert(0))
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)
    other = graph(14)
    assert not torch.allclose(dense(*other), model(*other))


def test_a_linear_layer_becomes_one_and_an_mlp_an_mlp() -> None:
    model = nn.Sequential(
        MoE(TokenChoice(D, num_experts=E, k=E), LinearExperts(D, D, num_experts=E), mix="weights"),
        MoE(UniformRouter(D, num_experts=E), MLPExperts(D, 8, 4, num_experts=E), mix="weights"),
    ).double()
    x, _ = graph()
    dense: Any = gmoe.merge(model.eval(), x)
    assert [type(part) for part in dense] == [nn.Linear, MLP]
    torch.testing.assert_close(dense(x), model(x), rtol=0, atol=1e-12)
    one: Any = gmoe.merge(model[0], x)
    assert type(one) is nn.Linear


def test_of_several_graphs_all_have_to_be_of_one_composition() -> None:
    model = schnet()
    z = torch.tensor([8, 1, 1, 1, 8, 1])
    batch = torch.tensor([0, 0, 0, 1, 1, 1])
    pos = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    dense: Any = gmoe.merge(model, {"z": z, "pos": pos, "batch": batch})
    torch.testing.assert_close(dense(z, pos, batch), model(z, pos, batch), rtol=0, atol=1e-12)
    found = torch.autograd.grad(dense(z, pos, batch).sum(), pos)
    wanted = torch.autograd.grad(model(z, pos, batch).sum(), pos)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    dense(z + 1, pos, batch)  # it reads no types anymore
    z[0] = 6
    with pytest.raises(ValueError, match=r"^graph: got 2 decisions in .*lin.*, expected one"):
        gmoe.merge(model, (z, pos, batch))


def test_what_has_no_dense_equal_is_refused_and_stays() -> None:
    data = graph()
    soft = GNNMoE(D, 8, 2, 3, num_experts=E).double()
    with pytest.raises(ValueError, match=r"model: got convs\.0, which mixes outputs, expected"):
        gmoe.merge(soft, data)
    gin = redrawn(GNNMoE(D, 8, 2, 3, num_experts=E, conv="gin", start="shared", mix="weights"))
    with pytest.raises(ValueError, match=r"model: got convs\.0, experts beside a shared one"):
        gmoe.merge(gin, data)
    router = TokenChoice(D, num_experts=E, k=2, weight="score")
    scaled = MoE(router, LinearExperts(D, D, num_experts=E), mix="weights").double()
    with pytest.raises(ValueError, match="whose weights do not always sum to 1"):
        gmoe.merge(scaled, data[0])
    with pytest.raises(ValueError, match="model: got Linear without layers of experts"):
        gmoe.merge(nn.Linear(D, D).double(), data[0])
    told = MoEConv("gcn", D, D, num_experts=E, router=None, mix="weights").double()
    with pytest.raises(ValueError, match="a MoEConv without one router of its own"):
        gmoe.merge(told, data)
