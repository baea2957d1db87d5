"""MoEConv as a layer: what it promises, however its experts are run.

The contract of all layers is in ``tests/contract.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch_geometric import EdgeIndex
from torch_geometric.nn import GATConv, GraphConv, MessagePassing, SAGEConv

from gmoe import MoEConv, TokenChoice, moefy
from gmoe.products import Kernel
from tests.contract import Halved, opened
from tests.helpers.conv_cases import AGGREGATE_ONCE, ATTENTION, NODES, SOME, WIDTH, graph, ids
from tests.helpers.folded import fold
from tests.helpers.kernels import kernel_is
from tests.helpers.masked import GRAPHS, features, mean_of_in_edges, routing_of

EXPERTS = 3


def layer(conv: Any = "gcn", **kwargs: Any) -> MoEConv:
    torch.manual_seed(0)
    return MoEConv(conv, WIDTH, WIDTH, **{"num_experts": EXPERTS, "start": "plain", **kwargs})


def test_neighbors_vote_along_the_edges() -> None:
    x, edge_index = graph()
    options: dict[str, Any] = {"router": "attention_vote", "router_kwargs": {"scope": "neighbors"}}
    for flow, edges in (("source_to_target", edge_index), ("target_to_source", edge_index.flip(0))):
        moe: Any = layer("sage", flow=flow, **options)
        _, routing = moe(x, edge_index, return_routing=True)
        torch.testing.assert_close(routing.scores, moe.router(x, None, edges).scores)
    # Isolated nodes vote for themselves
    torch.testing.assert_close(routing.scores[6:], torch.ones(2, EXPERTS))


@pytest.mark.filterwarnings("ignore:.*runs on the whole graph")
@pytest.mark.parametrize("router_input", [("neighbors", "node"), ("degree", "neighbors")], ids=str)
@pytest.mark.parametrize(
    "conv", ["gcn", ["mean", "max"], "gat", "tag", ["gcn", "gat", "le"]], ids=str
)
def test_router_input(conv: Any, router_input: Any) -> None:
    """Node, neighbors and degree, in this order, whatever order was given.

    The neighbors are the conv's own aggregate, or else the mean over in-edges.
    """
    (x, edge_index), kwargs = graph(), dict[str, Any]()
    aggregate: Any = mean_of_in_edges
    if conv == "gcn":
        aggregate = lambda x, e: GraphConv(1, 1).propagate(e, x=(x, x), edge_weight=None)  # noqa: E731
        kwargs = {"normalize": False}
    elif conv == ["mean", "max"]:  # twice as wide
        sage = SAGEConv(WIDTH, WIDTH, aggr=conv, root_weight=False, bias=False)
        sage.lin_l = nn.Identity()
        conv, aggregate, kwargs = "sage", sage, {"aggr": conv}
    degree = torch.bincount(edge_index[1], minlength=NODES).float().log1p()[:, None]
    parts = {"node": x, "neighbors": aggregate(x, edge_index), "degree": degree}
    expected = torch.cat([value for name, value in parts.items() if name in router_input], dim=1)
    moe: Any = layer(conv, router_input=router_input, **kwargs)
    assert moe.router.dim == expected.size(1)
    inputs: list[Tensor] = []
    moe.router.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    moe(x, edge_index)
    torch.testing.assert_close(inputs, [expected])


@pytest.mark.filterwarnings("ignore:.*runs on the whole graph")
@pytest.mark.parametrize(("conv", "kwargs"), SOME, ids=ids)
def test_expert_is_a_detached_copy(conv: Any, kwargs: dict[str, Any]) -> None:
    x, edge_index = graph()
    moe = layer(
        conv, router=None, **({"num_experts": None} if isinstance(conv, list) else {}), **kwargs
    ).eval()
    plain, routing = moe.expert(1), routing_of(torch.eye(EXPERTS)[1].expand(NODES, EXPERTS))
    assert not plain.training
    before = moe(x, edge_index, routing=routing)
    torch.testing.assert_close(plain(x, edge_index), before)
    for parameter in plain.parameters():
        nn.init.ones_(parameter)
    assert torch.equal(moe(x, edge_index, routing=routing), before)
    for index in (-1, EXPERTS):
        with pytest.raises(ValueError, match=f"index: got {index}"):
            moe.expert(index)


@pytest.mark.parametrize(
    ("conv", "kwargs"),
    [case for case in [*AGGREGATE_ONCE, *ATTENTION] if case[0] not in ("gin", "gine")],
    ids=ids,
)
def test_initialized_as_separate_convs(conv: str, kwargs: dict[str, Any]) -> None:
    moe = MoEConv(conv, 6, 5, num_experts=EXPERTS, router=None, start="plain", **kwargs)
    torch.manual_seed(7)
    moe.reset_parameters()
    separate: Any = [moe.expert(index) for index in range(EXPERTS)]
    torch.manual_seed(7)
    for plain in separate:
        plain.reset_parameters()
    unused = (
        ()
        if kwargs.get("root_weight", True) or conv != "transformer"
        else ("lin_skip.weight", "lin_skip.bias")
    )
    for index, plain in enumerate(separate):
        mine = moe.expert(index).state_dict()
        assert all(
            torch.equal(value, mine[name])
            for name, value in plain.state_dict().items()
            if name not in unused
        )
    in_use = sum(p.numel() for name, p in separate[0].named_parameters() if name not in unused)
    assert sum(p.numel() for p in moe.parameters()) == EXPERTS * in_use


def test_a_given_routing_is_followed_without_the_router() -> None:
    x, edge_index = graph()
    given = routing_of(features(NODES, EXPERTS, seed=3).float())
    moe: Any = layer()
    y, routing = moe(x, edge_index, routing=given, return_routing=True)
    assert routing is given
    y.sum().backward()
    assert all(p.grad is None for p in moe.router.parameters())
    for wrong in (None, routing_of(torch.ones(NODES, 2)), "token_choice"):
        with pytest.raises(ValueError, match="routing: got"):
            layer(router=None)(x, edge_index, routing=wrong)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"router": "tokenchoice"}, "router: got 'tokenchoice'"),
        ({"k": 4, "router": None}, "k: got 4"),
        ({"num_experts": 2.0}, "num_experts: got 2.0"),
        ({"router_input": ("node", "x")}, "router_input: got 'x'"),
        ({"router_input": ()}, "router_input: got nothing"),
        ({"router_input": 3}, "router_input: got 3, expected one of"),
        ({"router_kwargs": {"weight": "normalized"}}, "weight: got 'normalized' with k=1"),
        (
            {"router": TokenChoice(5, num_experts=3)},
            "router: got an instance for dim=5, num_experts=3",
        ),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer(**kwargs)


X = torch.full((NODES, WIDTH), 0.5)
WEIGHT, ATTR = torch.ones(13), torch.ones(13, 1)


@pytest.mark.parametrize(
    ("conv", "x", "kwargs", "message"),
    [
        ("gcn", torch.randn(NODES, 5), {}, r"x: got .*\(8, 5\)"),
        ("gat", torch.randn(1, 2, NODES, 4), {}, r"x: got .*\(1, 2, 8, 4\)"),
        ("gat", (torch.randn(2, NODES, 4),) * 2, {}, r"x: got .*\(2, 8, 4\)"),
        ("le", None, {}, "x: got NoneType"),
        ("sage", (None, X), {}, r"x: got \['NoneType', 'Tensor'\]"),
        (
            partial(GATConv, flow="target_to_source"),
            (X, X[:5]),
            {},
            r"x: got a tuple .*flow='target_to_source'",
        ),
        ("gcn", (X, X[:5]), {}, "x: got a tuple .*GCNConv"),
        ("gcn", X.to_sparse(), {}, "x: got .*torch.sparse_coo"),
        ("gcn", X.long(), {}, "x: got .*torch.int64"),
        ("sage", X, {"size": (3, 3)}, r"size: got \(3, 3\)"),
        (
            "gcn",
            X,
            {"batch": torch.zeros(3, dtype=torch.long)},
            r"batch: got shape \(3,\) of torch.int64",
        ),
        ("gcn", X, {"batch": [0] * NODES}, "batch: got list"),
        ("sage", X, {"edge_weight": WEIGHT}, "edge_weight: got a tensor, .* takes none"),
        (
            ["gcn", "sage", "le"],
            X,
            {"edge_attr": ATTR},
            r"edge_attr: got a tensor, .* takes \['edge_weight'\]",
        ),
    ],
)
def test_bad_input(conv: Any, x: Any, kwargs: dict[str, Any], message: str) -> None:
    moe: Any = layer(conv)
    with pytest.raises(ValueError, match=message):
        moe(x, graph()[1], **kwargs)


def test_an_edge_index_that_knows_its_size() -> None:
    edges, x, conv = (
        torch.tensor([[0, 1, 3], [1, 2, 0]]),
        torch.randn(4, 6),
        partial(SAGEConv, root_weight=False),
    )
    known, layer = (
        EdgeIndex(edges, sparse_size=(4, 3)),
        MoEConv(conv, 6, 6, router_input="neighbors"),
    )
    assert torch.equal(layer((x, None), known), layer((x, None), edges, size=(4, 3)))
    for given, wrong, name in (((x, None), EdgeIndex(edges), "size"), (x, known, "edge_index")):
        with pytest.raises(ValueError, match=f"{name}: got"):
            layer(given, wrong)


@pytest.mark.parametrize("nodes", [12, 20_000])
def test_the_dtype_under_autocast_does_not_follow_the_number_of_nodes(nodes: int) -> None:
    layer = MoEConv("sage", 6, 16, start="plain")
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(nodes, 6), torch.tensor([[0, 1], [1, 2]])).dtype == torch.bfloat16


def test_a_layer_of_edge_features_that_was_replaced_is_refused() -> None:
    """Of which the weight alone is read; ``test_noticed.py`` has all other changes."""
    x, edge_index = graph()
    for start in ("plain", "copies"):
        edges: Any = fold(MoEConv("gat", WIDTH, 8, num_experts=EXPERTS, edge_dim=2, start=start))
        edges.experts.lin_edge = Halved(edges.experts.lin_edge)
        with pytest.raises(ValueError, match="lin_edge: got a changed layer"):
            edges(x, edge_index, edge_attr=torch.ones(edge_index.size(1), 2))


def test_an_unrouted_node_of_nan_features_touches_no_other() -> None:
    """Its own routed part is zero, and no weight gets a NaN from it."""
    x, edge_index = graph()
    x[0] = torch.nan
    moe = MoEConv("gcn", WIDTH, WIDTH, num_experts=3, router=None, start="plain")
    edge_index = edge_index[:, (edge_index != 0).all(dim=0)]
    gate = torch.eye(3)[torch.arange(NODES) % 3]
    gate[0] = 0
    out = moe(x, edge_index, routing=routing_of(gate))
    assert not out[0].any()
    out.sum().backward()
    gradients = [parameter.grad for parameter in moe.parameters()]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)


def test_compiled_where_pyg_aggregates() -> None:
    """The slow tests of ``test_compile.py`` have more of PyG's aggregations."""
    torch.compiler.reset()
    x, edge_index = graph()
    moe = opened(MoEConv("sage", WIDTH, WIDTH, num_experts=3, aggr=["mean", "max"]).eval())
    expected = moe(x, edge_index)
    compiled = torch.compile(moe, backend="aot_eager")
    torch.testing.assert_close(compiled(x, edge_index), expected)


