"""RelationalConv and HeteroMoEConv, against PyG and as layers.

PyG's HeteroConv of SAGEConvs is the reference of the first, and E of them that of the second.
"""

from __future__ import annotations

import json
import re
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch_geometric import EdgeIndex
from torch_geometric.nn import HeteroLinear

import gmoe
from gmoe import (
    ROUTERS,
    Graph,
    HeteroMoEConv,
    RelationalConv,
    TokenChoice,
    active_parameters,
    count_flops,
)
from gmoe.routers import ByType
from tests.helpers.hetero_reference import (
    COUNTS,
    METADATA,
    OUT,
    WIDTHS,
    Nodes,
    assert_all_close,
    assert_equals_masked,
    backward,
    by_pyg,
    edges,
    nodes,
)
from tests.helpers.masked import csr, features, gradient, routing_of

EXPERTS, WIDTH = 3, 4
TYPES, RELATIONS = METADATA
WRITES = ("author", "writes", "paper")


def dense(widths: Any = WIDTHS, metadata: Any = METADATA, **kwargs: Any) -> RelationalConv:
    torch.manual_seed(0)
    return RelationalConv(widths, OUT, metadata, **kwargs).double()


def layer(widths: Any = WIDTH, **kwargs: Any) -> HeteroMoEConv:
    torch.manual_seed(0)
    # Noise would differ from call to call
    if kwargs.get("router", "token_choice") == "token_choice":
        kwargs.setdefault("router_kwargs", {"balance": None})
    kwargs.setdefault("start", "plain")
    return HeteroMoEConv(
        widths, **{"out_channels": OUT, "metadata": METADATA, "num_experts": EXPERTS, **kwargs}
    )


def following(weights: Nodes) -> HeteroMoEConv:
    """A layer whose routers give these (T, E) weights."""
    conv = layer(router="uniform", num_experts=weights["paper"].size(1))
    for name, router in conv.routers.items():
        router.weights = nn.Parameter(weights[name])
        router.register_forward_hook(lambda router, *_: routing_of(router.weights))
    return conv.double()


@pytest.mark.parametrize("out_types", [None, ["field", "paper"]], ids=str)
def test_dense_equals_pyg(out_types: Any) -> None:
    """Outputs and all gradients are those of HeteroConv of SAGEConvs.

    Each node type also has a linear layer for its root.
    """
    conv = dense(metadata=json.loads(json.dumps(METADATA)), out_types=out_types)  # lists, of tuples

    def run(forward: Any) -> dict[str, Tensor]:
        conv.zero_grad()
        xs = {t: x.requires_grad_() for t, x in nodes().items()}
        y_dict = forward(xs, edges())
        backward(y_dict)
        found = {**{f"x.{t}": x for t, x in xs.items()}, **dict(conv.named_parameters())}
        return {**y_dict, **{name: gradient(value).clone() for name, value in found.items()}}

    assert_all_close(run(conv), run(partial(by_pyg, conv)))
    assert set(conv(nodes(), edges())) == set(out_types or TYPES)


@pytest.mark.parametrize("form", [csr, Graph, lambda e, size: EdgeIndex(e, sparse_size=size)])
def test_takes_every_form_of_edges(form: Any) -> None:
    simple = {r: e.unique(dim=1).contiguous() for r, e in edges().items()}
    found = {r: form(e, (COUNTS[r[0]], COUNTS[r[-1]])) for r, e in simple.items()}
    assert_all_close(dense()(nodes(), found), dense()(nodes(), simple))


def test_absent_relations_and_isolated_nodes_add_zero() -> None:
    conv, xs = dense(), nodes()
    alone = conv(xs, {})
    for t, y in alone.items():
        torch.testing.assert_close(y, conv.root[t](xs[t]))
    backward(alone)
    assert all(p.grad is not None for p in conv.parameters())
    together = conv(xs, edges())
    # The last ones are isolated
    assert all(torch.allclose(together[t][-1], alone[t][-1]) for t in alone)
    assert not torch.allclose(together["paper"], alone["paper"])


SWITCH = {"balance": "switch", "balance_coef": 0.5, "z_coef": 0.1}
MASKED: list[dict[str, Any]] = [
    *({"router": router} for router in ROUTERS),
    {"out_types": ["paper"], "router_kwargs": SWITCH},
    {"start": "shared"},
    {"start": "copies"},
]


