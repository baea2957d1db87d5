"""MoEConv as a citizen of PyG and torch: widths filled in, positional arguments, to_hetero, explainers, threads."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
from collections.abc import Callable
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
from gmoe.conv.kinds import OPTIONS, SOURCES_ALONE
from tests.gmoe.conv.masked import GRAPHS, assert_equals_masked, features, random_graph, routing_of

pytestmark = pytest.mark.filterwarnings("ignore:.*runs on the whole graph")

NODES, WIDTH = 8, 4
KINDS: list[Any] = [
    "gcn",
    "sage",
    "graph",
    "gin",
    "gat",
    "gatv2",
    "transformer",
    "le",
    "filter",
    "mlp",
    ["gcn", "gat", "le"],
]


def layer(conv: Any = "gcn", in_channels: Any = WIDTH, **kwargs: Any) -> MoEConv:
    torch.manual_seed(0)
    return MoEConv(conv, in_channels, WIDTH, **{"num_experts": 3, **kwargs})


def graph() -> tuple[Tensor, Tensor]:
    return features(NODES, WIDTH).float(), GRAPHS["mixed"][1]


# widths -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("router_input", ["node", ("node", "neighbors")], ids=str)
@pytest.mark.parametrize("conv", KINDS, ids=str)
def test_open_widths_are_filled_in_by_the_first_call(conv: Any, router_input: Any) -> None:
    x, edge_index = graph()
    lazy, built = (layer(conv, width, router_input=router_input, shared_expert=True) for width in (-1, WIDTH))
    assert isinstance(lazy, MessagePassing)
    assert list(lazy.parameters()) == []
    torch.manual_seed(1)
    y = lazy.double()(x.double(), edge_index)
    assert y.dtype == torch.float64
    assert lazy.in_channels == WIDTH
    lazy.float()
    assert {n: p.shape for n, p in lazy.named_parameters()} == {n: p.shape for n, p in built.named_parameters()}
    built.load_state_dict(lazy.state_dict())
    assert torch.equal(built(x, edge_index), lazy(x, edge_index))
    torch.testing.assert_close(y.float(), built(x, edge_index))


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
    for strict in (True, False):
        with pytest.raises(RuntimeError, match="in_channels: got -1, expected a call that fills it in"):
            lazy.load_state_dict(state, strict=strict)
    lazy[0](x, edge_index)
    lazy.load_state_dict(state)
    assert torch.equal(lazy[0](x, edge_index), built(x, edge_index))


# positional arguments -----------------------------------------------------------------------------------------------


def test_the_convs_own_arguments_come_by_position() -> None:
    x, edge_index = graph()
    gat: Any = MoEConv(GATConv, WIDTH, 8, 8, num_experts=2, shared_expert=False)
    assert (gat.num_experts, gat.expert(0).heads) == (2, 8)
    assert gat(x, edge_index).shape == (NODES, 64)
    assert MoEConv(GATConv, WIDTH, 8, 2, False)(x, edge_index).shape == (NODES, 8)
    assert MoEConv("sage", WIDTH, 8, "max", shared_expert=False).expert(0).aggr == "max"
    open_width = MoEConv(GATConv, -1, 8, 2)
    assert open_width(x, edge_index).shape == (NODES, 16)
    with pytest.raises(ValueError, match="conv: got GCNConv, which cannot be built as"):
        MoEConv(GCNConv, WIDTH, 8, *[True] * 9)
    for conv, args, name in ((GCNConv, (8,), "improved"), ("sage", ("mean", 8), "normalize")):
        with pytest.raises(ValueError, match=rf"{name}: got 8, expected True or False; .* num_experts=8"):
            MoEConv(conv, WIDTH, 8, *args)
    with pytest.raises(ValueError, match=r"improved: got 1, expected True or False"):
        GNNMoE(WIDTH, 8, 3, improved=1)


def test_mistyped_and_misplaced_arguments_are_told_what_is_meant() -> None:
    assert set(OPTIONS) == {
        name for name, part in inspect.signature(MoEConv).parameters.items() if part.kind is part.KEYWORD_ONLY
    }
    builds: list[Callable[..., Any]] = [partial(MoEConv, GCNConv, WIDTH, 8), partial(GNNMoE, WIDTH, 8, 3)]
    for build in builds:
        with pytest.raises(ValueError, match=r"did you mean 'num_experts'\?"):
            build(num_expert=3)
        with pytest.raises(ValueError, match=r"router_kwargs: got \[1\], expected a dictionary"):
            build(router_kwargs=[1])
    for conv in ("hgt", "han", HeteroConv):
        with pytest.raises(ValueError, match=r"conv: got .*; expected gmoe\.HeteroMoEConv"):
            MoEConv(conv, WIDTH, 8)
    by_name: Any = {"nn": nn.Linear(WIDTH, 8)}
    for build in (partial(MoEConv, "gin", WIDTH, 8, **by_name), partial(MoEConv, "gin", WIDTH, 8, nn.Linear(WIDTH, 8))):
        with pytest.raises(ValueError, match="nn: got a network, expected none: it is made"):
            build()


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
    attr = features(edge_index.size(1), 2, seed=8).float()
    for conv, value, name in (
        ("gcn", weight, "edge_weight"),
        ("gat", attr, "edge_attr"),
        (["gcn", "graph", "le"], weight, "edge_weight"),
    ):
        moe = layer(conv, **({"edge_dim": 2} if conv == "gat" else {}))
        expected = moe(x, edge_index, **{name: value})
        assert torch.equal(moe(x, edge_index, value), expected)
        assert torch.equal(moe(x, edge_index, None), moe(x, edge_index))
        assert not torch.equal(expected, moe(x, edge_index))
        with pytest.raises(ValueError, match=f"{name}: got Tensor by position, expected .* once"):
            moe(x, edge_index, value, **{name: value})
    for conv in (["gcn", "gat", "mlp"], ["gcn", "sage", "gcn"]):
        with pytest.raises(
            ValueError, match=r"forward: got 1 arguments behind edge_index, expected edge_weight= or edge_attr= by"
        ):
            layer(conv)(x, edge_index, weight)
    with pytest.raises(ValueError, match="forward: got 1 arguments behind edge_index, expected at most 0"):
        layer("mlp")(x, edge_index, weight)
    with pytest.raises(ValueError, match="size: got "):
        layer("sage")(x, edge_index, weight)


# to_hetero ----------------------------------------------------------------------------------------------------------

METADATA = (
    ["paper", "author"],
    [("paper", "cites", "paper"), ("author", "writes", "paper"), ("paper", "has", "author")],
)


class Two(nn.Module):
    """Two layers, as in PyG's tutorials."""

    def __init__(self, make: Callable[[int], MessagePassing]) -> None:
        super().__init__()
        self.conv1, self.conv2 = make(6), make(3)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        out: Tensor = self.conv2(self.conv1(x, edge_index).relu(), edge_index)
        return out