@pytest.mark.parametrize("conv", ["gin", "gine"])
def test_a_conv_that_adds_nodes_to_their_neighbors_takes_one_width(conv: str) -> None:
    with pytest.raises(ValueError, match=r"^in_channels: got \(8, 4\), expected one width: GIN"):
        MoEConv(conv, (8, 4), 8, num_experts=2)


REPARAMETRIZED: dict[str, Callable[[nn.Module], object]] = {
    "pruned": lambda linear: prune.l1_unstructured(linear, "weight", 0.5),
    "pruned bias": lambda linear: prune.l1_unstructured(linear, "bias", 0.5),
    "pruned rows": lambda linear: prune.ln_structured(linear, "weight", 0.5, n=2, dim=0),
    "weight_norm": torch.nn.utils.weight_norm,
    "spectral_norm": torch.nn.utils.spectral_norm,
    "pruned for good": lambda linear: prune.remove(
        prune.l1_unstructured(linear, "weight", 0.5), "weight"
    ),
    "pruned, frozen": lambda linear: prune.l1_unstructured(
        linear.requires_grad_(False), "weight", 0.5
    ),
    "parametrized weight_norm": parametrizations.weight_norm,
    "parametrized spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
}
HOOKED = ("pruned", "pruned bias", "pruned rows", "weight_norm", "spectral_norm")


