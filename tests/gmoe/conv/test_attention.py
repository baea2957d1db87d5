"""GAT, GATv2 and TransformerConv experts: equal to masked convs, with messages along K times the edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch_geometric import EdgeIndex
from torch_geometric.data import Data
from torch_geometric.nn import GATConv, GATv2Conv, TransformerConv

from gmoe import MoEConv
from gmoe.conv import segment
from gmoe.conv.attention import AttentionExperts
from gmoe.conv.pair_graph import PairGraph
from gmoe.conv.base import Pieces
from gmoe.conv.separate import SeparateExperts
from tests.gmoe.conv.masked import GRAPHS, assert_equals_masked, features, random_graph, routing_of

IN, OUT, EDGE_DIM = 6, 4, 3
CONVS: list[Any] = [GATConv, GATv2Conv, TransformerConv]

CASES: list[tuple[Any, dict[str, Any]]] = [
    (GATConv, {}),
    (GATConv, {"heads": 2, "negative_slope": 0.7, "bias": False}),
    (GATConv, {"heads": 2, "concat": False, "residual": True, "add_self_loops": False}),
    (GATConv, {"heads": 2, "edge_dim": EDGE_DIM}),
    (GATConv, {"edge_dim": EDGE_DIM, "fill_value": "max"}),
    (GATConv, {"edge_dim": EDGE_DIM, "fill_value": 0.5, "concat": False}),
    (GATConv, {"edge_dim": EDGE_DIM, "fill_value": torch.tensor([1.0, -1.0, 2.0])}),
    (GATConv, {"edge_dim": EDGE_DIM, "add_self_loops": False, "residual": True}),
    (GATv2Conv, {}),
    (GATv2Conv, {"heads": 2, "negative_slope": 0.7, "bias": False}),
    (GATv2Conv, {"heads": 2, "concat": False, "residual": True, "add_self_loops": False}),
    (GATv2Conv, {"share_weights": True, "heads": 2}),
    (GATv2Conv, {"share_weights": True, "edge_dim": EDGE_DIM, "bias": False}),
    (GATv2Conv, {"heads": 2, "edge_dim": EDGE_DIM, "fill_value": "add"}),
    (GATv2Conv, {"edge_dim": EDGE_DIM, "fill_value": torch.tensor([1.0, -1.0, 2.0])}),
    (TransformerConv, {}),
    (TransformerConv, {"heads": 2, "bias": False}),
    (TransformerConv, {"heads": 2, "concat": False}),
    (TransformerConv, {"heads": 2, "beta": True}),
    (TransformerConv, {"heads": 2, "beta": True, "concat": False, "edge_dim": EDGE_DIM}),
    (TransformerConv, {"root_weight": False, "beta": True, "edge_dim": EDGE_DIM}),
    (TransformerConv, {"heads": 2, "edge_dim": EDGE_DIM}),
]


def ids(value: Any) -> str | None:
    return getattr(value, "__name__", None) or ",".join(f"{k}={v}" for k, v in value.items()) or "default"


def build(cls: Any, kwargs: dict[str, Any], in_channels: Any = IN, **moe: Any) -> MoEConv:
    torch.manual_seed(0)
    return MoEConv(cls, in_channels, OUT, **{"num_experts": 3, "router": None, **moe}, **kwargs).double()


def edge_args(kwargs: dict[str, Any], num_edges: int) -> dict[str, Tensor]:
    return {"edge_attr": features(num_edges, EDGE_DIM, seed=8)} if "edge_dim" in kwargs else {}


def weights(num_tokens: int, kind: str = "some") -> Tensor:
    """``"some"``: expert 1 is starved, some tokens have no expert, some have two."""
    weight_TE = features(num_tokens, 3, seed=3)
    if kind == "some":
        weight_TE[:, 1] = 0
        weight_TE[::3] = 0
        weight_TE[1::4, 0] = 0
    return torch.zeros_like(weight_TE) if kind == "none" else weight_TE


@pytest.mark.parametrize(("cls", "kwargs"), CASES, ids=ids)
def test_equals_masked(cls: Any, kwargs: dict[str, Any]) -> None:
    conv = build(cls, kwargs)
    assert isinstance(conv.experts, AttentionExperts)
    more_edges_than_pairs = {"three loops": (1, torch.zeros(2, 3, dtype=torch.long))}
    for name, (num_nodes, edge_index) in (GRAPHS | more_edges_than_pairs).items():
        args = edge_args(kwargs, edge_index.size(1))
        for kind in ("all", "some", "none") if name == "mixed" else ("all",):
            weight_TE = weights(num_nodes, kind)
            assert_equals_masked(conv, features(num_nodes, IN), edge_index, weight_TE=weight_TE, **args)


@pytest.mark.parametrize(("cls", "kwargs"), [case for case in CASES if case[0] is GATConv], ids=ids)
def test_heads_as_wide_as_the_input_equal_masked(cls: Any, kwargs: dict[str, Any]) -> None:
    """Where GAT sums the inputs, and transforms the sum."""
    conv = build(cls, kwargs, OUT)
    for num_nodes, edge_index in GRAPHS.values():
        args = edge_args(kwargs, edge_index.size(1))
        assert_equals_masked(conv, features(num_nodes, OUT), edge_index, weight_TE=weights(num_nodes), **args)


@pytest.mark.parametrize(
    ("sizes", "in_channels"), [((9, 5), (IN, 7)), ((5, 9), (OUT, IN)), ((5, 9), IN), ((6, 6), IN)], ids=str
)
@pytest.mark.parametrize(("cls", "kwargs"), CASES, ids=ids)
def test_bipartite_equals_masked(cls: Any, kwargs: dict[str, Any], in_channels: Any, sizes: tuple[int, int]) -> None:
    """Loops join the nodes of equal index."""
    num_src, num_dst = sizes
    if "share_weights" in kwargs:
        in_channels = IN
    if "edge_dim" in kwargs and cls is not TransformerConv and num_src < num_dst:
        kwargs = {
            **kwargs,
            "fill_value": 2.0,
        }  # PyG fails to reduce over the in-edges of more destinations than sources
    conv = build(cls, kwargs, in_channels)
    x = (features(num_src, conv._widths[0]), features(num_dst, conv._widths[1], seed=1))
    args = edge_args(kwargs, 20)
    assert_equals_masked(conv, x, random_graph(num_src, num_dst, 20), weight_TE=weights(num_dst), **args)


@pytest.mark.parametrize("cls", CONVS)
def test_one_set_of_nodes_for_two_layers(cls: Any) -> None:
    """A tuple of widths with a single tensor: both ends are the same nodes, each through its own layer."""
    num_nodes, edge_index = GRAPHS["mixed"]
    conv = build(cls, {"heads": 2}, (IN, IN))
    assert_equals_masked(conv, features(num_nodes, IN), edge_index, weight_TE=weights(num_nodes))


def sparse(edge_index: Tensor, size: tuple[int, int], value: Tensor, layout: torch.layout) -> Tensor:
    coo = torch.sparse_coo_tensor(edge_index.flip(0), value, (*size[::-1], *value.shape[1:]), check_invariants=True)
    if layout == torch.sparse_coo:
        return coo.coalesce()
    (row, col), value = coo.coalesce().indices(), coo.coalesce().values()
    start = torch.zeros(size[1] + 1, dtype=torch.long).index_add(0, row + 1, torch.ones_like(row)).cumsum(0)
    return torch.sparse_csr_tensor(start, col, value, (*size[::-1], *value.shape[1:]))


@pytest.mark.parametrize(
    "form", ["EdgeIndex", "by row", "by col", "not contiguous", torch.sparse_coo, torch.sparse_csr]
)
@pytest.mark.parametrize("cls", CONVS)
@pytest.mark.parametrize("sizes", [(9, 9), (9, 5)], ids=str)
def test_forms_of_the_graph(cls: Any, form: Any, sizes: tuple[int, int]) -> None:
    """Against PyG's convs on the very same object."""
    edges = random_graph(*sizes, 30).unique(dim=1)
    edges = edges[:, torch.randperm(edges.size(1), generator=torch.Generator().manual_seed(1))]
    adj: Any
    if isinstance(form, torch.layout):
        adj = sparse(edges, sizes, features(edges.size(1), seed=2), form)
    elif form == "not contiguous":
        adj = edges.T.contiguous().T
    elif form == "EdgeIndex":
        adj = EdgeIndex(edges, sparse_size=sizes)
    else:
        order = edges[int(form == "by col")].argsort(stable=True)
        adj = EdgeIndex(edges[:, order], sparse_size=sizes, sort_order=form.removeprefix("by "))
    x: Any = features(sizes[0], IN)
    if sizes[0] != sizes[1]:
        x = (x, features(sizes[1], IN, seed=1))
    assert_equals_masked(build(cls, {"heads": 2}), x, adj, weight_TE=weights(sizes[1]))


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.parametrize("cls", CONVS)
def test_values_of_a_sparse_matrix_are_edge_features(cls: Any, layout: torch.layout) -> None:
    edges = random_graph(9, 9, 30).unique(dim=1)
    adj = sparse(edges, (9, 9), features(edges.size(1), EDGE_DIM, seed=2), layout)
    conv = build(cls, {"edge_dim": EDGE_DIM, "heads": 2})
    assert_equals_masked(conv, features(9, IN), adj, weight_TE=weights(9))


