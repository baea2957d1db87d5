"""A SchNet whose weights are mixed by composition, beside a loop over molecules; and its merge."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torchvision
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.data import Batch, Data
from torch_geometric.nn import (
    MLP,
    AttentiveFP,
    GATv2Conv,
    GCNConv,
    GINConv,
    GINEConv,
    Linear,
    MessagePassing,
    SchNet,
    ViSNet,
)
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertLayer

import gmoe
from gmoe import LinearExperts, MLPExperts, MoE, TokenChoice
from gmoe.mixed import MixedWeights
from gmoe.routers import ByType
from gmoe.stack import stacks_in
from tests.helpers import sources
from tests.helpers.mlps import FORMS, plain_mlp

ELEMENTS = [1, 6, 8]
LINEAR = ["interactions.*.conv.lin*", "interactions.*.lin", "lin1", "lin2"]
Z = torch.tensor([8, 1, 1, 6, 1, 1, 1, 1, 6, 8])
BATCH = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 2, 2])
"""Water, methane and carbon monoxide."""


def all_pairs(pos: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs of atoms of a molecule, and their distances."""
    is_pair = (batch[:, None] == batch) & ~torch.eye(len(pos), dtype=torch.bool)
    sender, receiver = is_pair.nonzero().T
    return torch.stack([sender, receiver]), (pos[sender] - pos[receiver]).norm(dim=-1)


def dense_schnet() -> Any:
    torch.manual_seed(0)
    return SchNet(8, 8, num_interactions=1, num_gaussians=5, interaction_graph=all_pairs).double()


def schnet(start: Any = "copies") -> Any:
    """A SchNet mixed by composition, its experts drawn at random."""
    router = ByType("z", ELEMENTS, batch="batch")
    model = gmoe.moefy(dense_schnet(), targets=LINEAR, router=router, mix="weights", start=start)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name and "base" not in name:
                parameter.normal_(std=0.3)
    return model


def positions() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(len(Z), 3, dtype=torch.float64, generator=generator, requires_grad=True)


def looped(model: Any, pos: Tensor) -> Tensor:
    """(G, 1) molecule by molecule: PyG's own SchNet, with the weights of its composition."""
    dense = dense_schnet()
    names = {name for name, _ in dense.named_parameters()}
    energies = []
    for group in range(3):
        own = group == BATCH
        share_E = [(Z[own] == element).double().mean() for element in ELEMENTS]
        weights = {name: value for name, value in model.named_parameters() if name in names}
        for path, part in model.named_modules():
            for inner, stack in stacks_in(part) if isinstance(part, MoE) else ():
                name = f"{path}.{inner.removeprefix('experts.stacked')}".rstrip(".")
                for key in stack.names:
                    value_E = getattr(stack, key)
                    weights[f"{name}.{key}"] = sum(
                        w * v for w, v in zip(share_E, value_E, strict=True)
                    )
        assert weights.keys() == names
        energies.append(torch.func.functional_call(dense, weights, (Z[own], pos[own])))
    return torch.cat(energies)


@pytest.mark.parametrize("start", ["copies", "plain"])
def test_a_schnet_mixes_its_linear_layers_by_composition(start: str) -> None:
    """Outputs, forces, gradients of all parameters, and those of a loss of forces."""
    model, pos = schnet(start), positions()
    found, expected = model(Z, pos, BATCH), looped(model, pos)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    values = [pos, *model.parameters()]
    forces, gradients = [], []
    for energy in (found, expected):
        (force,) = torch.autograd.grad(energy.sum(), pos, create_graph=True)
        loss = energy.square().sum() + force.square().sum()
        forces.append(force)
        gradients.append(
            torch.autograd.grad(loss, values, allow_unused=True, materialize_grads=True)
        )
    torch.testing.assert_close(*forces, rtol=0, atol=1e-10)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


