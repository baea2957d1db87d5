"""RelationalConv against PyG's HeteroConv of SAGEConvs, HeteroMoEConv against E of them, and both as layers."""

from __future__ import annotations

import copy
import json
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch_geometric import EdgeIndex

from gmoe import (
    ROUTERS,
    ExpertChoice,
    Graph,
    HeteroMoEConv,
    OracleRouter,
    RandomRouter,
    RelationalConv,
    TokenChoice,
    UniformRouter,
    active_parameters,
    aux_loss,
    count_flops,
    record_routing,
)
from tests.gmoe.conv.hetero_reference import (
    COUNTS,
    METADATA,
    OUT,
    WIDTHS,
    Edges,
    Nodes,
    Plain,
    assert_all_close,
    assert_equals_masked,
    backward,
    csr,
    edges,
    nodes,
)
from tests.gmoe.conv.masked import features, gradient, routing_of

EXPERTS, WIDTH = 3, 4
TYPES, RELATIONS = METADATA
WRITES = ("author", "writes", "paper")
BOTH = ("node", "neighbors")

each_tie = pytest.mark.parametrize("tie_routers", [False, True], ids=["separate routers", "tied routers"])
each_tie_of_both = pytest.mark.parametrize(
    "ties", [{"tie_routers": r, "tie_experts": e} for r in (False, True) for e in (False, True)], ids=str
)
each_form = pytest.mark.parametrize("sparse", [False, True], ids=["edge_index", "csr"])
each_aggr = pytest.mark.parametrize("aggr", ["mean", "sum"])


def dense(widths: Any = WIDTHS, metadata: Any = METADATA, **kwargs: Any) -> RelationalConv:
    torch.manual_seed(0)
    return RelationalConv(widths, OUT, metadata, **kwargs).double()


def layer(widths: Any = WIDTH, **kwargs: Any) -> HeteroMoEConv:
    torch.manual_seed(0)
    if kwargs.get("router", "token_choice") == "token_choice":  # noise would differ from call to call
        kwargs.setdefault("router_kwargs", {"balance": None})
    kwargs.setdefault("shared_expert", False)
    return HeteroMoEConv(widths, **{"out_channels": OUT, "metadata": METADATA, "num_experts": EXPERTS, **kwargs})


def floats(x_dict: Nodes, dtype: torch.dtype = torch.float32) -> Nodes:
    return {t: x.to(dtype) for t, x in x_dict.items()}


def sparse_edges(counts: dict[str, int] = COUNTS, dtype: torch.dtype = torch.float64) -> Edges:
    return {r: csr(e, counts[r[0]], counts[r[-1]], dtype) for r, e in edges().items()}


def routers_of(conv: HeteroMoEConv) -> dict[str, Any]:
    return dict(conv.routers.items()) if conv.router is None else {"all": conv.router}


# The dense layer


@each_aggr
@pytest.mark.parametrize("share_root", [False, True])
@pytest.mark.parametrize("out_types", [None, ["field", "paper"]], ids=str)
def test_dense_equals_pyg(aggr: Any, share_root: bool, out_types: Any) -> None:
    """Outputs and all gradients are those of HeteroConv of SAGEConvs, and a root linear layer a node type."""
    widths = WIDTH if share_root else WIDTHS
    conv = dense(widths, aggr=aggr, share_root=share_root, out_types=out_types)
    plain = Plain(conv)

    def run(module: Any, named: Any) -> dict[str, Tensor]:
        xs = {t: x.requires_grad_() for t, x in nodes(widths).items()}
        y_dict = module(xs, edges())
        backward(y_dict)
        return {**y_dict, **{f"x.{t}": gradient(x) for t, x in xs.items()}, **named()}

    ours = run(conv, lambda: {name: gradient(p) for name, p in conv.named_parameters()})
    assert_all_close(ours, run(plain, lambda: plain.named(gradient)))
    assert {t for t in ours if t in TYPES} == set(out_types or TYPES)