def reparametrized(name: str, in_channels: int, out_channels: int) -> MessagePassing:
    torch.manual_seed(0)
    conv = SAGEConv(in_channels, out_channels)
    REPARAMETRIZED[name](conv.lin_l)
    return conv


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated", "ignore:.*runs on the whole")
@pytest.mark.parametrize(("by", "start"), [("MoEConv", "plain"), ("moefy", "copies")])
@pytest.mark.parametrize("name", REPARAMETRIZED)
def test_a_reparametrized_conv_is_run_as_it_is_or_refused(name: str, start: Any, by: str) -> None:
    """All of torch's ways to compute a weight from others; what is taken can be copied, too."""
    x, edge_index = features(8, 4).float(), GRAPHS["mixed"][1]
    dense = reparametrized(name, 4, 6).eval()
    parent = nn.ModuleDict({"conv": reparametrized(name, 4, 6)})

    def build() -> nn.Module:
        if by == "MoEConv":
            return MoEConv(partial(reparametrized, name), 4, 6, start=start)
        return moefy(parent, targets="conv", start=start)["conv"]  # type: ignore[index]

    if name in HOOKED:
        message = rf"^(conv|model): got \w+\.lin_l with a {'bias' if 'bias' in name else 'weight'} "
        with pytest.raises(ValueError, match=message):
            build()
        return
    layer = build().eval()
    y = layer(x, edge_index)
    if start != "plain":
        torch.testing.assert_close(y, dense(x, edge_index))
    y.sum().backward()
    torch.testing.assert_close(copy.deepcopy(layer)(x, edge_index), y)


