"""Blocks with a feed-forward part, beside the models of the paper and a mixture by masks."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_geometric.data import Data

import gmoe
from gmoe import BlockGNN, MoE, MoEConv, TokenChoice
from gmoe.models.blocks import DropThenAct
from tests.helpers.equal import assert_same
from tests.helpers.mapped import map_to
from tests.helpers.masked import features, simple_graph

NODES, IN, HIDDEN, OUT, BLOCKS, EXPERTS = 9, 4, 6, 3, 2, 3
EDGES = simple_graph(NODES, NODES, loops=False)
BOTH_WAYS = torch.cat([EDGES, EDGES.flip(0)], dim=1).unique(dim=1)
"""As the paper has its graphs: undirected, without loops and parallel edges."""


def model(**options: Any) -> BlockGNN:
    """Blocks with experts that differ; without noise, which would differ from call to call."""
    torch.manual_seed(0)
    options = {"act": "gelu", "num_experts": EXPERTS, **options}
    if options.get("router", "token_choice") == "token_choice":
        kwargs = options.get("router_kwargs", {})
        options["router_kwargs"] = {"balance": None, "noise": False, **kwargs}
    gnn = BlockGNN(IN, HIDDEN, OUT, BLOCKS, **options).double()
    with torch.no_grad():
        for name, value in gnn.named_parameters():
            if name.endswith("_difference") or "experts.down" in name:
                value.normal_(std=0.5)
    return gnn


# the paper's models -------------------------------------------------------------------------------


class PaperFeedForward(nn.Module):
    """``FeedForwardModule`` of the paper's ``modules.py``."""

    def __init__(self, in_width: int, dropout: float) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_width, HIDDEN)
        self.dropout_1 = nn.Dropout(dropout)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(HIDDEN, HIDDEN)
        self.dropout_2 = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.dropout_1(self.linear_1(x)))
        return self.dropout_2(self.linear_2(x))


