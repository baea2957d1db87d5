"""MoEConv as a citizen of PyG and torch: widths filled in, positional arguments, to_hetero, explainers, threads."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.explain import (
    AttentionExplainer,
    CaptumExplainer,
    Explainer,
    ExplainerAlgorithm,
    GNNExplainer,
    GraphMaskExplainer,
    ModelConfig,
    PGExplainer,
)
from torch_geometric.explain.algorithm.utils import clear_masks, set_masks
from torch_geometric.nn import (
    DegreeScalerAggregation,
    GATConv,
    GCNConv,
    HeteroConv,
    MessagePassing,
    MLPAggregation,
    SAGEConv,
    to_hetero,
)

from gmoe import GNNMoE, Graph, MoEConv
from gmoe.conv.kinds import OPTIONS
from tests.gmoe.conv.masked import GRAPHS, assert_equals_masked, features, random_graph

pytestmark = pytest.mark.filterwarnings("ignore:.*runs on the whole graph")

NODES, WIDTH = 8, 4
KINDS: list[Any] = ["gcn", "gin", "gat", "le", "filter", "mlp", ["gcn", "gat", "le"]]


def layer(conv: Any = "gcn", in_channels: Any = WIDTH, **kwargs: Any) -> MoEConv:
    torch.manual_seed(0)
    return MoEConv(conv, in_channels, WIDTH, **{"num_experts": 3, **kwargs})


def graph() -> tuple[Tensor, Tensor]:
    return features(NODES, WIDTH).float(), GRAPHS["mixed"][1]


# widths


@pytest.mark.parametrize("conv", KINDS, ids=str)
def test_open_widths_are_filled_in_by_the_first_call(conv: Any) -> None:
    x, edge_index = graph()
    lazy, built = (layer(conv, width, router_input=("node", "neighbors")) for width in (-1, WIDTH))
    assert isinstance(lazy, MessagePassing)
    assert list(lazy.parameters()) == []
    y = lazy.double()(x.double(), edge_index)
    assert y.dtype == torch.float64
    assert lazy.in_channels == WIDTH
    lazy.float()
    assert {n: p.shape for n, p in lazy.named_parameters()} == {n: p.shape for n, p in built.named_parameters()}
    built.load_state_dict(lazy.state_dict())
    assert torch.equal(built(x, edge_index), lazy(x, edge_index))


def test_open_widths_of_two_sets_of_nodes() -> None:
    x = (features(9, 3).float(), features(5, 6).float())
    for given in ((-1, -1), (3, -1), (-1, 6), -1):
        lazy = layer("sage", given).eval()
        assert lazy(x, random_graph(9, 5, 20)).shape == (5, WIDTH)
        assert lazy.in_channels == (3, 6)
        assert not lazy.training
        assert not lazy.router.training  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"x: got .*expected"):
        layer("sage", (4, -1))(x, random_graph(9, 5, 20))
    with pytest.raises(ValueError, match="in_channels: got -2"):
        layer("sage", (-2, -1))


def test_an_open_layer_is_copied_and_takes_a_state_once_it_is_built() -> None:
    x, edge_index = graph()
    built, lazy = layer("gat", heads=2), nn.ModuleList([layer("gat", -1, heads=2)])
    twin = pickle.loads(pickle.dumps(copy.deepcopy(lazy)))
    twin[0](features(NODES, 7).float(), edge_index)
    assert [one.in_channels for one in (*twin, *lazy)] == [7, -1]
    lazy.load_state_dict(copy.deepcopy(lazy).state_dict())  # an open one's has nothing
    state = nn.ModuleList([built]).state_dict()
    with pytest.raises(RuntimeError, match="Unexpected key"):
        lazy.load_state_dict(state)
    lazy[0](x, edge_index)
    lazy.load_state_dict(state)
    assert torch.equal(lazy[0](x, edge_index), built(x, edge_index))


# positional arguments


def test_the_convs_own_arguments_come_by_position() -> None:
    gat: Any = MoEConv(GATConv, WIDTH, 8, 8, num_experts=2, shared_expert=False)
    assert (gat.num_experts, gat.expert(0).heads) == (2, 8)
    assert MoEConv(GATConv, -1, 8, 2)(*graph()).shape == (NODES, 16)
    with pytest.raises(ValueError, match="conv: got GCNConv, which cannot be built as"):
        MoEConv(GCNConv, WIDTH, 8, *[True] * 9)
    for conv, args, name in ((GCNConv, (8,), "improved"), ("sage", ("mean", 8), "normalize")):
        with pytest.raises(ValueError, match=f"{name}: got 8, .* num_experts=8"):
            MoEConv(conv, WIDTH, 8, *args)
    with pytest.raises(ValueError, match="improved: got 1"):
        GNNMoE(WIDTH, 8, 3, improved=1)


def test_mistyped_and_misplaced_arguments_are_told_what_is_meant() -> None:
    by_name = {name for name, part in inspect.signature(MoEConv).parameters.items() if part.kind is part.KEYWORD_ONLY}
    assert set(OPTIONS) == by_name
    network: Any = nn.Linear(WIDTH, 8)
    moe, gnn = partial(MoEConv, GCNConv, WIDTH, 8), partial(GNNMoE, WIDTH, 8, 3)
    calls: list[tuple[Callable[[], Any], str]] = [
        *((partial(build, num_expert=3), r"did you mean 'num_experts'\?") for build in (moe, gnn)),
        *((partial(build, router_kwargs=[1]), r"router_kwargs: got \[1\]") for build in (moe, gnn)),
        *((partial(MoEConv, conv, WIDTH, 8), r"gmoe\.HeteroMoEConv") for conv in ("hgt", "han", HeteroConv)),
        (partial(MoEConv, "gin", WIDTH, 8, network), "nn: got a network"),
        (partial(MoEConv, "gin", WIDTH, 8, nn=network), "nn: got a network"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()


def test_a_module_among_the_arguments_is_each_experts_own() -> None:
    x, edge_index = graph()
    aggr = MLPAggregation(WIDTH, WIDTH, max_num_elements=9, num_layers=1)
    moe: Any = MoEConv(SAGEConv, WIDTH, 8, aggr=aggr, num_experts=3, shared_expert=False)
    weights = [next(moe.expert(index).aggr_module.parameters()) for index in range(3)]
    assert not torch.equal(weights[0], weights[1])
    assert moe(x, edge_index[:, edge_index[1].argsort()]).shape == (NODES, 8)


def test_forward_takes_what_the_conv_takes_by_position() -> None:
    x, edge_index = graph()
    weight = features(edge_index.size(1), seed=7).float().abs()
    moe = layer(["gcn", "graph", "le"])
    assert torch.equal(moe(x, edge_index, weight), moe(x, edge_index, edge_weight=weight))
    assert torch.equal(moe(x, edge_index, None), moe(x, edge_index))
    for conv, given, message in (
        ("gcn", {"edge_weight": weight}, r"edge_weight: got Tensor by position, expected .* once"),
        (["gcn", "gat", "mlp"], {}, r"forward: got 1 arguments .* by name"),
        (["gcn", "sage", "gcn"], {}, r"forward: got 1 arguments .* by name"),
        ("mlp", {}, "forward: got 1 arguments behind edge_index, expected at most 0"),
        ("sage", {}, "size: got "),
    ):
        with pytest.raises(ValueError, match=message):
            layer(conv)(x, edge_index, weight, **given)


# to_hetero


class Two(nn.Module):
    """Two layers, as in PyG's tutorials, or those of experts, equal to the dense ones: a gain is zero."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.conv1, self.conv2 = make(), make()

    def forward(self, x: Tensor, edge_index: Tensor) -> Any:
        return self.conv2(self.conv1(x, edge_index).relu(), edge_index)