FORMS: dict[str, Any] = {
    "csr": csr,
    "coo": lambda e, *size: csr(e, *size).to_sparse_coo(),
    "sized EdgeIndex": lambda e, *size: EdgeIndex(e, sparse_size=size),
    "int32": lambda e, *_: e.int(),
    "Graph": lambda e, *size: Graph(e, size),
}


@pytest.mark.filterwarnings("ignore:Converting sparse tensor to CSR")
@each_aggr
@pytest.mark.parametrize("form", FORMS)
def test_takes_every_form_of_edges(form: str, aggr: Any) -> None:
    found = {r: FORMS[form](e, COUNTS[r[0]], COUNTS[r[-1]]) for r, e in edges().items()}
    conv = dense(aggr=aggr)
    assert_all_close(conv(nodes(), found), conv(nodes(), edges()))


def test_values_of_a_sparse_matrix_are_weights() -> None:
    conv = dense(aggr="sum")
    plain = edges()[WRITES]
    expected = conv(nodes(), {WRITES: torch.cat([plain, plain], dim=1)})
    assert_all_close(conv(nodes(), {WRITES: 2 * csr(plain, COUNTS["author"], COUNTS["paper"])}), expected)


def test_absent_relations_and_isolated_nodes_add_zero() -> None:
    conv, xs = dense(), nodes()
    alone = conv(xs, {})
    for t, y in alone.items():
        torch.testing.assert_close(y, conv.root[t](xs[t]))  # type: ignore[index]
    backward(alone)
    assert all(p.grad is not None for p in conv.parameters())
    assert_all_close(conv(xs, {r: torch.zeros(2, 0, dtype=torch.long) for r in RELATIONS}), alone)
    together = conv(xs, edges())
    assert all(torch.allclose(together[t][-1], alone[t][-1]) for t in alone)  # the last ones are isolated
    assert not torch.allclose(together["paper"], alone["paper"])


@pytest.mark.parametrize("empty", [["author"], ["paper"], ["venue", "field"]], ids=str)
def test_types_without_nodes(empty: list[str]) -> None:
    conv, counts = dense(), {t: 0 if t in empty else n for t, n in COUNTS.items()}
    found = {r: e[:, : 0 if {r[0], r[-1]} & set(empty) else None] for r, e in edges().items()}
    y_dict = conv({t: x[: counts[t]] for t, x in nodes().items()}, found)
    assert {t: y.shape for t, y in y_dict.items()} == {t: (n, OUT) for t, n in counts.items()}
    backward(y_dict)
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in conv.parameters())


def test_metadata_may_have_been_through_json() -> None:
    conv = dense(metadata=json.loads(json.dumps(METADATA)))
    assert_all_close(conv(nodes(), edges()), dense()(nodes(), edges()), atol=0.0)


