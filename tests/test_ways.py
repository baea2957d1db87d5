"""Every way to a model's outputs, with every form of its edges: as the forward, or refused.

The forward is that of ``edge_index`` on the whole graph. The table of what is refused is part of
the test: nothing else may be refused, and nothing of it taken.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_geometric import EdgeIndex
from torch_geometric.data import Data, HeteroData
from torch_geometric.nn import GCN, GIN, GraphSAGE, HeteroConv
from torch_geometric.typing import WITH_TORCH_SPARSE, SparseTensor
from torch_geometric.utils import trim_to_layer

import gmoe
from gmoe import GNNMoE, MoEConv, moefy, neighbor_loader
from tests.helpers.masked import coo, csr, features, simple_graph

NODES, AUTHORS, IN, HIDDEN, OUT, EXPERTS, LAYERS = 40, 9, 4, 6, 3, 3, 3
SEEDS = 4
ALL_HOPS = [-1] * (LAYERS + 3)
"""So many that trimming leaves whole the degrees of all nodes that count, which a GCN reads."""

# Forms of edges -----------------------------------------------------------------------------------

Size = tuple[int, int]


def sparse_tensor(edges: Tensor, size: Size) -> SparseTensor:
    return SparseTensor(row=edges[1], col=edges[0], sparse_sizes=size[::-1])


FORMS: dict[str, tuple[str, Callable[[Tensor, Size], Any]]] = {
    "edge_index": ("edge_index", lambda edges, _: edges),
    "EdgeIndex": ("edge_index", lambda edges, size: EdgeIndex(edges, sparse_size=size)),
    "adj_t": ("adj_t", csr),
    "adj_t, COO": ("adj_t", coo),
    **({"SparseTensor": ("adj_t", sparse_tensor)} if WITH_TORCH_SPARSE else {}),
    "none": ("edge_index", lambda *_: None),
}
"""What a data set calls a form, and how it is made of (2, M) edges and their numbers of nodes."""


def ring() -> Tensor:
    """In-edges from nodes shortly behind, so that each hop finds new ones; in no order.

    Neither loops nor parallel edges, which PyG's convs treat otherwise in a matrix.
    """
    node = torch.arange(NODES)
    edges = [torch.stack([(node + step) % NODES, node])[:, ::step] for step in (1, 2, 3)]
    return torch.cat(edges, dim=1)[:, torch.randperm(sum(edge.size(1) for edge in edges))]


def graph(form: str) -> Data:
    name, make = FORMS[form]
    torch.manual_seed(0)
    return Data(x=features(NODES, IN), **{name: make(ring(), (NODES, NODES))})


RELATIONS = [("author", "writes", "paper"), ("paper", "by", "author"), ("paper", "cites", "paper")]


def hetero_graph(form: str) -> HeteroData:
    name, make = FORMS[form]
    data = HeteroData()
    sizes = {"paper": NODES, "author": AUTHORS}
    for kind, number in sizes.items():
        data[kind].x = features(number, IN, seed=number)
    for relation in RELATIONS:
        size = sizes[relation[0]], sizes[relation[-1]]
        data[relation][name] = make(simple_graph(*size), size)
    return data


# Models -------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Somebody's own model, which trims as PyG's documentation says."""

    def __init__(self, conv: str, **options: Any) -> None:
        super().__init__()
        widths = [IN, *[HIDDEN] * (LAYERS - 1), OUT]
        self.convs = nn.ModuleList(
            MoEConv(conv, *pair, num_experts=EXPERTS, **options) for pair in pairwise(widths)
        )

    def forward(self, x: Tensor, adj: Any, nodes: Any = None, edges: Any = None) -> Tensor:
        for layer, conv in enumerate(self.convs):
            if nodes is not None:
                x, adj, _ = trim_to_layer(layer, nodes, edges, x, adj)
            x = conv(x, adj).relu()
        return x


def gnn(conv: str, **options: Any) -> nn.Module:
    return GNNMoE(IN, HIDDEN, OUT, LAYERS, conv=conv, num_experts=EXPERTS, **options)


def moefied(kind: Any, **options: Any) -> nn.Module:
    return moefy(kind(IN, HIDDEN, LAYERS, OUT), num_experts=EXPERTS, **options)


def hetero(**options: Any) -> nn.Module:
    """PyG's own container, of a layer for each relation."""
    return HeteroConv(
        {
            relation: MoEConv("sage", IN, OUT, num_experts=EXPERTS, **options)
            for relation in RELATIONS
        }
    )