@pytest.mark.parametrize("options", MASKED, ids=str)
def test_equals_masked_layers(options: dict[str, Any]) -> None:
    conv = layer(WIDTHS, k=2, **options).double()
    if conv.gain is not None:
        nn.init.constant_(conv.gain, 3.0)
    assert_equals_masked(conv, nodes(), edges())
    assert list(conv(nodes(), edges())) == options.get("out_types", TYPES)


def test_equals_masked_layers_under_routers_that_a_user_put_in() -> None:
    """Any weights, tokens without experts and experts without tokens included."""
    weights = {t: features(n, EXPERTS) for t, n in COUNTS.items()}
    for i, weight in enumerate(weights.values()):
        weight[0] = weight[:, i % EXPERTS] = 0
    assert_equals_masked(following(weights), nodes(WIDTH), edges())


def test_a_new_layer_is_the_dense_one() -> None:
    """With one seed, also after ``reset_parameters``; an expert adds nothing."""
    conv, plain = layer(start="shared"), dense(WIDTH).float()
    for _ in range(2):
        xs = {t: x.float() for t, x in nodes(WIDTH).items()}
        assert_all_close(conv(xs, edges()), plain(xs, edges()), atol=1e-6)
        assert not any(parameter.any() for parameter in conv.expert(0).parameters())
        for module in (conv, plain):
            torch.manual_seed(3)
            module.reset_parameters()


@pytest.mark.parametrize("empty", [["venue", "field"], TYPES], ids=str)
def test_equals_masked_layers_without_some_nodes(empty: list[str]) -> None:
    """Relations of types without nodes have no edges, or are absent."""
    xs = {t: x[: 0 if t in empty else None] for t, x in nodes().items()}
    found = {
        r: e[:, : 0 if {r[0], r[-1]} & set(empty) else None]
        for r, e in edges().items()
        if r != WRITES
    }
    assert_equals_masked(layer(WIDTHS, k=2).double(), xs, found)


def test_a_router_instance_is_for_one_type() -> None:
    router = TokenChoice(WIDTH, num_experts=EXPERTS)
    assert layer(router=router, router_kwargs=None, out_types=["paper"]).routers["paper"] is router


def test_expert_is_a_detached_copy() -> None:
    conv, state = layer(), layer().state_dict()
    for parameter in conv.expert(1).parameters():
        nn.init.ones_(parameter)
    assert all(torch.equal(value, state[name]) for name, value in conv.state_dict().items())
    with pytest.raises(ValueError, match="index"):
        conv.expert(EXPERTS)


def test_flops_follow_k() -> None:
    """The same for any E, and K times the products; the means are taken once."""
    conv = layer(k=2, num_experts=8)
    one, gates = (
        sum(p.numel() for p in module.parameters()) for module in (conv.expert(0), conv.routers)
    )
    assert active_parameters(conv) == 2 * one + gates

    def flops(num_experts: int, k: int) -> int:
        weight = {
            t: (torch.arange(num_experts).expand(n, -1) < k).double() for t, n in COUNTS.items()
        }
        return count_flops(following(weight), nodes(WIDTH), edges())

    assert flops(2, 1) == flops(16, 1)
    products = (
        2
        * OUT
        * WIDTH
        * (COUNTS["paper"] * 4 + COUNTS["author"] * 2 + COUNTS["field"] * 2 + COUNTS["venue"])
    )
    assert flops(16, 2) - flops(16, 1) == products + OUT * sum(COUNTS.values())


def test_sizes_may_be_integers_of_numpy() -> None:
    size: Any = np.int64
    widths = {name: size(width) for name, width in WIDTHS.items()}
    for given, expected, xs in ((size(WIDTH), WIDTH, nodes(WIDTH)), (widths, WIDTHS, nodes())):
        counts = {"out_channels": size(OUT), "num_experts": size(EXPERTS), "k": size(2)}
        found = layer(given, start="shared", **counts).double()
        plain = layer(expected, start="shared", k=2).double()
        assert_all_close(found(xs, edges()), plain(xs, edges()))


@pytest.mark.parametrize(
    ("kwargs", "argument"),
    [
        ({"metadata": (["a"], [("a", "r", "b")])}, "metadata"),
        ({"widths": {"paper": 3}}, "in_channels"),
        ({"out_types": ["book"]}, "out_types"),
        ({"out_channels": 0}, "out_channels"),
        ({"router": TokenChoice(WIDTH, num_experts=EXPERTS), "router_kwargs": None}, "router"),
        (
            {"router": ByType("node_type", range(EXPERTS)), "router_kwargs": None},
            "router: got ByType",
        ),
    ],
    ids=str,
)
def test_errors_of_the_constructor(kwargs: dict[str, Any], argument: str) -> None:
    with pytest.raises(ValueError, match=rf"^{argument}"):
        layer(**kwargs)