def test_to_hetero_gives_what_it_gives_for_the_plain_conv() -> None:
    """All experts are copies of it, and the weights of a node sum to 1."""
    x = {"paper": features(7, 5).float(), "author": features(4, 3).float()}
    ends = [("paper", "cites", "paper"), ("author", "writes", "paper"), ("paper", "has", "author")]
    edges = {(a, by, b): random_graph(len(x[a]), len(x[b]), 15) for a, by, b in ends}
    options: dict[str, Any] = {"num_experts": 4, "router": "uniform", "k": 4, "shared_expert": False}
    plain = to_hetero(Two(lambda: SAGEConv((-1, -1), 6)), (list(x), ends))
    expected = plain(x, edges)
    moe = to_hetero(Two(lambda: MoEConv(SAGEConv, (-1, -1), 6, **options)), (list(x), ends))
    moe(x, edges)
    for name, conv in plain.named_modules():
        if isinstance(conv, SAGEConv):
            moe.get_submodule(name).experts.fill([conv] * 4)
    found = moe(x, edges)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


# explainers


@pytest.mark.parametrize("conv", KINDS, ids=str)
def test_a_mask_acts_on_messages_and_not_on_the_router(conv: Any) -> None:
    """Also where layers have a router and a shared expert; see ``test_experts.py``."""
    x, edge_index = features(NODES, WIDTH), graph()[1]
    mask = features(edge_index.size(1), seed=9)
    for options in ({}, {"shared_expert": "sage", "k": 2}):
        assert_equals_masked(layer(conv, **options).double(), x, edge_index, mask=mask)
    moe = layer(conv, shared_expert=False).double().eval()
    before, routing = moe(x, edge_index, return_routing=True)
    set_masks(moe, mask, edge_index)
    shown, again = moe(x, edge_index, return_routing=True)
    clear_masks(moe)
    assert torch.equal(again.to_dense(), routing.to_dense())
    assert torch.equal(moe(x, edge_index), before)
    assert torch.equal(shown, before) is (conv == "mlp")