def experts_of_sage(router: str, k: int, out: int) -> MoEConv:
    kwargs = {"weight": "straight_through"} if router == "token_choice" else {}
    return MoEConv(
        SAGEConv, (-1, -1), out, num_experts=4, router=router, k=k, shared_expert=False, router_kwargs=kwargs
    )


def test_to_hetero_gives_what_it_gives_for_the_plain_conv() -> None:
    """All experts are copies of it, and the weights of a node sum to 1."""
    torch.manual_seed(0)
    x = {"paper": features(7, 5).float(), "author": features(4, 3).float()}
    edges = {
        ("paper", "cites", "paper"): random_graph(7, 7, 20),
        ("author", "writes", "paper"): random_graph(4, 7, 15),
        ("paper", "has", "author"): random_graph(7, 4, 15),
    }
    plain = to_hetero(Two(lambda out: SAGEConv((-1, -1), out)), METADATA)
    expected = plain(x, edges)
    for k, router in ((4, "uniform"), (1, "token_choice")):
        moe = to_hetero(Two(partial(experts_of_sage, router, k)), METADATA)
        moe(x, edges)
        with torch.no_grad():
            for name, conv in plain.named_modules():
                if not isinstance(conv, SAGEConv):
                    continue
                mine = moe.get_submodule(name)
                assert isinstance(mine, MoEConv)
                weights = [conv.lin_l.weight.T, conv.lin_r.weight.T]
                mine.experts.linear.weight.copy_(torch.cat(weights).expand(4, -1, -1))
                mine.experts.linear.bias.copy_(conv.lin_l.bias.expand(4, -1))
        found = moe(x, edges)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value)