class Typed(nn.Module):
    """Messages by the type of their edge, and roots by the type of their node."""

    def __init__(self) -> None:
        super().__init__()
        self.root = nn.Linear(WIDTH, OUT)
        self.message = nn.Linear(WIDTH, OUT)

    def forward(
        self, x: Tensor, edge_index: Tensor, node_type: Tensor, edge_type: Tensor
    ) -> tuple[Tensor, Tensor]:
        source, target = edge_index
        message = self.message(x[source])
        return self.root(x).index_add(0, target, message), message


def test_types_of_homogeneous_data_are_routed_as_pygs_hetero_linear() -> None:
    x = features(9, WIDTH)
    edge_index = torch.tensor([[0, 1, 2, 3, 8, 5], [1, 0, 4, 4, 2, 5]])
    node_type = torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2])
    edge_type = torch.tensor([1, 1, 0, 1, 0, 0])
    model: Any = Typed().double()
    gmoe.moefy(model, targets="root", router=ByType("node_type", range(3)), start="plain")
    gmoe.moefy(model, targets="message", router=ByType("edge_type", range(2)), start="plain")
    out, message = model(x, edge_index, node_type, edge_type)

    def typed(experts: Any, rows: Tensor, of_row: Tensor) -> Tensor:
        linear = HeteroLinear(WIDTH, OUT, len(experts.weight)).double()
        with torch.no_grad():
            linear.weight.copy_(experts.weight.mT)
            linear.bias.copy_(experts.bias)
        result: Tensor = linear(rows, of_row)
        return result

    expected = typed(model.message.experts, x[edge_index[0]], edge_type)
    torch.testing.assert_close(message, expected)
    root = typed(model.root.experts, x, node_type)
    torch.testing.assert_close(out, root.index_add(0, edge_index[1], expected))


OTHER = Graph(torch.zeros(2, 0, dtype=torch.long), (5, 8))


@pytest.mark.parametrize(
    ("x", "found", "batch", "argument"),
    [
        ({"author": None}, {}, None, "x_dict['author']"),
        ({"author": torch.zeros(5, 3)}, {}, None, "x_dict['author']"),
        ({}, {("author", "reads", "paper"): torch.zeros(2, 0)}, None, "edge_index_dict"),
        ({}, {WRITES: OTHER}, None, f"edge_index_dict[{WRITES}]"),
        ({}, {}, {"field": torch.zeros(2, dtype=torch.long)}, "batch"),
    ],
    ids=str,
)
def test_errors_of_a_call(x: Any, found: Any, batch: Any, argument: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(argument)}"):
        layer().double()({**nodes(WIDTH), **x}, found, batch_dict=batch)


@pytest.mark.parametrize(
    ("paper", "got"),
    [
        (torch.zeros(5, WIDTH), "torch.float32, expected torch.float64, the type of the weights"),
        (torch.zeros(5, WIDTH, dtype=torch.int64), "shape .* of torch.int64, expected dense"),
        (torch.zeros(5, WIDTH, dtype=torch.complex128), "shape .* of torch.complex128, expected"),
        (torch.eye(5, WIDTH).double().to_sparse(), "shape .*, expected dense floats"),
        ([[0.0] * WIDTH] * 5, "list, expected dense floats"),
        (torch.zeros(5, WIDTH + 1).double(), "shape .*, expected dense floats of shape"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_features_of_another_kind_are_refused_by_their_type(paper: Any, got: str) -> None:
    x = {**nodes(WIDTH), "paper": paper}
    for conv in (layer().double(), dense(WIDTH)):
        with pytest.raises(ValueError, match=rf"^x_dict\['paper'\]: got {got}"):
            conv(x, {})


def test_graphs_of_nodes_that_are_not_there_are_refused() -> None:
    """Else a misspelt type's graphs would compete with each other."""
    x = nodes(WIDTH)
    batch = {name: torch.arange(len(value)) // 3 for name, value in x.items()}
    conv = layer(router="expert_choice", router_kwargs={}).double()
    together, apart = conv(x, {}), conv(x, {}, batch_dict=batch)
    assert not torch.equal(together["paper"], apart["paper"])
    with pytest.raises(ValueError, match=r"^batch_dict: got 'Paper', expected some of "):
        conv(x, {}, batch_dict={"Paper": batch["paper"]})