def test_merged_for_a_molecule_it_is_the_dense_model() -> None:
    model, pos = schnet(), positions()
    state = copy.deepcopy(model.state_dict())
    water = BATCH == 0
    merged: Any = gmoe.merge(model, z=Z[water], pos=pos[water])
    assert type(merged.lin1) is nn.Linear
    assert not any(isinstance(part, MoE | gmoe.Router) for part in merged.modules())
    found, expected = merged(Z[water], pos[water]), model(Z[water], pos[water])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    of_both = [torch.autograd.grad(energy.sum(), pos)[0] for energy in (found, expected)]
    torch.testing.assert_close(*of_both, rtol=0, atol=1e-10)
    merged(Z[water] + 1, pos[water])  # it reads no types anymore
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


def test_of_several_molecules_all_have_to_be_of_one_composition() -> None:
    model, pos = schnet(), positions()[:6]
    z, batch = torch.tensor([8, 1, 1, 1, 8, 1]), torch.tensor([0, 0, 0, 1, 1, 1])
    merged: Any = gmoe.merge(model, z, pos, batch)
    found, expected = merged(z, pos, batch), model(z, pos, batch)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    z[0] = 6
    with pytest.raises(ValueError, match=r"^model: got 2 decisions in .*lin.*, expected one"):
        gmoe.merge(model, z, pos, batch)


class ByVector(nn.Module):
    """Layers on nodes, whose weights are mixed by a vector of each graph."""

    def __init__(self, *experts: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MoE(None, MixedWeights(one)) for one in experts)
        self.router = TokenChoice(3, num_experts=4, k=4, weight="score", balance=None)

    def forward(self, x: Tensor, vector: Tensor, batch: Tensor) -> Tensor:
        nodes = self.router(vector).expand(batch)
        for layer in self.layers:
            x = layer(x, routing=nodes)
        return x


def test_of_experts_that_you_built_linear_layers_are_merged() -> None:
    """Whatever their weights sum to; of an MLP's nobody knows the class that it would have."""
    experts: Any = LinearExperts(6, 5, num_experts=3)
    model = MoE(Told(6), MixedWeights(experts)).double().eval()
    x = torch.randn(7, 6, dtype=torch.float64)
    dense = gmoe.merge(model, x)
    assert type(dense) is nn.Linear
    torch.testing.assert_close(dense(x), model(x), rtol=0, atol=1e-12)
    of_mlp = MoE(Told(6), MixedWeights(MLPExperts(6, 8, 5, num_experts=3))).double()
    with pytest.raises(ValueError, match=r"model: got the model itself, a MoE with Mix.*moefy"):
        gmoe.merge(of_mlp, x)


class Told(gmoe.Router):
    """One decision for all tokens, whose weights do not sum to 1."""

    def __init__(self, dim: int, weights: Sequence[float] = (0.5, -0.2, 0.9)) -> None:
        super().__init__(dim, num_experts=3, k=3)
        self.weights = weights

    def reset_parameters(self) -> None:
        """Nothing to draw."""

    def route(self, x_TD: Tensor, group: Any, edge_index: Any) -> gmoe.Routing:
        weight_1E = torch.tensor([self.weights], dtype=x_TD.dtype)
        all_T = torch.zeros(len(x_TD), dtype=torch.int64)
        return gmoe.Routing.to_all(weight_1E).expand(all_T)