# explainers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conv", KINDS, ids=str)
def test_a_mask_acts_on_messages_and_not_on_the_router(conv: Any) -> None:
    """Also where layers have a router, a shared expert, and edges sorted otherwise; see ``test_experts.py``."""
    x, edge_index = graph()
    mask = features(edge_index.size(1), seed=9)
    for options in ({"shared_expert": True}, {"shared_expert": "sage", "k": 2}):
        assert_equals_masked(layer(conv, **options).double(), x.double(), edge_index, mask=mask)
    moe = layer(conv).double().eval()
    before, routing = moe(x.double(), edge_index, return_routing=True)
    set_masks(moe, mask, edge_index)
    shown, again = moe(x.double(), edge_index, return_routing=True)
    clear_masks(moe)
    assert torch.equal(again.to_dense(), routing.to_dense())
    assert torch.equal(moe(x.double(), edge_index), before)
    assert torch.equal(shown, before) is (conv == "mlp")


@pytest.mark.parametrize("conv", ["gcn", "gat", "sage", ["gcn", "gat", "le"]], ids=str)
@pytest.mark.parametrize("shared_router", [False, True])
def test_gnn_explainer_runs_on_a_model(conv: Any, shared_router: bool) -> None:
    torch.manual_seed(0)
    x, edge_index = graph()
    model = GNNMoE(WIDTH, 8, 3, conv=conv, num_experts=3, shared_router=shared_router, num_layers=3).eval()
    before = model(x, edge_index)
    config = {"mode": "multiclass_classification", "task_level": "node", "return_type": "raw"}
    explainer = Explainer(
        model,
        GNNExplainer(epochs=5),
        explanation_type="model",
        edge_mask_type="object",
        node_mask_type="attributes",
        model_config=config,
    )
    explanation = explainer(x, edge_index, index=3)
    mask = explanation.edge_mask
    assert mask.shape == (edge_index.size(1),)
    reached = {3}
    for _ in range(3):
        reached |= {int(s) for s, d in edge_index.T.tolist() if d in reached}
    heard = torch.tensor([d in reached for _, d in edge_index.T.tolist()])
    assert mask[heard].any()
    assert not mask[~heard].any()
    assert torch.equal(model(x, edge_index), before)  # and the model is as it was


@pytest.mark.parametrize("conv", [*KINDS[:7], "filter", "mlp"], ids=str)
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