@pytest.mark.parametrize(
    ("conv", "options", "edges"),
    [
        ("gcn", {}, {"edge_weight": (12,)}),
        ("graph", {"router_input": ("node", "neighbors")}, {"edge_weight": (12,)}),
        ("gin", {"start": "shared"}, {}),
        ("gine", {"edge_dim": 3}, {"edge_attr": (12, 3)}),
        ("gat", {"edge_dim": 3}, {"edge_attr": (12, 3)}),
        ("gatv2", {"edge_dim": 3}, {"edge_attr": (12, 3)}),
        ("transformer", {"edge_dim": 3}, {"edge_attr": (12, 3)}),
    ],
    ids=str,
)
def test_second_gradients_are_those_of_nodes_and_edges(
    conv: str, options: dict[str, Any], edges: dict[str, tuple[int, ...]]
) -> None:
    torch.manual_seed(0)
    layer = MoEConv(conv, 4, 3, num_experts=3, k=2, **options).double().eval()
    for parameter in layer.parameters():  # away from experts that are equal
        nn.init.normal_(parameter, std=0.5)
    edge_index = torch.stack([torch.arange(12) % 7, (torch.arange(12) * 5 + 1) % 6])
    x = torch.randn(7, 4, dtype=torch.double, requires_grad=True)
    of_edges = [torch.rand(shape, dtype=torch.double) for shape in edges.values()]

    def run(x: Tensor, *of_edges: Tensor) -> Tensor:
        return layer(x, edge_index, **dict(zip(edges, of_edges, strict=True)))

    leaves = [x, *(values.requires_grad_() for values in of_edges)]
    for kernel in get_args(Kernel):
        with kernel_is(kernel):
            assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
            assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)


def test_second_gradients_are_finite_where_no_weight_reaches_a_node() -> None:
    """The norm of such a node is a power of zero."""
    torch.manual_seed(0)
    layer = MoEConv("gcn", 3, 2, num_experts=2, add_self_loops=False).double()
    edge_index = torch.tensor([[1, 2], [0, 0]])  # to two nodes, nothing is sent
    x = torch.randn(3, 3, dtype=torch.double, requires_grad=True)
    weight = torch.rand(2, dtype=torch.double, requires_grad=True)
    y = layer(x, edge_index, edge_weight=weight).square().sum()
    first = torch.autograd.grad(y, [x, weight], create_graph=True)
    size = torch.stack([gradient.square().sum() for gradient in first]).sum()
    second = torch.autograd.grad(size, [x, weight])
    assert all(bool(value.isfinite().all()) for value in second)