def test_what_has_no_dense_equal_is_refused_and_stays() -> None:
    pos = positions()[:3]
    call = (Z[:3], pos)
    beside = schnet("shared")
    with pytest.raises(ValueError, match=r"model: got inter.*, experts beside a shared one, exp"):
        gmoe.merge(beside, *call)
    by_atom = gmoe.moefy(dense_schnet(), targets="lin1", num_experts=3, start="plain")
    with pytest.raises(ValueError, match=r"model: got \d decisions in lin1, expected one for all"):
        gmoe.merge(by_atom, *call)
    of_all = gmoe.moefy(
        nn.Sequential(nn.Linear(6, 6)), targets="0", router="uniform", start="plain"
    )
    with pytest.raises(ValueError, match="model: got 0, which mixes or scales the outputs of"):
        gmoe.merge(of_all, torch.randn(3, 6))
    with pytest.raises(ValueError, match="model: got Linear without layers of experts"):
        gmoe.merge(nn.Linear(6, 6), pos)
    half = MoE(Told(6, [0.0, 0.5, 0.0]), LinearExperts(6, 6, num_experts=3))
    with pytest.raises(ValueError, match="model: got the model itself, which mixes or scales the"):
        gmoe.merge(half, torch.randn(3, 6))
    soft = gmoe.SoftMoE(gmoe.SoftSlots(6, num_experts=3), LinearExperts(6, 6, num_experts=3))
    with pytest.raises(ValueError, match="model: got the model itself, a SoftMoE with LinearE"):
        gmoe.merge(soft, torch.randn(3, 6))
    told = ByVector(LinearExperts(6, 6, num_experts=4))
    x, batch = torch.randn(5, 6), torch.tensor([0, 1, 1, 0, 0])
    with pytest.raises(ValueError, match=r"got layers\.0, a MoE without a router of its own"):
        gmoe.merge(told, x, torch.randn(2, 3), batch)


@pytest.mark.parametrize("mix", ["weights", "outputs"])
def test_a_model_of_types_is_handed_out_for_one_of_them(mix: str) -> None:
    model, x = sources.net(sources.BY_SOURCE, mix).eval(), sources.atoms()
    for source in sources.SOURCES:
        told = torch.tensor([source])
        expected = model(x, None, told)
        for dense in (gmoe.merge(model, source=told), gmoe.merge(model, x, None, told)):
            assert not any(isinstance(part, gmoe.MoE) for part in dense.modules())
            assert type(dense) is sources.Net
            torch.testing.assert_close(dense(x), expected, rtol=0, atol=1e-10)


def test_a_learned_mixture_is_handed_out_for_one_vector() -> None:
    model, x = sources.net(sources.BY_VECTOR).eval(), sources.atoms()
    system = sources.systems()[2:3]
    dense = gmoe.merge(model, system=system)
    torch.testing.assert_close(dense(x), model(x, system=system), rtol=0, atol=1e-10)
    names = {name.partition(".")[0] for name, _ in dense.named_parameters()}
    assert names == {"lin1", "lin2"}  # the router is gone, too
    assert "router_of_system" in dict(model.named_children())


class Whole(nn.Module):
    """A model of one layer or block, told more than that takes."""

    def __init__(self, part: Any) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Any, batch: Any = None, source: Any = None, system: Any = None) -> Tensor:
        edge_index = torch.tensor([[0, 1, 2, 2], [1, 2, 0, 1]])
        others = {MessagePassing: (edge_index,), nn.TransformerDecoderLayer: (x,)}
        given = [more for cls, more in others.items() if isinstance(self.part, cls)]
        out = self.part(x, *sum(given, ()))
        return out[0] if isinstance(out, tuple) else out


def bert_block() -> nn.Module:
    config = BertConfig(hidden_size=8, num_attention_heads=2, intermediate_size=12)
    config._attn_implementation = "eager"
    return BertLayer(config)


NO_BIAS = "SwiGLU with a norm (EVA-02)"
"""Its norm shifts what a layer without a bias takes."""