@each_form
@pytest.mark.parametrize(("aggr", "expected"), [("mean", 1.0), ("sum", 4096.0)])
def test_half_precision_sums_in_float32(aggr: Any, expected: float, sparse: bool) -> None:
    """4,096 neighbors are more than bfloat16 can count or add one by one."""
    x_dict = {"a": torch.ones(4096, 2, dtype=torch.bfloat16), "b": torch.zeros(1, 2, dtype=torch.bfloat16)}
    to_one = torch.stack([torch.arange(4096), torch.zeros(4096, dtype=torch.long)])
    found = {("a", "to", "b"): csr(to_one, 4096, 1, dtype=torch.float32) if sparse else to_one}
    conv = RelationalConv(2, OUT, (["a", "b"], [("a", "to", "b")]), aggr=aggr).bfloat16()
    _, aggregate = conv.parts(x_dict, found)["b"]
    assert aggregate.dtype == torch.bfloat16
    assert aggregate.tolist() == [[expected, expected]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert conv(x_dict, found)["b"].dtype == torch.bfloat16


# The mixture equals its reference


@each_tie_of_both
@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("router", ROUTERS)
def test_equals_masked_layers(router: str, k: int, ties: dict[str, bool]) -> None:
    conv = layer(router=router, k=k, router_input=BOTH, **ties).double()
    assert_equals_masked(conv, nodes(WIDTH), edges())


@pytest.mark.parametrize("router_input", ["node", "neighbors", BOTH], ids=str)
@pytest.mark.parametrize("out_types", [["paper"], ["author", "field"]], ids=str)
def test_equals_masked_layers_with_every_option(out_types: list[str], router_input: Any) -> None:
    options: dict[str, Any] = {"balance": "switch", "balance_coef": 0.5, "z_coef": 0.1}
    conv = layer(WIDTHS, aggr="sum", router_input=router_input, out_types=out_types, router_kwargs=options).double()
    assert_equals_masked(conv, nodes(), edges())
    assert list(conv(nodes(), edges())) == out_types


@each_tie_of_both
@pytest.mark.parametrize("dense_start", [False, True])
def test_equals_masked_layers_beside_a_shared_expert(dense_start: bool, ties: dict[str, bool]) -> None:
    conv = layer(k=2, shared_expert=True, dense_start=dense_start, **ties).double()
    if dense_start:
        nn.init.constant_(conv.gain, 3.0)  # type: ignore[arg-type]
    assert_equals_masked(conv, nodes(WIDTH), edges())


@pytest.mark.parametrize("tie_experts", [False, True])
@pytest.mark.parametrize("router", ["token_choice", "expert_choice", None])
def test_a_new_layer_is_the_dense_one(router: Any, tie_experts: bool) -> None:
    """With one seed, also after ``reset_parameters``; and what is added for an expert is nothing."""
    conv, plain = (
        layer(shared_expert=True, router=router, tie_experts=tie_experts),
        dense(WIDTH, share_root=tie_experts),
    )
    follow = None if router else {t: routing_of(torch.ones(n, EXPERTS)) for t, n in COUNTS.items()}
    for _ in range(2):
        assert_all_close(conv.double()(nodes(WIDTH), edges(), routings=follow), plain(nodes(WIDTH), edges()))
        assert not any(parameter.any() for parameter in conv.expert(0).parameters())
        for module in (conv.float(), plain.float()):
            torch.manual_seed(3)
            module.reset_parameters()
        plain.double()


def test_equals_masked_layers_on_sparse_matrices() -> None:
    assert_equals_masked(layer(WIDTHS, k=2).double(), nodes(), sparse_edges(), reference_edges=edges())


@pytest.mark.parametrize("tie_experts", [False, True])
def test_follows_given_routings(tie_experts: bool) -> None:
    """Any weights, tokens without experts and experts without tokens included."""
    weights = {t: features(n, EXPERTS) for t, n in COUNTS.items()}
    for i, weight in enumerate(weights.values()):
        weight[0] = weight[:, i % EXPERTS] = 0
    assert_equals_masked(layer(router=None, tie_experts=tie_experts).double(), nodes(WIDTH), edges(), weights=weights)


@st.composite
def graphs(draw: st.DrawFn) -> tuple[dict[str, int], Edges]:
    """Few nodes, some types without any; relations with few edges, without any, or absent."""
    counts = {t: draw(st.integers(0, 4)) for t in TYPES}
    found: Edges = {}
    for relation in RELATIONS:
        num_src, num_dst = counts[relation[0]], counts[relation[-1]]
        some: st.SearchStrategy[list[tuple[int, int]]] = st.just([])
        if num_src and num_dst:
            some = st.lists(st.tuples(st.integers(0, num_src - 1), st.integers(0, num_dst - 1)), max_size=6)
        chosen = draw(st.none() | some)
        if chosen is not None:
            found[relation] = torch.tensor(chosen, dtype=torch.long).reshape(-1, 2).T.contiguous()
    return counts, found


@settings(max_examples=40, deadline=None)
@given(graphs(), st.sampled_from(["token_choice", "expert_choice"]), st.booleans(), st.booleans())
def test_equals_masked_layers_on_any_graph(graph: Any, router: str, tie_routers: bool, tie_experts: bool) -> None:
    counts, found = graph
    conv = layer(router=router, k=2, router_input=BOTH, tie_routers=tie_routers, tie_experts=tie_experts).double()
    assert_equals_masked(conv, nodes(WIDTH, counts), found)


@pytest.mark.parametrize("backend", ["loop", "padded", "grouped"])
def test_backends_agree(backend: Any) -> None:
    conv = layer(WIDTHS, k=2, backend=backend)
    expected = layer(WIDTHS, k=2).double()(nodes(), edges())
    assert_all_close(conv(floats(nodes()), edges()), expected, atol=1e-5)


@each_tie_of_both
@pytest.mark.parametrize("router", ROUTERS)
def test_follows_permutations_of_the_nodes(router: str, ties: dict[str, bool]) -> None:
    conv = layer(router=router, k=2, router_input=BOTH, **ties).double()
    order = {t: torch.randperm(n, generator=torch.Generator().manual_seed(n)) for t, n in COUNTS.items()}
    place = {t: o.argsort() for t, o in order.items()}
    moved = {r: torch.stack([place[r[0]][e[0]], place[r[-1]][e[1]]]) for r, e in edges().items()}
    actual = conv({t: x[order[t]] for t, x in nodes(WIDTH).items()}, moved)
    assert_all_close(actual, {t: y[order[t]] for t, y in conv(nodes(WIDTH), edges()).items()})


# Routers


@pytest.mark.parametrize("router_input", ["node", "neighbors", BOTH, ["neighbors", "node"]], ids=str)
@each_tie
def test_what_routers_see(router_input: Any, tie_routers: bool) -> None:
    """Separate routers see each aggregate, a tied one their mean; and the types are its groups."""
    types = ["paper", "author", "field"]
    conv = layer(router_input=router_input, tie_routers=tie_routers, out_types=types).double()
    xs, found = nodes(WIDTH), edges()

    def mean(relation: Any) -> Tensor:
        adjacency = csr(found[relation], COUNTS[relation[0]], COUNTS[relation[-1]]).to_dense()
        return adjacency @ xs[relation[0]] / adjacency.sum(dim=1, keepdim=True).clamp(min=1)

    expected = []
    for t in types:
        aggregates = [mean(r) for r in RELATIONS if r[-1] == t]
        if tie_routers:
            aggregates = [torch.stack(aggregates).mean(dim=0)]
        parts = {"node": [xs[t]], "neighbors": aggregates}
        expected.append(torch.cat(parts.get(str(router_input), [xs[t], *aggregates]), dim=1))
    calls: list[tuple[Any, ...]] = []
    for router in routers_of(conv).values():
        router.register_forward_pre_hook(lambda _, args: calls.append(args))
    conv(xs, found)
    if not tie_routers:
        torch.testing.assert_close([call[0] for call in calls], expected)
        return
    ((seen, group),) = calls
    torch.testing.assert_close(seen, torch.cat(expected))
    assert group.unique_consecutive(return_counts=True)[1].tolist() == [COUNTS[t] for t in types]


def test_a_tied_router_decides_once() -> None:
    """Its decision is taken apart: node types are groups; losses and dropped pairs are counted once."""
    kwargs: dict[str, Any] = {"balance": "switch", "z_coef": 0.1, "capacity_factor": 0.5, "weight": "score"}
    conv = layer(tie_routers=True, router_kwargs=kwargs).double()
    with record_routing(conv) as recorded:
        _, routings = conv(nodes(WIDTH), edges(), return_routing=True)
    (together,) = recorded
    torch.testing.assert_close(aux_loss(routings.values()), together.aux_loss)
    torch.testing.assert_close(torch.cat([r.to_dense() for r in routings.values()]), together.to_dense())
    assert {t: r.num_tokens for t, r in routings.items()} == COUNTS
    assert all(int(r.dropped) == COUNTS[t] - r.token.numel() for t, r in routings.items())  # K = 1
    assert int(together.dropped) == sum(int(r.dropped) for r in routings.values()) > 0
    chosen = layer(tie_routers=True, router="expert_choice").double()(nodes(WIDTH), edges(), return_routing=True)[1]
    assert {t: set(r.load.tolist()) for t, r in chosen.items()} == {t: {-(-n // EXPERTS)} for t, n in COUNTS.items()}


@each_tie
@pytest.mark.parametrize("router", ["expert_choice", "attention_vote"])
def test_batch_mates_do_not_matter(router: str, tie_routers: bool) -> None:
    conv = layer(router=router, tie_routers=tie_routers).double()
    other = {t: 2 * n for t, n in COUNTS.items()}
    graphs = [(nodes(WIDTH), edges()), (nodes(WIDTH, other, seed=9), edges(other, seed=9))]
    alone = [conv(*graph) for graph in graphs]
    xs = {t: torch.cat([graph[0][t] for graph in graphs]) for t in TYPES}
    shift = {r: torch.tensor([[COUNTS[r[0]]], [COUNTS[r[-1]]]]) for r in RELATIONS}
    found = {r: torch.cat([graphs[0][1][r], graphs[1][1][r] + shift[r]], dim=1) for r in RELATIONS}
    batch = {t: torch.tensor([0] * n + [1] * other[t]) for t, n in COUNTS.items()}
    assert_all_close(conv(xs, found, batch_dict=batch), {t: torch.cat([y[t] for y in alone]) for t in TYPES})


@each_tie
def test_router_instances(tie_routers: bool) -> None:
    """One for all types, or one of each."""
    assignment = {t: torch.arange(n) % EXPERTS for t, n in COUNTS.items()}
    router: Any = {t: OracleRouter(WIDTH, EXPERTS, a) for t, a in assignment.items()}
    if tie_routers:
        router = OracleRouter(WIDTH, EXPERTS, torch.cat(list(assignment.values())))
    conv = layer(router=router, tie_routers=tie_routers).double()
    _, routings = conv(nodes(WIDTH), edges(), return_routing=True)
    assert all(torch.equal(r.to_dense().argmax(dim=1), assignment[t]) for t, r in routings.items())


def test_router_of_each_type() -> None:
    router: Any = dict(zip(TYPES, ("expert_choice", UniformRouter, partial(TokenChoice, k=2), "random"), strict=True))
    conv = layer(WIDTHS, router=router, router_input=BOTH)
    assert [type(r) for r in routers_of(conv).values()] == [ExpertChoice, UniformRouter, TokenChoice, RandomRouter]
    assert conv.experts_per_token == (1 + EXPERTS + 2 + 1) / 4
    assert [r.dim for r in routers_of(conv).values()] == [4 + 3 + 4 + 2, 3 + 4, 5 + 4, 2]


@each_tie
def test_check_finite_reaches_the_routers(tie_routers: bool) -> None:
    xs = floats(nodes(WIDTH))
    xs["field"][1, 1] = torch.nan
    layer(tie_routers=tie_routers)(xs, edges())
    with pytest.raises(ValueError, match=r"x: got .* NaN"):
        layer(tie_routers=tie_routers, check_finite=True)(xs, edges())


# As modules


def test_expert_is_a_detached_copy() -> None:
    conv = layer(WIDTHS, router=None).double().eval()
    state = torch.get_rng_state()
    for index in range(EXPERTS):
        expert = conv.expert(index)
        assert not expert.training
        only = {t: torch.eye(EXPERTS, dtype=torch.float64)[index].expand(n, -1) for t, n in COUNTS.items()}
        follow = {t: routing_of(w) for t, w in only.items()}
        before = conv(nodes(), edges(), routings=follow)
        assert_all_close(expert(nodes(), edges()), before)
        with torch.no_grad():
            for parameter in expert.parameters():
                parameter.add_(1.0)
        assert_all_close(conv(nodes(), edges(), routings=follow), before, atol=0.0)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match=r"index: got 3, expected 0\.\.num_experts-1=2"):
        conv.expert(EXPERTS)


class Scaled(nn.Module):
    """A part that a user put around another one."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, *args: Any) -> Tensor:
        out: Tensor = 2 * self.part(*args)
        return out


@pytest.mark.parametrize("moe", [False, True], ids=["dense", "mixture"])
@pytest.mark.parametrize("how", ["replaced", "hooked"])
def test_parts_that_a_user_put_in_run(how: str, moe: bool) -> None:
    conv: Any = layer(WIDTHS, router="uniform").double() if moe else dense()
    other = copy.deepcopy(conv)
    own, changed = (conv.experts, other.experts) if moe else (conv, other)
    with torch.no_grad():
        own.relation[WRITES].weight.mul_(2)
    if how == "replaced":
        changed.relation[WRITES] = Scaled(changed.relation[WRITES])
    else:
        changed.relation[WRITES].register_forward_hook(lambda _, __, out: 2 * out)
    assert_all_close(other(nodes(), edges()), conv(nodes(), edges()))


# Cost


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@each_tie_of_both
def test_active_parameters_follow_k(ties: dict[str, bool]) -> None:
    conv = layer(k=2, num_experts=8, **ties)
    one, gates = parameters(conv.expert(0)), sum(map(parameters, routers_of(conv).values()))
    assert parameters(conv) == 8 * one + gates
    assert active_parameters(conv) == 2 * one + gates
    assert active_parameters(layer(router="uniform", num_experts=8, **ties)) == 8 * one


def test_flops_follow_k() -> None:
    """The same for any E; K times the products, and the aggregation once; and at K = 1 a dense layer's."""
    xs = floats(nodes(WIDTH))

    def flops(num_experts: int, k: int) -> int:
        conv = layer(num_experts=num_experts, router=None, k=k)
        weight = {t: torch.arange(num_experts).expand(n, -1) < k for t, n in COUNTS.items()}
        return count_flops(conv, xs, edges(), routings={t: routing_of(w.float()) for t, w in weight.items()})

    assert flops(2, 1) == flops(16, 1)
    assert flops(2, 2) == flops(16, 2)
    products = 2 * OUT * WIDTH * (COUNTS["paper"] * 4 + COUNTS["author"] * 2 + COUNTS["field"] * 2 + COUNTS["venue"])
    combining = OUT * sum(COUNTS.values())
    assert flops(16, 2) - flops(16, 1) == products + combining
    assert count_flops(layer().expert(0), xs, edges()) == flops(16, 1) - combining


# What is refused


BAD_DENSE: list[tuple[dict[str, Any], str]] = [
    ({"metadata": ([], [])}, "metadata: got no node types"),
    ({"metadata": (["a", "a"], [])}, "metadata: got node types ['a', 'a'], expected each of them once"),
    ({"metadata": (["a"], [("a", "r", "a")] * 2)}, "metadata: got edge types"),
    ({"metadata": (["a"], [("a", "r", "b")])}, "metadata: got edge type ('a', 'r', 'b'), expected (source"),
    ({"metadata": (["a"], [("a", "a")])}, "metadata: got edge type ('a', 'a'), expected (source"),
    ({"widths": {"paper": 3}}, "expected widths of ['author', 'field', 'venue'] too"),
    ({"widths": 0}, "in_channels: got 0, expected at least 1"),
    ({"aggr": "max"}, "aggr: got 'max', expected one of 'mean', 'sum'"),
    ({"out_types": ["book"]}, "out_types: got 'book', expected one of 'paper'"),
    ({"out_types": []}, "out_types: got none"),
    ({"share_root": True}, "in_channels: got {'paper': 4, 'author': 3, 'field': 5, 'venue': 2} with a shared root"),
]
BAD_MIXTURE: list[tuple[dict[str, Any], str]] = [
    ({"num_experts": 0}, "num_experts: got 0, expected at least 1"),
    ({"k": 4}, "k: got 4, expected at most num_experts=3"),
    ({"out_channels": 0}, "out_channels: got 0"),
    ({"router_input": "degree"}, "router_input: got 'degree', expected 'node', 'neighbors', or both of them"),
    ({"router_input": ()}, "router_input: got (), expected 'node', 'neighbors', or both of them"),
    ({"router_input": "neighbors"}, "router_input: got 'neighbors', expected 'node' or both, since no relation ends"),
    ({"backend": "magic"}, "backend: got 'magic'"),
    ({"aggr": "max"}, "aggr: got 'max', expected one of 'mean', 'sum'"),
    ({"router": "choice"}, "router: got 'choice', expected one of 'token_choice'"),
    ({"router": {"paper": "random"}}, "router: got a dict for ['paper'], expected one router for each of ['paper', 'a"),
    ({"router": dict.fromkeys(TYPES, "random"), "tie_routers": True}, "expected one router, since tie_routers=True"),
    ({"router": TokenChoice(4, 3)}, "router: got one instance for several node types"),
    ({"router": dict.fromkeys(TYPES, TokenChoice(4, 3))}, "router: got one instance for several node types"),
    ({"router": "attention_vote", "router_kwargs": {"scope": "neighbors"}}, "scope='neighbors', expected scope="),
    ({"widths": WIDTHS, "tie_routers": True}, "with tie_routers=True, expected one width for all node types"),
    ({"widths": WIDTHS, "tie_experts": True}, "expected one width for all node types"),
]


@pytest.mark.parametrize(
    ("build", "kwargs", "message"),
    [(build, *case) for build, cases in ((dense, BAD_DENSE), (layer, BAD_MIXTURE)) for case in cases],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_errors_of_the_constructors(build: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        build(**kwargs)
    assert message in str(error.value)


OTHER = Graph(torch.zeros(2, 0, dtype=torch.long), (5, 8))
HALF = {"author": routing_of(torch.ones(5, EXPERTS)), "paper": routing_of(torch.ones(5, EXPERTS))}
BAD_CALLS: list[tuple[dict[str, Any], str]] = [
    ({"x": {"author": None}}, "x_dict['author']: got None, expected (number of nodes, 4)"),
    ({"x": {"author": torch.zeros(5, 3)}}, "x_dict['author']: got shape (5, 3), expected (number of nodes, 4)"),
    (
        {"edges": {("author", "reads", "paper"): 0}},
        "edge_index_dict: got ('author', 'reads', 'paper'), expected one of",
    ),
    ({"edges": {WRITES: torch.tensor([[5], [0]])}}, f"edge_index_dict[{WRITES}]: edge_index: got node 5"),
    ({"edges": {WRITES: OTHER}}, "got a Graph of 5 sources and 8 destinations, expected 5 and 7"),
    ({"batch_dict": {"field": torch.zeros(2, dtype=torch.long)}}, "batch_dict['field']: batch: got shape (2,)"),
    ({"router": None}, "routings: got None, expected one of each node type, since router=None"),
    ({"routings": {}}, "routings['paper']: got None tokens and experts, expected (7, 3)"),
    ({"routings": HALF}, "routings['paper']: got (5, 3) tokens and experts, expected (7, 3)"),
]


@pytest.mark.parametrize(("kwargs", "message"), BAD_CALLS, ids=[message[:40] for _, message in BAD_CALLS])
def test_errors_of_a_call_name_the_type(kwargs: dict[str, Any], message: str) -> None:
    kwargs = dict(kwargs)
    xs = {t: x for t, x in {**nodes(WIDTH), **kwargs.pop("x", {})}.items() if x is not None}
    conv = layer(router=kwargs.pop("router", "token_choice")).double()
    with pytest.raises(ValueError) as error:  # noqa: PT011
        conv(xs, kwargs.pop("edges", edges()), **kwargs)
    assert message in str(error.value)