class PaperModel(nn.Module):
    """``Model`` of the paper's ``model.py``: SAGE, by a dense matrix in place of DGL's sums."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.input_linear = nn.Linear(IN, HIDDEN)
        self.dropout = nn.Dropout(dropout)
        self.act = nn.GELU()
        self.normalizations = nn.ModuleList(nn.LayerNorm(HIDDEN) for _ in range(BLOCKS))
        self.modules_ = nn.ModuleList(PaperFeedForward(2 * HIDDEN, dropout) for _ in range(BLOCKS))
        self.output_normalization = nn.LayerNorm(HIDDEN)
        self.output_linear = nn.Linear(HIDDEN, OUT)

    def aggregate(self, adjacency: Tensor, x: Tensor) -> Tensor:
        mean = adjacency @ x / adjacency.sum(dim=1, keepdim=True).clamp(min=1)
        return torch.cat([x, mean], dim=1)

    def forward(self, adjacency: Tensor, x: Tensor) -> Tensor:
        x = self.act(self.dropout(self.input_linear(x)))
        for normalization, module in zip(self.normalizations, self.modules_, strict=True):
            x = x + module(self.aggregate(adjacency, normalization(x)))
        return self.output_linear(self.output_normalization(x))

    def pairs(self, gnn: Any) -> list[tuple[nn.Module, nn.Module]]:
        """Each layer with parameters, and ours in its place."""
        parts: list[tuple[Any, Any]] = [(self.input_linear, gnn.input)]
        for layer, module in enumerate(self.modules_):
            theirs: Any = module
            parts.append((self.normalizations[layer], gnn.norms[layer]))
            parts.append((theirs.linear_1, gnn.ffns[layer][0]))
            parts.append((theirs.linear_2, gnn.ffns[layer][2]))
        parts.append((self.output_normalization, gnn.norms[-1]))
        return [*parts, (self.output_linear, gnn.lin)]


@pytest.mark.parametrize("training", [True, False])
def test_the_dense_model_is_that_of_the_paper(training: bool) -> None:
    """With the same weights, also with its dropouts: outputs, and gradients of all weights."""
    paper = PaperModel(dropout=0.4).double().train(training)
    ours = model(router=None, conv="bare_sage", dropout=0.4).train(training)
    for theirs, own in paper.pairs(ours):
        own.load_state_dict(theirs.state_dict())
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in paper.parameters())
    adjacency = torch.zeros(NODES, NODES, dtype=torch.float64)
    adjacency[BOTH_WAYS[1], BOTH_WAYS[0]] = 1
    x = features(NODES, IN)
    outputs = []
    for call in (partial(paper, adjacency, x), partial(ours, x, BOTH_WAYS)):
        torch.manual_seed(1)
        outputs.append(call())
        outputs[-1].square().sum().backward()
    assert_same(*outputs)
    for theirs, own in paper.pairs(ours):
        for one, other in zip(theirs.parameters(), own.parameters(), strict=True):
            assert_same(one.grad, other.grad)  # type: ignore[arg-type]


# experts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["copies", "shared"])
def test_it_starts_as_the_dense_model(start: str) -> None:
    x = features(NODES, IN).float()
    logits = []
    for router in (None, "token_choice"):
        torch.manual_seed(3)
        gnn = BlockGNN(IN, HIDDEN, OUT, BLOCKS, router=router, start=start, conv="sage")
        logits.append(gnn.eval()(x, EDGES))
    torch.testing.assert_close(*logits)


def test_where_the_experts_are() -> None:
    gnn = model()
    assert [type(part) for part in gnn.ffns] == [MoE] * BLOCKS
    assert not any(isinstance(conv, MoEConv) for conv in gnn.convs)
    assert [type(part).__name__ for part in model(every=2).ffns] == ["Sequential", "MoE"]


# with all that a GNNMoE does ----------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"shared_router": False}, {"router": None}], ids=str)
def test_inference_of_a_mapped_graph(tmp_path: Path, options: dict[str, Any]) -> None:
    gnn = model(conv="bare_sage", **options).eval()
    data = map_to(tmp_path, Data(x=features(NODES, IN), edge_index=EDGES), half=True)
    out = torch.empty(NODES, OUT, dtype=torch.float64)
    gnn.inference(data, batch_size=4, out=out)
    assert_same(out, gnn(data.x.double(), EDGES))


def test_a_dense_model_of_blocks_is_moefied() -> None:
    gnn, x = model(router=None, dropout=0.3).eval(), features(NODES, IN)
    logits = gnn(x, EDGES)
    gmoe.moefy(gnn, targets="ffns.*", num_experts=EXPERTS, start="copies")
    assert_same(gnn(x, EDGES), logits)


# what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"jk": "cat"}, "jk: got 'cat', expected an argument of BlockGNN or of GCNConv"),
        ({"residual": "none"}, "residual: got 'none', expected an argument of BlockGNN"),
        ({"norm": "graph_norm"}, "norm: got GraphNorm in blocks, expected one by row"),
        (
            {"conv": ["gcn", "sage", "gat"]},
            r"conv: got \['gcn', 'sage', 'gat'\], expected one kind",
        ),
        ({"local": True, "conv": "sage"}, "local: got True, expected an argument of BlockGNN"),
        (
            {"shared_router": False, "router_input": ("node", "degree")},
            "router_input: got .'node', 'degree'., expected 'node'",
        ),
        ({"router": TokenChoice(HIDDEN, num_experts=EXPERTS)}, "router: got an instance"),
    ],
    ids=str,
)
def test_what_blocks_do_not_have_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{message}"):
        model(**options)


def test_an_activation_keeps_no_weights_of_others() -> None:
    act = nn.PReLU()
    part = DropThenAct(0.0, act)
    assert part.act is not act
    x = features(3, 2).float()
    assert_same(part(x), copy.deepcopy(act)(x))