CONVS: dict[str, Any] = {
    "GCN": lambda: GCNConv(8, 6),
    "GIN": lambda: GINConv(plain_mlp()),
    "GATv2": lambda: GATv2Conv(8, 6),
}
PARTS: dict[str, Any] = {
    "linear": lambda: nn.Linear(8, 6),
    "linear without a bias": lambda: nn.Linear(8, 6, bias=False),
    "PyG's linear": lambda: Linear(8, 6),
    "PyG's MLP": lambda: MLP([8, 12, 8], norm=None),
    "torchvision's MLP": lambda: torchvision.ops.MLP(8, [12, 8], dropout=0.1),
    "timm's MLP": lambda: Mlp(8, 12, drop=0.1),
    "torch's encoder": lambda: nn.TransformerEncoderLayer(8, 2, 12, activation=F.gelu),
    "torch's encoder, a module": lambda: nn.TransformerEncoderLayer(8, 2, 12, 0.0, nn.ReLU()),
    "torch's decoder": lambda: nn.TransformerDecoderLayer(8, 2, 12),
    "BERT": bert_block,
    **{name: form for name, form in FORMS.items() if name != NO_BIAS},
}


def classes(model: nn.Module) -> dict[str, type]:
    return {name: type(part) for name, part in model.named_modules(remove_duplicate=False)}


@pytest.mark.parametrize(
    ("name", "router"),
    [
        *[(name, sources.BY_SOURCE) for name in (PARTS | CONVS)],
        *[(name, sources.BY_VECTOR) for name in PARTS],
    ],
)
def test_what_had_experts_is_of_its_class_again(name: str, router: Any, tmp_path: Any) -> None:
    build = (PARTS | CONVS)[name]
    dense = Whole(build()).double().eval()
    for parameter in dense.parameters():  # norms scale and shift
        nn.init.normal_(parameter, std=0.4)
    mix = "outputs" if name in CONVS else "weights"
    model: Any = sources.net(router, mix, copy.deepcopy(dense), targets="part").eval()
    width = 12 if name.startswith("a last layer as wide") else 8
    x = torch.randn(*[2] * (name == "BERT"), 7, width, dtype=torch.float64)
    told = {"source": torch.tensor([7]), "system": sources.systems()[:1]}
    expected = model(x, **told)
    assert not torch.allclose(expected, dense(x))
    merged = gmoe.merge(model, **{router.argument: told[router.argument]})
    assert classes(merged) == classes(dense)
    assert [*merged.state_dict()] == [*dense.state_dict()]
    gmoe.save(merged, tmp_path)
    loaded = gmoe.load(tmp_path, Whole(build()).double())
    dense.load_state_dict(merged.state_dict())
    for found in (merged, dense, loaded):
        torch.testing.assert_close(found(x), expected, rtol=0, atol=1e-10)


def test_what_is_not_as_it_was_built_is_refused() -> None:
    model = sources.net(sources.BY_VECTOR, model=Whole(FORMS[NO_BIAS]()), targets="part")
    with pytest.raises(ValueError, match="model: got part, a layer without a bias behind a norm"):
        gmoe.merge(model, system=VECTOR)
    model = sources.net(sources.BY_VECTOR)
    model.lin2.experts.stacked.activation = nn.Tanh()
    with pytest.raises(ValueError, match=r"model: got lin2.experts.stacked.activation, Tanh, exp"):
        gmoe.merge(model, system=VECTOR)


class Molecules(nn.Module):
    """A GNN on molecules, which is called with a graph that knows its source."""

    def __init__(self, conv: Any) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 6)
        self.conv1, self.conv2 = conv(), conv()
        self.takes_attributes = isinstance(self.conv1, GINEConv)

    def forward(self, data: Any) -> Tensor:
        x = self.embed(data.x)
        for conv in (self.conv1, self.conv2):
            edges = (data.edge_attr,) if self.takes_attributes else ()
            x = conv(x, data.edge_index, *edges).tanh()
        return x


