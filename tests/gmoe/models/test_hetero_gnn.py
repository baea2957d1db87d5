"""HeteroGNNMoE on the layout of ogbn-mag.

Papers have features and labels; three node types have no features.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch_geometric.data import Batch
from torch_geometric.nn import LayerNorm

from gmoe import TokenChoice, aux_loss, neighbor_loader
from gmoe.conv.hetero import HeteroMoEConv
from gmoe.models.hetero_gnn import HeteroGNNMoE
from tests.helpers.equal import assert_same
from tests.helpers.mag import COUNTS, DATA, EXPERTS, HIDDEN, IN, OUT, call, mag, model
from tests.helpers.masked import features


@pytest.mark.parametrize(
    ("kwargs", "moe_layers"),
    [({}, [0]), ({"num_layers": 5, "every": 2}, [1, 3]), ({"router": None}, [])],
    ids=str,
)
def test_which_layers_are_moe(kwargs: dict[str, Any], moe_layers: list[int]) -> None:
    gnn = model(**kwargs)
    assert [i for i, conv in enumerate(gnn.convs) if isinstance(conv, HeteroMoEConv)] == moe_layers
    logits, routings = call(gnn, return_routing=True)
    assert logits.shape == (COUNTS["paper"], OUT)
    assert sorted({layer for layer, _ in gnn.routed}) == moe_layers
    assert [r.num_tokens for r in routings] == [COUNTS[name] for _, name in gnn.routed]


def test_a_target_prunes_what_its_logits_do_not_follow_from() -> None:
    """The same logits as of the whole model, by fewer parameters, each of which gets a gradient."""
    pruned, whole = model(num_layers=3), model(num_layers=3, target=None)
    assert pruned.routed == [(0, name) for name in COUNTS] + [
        (1, n) for n in ("paper", "author", "field_of_study")
    ]
    missing, unexpected = whole.load_state_dict(pruned.state_dict(), strict=False)
    assert missing
    assert not unexpected
    assert_same(call(whole)["paper"], call(pruned))
    assert {name: y.shape for name, y in call(whole).items()} == {
        name: (n, OUT) for name, n in COUNTS.items()
    }
    call(pruned).square().sum().backward()
    assert [name for name, p in pruned.named_parameters() if p.grad is None] == []


def test_forward_by_hand() -> None:
    """The definition: input, conv + residual, norm, activation; a dense conv at the end.

    Embeddings stand for features.
    """
    gnn = model(num_layers=3, norm=LayerNorm(HIDDEN, mode="node"), act="elu", target=None)
    h: Any = {"paper": gnn.lin_in["paper"](DATA["paper"].x)}
    h |= {name: gnn.embeddings[name].weight for name in COUNTS if name != "paper"}
    first, second, last = gnn.convs
    for conv, residuals, norms in zip((first, second), gnn.residuals, gnn.norms, strict=True):
        out = conv(h, DATA.edge_index_dict)
        h = {n: F.elu(norms[n](out[n] + residuals[n](h[n]))) for n in h}  # type: ignore[index]
    expected = last(h, DATA.edge_index_dict)
    actual = call(gnn)
    for name in COUNTS:
        assert_same(actual[name], expected[name])


def test_seeds_with_all_their_neighbors_get_the_logits_of_the_whole_graph() -> None:
    data = mag({name: 5 * n for name, n in COUNTS.items()})
    gnn = model(data, num_layers=3, k=2).eval()
    whole = call(gnn, data)
    assert_same(call(gnn, data, n_id_dict=data.n_id_dict), whole)
    for batch in neighbor_loader(data, [-1] * 3, "paper", batch_size=16):
        seeds = batch["paper"].n_id[: batch["paper"].batch_size]
        assert_same(call(gnn, batch, n_id_dict=batch.n_id_dict)[: len(seeds)], whole[seeds])


def test_graphs_of_a_batch_are_separate() -> None:
    graphs = [mag(seed=1), mag({name: n + 3 for name, n in COUNTS.items()}, seed=2)]
    for graph in graphs:
        for name, n in list(graph.num_nodes_dict.items()):
            graph[name].x = features(n, IN, seed=n)
    torch.manual_seed(0)
    options: dict[str, Any] = {"router": "expert_choice", "norm": "graph_norm", "num_experts": 3}
    gnn = HeteroGNNMoE(IN, HIDDEN, OUT, DATA.metadata(), **options).double()
    alone = [gnn(g.x_dict, g.edge_index_dict) for g in graphs]
    batch = Batch.from_data_list(graphs)
    together = gnn(batch.x_dict, batch.edge_index_dict, batch_dict=batch.batch_dict)
    for name in COUNTS:
        assert_same(together[name], torch.cat([y[name] for y in alone]))


def test_the_graphs_of_types_that_the_target_does_not_need_are_taken() -> None:
    """``batch.batch_dict`` has all types, though those without features may not even be inputs."""
    metadata = ([*DATA.node_types, "venue"], [*DATA.edge_types, ("paper", "in", "venue")])
    sizes = {**DATA.num_nodes_dict, "venue": 2}
    torch.manual_seed(0)
    gnn = HeteroGNNMoE({"paper": IN}, HIDDEN, OUT, metadata, target="paper", num_nodes_dict=sizes)
    groups = {name: torch.zeros(n, dtype=torch.long) for name, n in sizes.items()}
    gnn = gnn.double().eval()
    assert_same(call(gnn, batch_dict=groups), call(gnn))
    conv = gnn.convs[0]
    h = {name: features(n, HIDDEN) for name, n in COUNTS.items()}
    assert_same(
        conv(h, DATA.edge_index_dict, batch_dict=groups)["paper"],
        conv(h, DATA.edge_index_dict)["paper"],
    )


def test_a_type_of_a_batch_may_have_no_node() -> None:
    """PyG's own norms fail there."""
    data = mag({**COUNTS, "institution": 0, "author": 0})
    groups = {name: torch.arange(n) // 5 for name, n in data.num_nodes_dict.items()}
    for norm in ("graph_norm", "layer_norm"):
        gnn = model(data, norm=norm, num_layers=3, target=None)
        call(gnn, data, batch_dict=groups)["paper"].sum().backward()
        assert_same(gnn.inference(data), call(gnn, data))


def test_sizes_may_be_integers_of_numpy() -> None:
    size: Any = np.int64
    counts = {"num_layers": size(3), "num_experts": size(EXPERTS), "every": size(1)}
    counts["num_nodes_dict"] = {name: size(count) for name, count in COUNTS.items()}
    found = model(hidden_channels=size(HIDDEN), **counts)
    assert_same(call(found), call(model(num_layers=3)))


@pytest.mark.parametrize(("count", "norm"), [(0, None), (0, "layer_norm"), (1, "batch_norm")])
def test_few_nodes_of_a_type(count: int, norm: str | None) -> None:
    """Mini-batches may hold one node of a type, or none."""
    small = mag({**COUNTS, "institution": count, "author": 2 * count})
    gnn = model(norm=norm, num_layers=3)
    logits, routings = call(gnn, small, n_id_dict=small.n_id_dict, return_routing=True)
    (logits.square().sum() + aux_loss(routings)).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in gnn.parameters())
    assert all(bool(b.isfinite().all()) for b in gnn.buffers())