@pytest.mark.parametrize("cls", [GATConv, GATv2Conv])
def test_one_feature_an_edge_as_a_vector(cls: Any) -> None:
    num_nodes, edge_index = GRAPHS["mixed"]
    conv = build(cls, {"edge_dim": 1})
    attr = features(edge_index.size(1), seed=8)
    assert_equals_masked(conv, features(num_nodes, IN), edge_index, weight_TE=weights(num_nodes), edge_attr=attr)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_random_graphs_equal_masked(data: st.DataObject) -> None:
    cls, kwargs = CASES[data.draw(st.integers(0, len(CASES) - 1), label="case")]
    num_nodes = data.draw(st.integers(1, 6), label="nodes")
    node = st.integers(0, num_nodes - 1)
    edges = data.draw(st.lists(st.tuples(node, node), max_size=12), label="edges")
    rows = st.lists(st.sampled_from([0.0, 0.0, 1.0, -0.5, 2.0]), min_size=3, max_size=3)
    weight = torch.tensor(
        data.draw(st.lists(rows, min_size=num_nodes, max_size=num_nodes), label="weights"), dtype=torch.float64
    )
    edge_index = torch.tensor(edges, dtype=torch.long).reshape(-1, 2).T
    args = edge_args(kwargs, len(edges))
    width = data.draw(st.sampled_from([OUT, IN]), label="width")
    conv = build(cls, kwargs, width)
    assert_equals_masked(conv, features(num_nodes, width), edge_index, weight_TE=weight, **args)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**16), cls=st.sampled_from(CONVS))