@pytest.mark.parametrize(
    "conv",
    [
        lambda: GINEConv(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)), edge_dim=3),
        lambda: GINConv(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))),
        lambda: GATv2Conv(6, 6),
        lambda: GCNConv(6, 6),
    ],
    ids=["GINE", "GIN", "GATv2", "GCN"],
)
@pytest.mark.parametrize("as_call", [True, False])
def test_convs_are_handed_out_for_one_source(conv: Any, as_call: bool) -> None:
    router = ByType("data.source", sources.SOURCES, batch="data.batch")
    model: Any = sources.net(router, "outputs", Molecules(conv), targets=["conv*"]).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    edges = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    graphs = [
        Data(torch.randn(3, 4), edges, torch.randn(4, 3), source=torch.tensor([source])).apply(
            lambda value: value.double() if value.is_floating_point() else value
        )
        for source in sources.SOURCES
    ]
    out = model(Batch.from_data_list(graphs))
    for graph, expected in zip(graphs, out.split(3), strict=True):
        dense: Any = gmoe.merge(model, *[graph] * as_call, **{} if as_call else {"data": graph})
        assert type(dense.conv1) is type(conv())
        torch.testing.assert_close(dense(graph), expected, rtol=0, atol=1e-10)


class Equivariant(ViSNet):
    """PyG's, with vectors (A, 3, D), and told more."""

    def __init__(self) -> None:
        super().__init__(hidden_channels=8, num_heads=2, num_layers=2, num_rbf=4)
        self.representation_model.distance = AllPairs()

    def forward(self, z: Any, pos: Any, batch: Any = None, source: Any = None, system: Any = None):  # type: ignore[no-untyped-def]
        batch = torch.zeros_like(z) if batch is None else batch
        return super().forward(z, pos, batch)[0]