@pytest.mark.parametrize(
    ("kwargs", "argument"),
    [
        ({"target": "book"}, "target"),
        ({"residual": "dense"}, "residual"),
        ({"every": 2}, "every"),
        ({"router": TokenChoice(4, num_experts=3)}, "router"),
        ({"num_nodes_dict": {"author": 3}}, "num_nodes_dict"),
        ({"hidden_channels": 0}, "hidden_channels"),
    ],
    ids=str,
)
def test_errors_of_the_constructor(kwargs: dict[str, Any], argument: str) -> None:
    with pytest.raises(ValueError, match=rf"^{argument}"):
        model(**kwargs)


@pytest.mark.parametrize(
    ("x_dict", "kwargs", "argument"),
    [
        ({}, {}, "x_dict['paper']"),
        ({"paper": DATA["paper"].x[:, :3]}, {}, "x_dict['paper']"),
        (
            {**DATA.x_dict, "author": torch.zeros(9, 4)},
            {},
            "x_dict['author']",
        ),  # of an embedded type
        ({"paper": DATA["paper"].x[:5]}, {}, "n_id_dict"),
        (DATA.x_dict, {"n_id_dict": {"paper": DATA["paper"].n_id}}, "n_id_dict"),
    ],
)
def test_errors_of_a_call(x_dict: Any, kwargs: dict[str, Any], argument: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(argument)}"):
        model()(x_dict, DATA.edge_index_dict, **kwargs)


def test_what_does_not_fit_the_nodes_is_refused_by_its_argument() -> None:
    net = model().double()
    args = (DATA.collect("x"), DATA.edge_index_dict)
    with pytest.raises(ValueError, match=r"^batch_dict: got 'Paper', expected some of "):
        net(*args, batch_dict={"Paper": torch.zeros(COUNTS["paper"], dtype=torch.int64)})
    with pytest.raises(ValueError, match=r"^x_dict\['paper'\]: got torch.float32, expected"):
        net({"paper": args[0]["paper"].float()}, args[1])
    numbers = DATA.collect("n_id")
    for bad, got in ((numbers["author"] - 1, r"\[-1\]"), (numbers["author"].float(), "shape")):
        with pytest.raises(ValueError, match=rf"^n_id_dict\['author'\]: got {got}"):
            net(*args, {**numbers, "author": bad})