def test_follows_renumbered_nodes_and_edges(seed: int, cls: Any) -> None:
    generator = torch.Generator().manual_seed(seed)
    edge_index, weight_TE = random_graph(7, 7, 15, seed=seed), weights(7, "some")
    conv, x, attr = build(cls, {"edge_dim": EDGE_DIM, "heads": 2}), features(7, IN), features(15, EDGE_DIM, seed=8)
    node, edge = torch.randperm(7, generator=generator), torch.randperm(15, generator=generator)
    expected = conv(x, edge_index, edge_attr=attr, routing=routing_of(weight_TE))
    place = node.argsort()[edge_index][:, edge]
    actual = conv(x[node], place, edge_attr=attr[edge], routing=routing_of(weight_TE[node]))
    torch.testing.assert_close(actual, expected[node], rtol=0, atol=1e-10)


@pytest.mark.parametrize("router", ["token_choice", "expert_choice"])
@pytest.mark.parametrize("cls", CONVS)
def test_routers_equal_masked(cls: Any, router: str) -> None:
    num_nodes, edge_index = GRAPHS["mixed"]
    for k in (1, 3):
        conv = build(cls, {"heads": 2}, router=router, k=k)
        assert_equals_masked(conv, features(num_nodes, IN), edge_index)


@pytest.mark.parametrize("backend", ["padded", "grouped"])
@pytest.mark.parametrize("cls", CONVS)
def test_backends_equal_masked(cls: Any, backend: str) -> None:
    num_nodes, edge_index = GRAPHS["mixed"]
    conv = build(cls, {"heads": 2, "edge_dim": EDGE_DIM}, backend=backend)
    args = edge_args({"edge_dim": EDGE_DIM}, edge_index.size(1))
    assert_equals_masked(conv, features(num_nodes, IN), edge_index, weight_TE=weights(num_nodes), **args)