class AllPairs(nn.Module):
    """In place of ViSNet's radius graph, which needs another package."""

    def forward(self, pos: Tensor, batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        edge_index, distance = all_pairs(pos, batch)
        return edge_index, distance, pos[edge_index[0]] - pos[edge_index[1]]


class Attentive(AttentiveFP):
    """PyG's, on distances, and told more."""

    def __init__(self) -> None:
        super().__init__(4, 8, 1, edge_dim=1, num_layers=2, num_timesteps=1)
        self.elements = nn.Embedding(9, 4)

    def forward(self, z: Any, pos: Any, batch: Any = None, source: Any = None, system: Any = None):  # type: ignore[no-untyped-def]
        batch = torch.zeros_like(z) if batch is None else batch
        edge_index, distance = all_pairs(pos, batch)
        return super().forward(self.elements(z), edge_index, distance[:, None], batch)


@pytest.mark.parametrize("router", [sources.BY_SOURCE, sources.BY_VECTOR])
@pytest.mark.parametrize(
    ("cls", "targets"),
    [
        (Equivariant, ["*.q_proj", "*.o_proj", "*.vec_proj", "*.update_net"]),
        (Attentive, ["lin1"]),
    ],
)
def test_models_of_pyg_give_each_molecule_that_of_its_source(
    router: Any, cls: Any, targets: list[str], tmp_path: Any
) -> None:
    """In a batch, alone, in a file, and merged."""
    model = sources.net(router, model=cls(), targets=targets).eval()
    pos = positions()
    told = {"source": torch.tensor([7, 0, 3]), "system": sources.systems()[:3]}
    expected = model(Z, pos, BATCH, **told)
    assert not torch.allclose(
        expected, model(Z, pos, BATCH, **{k: v.flip(0) for k, v in told.items()})
    )
    gmoe.save(model, tmp_path)
    loaded = gmoe.load(tmp_path, cls().double())
    torch.testing.assert_close(loaded(Z, pos, BATCH, **told), expected, rtol=0, atol=0)
    for group in range(3):
        alone = Z[group == BATCH], pos[group == BATCH]
        own = {name: value[group : group + 1] for name, value in told.items()}
        argument = router.argument
        merged = gmoe.merge(model, **{argument: own[argument]})
        for found in (model(*alone, None, **own), merged(*alone)):
            torch.testing.assert_close(found, expected[group : group + 1], rtol=1e-12, atol=1e-10)


def test_all_routers_of_a_model_are_told_or_none() -> None:
    dense = sources.Net().double()
    gmoe.moefy(dense, targets="lin1", router=sources.BY_SOURCE, mix="weights", start="copies")
    gmoe.moefy(dense, targets="lin2", router=sources.BY_VECTOR, mix="weights", start="copies")
    model, x = dense.eval(), sources.atoms()
    told = {"source": torch.tensor([7]), "system": sources.systems()[:1]}
    expected = model(x, None, told["source"], system=told["system"])
    torch.testing.assert_close(gmoe.merge(model, **told)(x), expected, rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match=r"^system: got nothing beside source, expected all that"):
        gmoe.merge(model, source=told["source"])


BY_ATOM = ByType("source", sources.SOURCES)
ONE = torch.tensor([7])
VECTOR = sources.systems()[:1]


@pytest.mark.parametrize(
    ("router", "told", "message"),
    [
        (sources.BY_SOURCE, {"source": torch.tensor([0, 3])}, "source: got 2 different values, "),
        (sources.BY_SOURCE, {"source": ONE[:0]}, "source: got 0 different values, expected one"),
        (BY_ATOM, {"source": torch.tensor([0, 3])}, "source: got 2 different values, expected one"),
        (sources.BY_SOURCE, {"source": ["uff"]}, "source: got list, expected a tensor"),
        (sources.BY_SOURCE, {"source": 7}, "source: got int, expected a tensor"),
        (
            sources.BY_SOURCE,
            {"source": ONE > 0},
            "source: got shape .* of torch.bool, expected a t",
        ),
        (sources.BY_SOURCE, {"source": ONE.double()}, "source: got shape .* of torch.float64, ex"),
        (sources.BY_SOURCE, {"source": ONE + 1}, r"source: got types \[8\] without an expert"),
        (sources.BY_SOURCE, {"source": ONE.to("meta")}, "source, model: got values on meta"),
        (sources.BY_SOURCE, {"system": VECTOR}, "model: got a call of Net with system .*, expect"),
        (sources.BY_SOURCE, {"sorce": ONE}, "model: got a call of Net with sorce .*, expected a"),
        (sources.BY_SOURCE, {}, "model: got a call of Net with nothing .*, expected a whole one"),
        (
            sources.BY_SOURCE,
            {"source": ONE, "batch": torch.tensor([0])},
            "model: got a call of Net with source, batch .*, expected a whole one",
        ),
        (sources.BY_VECTOR, {"system": sources.systems()}, "system: got 4 vectors without a batch"),
        (sources.BY_VECTOR, {"system": VECTOR[:, :2]}, "system: got .*, expected a vector of 3"),
        (sources.BY_VECTOR, {"system": VECTOR[0]}, "system: got .*, expected a vector of 3 floats"),
        (sources.BY_VECTOR, {"system": VECTOR.long()}, "system: got .*, expected a vector of 3"),
        (sources.BY_VECTOR, {"system": VECTOR / 0}, "system: got NaN or infinity"),
        (sources.BY_VECTOR, {"system": VECTOR.to("meta")}, "system, model: got values on meta"),
        ("uniform", {"source": ONE}, "model: got a call of Net with source .*, expected a whole"),
    ],
)
def test_values_that_tell_no_single_model_are_refused(
    router: Any, told: dict[str, Any], message: str
) -> None:
    mix = "outputs" if router in (BY_ATOM, "uniform") else "weights"
    model = sources.net(router, mix, start="plain" if router == "uniform" else "copies")
    with pytest.raises(ValueError, match=rf"^{message}"):
        gmoe.merge(model, **told)


def test_a_merged_model_is_not_merged_again() -> None:
    merged = gmoe.merge(sources.net(sources.BY_VECTOR), system=VECTOR)
    with pytest.raises(ValueError, match=r"^model: got Net without layers of experts"):
        gmoe.merge(merged, system=VECTOR)