GNNS: dict[str, Callable[[], nn.Module]] = {
    "GNNMoE, gcn": partial(gnn, "gcn"),
    "GNNMoE, sage, a router a layer": partial(
        gnn, "sage", shared_router=False, router_input=("node", "neighbors", "degree"), k=2
    ),
    "GNNMoE, gat, shared": partial(gnn, "gat", start="shared", jk="cat"),
    "GNNMoE, one by one": partial(gnn, "le", every=2),
    "GNNMoE, gin, experts choose once": partial(
        gnn, "gin", router="expert_choice", shared_router=True
    ),
    "GNNMoE, dense": partial(gnn, "gcn", router=None),
}
HETERO: dict[str, Callable[[], nn.Module]] = {
    "HeteroConv": hetero,
    "HeteroConv, copies": partial(hetero, start="copies"),
}
NETS: dict[str, Callable[[], nn.Module]] = {
    "MoEConv, sage": partial(Net, "sage"),
    "MoEConv, transformer, copies": partial(Net, "transformer", start="copies"),
}
MOEFIED: dict[str, partial[nn.Module]] = {
    "moefied GCN": partial(moefied, GCN),
    "moefied GraphSAGE, copies": partial(moefied, GraphSAGE, start="copies"),
    "moefied GIN": partial(moefied, GIN, k=2),
}
BASES: dict[str, Callable[[], nn.Module]] = {
    name: partial(make.args[0], IN, HIDDEN, LAYERS, OUT) for name, make in MOEFIED.items()
}
MODELS: dict[str, Callable[[], nn.Module]] = {**GNNS, **HETERO, **NETS, **MOEFIED}


@cache
def built(name: str) -> Any:
    """Of random parameters: at the start, experts are equal or add nothing."""
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def data_of(name: str, form: str) -> Any:
    return hetero_graph(form) if name in HETERO else graph(form)


def arguments(name: str, form: str) -> tuple[Any, Any]:
    """What a model is called with: the whole graph."""
    data = data_of(name, form)
    key, _ = FORMS[form]
    if name not in HETERO:
        return data.x, data.get(key)
    return data.x_dict, {relation: data[relation].get(key) for relation in RELATIONS}


def logits(found: Any) -> Tensor:
    """Those of papers, or of all nodes if there is one type."""
    tensor: Tensor = found["paper"] if isinstance(found, dict) else found
    return tensor


# Ways ---------------------------------------------------------------------------------------------


def forward(name: str, form: str, _: Path) -> Tensor:
    return logits(built(name)(*arguments(name, form)))


def inference(name: str, form: str, _: Path) -> Tensor:
    """Layer by layer in parts."""
    return logits(built(name).inference(graph(form), batch_size=5))


def sampled(name: str, form: str, _: Path) -> Tensor:
    """The seeds of a batch of a loader over a graph of this form."""
    loader = neighbor_loader(graph(form), ALL_HOPS, batch_size=SEEDS)
    batch: Any = next(iter(loader))
    return logits(built(name)(batch.x, batch.edge_index))[:SEEDS]


def batch_of() -> Any:
    """A sampled batch, the seeds first."""
    loader = neighbor_loader(graph("edge_index"), ALL_HOPS, batch_size=SEEDS)
    return next(iter(loader))


@cache
def expected(name: str, way: str) -> Tensor:
    """The forward; of a trimmed batch, that of the whole batch, whose seeds come first."""
    if way != "trimmed":
        return logits(built(name)(*arguments(name, "edge_index")))
    batch = batch_of()
    return logits(built(name)(batch.x, batch.edge_index))


def trimmed(name: str, form: str, _: Path) -> Tensor:
    """The seeds of a batch whose edges have this form, trimmed layer by layer."""
    batch = batch_of()
    adj = FORMS[form][1](batch.edge_index, (batch.num_nodes, batch.num_nodes))
    hops = batch.num_sampled_nodes, batch.num_sampled_edges
    if name in NETS:
        return logits(built(name)(batch.x, adj, *hops))[:SEEDS]
    names = ("num_sampled_nodes_per_hop", "num_sampled_edges_per_hop")
    return logits(built(name)(batch.x, adj, **dict(zip(names, hops, strict=True))))[:SEEDS]