CONFIG = ModelConfig(mode="multiclass_classification", task_level="node", return_type="raw")


def explained(model: nn.Module, algorithm: Any, kind: Any = "model", **options: Any) -> Explainer:
    return Explainer(model, algorithm, explanation_type=kind, edge_mask_type="object", model_config=CONFIG, **options)


@pytest.mark.parametrize("shared_router", [False, True])
def test_gnn_explainer_runs_on_a_model(shared_router: bool) -> None:
    torch.manual_seed(0)
    x, edge_index = graph()
    model = GNNMoE(WIDTH, 8, 3, 3, conv=["gcn", "gat", "le"], shared_router=shared_router).eval()
    before = model(x, edge_index)
    mask = explained(model, GNNExplainer(epochs=5), node_mask_type="attributes")(x, edge_index, index=3).edge_mask
    reached = {3}
    for _ in range(3):
        reached |= {int(s) for s, d in edge_index.T.tolist() if d in reached}
    counts = torch.tensor([d in reached for _, d in edge_index.T.tolist()])
    assert mask[counts].any()
    assert not mask[~counts].any()
    assert torch.equal(model(x, edge_index), before)  # and the model is as it was


@pytest.mark.parametrize("conv", [kind for kind in KINDS[:6] if kind != "le"])
def test_a_stacked_layer_is_one_hop(conv: Any) -> None:
    model: Any = nn.Sequential(layer(conv), layer(conv))
    assert ExplainerAlgorithm._num_hops(model) == 2
    assert [name for name, part in model.named_modules() if isinstance(part, MessagePassing)] == ["0", "1"]
    assert [part for part in model.modules() if part is model[0].experts.prototype] == []


def test_what_explainers_do_not_see_moves_with_the_layer() -> None:
    """Aggregations may hold buffers."""
    moe = layer("sage", aggr=DegreeScalerAggregation("mean", "identity", torch.tensor([1, 2, 1])), shared_expert=False)
    buffer = moe.experts.prototype.aggr_module.avg_deg_lin
    assert buffer.device.type == "cpu"
    assert "experts.prototype.aggr_module.avg_deg_lin" in moe.state_dict()
    assert moe.to("meta").experts.prototype.aggr_module.avg_deg_lin.is_meta
    assert not moe.to_empty(device="cpu").experts.prototype.aggr_module.avg_deg_lin.is_meta
    assert moe.double().experts.prototype.aggr_module.avg_deg_lin.dtype == torch.float64
    assert not moe.eval().experts.prototype.training


@pytest.mark.parametrize("algorithm", ["gnn", "pg", "captum"])
@pytest.mark.parametrize("conv", [GCNConv, SAGEConv, GATConv])
def test_explanations_are_those_of_the_dense_model(conv: Any, algorithm: str) -> None:
    x, edge_index = graph()
    found, target, index = [], torch.arange(NODES) % WIDTH, torch.tensor([3])
    for make in (lambda: conv(WIDTH, WIDTH), lambda: MoEConv(conv, WIDTH, WIDTH, num_experts=3)):
        torch.manual_seed(0)
        model, given = Two(make).eval(), {}
        if algorithm == "pg":
            explainer, given = explained(model, PGExplainer(epochs=3), "phenomenon"), {"target": target}
            torch.manual_seed(1)
            for epoch in range(3):
                explainer.algorithm.train(epoch, model, x, edge_index, target=target, index=index)
        else:
            by: Any = GNNExplainer(epochs=3) if algorithm == "gnn" else CaptumExplainer("Saliency")
            explainer = explained(model, by)
        torch.manual_seed(2)
        found.append(explainer(x, edge_index, index=index, **given).edge_mask)
    torch.testing.assert_close(found[1], found[0])