@pytest.mark.parametrize("numbers", [1, 20])
@pytest.mark.parametrize(("cls", "kwargs"), CASES, ids=ids)
def test_block_by_block_equals_masked(
    cls: Any, kwargs: dict[str, Any], numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU; a message a block, and a few."""
    monkeypatch.setattr(segment, "SPARSE_DEVICES", ())
    monkeypatch.setattr(segment, "NUMBERS", numbers)
    num_nodes, edge_index = GRAPHS["mixed"]
    args = edge_args(kwargs, edge_index.size(1))
    conv = build(cls, kwargs)
    assert_equals_masked(conv, features(num_nodes, IN), edge_index, weight_TE=weights(num_nodes), **args)


@pytest.mark.parametrize("cls", CONVS)
def test_messages_run_along_the_in_edges_of_the_chosen(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """K messages an edge, and no source is transformed for an expert that does not hear it."""
    edge_index = torch.tensor([[0, 2, 4, 2, 2], [1, 3, 5, 5, 1]])
    seen: list[PairGraph] = []
    layer = build(cls, {"heads": 2, **({"add_self_loops": False} if cls is not TransformerConv else {})})
    kind: Any = type(layer.experts)
    attend = kind._attend

    def watched(self: Any, x_src: Tensor, x_PI: Tensor, pairs: PairGraph) -> Tensor:
        seen.append(pairs)
        return attend(self, x_src, x_PI, pairs)

    monkeypatch.setattr(kind, "_attend", watched)
    weight_TE = torch.zeros(6, 3, dtype=torch.float64)
    weight_TE[1, 0], weight_TE[3, 2], weight_TE[5, 2] = 1.0, 1.0, 1.0
    layer(features(6, IN), edge_index, routing=routing_of(weight_TE))
    (pairs,) = seen
    assert pairs.edge.tolist() == [0, 4, 1, 2, 3]
    assert pairs.pair.tolist() == [0, 0, 1, 2, 2]
    assert pairs.heard.tolist() == [0, 2, 2, 4]  # 0 and 2 by expert 0, 2 and 4 by expert 2
    assert pairs.heard_offsets.tolist() == [2, 2, 4]
    assert pairs.offsets.tolist() == [2, 2, 5]
    assert pairs.messages.sender.tolist() == [0, 1, 2, 3, 2]


@pytest.mark.parametrize("cls", CONVS)
def test_dropout_is_right_in_the_mean(cls: Any) -> None:
    num_nodes, edge_index = GRAPHS["mixed"]
    x, routing = features(num_nodes, IN), routing_of(weights(num_nodes, "all"))
    conv = build(cls, {"heads": 2, "dropout": 0.5})
    expected = conv.eval()(x, edge_index, routing=routing)
    exact = build(cls, {"heads": 2})
    torch.testing.assert_close(exact(x, edge_index, routing=routing), expected)
    conv.train()
    draws = torch.stack([conv(x, edge_index, routing=routing).detach() for _ in range(300)])
    error = draws.std(dim=0) / len(draws) ** 0.5
    assert float(draws.std(dim=0).max()) > 0.1
    assert ((draws.mean(dim=0) - expected).abs() <= 5 * error + 1e-12).all()
    # as the separate convs', draw by draw
    plain: Any = [conv.expert(e) for e in range(3)]
    weight_TE = routing.to_dense()
    theirs = torch.stack(
        [sum(weight_TE[:, e, None] * plain[e](x, edge_index).detach() for e in range(3)) for _ in range(300)]
    )
    torch.testing.assert_close(draws.std(dim=0), theirs.std(dim=0), rtol=0.3, atol=1e-12)


@pytest.mark.parametrize(("cls", "kwargs"), CASES, ids=ids)
def test_initialised_as_separate_convs(cls: Any, kwargs: dict[str, Any]) -> None:
    moe = MoEConv(cls, 6, 5, num_experts=3, router=None, **kwargs)
    torch.manual_seed(7)
    moe.reset_parameters()
    separate = [cls(6, 5, **kwargs) for _ in range(3)]
    torch.manual_seed(7)
    for plain in separate:
        plain.reset_parameters()
    unused = () if kwargs.get("root_weight", True) else ("lin_skip.weight", "lin_skip.bias")
    for index, plain in enumerate(separate):
        mine = moe.expert(index).state_dict()
        assert mine.keys() == plain.state_dict().keys()
        assert all(torch.equal(value, mine[name]) for name, value in plain.state_dict().items() if name not in unused)
    in_use = sum(p.numel() for name, p in plain.named_parameters() if name not in unused)
    assert sum(p.numel() for p in moe.parameters()) == 3 * in_use


@pytest.mark.parametrize("cls", CONVS)
@pytest.mark.parametrize("kind", ["some", "none"])
def test_idle_experts_have_zero_gradients(cls: Any, kind: str) -> None:
    num_nodes, edge_index = GRAPHS["mixed"]
    conv = build(cls, {"edge_dim": EDGE_DIM, **({"beta": True} if cls is TransformerConv else {"residual": True})})
    args = edge_args({"edge_dim": EDGE_DIM}, edge_index.size(1))
    x = features(num_nodes, IN).requires_grad_()
    conv(x, edge_index, **args, routing=routing_of(weights(num_nodes, kind))).sum().backward()
    for name, parameter in conv.experts.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad[1].any(), name
        assert bool(parameter.grad[0].any()) is (kind == "some"), name
    assert x.grad is not None


@pytest.mark.parametrize("cls", CONVS)
def test_no_nodes(cls: Any) -> None:
    conv = build(cls, {}, router="token_choice")
    x = torch.zeros(0, IN, dtype=torch.float64, requires_grad=True)
    y = conv(x, torch.zeros(2, 0, dtype=torch.long))
    assert y.shape == (0, OUT)
    y.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in conv.experts.parameters())


@pytest.mark.parametrize(("cls", "kwargs"), CASES, ids=ids)
def test_autocast_gives_what_pyg_gives(cls: Any, kwargs: dict[str, Any]) -> None:
    num_nodes, edge_index = GRAPHS["mixed"]
    conv = build(cls, kwargs).float()
    x = features(num_nodes, IN).float().requires_grad_()
    args = {name: value.float() for name, value in edge_args(kwargs, edge_index.size(1)).items()}
    weight_TE = torch.zeros(num_nodes, 3)
    weight_TE[:, 1] = 1.0
    exact = conv(x, edge_index, **args, routing=routing_of(weight_TE))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain: Any = conv.expert(1)
        y = conv(x, edge_index, **args, routing=routing_of(weight_TE))
        assert y.dtype == plain(x, edge_index, **args).dtype
        y.sum().backward()  # here, where products would be cast
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.05)
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("cls", CONVS)
def test_bfloat16_model(cls: Any) -> None:
    num_nodes, edge_index = GRAPHS["mixed"]
    conv = build(cls, {"heads": 2})
    x, routing = features(num_nodes, IN), routing_of(weights(num_nodes))
    exact = conv(x, edge_index, routing=routing)
    y = conv.bfloat16()(x.bfloat16(), edge_index, routing=routing)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), exact, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("cls", CONVS)
def test_by_pieces(cls: Any) -> None:
    edge_index = random_graph(9, 9, 30)
    x, args = features(9, IN), edge_args({"edge_dim": EDGE_DIM}, 30)
    conv = build(cls, {"edge_dim": EDGE_DIM}, router="expert_choice", k=2).eval()
    pieces = Pieces(Data(x=x, edge_index=edge_index, **args), batch_size=4, device=x.device)
    y, _ = conv.by_pieces(x, pieces)
    torch.testing.assert_close(y, conv(x, edge_index, **args), rtol=0, atol=1e-10)


def test_compiled_equals_eager() -> None:
    torch.compiler.reset()
    num_nodes, edge_index = GRAPHS["mixed"]
    conv, x = build(GATv2Conv, {"heads": 2}, router="token_choice"), features(num_nodes, IN)
    compiled = torch.compile(conv, backend="eager")
    torch.testing.assert_close(compiled(x, edge_index), conv(x, edge_index))
    compiled(x, edge_index).sum().backward()


@pytest.mark.parametrize("cls", CONVS)
@pytest.mark.parametrize("kwargs", [{"aggr": "max"}, {"aggr": "mean"}, {"edge_dim": -1}], ids=ids)
def test_other_options_run_one_by_one(cls: Any, kwargs: dict[str, Any]) -> None:
    if kwargs.get("edge_dim") == -1 and cls is TransformerConv:
        pytest.skip("PyG's own fails to initialise it")
    conv = MoEConv(cls, IN, OUT, num_experts=2, router=None, **kwargs)
    assert isinstance(conv.experts, SeparateExperts)


def test_subclasses_run_one_by_one() -> None:
    class Own(GATConv):
        pass

    with pytest.warns(UserWarning, match="Own runs on the whole graph"):
        assert isinstance(MoEConv(Own, IN, OUT, num_experts=2).experts, SeparateExperts)


def test_edge_features_that_do_not_fit() -> None:
    num_nodes, edge_index = GRAPHS["mixed"]
    x, attr = features(num_nodes, IN), features(edge_index.size(1), EDGE_DIM)
    routing = routing_of(weights(num_nodes))
    for cls in (GATv2Conv, TransformerConv):
        with pytest.raises(
            ValueError, match=f"edge_attr: got a tensor, .* {cls.__name__} was built with edge_dim=None"
        ):
            build(cls, {})(x, edge_index, edge_attr=attr, routing=routing)
    with pytest.raises(ValueError, match=r"edge_attr: got None, expected a tensor of shape \(edges, 3\)"):
        build(TransformerConv, {"edge_dim": 3})(x, edge_index, routing=routing)
    for cls, kwargs in ((GATConv, {}), (GATConv, {"edge_dim": 3}), (GATv2Conv, {"edge_dim": 3})):  # as PyG has it
        assert_equals_masked(build(cls, kwargs), x, edge_index, weight_TE=weights(num_nodes))
    assert_equals_masked(build(GATConv, {}), x, edge_index, weight_TE=weights(num_nodes), edge_attr=attr)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("cls", "kwargs"), CASES, ids=ids)
def test_cuda_gives_the_same(cls: Any, kwargs: dict[str, Any]) -> None:
    num_nodes, edge_index = GRAPHS["mixed"]
    args = edge_args(kwargs, edge_index.size(1))
    found = []
    for device in ("cpu", "cuda"):
        conv = build(cls, kwargs).to(device)
        x = features(num_nodes, IN).to(device).requires_grad_()
        weight_TE = weights(num_nodes).to(device)
        there = {name: value.to(device) for name, value in args.items()}
        y = conv(x, edge_index.to(device), **there, routing=routing_of(weight_TE))
        y.backward(features(*y.shape, seed=5).to(device))
        found.append([y, x.grad, *(p.grad for p in conv.experts.parameters())])
    for cpu, cuda in zip(*found, strict=True):
        torch.testing.assert_close(cuda.cpu(), cpu, rtol=0, atol=1e-9)