def saved(name: str, form: str, folder: Path) -> Tensor:
    model = built(name)
    if name in GNNS:
        again: nn.Module = GNNMoE.from_pretrained(model.save_pretrained(folder))
    else:
        base = BASES[name]() if name in BASES else MODELS[name]()
        again = gmoe.load(gmoe.save(model, folder), base)
    return logits(again(*arguments(name, form)))


def exported(name: str, form: str, _: Path) -> Tensor:
    args = arguments(name, form)
    return logits(torch.export.export(built(name), args).module()(*args))


# The matrix ---------------------------------------------------------------------------------------

MATRICES = ("adj_t", "adj_t, COO", "SparseTensor")
COMPETING = ("GNNMoE, gin, experts choose once",)
WAYS: dict[str, tuple[Callable[[str, str, Path], Tensor], list[str]]] = {
    "forward": (forward, [*MODELS]),
    "inference": (inference, [*GNNS]),
    # To these, a batch is another group of nodes than the graph.
    "sampled": (sampled, [name for name in MODELS if name not in (*COMPETING, *HETERO)]),
    # PyG's own models and HeteroConv trim by themselves, or not at all.
    "trimmed": (trimmed, [*GNNS, *NETS]),
    "saved": (saved, [*MODELS]),
    "exported": (exported, [*MODELS]),
}


def refused(name: str, way: str, form: str) -> str | None:
    """The start of the message; ``None`` for what is taken."""
    if form == "none":
        return {"inference": "loader: got neither", "sampled": "data: got"}.get(
            way, "edge_index: got NoneType"
        )
    if way == "sampled" and form in MATRICES:
        return "data: got"
    if way == "exported" and form in MATRICES:
        return r"torch\.export: got a sparse matrix"
    if way == "trimmed" and form in MATRICES:
        return "edge_index: got a sparse matrix"
    return None


def left_to_pyg(name: str, way: str, form: str) -> bool:
    """True where PyG's own code fails: it trims no matrix, and a conv of its own exports none."""
    if name in NETS and way == "trimmed":
        return form in MATRICES
    return name in MOEFIED and (way, form) == ("exported", "EdgeIndex")


ENTRIES = [
    (name, way, form)
    for way, (_, names) in WAYS.items()
    for name in names
    # A model that came back is the forward's, whatever its edges.
    for form in (["edge_index"] if way == "saved" else FORMS)
    if not left_to_pyg(name, way, form)
]
EXPORTED = ("GNNMoE, gcn", "HeteroConv", "MoEConv, sage")
"""Models whose exports are in the default suite; the others are slow together."""


def is_slow(name: str, way: str, form: str) -> bool:
    is_run = refused(name, way, form) is None
    return way == "exported" and (name not in EXPORTED or (is_run and form != "edge_index"))


@pytest.mark.parametrize(
    ("name", "way", "form"),
    [
        pytest.param(
            *entry, id=" | ".join(entry), marks=[pytest.mark.slow] if is_slow(*entry) else []
        )
        for entry in ENTRIES
    ],
)
def test_it_equals_the_forward_or_is_refused(
    name: str, way: str, form: str, tmp_path: Path
) -> None:
    run, _ = WAYS[way]
    message = refused(name, way, form)
    with torch.no_grad():
        if message is not None:
            with pytest.raises(ValueError, match=f"^{message}"):
                run(name, form, tmp_path)
            return
        found = run(name, form, tmp_path)
        close_to = expected(name, way)[: len(found)]
    torch.testing.assert_close(found, close_to, rtol=0, atol=1e-10)


def test_later_layers_see_fewer_nodes_of_the_batch() -> None:
    """Else nothing was trimmed."""
    hops = batch_of().num_sampled_nodes
    assert sum(hops[:-2]) < sum(hops[:-1]) < sum(hops) < NODES


@pytest.mark.skipif(WITH_TORCH_SPARSE, reason="torch_sparse is there: its form is in the matrix")
def test_without_torch_sparse_its_form_cannot_be_made() -> None:
    with pytest.raises(ImportError, match="torch-sparse"):
        sparse_tensor(ring(), (NODES, NODES))


def test_two_forms_of_the_same_edges_are_refused() -> None:
    data = graph("edge_index")
    data.adj_t = graph("adj_t").adj_t
    with pytest.raises(ValueError, match=r"^loader: got edge_index and adj_t in the graph"):
        built("GNNMoE, gcn").inference(data)