def test_explainers_that_look_into_messages_are_refused() -> None:
    x, edge_index = graph()
    model = Two(layer).eval()
    with pytest.raises(ValueError, match="explain: got an explainer without a mask"):
        explained(model, GraphMaskExplainer(2, epochs=1), node_mask_type="attributes")(x, edge_index, index=3)
    clear_masks(model)
    with pytest.raises(ValueError, match=r"hook: got .*, expected none on a MoEConv"):
        explained(model, AttentionExplainer())(x, edge_index, index=3)


# sources alone


@pytest.mark.parametrize("by", ["size", "matrix", "graph", "position"])
def test_destinations_without_features_are_those_of_the_dense_conv(by: str) -> None:
    """Of a new layer, whose gain is zero."""
    x, edge_index = features(NODES, WIDTH), torch.tensor([[0, 1, 2, 3, 7], [0, 0, 1, 1, 2]])
    adj: Any = {"graph": Graph(edge_index, (NODES, 5))}.get(by, edge_index)
    if by == "matrix":
        adj = torch.sparse_coo_tensor(edge_index.flip(0), torch.ones(5).double(), (5, NODES)).to_sparse_csr()
    moe = layer("sage").double().eval()
    at, given = ((NODES, 5),) if by == "position" else (), {"size": (NODES, 5)} if by == "size" else {}
    dense = moe.shared_expert.expert(0)((x, None), edge_index, size=(NODES, 5))
    torch.testing.assert_close(moe((x, None), adj, *at, **given), dense)


def test_destinations_without_features_are_refused_where_a_conv_reads_them() -> None:
    for conv, width, given, message in (
        ("transformer", (WIDTH, WIDTH), {"size": (NODES, 1)}, "x: got no destination nodes, expected .* reads them"),
        ("sage", -1, {"size": (NODES, 1)}, "x: got .*NoneType"),
        ("sage", WIDTH, {}, "size: got None"),
    ):
        with pytest.raises(ValueError, match=message):
            layer(conv, width)((graph()[0], None), torch.tensor([[0, 1], [0, 0]]), **given)


# threads and transforms


@pytest.mark.parametrize("conv", ["gcn", ["low_pass", "high_pass"], "gat"], ids=str)
def test_two_threads_get_what_one_gets(conv: Any) -> None:
    """Each on a graph of its own and on one that they share, in forward and in inference."""
    experts = None if isinstance(conv, list) else 3
    model = GNNMoE(WIDTH, 8, 3, conv=conv, num_experts=experts, router="expert_choice").double().eval()
    datas = [Data(x=features(40, WIDTH, seed=s), edge_index=random_graph(40, 40, 150, seed=s)) for s in (0, 1)]

    def work(data: Data, shared: Graph) -> list[Tensor]:
        with torch.no_grad():
            found = [model(data.x, data.edge_index), model(data.x, shared), model.convs[0](data.x, shared)]
            return [*found, model.inference(data, batch_size=7)]

    expected = [work(data, Graph(datas[0].edge_index, 40)) for data in datas]
    fresh = Graph(datas[0].edge_index, 40, x=datas[0].x)
    with ThreadPoolExecutor(4) as pool:
        for index, found in zip([0, 1] * 8, pool.map(lambda i: work(datas[i], fresh), [0, 1] * 8), strict=True):
            torch.testing.assert_close(found, expected[index], rtol=0, atol=1e-12)


def test_transforms_of_torch_func_are_one_clear_error() -> None:
    x, edge_index = graph()
    moe = layer()
    calls: list[Callable[[], Any]] = [
        lambda: torch.func.grad(lambda x: moe(x, edge_index).sum())(x),
        lambda: torch.func.vmap(lambda x: moe(x, edge_index))(x.expand(2, -1, -1)),
        lambda: torch.func.jvp(lambda x: moe(x, edge_index), (x,), (x,)),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=r"torch\.func transforms .* are not supported by gmoe"):
            call()
    values = {name: p.detach() for name, p in moe.named_parameters()}
    torch.testing.assert_close(torch.func.functional_call(moe, values, (x, edge_index)), moe(x, edge_index))