class Twice(nn.Module):
    """Two layers, those of experts equal to the dense ones: a gain is zero."""

    def __init__(self, make: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(make() for _ in range(2))

    def forward(self, x: Tensor, edge_index: Tensor) -> Any:
        return self.convs[1](self.convs[0](x, edge_index).relu(), edge_index)


@pytest.mark.parametrize("algorithm", ["gnn", "pg", "captum"])
@pytest.mark.parametrize("conv", [GCNConv, SAGEConv, GATConv])
def test_explanations_are_those_of_the_dense_model(conv: Any, algorithm: str) -> None:
    x, edge_index = graph()
    found = []
    for make in (lambda: conv(WIDTH, WIDTH), lambda: MoEConv(conv, WIDTH, WIDTH, num_experts=3)):
        torch.manual_seed(0)
        model = Twice(make).eval()
        config = ModelConfig(mode="multiclass_classification", task_level="node", return_type="raw")
        options: dict[str, Any] = {"edge_mask_type": "object", "model_config": config, "explanation_type": "model"}
        if algorithm == "gnn":
            explainer = Explainer(model, GNNExplainer(epochs=3), **options)
        elif algorithm == "captum":
            explainer = Explainer(model, CaptumExplainer("Saliency"), **options)
        else:
            explainer = Explainer(model, PGExplainer(epochs=3), **{**options, "explanation_type": "phenomenon"})
            torch.manual_seed(1)
            target = torch.arange(NODES) % WIDTH
            for epoch in range(3):
                explainer.algorithm.train(epoch, model, x, edge_index, target=target, index=torch.tensor([3]))
        torch.manual_seed(2)
        given = {"target": torch.arange(NODES) % WIDTH} if algorithm == "pg" else {}
        found.append(explainer(x, edge_index, index=torch.tensor([3]), **given).edge_mask)
    torch.testing.assert_close(found[1], found[0])


def test_explainers_that_look_into_messages_are_refused() -> None:
    x, edge_index = graph()
    model = Twice(layer).eval()
    options: dict[str, Any] = {"explanation_type": "model", "edge_mask_type": "object"}
    config = ModelConfig(mode="multiclass_classification", task_level="node", return_type="raw")
    for algorithm, message in (
        (GraphMaskExplainer(2, epochs=1), r"explain: got an explainer without a mask, expected one of the"),
        (AttentionExplainer(), r"hook: got .*, expected none on a MoEConv"),
    ):
        mask_type = {"node_mask_type": "attributes"} if isinstance(algorithm, GraphMaskExplainer) else {}
        with pytest.raises(ValueError, match=message):
            Explainer(model, algorithm, model_config=config, **options, **mask_type)(x, edge_index, index=3)
        clear_masks(model)


# sources alone ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["size", "matrix", "graph", "position"])
@pytest.mark.parametrize("conv", [*sorted(SOURCES_ALONE, key=str), ["sage", "graph"]], ids=str)
def test_destinations_without_features_are_those_of_the_dense_conv(conv: Any, by: str) -> None:
    """Of a new layer, whose gain is zero, and of one of two kinds under a routing that is given."""
    x, edge_index = features(NODES, WIDTH), torch.tensor([[0, 1, 2, 3, 7], [0, 0, 1, 1, 2]])
    adj: Any = {"graph": Graph(edge_index, (NODES, 5))}.get(by, edge_index)
    if by == "matrix":
        adj = torch.sparse_coo_tensor(
            edge_index.flip(0), torch.ones(5, dtype=torch.float64), (5, NODES)
        ).to_sparse_csr()
    name = conv if isinstance(conv, list) else conv.__name__
    edge_attr = {"edge_attr": features(5, WIDTH)} if name == "GINEConv" else {}
    if edge_attr and by == "matrix":
        pytest.skip("a matrix of torch has no rows of features")
    moe = layer(conv, shared_expert=not isinstance(conv, list), num_experts=2).double().eval()
    given: dict[str, Any] = {"size": {"size": (NODES, 5)}}.get(by, {})
    args = ((NODES, 5),) if by == "position" and name in ("SAGEConv", "GINConv") else ()
    if by == "position" and not args:
        given = {"size": (NODES, 5)}
    weight_TE = torch.eye(2, dtype=torch.float64)[torch.arange(5) % 2]
    y = moe((x, None), adj, *args, **given, **edge_attr, routing=routing_of(weight_TE))
    convs = [moe.shared_expert.expert(0)] * 2 if moe.shared_expert is not None else [moe.expert(0), moe.expert(1)]
    dense = [one((x, None), edge_index, size=(NODES, 5), **edge_attr) for one in convs]
    torch.testing.assert_close(y, sum(weight_TE[:, e, None] * dense[e] for e in range(2)))


def test_destinations_without_features_are_refused_where_a_conv_reads_them() -> None:
    x, edge_index = features(NODES, WIDTH), torch.tensor([[0, 1], [0, 0]])
    for conv in ("transformer", "gatv2", "le"):
        with pytest.raises(ValueError, match=r"x: got no destination nodes, expected .* reads them"):
            layer(conv, (WIDTH, WIDTH)).double()((x, None), edge_index, size=(NODES, 1))
    with pytest.raises(ValueError, match=r"x: got .*'NoneType'.*, expected .* widths are open"):
        layer("sage", -1).double()((x, None), edge_index, size=(NODES, 1))
    with pytest.raises(ValueError, match=r"size: got None, expected \(sources, destinations\)"):
        layer("sage").double()((x, None), edge_index)


# threads and transforms ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conv", ["gcn", ["low_pass", "high_pass", "two_hop"], "gat", "sage"], ids=str)
def test_two_threads_get_what_one_gets(conv: Any) -> None:
    """Each on a graph of its own and on one that they share, in forward and in inference."""
    model = GNNMoE(WIDTH, 8, 3, conv=conv, num_experts=3, router="expert_choice").double().eval()
    datas = [Data(x=features(40, WIDTH, seed=s), edge_index=random_graph(40, 40, 150, seed=s)) for s in (0, 1)]

    def work(data: Data, shared: Graph) -> list[Tensor]:
        with torch.no_grad():
            return [
                model(data.x, data.edge_index),
                model.inference(data, batch_size=7),
                model(data.x, shared),
                model.convs[0](data.x, shared),
            ]

    expected = [work(data, Graph(datas[0].edge_index, 40)) for data in datas]
    fresh = Graph(datas[0].edge_index, 40)
    failed: list[Any] = []

    def run(index: int) -> None:
        try:
            for _ in range(4):
                torch.testing.assert_close(work(datas[index], fresh), expected[index], rtol=0, atol=1e-12)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in (0, 1, 0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


@pytest.mark.parametrize("conv", ["gcn", "gat", "le"])
@pytest.mark.parametrize("router", ["token_choice", None])
def test_transforms_of_torch_func_are_one_clear_error(conv: str, router: Any) -> None:
    x, edge_index = graph()
    moe = layer(conv, router=router)
    options = {} if router else {"routing": routing_of(torch.ones(NODES, 3))}
    calls: list[Callable[[], Any]] = [
        lambda: torch.func.grad(lambda x: moe(x, edge_index, **options).sum())(x),
        lambda: torch.func.vmap(lambda x: moe(x, edge_index, **options))(x.expand(2, -1, -1)),
        lambda: torch.func.jvp(lambda x: moe(x, edge_index, **options), (x,), (x,)),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=r"torch\.func transforms .* are not supported by gmoe"):
            call()
    values = {name: p.detach() for name, p in moe.named_parameters()}
    torch.testing.assert_close(
        torch.func.functional_call(moe, values, (x, edge_index), options), moe(x, edge_index, **options)
    )


@pytest.mark.parametrize(
    "make", [layer, lambda: layer("gat"), lambda: GNNMoE(WIDTH, 8, 3)], ids=["gcn", "gat", "GNNMoE"]
)
def test_tracing_and_export_are_one_clear_error(make: Callable[[], nn.Module]) -> None:
    for run in (torch.jit.trace, torch.export.export):
        with pytest.raises(RuntimeError, match=r"jit\.trace and torch\.export are not supported .* use torch\.compile"):
            run(make(), graph())


@pytest.mark.parametrize("conv", KINDS, ids=str)
def test_quantize_dynamic_quantizes_what_is_nn_linear(conv: Any) -> None:
    """The routers' layers and the model's own; stacked experts stay as they are."""
    x, edge_index = graph()
    model = GNNMoE(WIDTH, 8, 3, conv=conv, num_experts=3).eval()
    found = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert isinstance(found.convs[0].router.gate, torch.ao.nn.quantized.dynamic.Linear)
    torch.testing.assert_close(found(x, edge_index), model(x, edge_index), rtol=0.2, atol=0.2)
