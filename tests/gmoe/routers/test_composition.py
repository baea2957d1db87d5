"""``ByType(..., batch=)``: a group is routed by the shares of the types in it."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch_geometric.nn import GCNConv

import gmoe
from gmoe import MoE, record_routing
from gmoe.routers import ByType
from tests.helpers import sources
from tests.helpers.sources import atoms, equal_with_gradients

VALUES = [1, 6, 8]
Z = torch.tensor([8, 6, 1, 6, 1, 8, 6])
BATCH = torch.tensor([4, 0, 4, 0, 4, 0, 2])
SHARES = {4: [2 / 3, 0, 1 / 3], 0: [0, 2 / 3, 1 / 3], 2: [0, 1, 0]}
"""Of each group, the share of each type, counted by hand."""


class Net(nn.Module):
    """Two linear layers on atoms."""

    def __init__(self) -> None:
        super().__init__()
        self.lin1 = nn.Linear(4, 4)
        self.lin2 = nn.Linear(4, 2)

    def forward(self, x: Tensor, z: Tensor, *, batch: Tensor | None = None) -> Tensor:
        out: Tensor = self.lin2(self.lin1(x).tanh())
        return out


def net(mix: Any = "weights") -> Any:
    return sources.net(ByType("z", VALUES, batch="batch"), mix, Net())


def shares() -> Tensor:
    return torch.tensor([SHARES[int(group)] for group in BATCH], dtype=torch.float64)


def test_the_weights_are_the_shares_of_the_types() -> None:
    routing = ByType("z", VALUES, batch="batch").decide(Z, BATCH, False, nn.Module())
    torch.testing.assert_close(routing.to_dense(), shares(), rtol=0, atol=1e-15)
    assert routing.by_group is not None
    groups = routing.by_group
    of_tokens = groups.routing.to_dense()[groups.group_T]
    torch.testing.assert_close(of_tokens, shares(), rtol=0, atol=1e-15)
    one = ByType("z", VALUES, batch="batch").decide(Z, None, False, nn.Module())
    assert one.by_group is not None
    torch.testing.assert_close(
        one.by_group.routing.to_dense(), torch.tensor([[2, 3, 2]]).double() / 7
    )


def test_tokens_of_other_types_lower_the_shares() -> None:
    z = torch.tensor([1, 9, 1, 6])
    batch = torch.tensor([0, 0, 1, 1])
    routing = ByType("z", [1, 6], batch="batch").decide(z, batch, True, nn.Module())
    expected = torch.tensor([[0.5, 0], [0.5, 0], [0.5, 0.5], [0.5, 0.5]]).double()
    torch.testing.assert_close(routing.to_dense(), expected)


@pytest.mark.parametrize("mix", ["weights", "outputs"])
def test_a_moefied_model_mixes_by_composition(mix: Any) -> None:
    model = net(mix=mix)
    x = atoms()
    out = model(x, Z, batch=BATCH)

    def layer(moe: MoE, x: Tensor) -> Tensor:
        experts: Any = moe.experts.stacked if mix == "weights" else moe.experts
        weight_TE = shares()
        y_TEO = torch.einsum("ti,eoi->teo", x, experts.weight) + experts.bias
        return torch.einsum("te,teo->to", weight_TE, y_TEO)

    expected = layer(model.lin2, layer(model.lin1, x).tanh())
    equal_with_gradients(model, out, expected, x)


def test_all_layers_share_the_decision_and_start_as_the_dense_model(tmp_path: Any) -> None:
    torch.manual_seed(0)
    dense = Net().double()
    x = atoms()
    expected = dense(x, Z)
    router = ByType("z", VALUES, batch="batch")
    model: Any = gmoe.moefy(dense, targets="lin*", router=router, start="copies", mix="weights")
    with record_routing(model) as routings:
        torch.testing.assert_close(model(x, Z, batch=BATCH), expected, rtol=0, atol=1e-12)
    assert routings[0] is routings[1]
    assert model.lin1.experts_per_token == 1.0
    trained = net()
    copied = pickle.loads(pickle.dumps(trained))
    torch.testing.assert_close(copied(x, Z, batch=BATCH), trained(x, Z, batch=BATCH))
    gmoe.save(trained, tmp_path)
    loaded: Any = gmoe.load(tmp_path, Net().double())
    torch.testing.assert_close(loaded(x, Z, batch=BATCH), trained.eval()(x, Z, batch=BATCH))


class Checkpointed(Net):
    """Net whose first layer is computed again in the backward pass."""

    use_reentrant = False

    def forward(self, x: Tensor, z: Tensor, *, batch: Tensor | None = None) -> Tensor:
        h = checkpoint(self.lin1, x, use_reentrant=self.use_reentrant)
        out: Tensor = self.lin2(h.tanh())
        return out


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints_compute_with_the_same_shares(use_reentrant: bool) -> None:
    plain = net()
    model = Checkpointed()
    model.use_reentrant = use_reentrant
    router = ByType("z", VALUES, batch="batch")
    gmoe.moefy(model.double(), targets="lin*", router=router, start="copies", mix="weights")
    model.load_state_dict(plain.state_dict())
    x = atoms()
    for one in (plain, model):
        one(x, Z, batch=BATCH).square().sum().backward()
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_export_refuses_it_by_name() -> None:
    inputs = {"x": atoms().detach(), "z": Z, "batch": BATCH}
    with pytest.raises(ValueError, match=r"^torch\.export: got the composition of groups, expec"):
        torch.export.export(net().eval(), (), inputs, strict=False)


@pytest.mark.slow
def test_compiled_it_is_the_same_for_any_number_of_groups() -> None:
    torch._dynamo.reset()
    model = net()
    compiled = torch.compile(model, backend="aot_eager")
    for size in (7, 3, 4, 6, 2):  # of 5, types are as many as groups
        x, z, batch = atoms()[:size], Z[:size], BATCH[:size]
        torch.testing.assert_close(compiled(x, z, batch=batch), model(x, z, batch=batch))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="batch: got '1', expected the name of an argument"):
        ByType("z", VALUES, batch="1")
    with pytest.raises(ValueError, match="batch: got 'group', expected an argument of Net"):
        ByType("z", VALUES, batch="group").attach(Net())
    for batch, legal in (
        (BATCH[:3], "0 to 6: z has 7 rows"),
        (BATCH.float(), "integers, the group of each"),
        (3, "integers, the group of each"),
    ):
        with pytest.raises(ValueError, match=rf"^batch: got .*, expected {legal}"):
            net()(atoms(), Z, batch=batch)
    with pytest.raises(ValueError, match="routing: got a decision for each token, expected one"):
        gmoe.moefy(Net(), targets="lin*", router=ByType("z", VALUES), mix="weights")(
            atoms().float(), Z
        )
    by_molecule = ByType("z", VALUES, batch="batch")
    for options, message in (
        ({"router": "token_choice", "targets": "lin*"}, r"router: got 'token_choice' with mix='we"),
        ({"router": by_molecule, "targets": "lin*", "router_input": "node"}, "router_input: got"),
        ({"router": by_molecule, "targets": "lin*", "mix": "sum"}, "mix: got 'sum', expected"),
    ):
        with pytest.raises(ValueError, match=message):
            gmoe.moefy(Net(), **({"mix": "weights"} | options))
    dense = nn.Module()
    dense.conv = GCNConv(4, 4)
    with pytest.raises(ValueError, match=r"targets: got conv, a GCNConv, with mix='weights', exp"):
        gmoe.moefy(dense, targets="conv", router=by_molecule, mix="weights")
