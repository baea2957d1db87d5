"""Models as people train them: PyG's and timm's own, and ours in their place, on the same inputs.

Data are made: random graphs, molecules and images of the sizes that the rows name.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric import seed_everything
from torch_geometric.data import Batch
from torch_geometric.datasets import FakeDataset
from torch_geometric.nn import GAT, GCN, GIN, GCNConv, GraphSAGE, global_mean_pool
from torch_geometric.utils import to_undirected

import gmoe
from experiments.benchmark.measure import wait_for
from gmoe import GNNMoE, Graph, MoEConv, TokenChoice
from gmoe.conv.kinds import factory_of

EXPERTS = 8
"""E of every layer with experts; K is 1."""

HEADS = 8
"""Of GAT, whose heads share the hidden width."""

LEARNING_RATE = 1e-3

WARMUP = 3
"""Rounds that are not timed."""

WHOLE_MODELS: dict[str, type[nn.Module]] = {"gcn": GCN, "sage": GraphSAGE, "gin": GIN, "gat": GAT}
"""PyG's own models, by the name that GNNMoE has for their conv."""


class Variant(NamedTuple):
    """A model, and the loss of one step of its training."""

    model: nn.Module
    loss: Callable[[nn.Module], Tensor]


Row = dict[str, Variant]
"""Models that are compared with the first of them."""


class NodeTask(NamedTuple):
    """A graph whose nodes have labels, and the widths of the models on it."""

    nodes: int
    citations: int
    """Edges, before the reverse of each is added."""
    features: int
    hidden: int
    classes: int
    layers: int
    labeled: int
    """Nodes in the loss."""
    dropout: float = 0.0


CORA = NodeTask(
    nodes=2_708,
    citations=5_278,
    features=1_433,
    hidden=64,
    classes=7,
    layers=2,
    labeled=140,
    dropout=0.5,
)
EXAMPLE = CORA._replace(hidden=16)
SMALL = NodeTask(
    nodes=30,
    citations=60,
    features=16,
    hidden=64,
    classes=4,
    layers=3,
    labeled=30,
)


class MadeNodes(NamedTuple):
    """Random features, edges and labels."""

    x: Tensor
    edge_index: Tensor
    target: Tensor

    def adjacencies(self) -> dict[str, Any]:
        """Both forms in which ours take the edges: as they are, or as a graph that keeps sums."""
        graph = Graph(self.edge_index, len(self.x), x=self.x)
        return {"edge_index": self.edge_index, "Graph": graph}

    def loss(self, adjacency: Any, model: nn.Module) -> Tensor:
        """Cross-entropy of the labeled nodes, which are the first."""
        logits = model(self.x, adjacency)
        return F.cross_entropy(logits[: len(self.target)], self.target)


def power_law_graph(nodes: int, edges: int) -> Tensor:
    """Draw the ``edge_index`` of a graph with in-degrees by a power law.

    Uniform nodes cite others by weights of a power law (exponent 2.7), in both directions.
    """
    cited = torch.multinomial(torch.rand(nodes).pow(-1 / 1.7), edges, replacement=True)
    citing = torch.randint(nodes, (edges,))
    return to_undirected(torch.stack([cited, citing]), num_nodes=nodes)


def made_nodes(task: NodeTask) -> MadeNodes:
    """Draw a graph of a task's size."""
    edge_index = power_law_graph(task.nodes, task.citations)
    x = torch.randn(task.nodes, task.features)
    return MadeNodes(x, edge_index, torch.randint(task.classes, (task.labeled,)))


def node_row(kind: str, task: NodeTask) -> Row:
    """PyG's model of a kind, and GNNMoE."""
    data = made_nodes(task)
    widths = (task.features, task.hidden)
    options: dict[str, Any] = {"dropout": task.dropout}
    if kind == "gat":
        options["heads"] = HEADS
    # Both take the same arguments, but in another order.
    own = WHOLE_MODELS[kind](*widths, task.layers, task.classes, **options)
    ours = GNNMoE(*widths, task.classes, task.layers, conv=kind, num_experts=EXPERTS, **options)
    row = {"PyG": Variant(own, partial(data.loss, data.edge_index))}
    for form, adjacency in data.adjacencies().items():
        row[f"gmoe, {form}"] = Variant(copy.deepcopy(ours), partial(data.loss, adjacency))
    return row


class TwoLayers(nn.Module):
    """The model of PyG's examples/gcn.py."""

    def __init__(self, conv: Callable[..., nn.Module], task: NodeTask) -> None:
        super().__init__()
        # PyG's convs keep the normalized edges; experts keep those of a Graph.
        self.conv1 = conv(task.features, task.hidden, cached=True)
        self.conv2 = conv(task.hidden, task.classes, cached=True)
        self.dropout = nn.Dropout(task.dropout)

    def forward(self, x: Tensor, adjacency: Any) -> Tensor:
        """(N, C) logits."""
        h = self.conv1(self.dropout(x), adjacency).relu()
        return self.conv2(self.dropout(h), adjacency)


def example_row(task: NodeTask) -> Row:
    """PyG's examples/gcn.py, and the same with the class of its layers swapped."""
    data = made_nodes(task)
    own = TwoLayers(GCNConv, task)
    swapped = TwoLayers(partial(MoEConv, GCNConv, num_experts=EXPERTS), task)
    row = {"PyG": Variant(own, partial(data.loss, data.edge_index))}
    for form, adjacency in data.adjacencies().items():
        row[f"gmoe, {form}"] = Variant(copy.deepcopy(swapped), partial(data.loss, adjacency))
    return row


ATOM_TYPES = 120
BOND_TYPES = 22


class MoleculeModel(nn.Module):
    """The usual model of molecules: embeddings, residuals, batch norms, a mean over the atoms.

    A ``router`` decides for all layers at once, by the atoms.
    """

    def __init__(self, kind: str, width: int, layers: int, router: TokenChoice | None) -> None:
        super().__init__()
        conv: Callable[[], nn.Module] = partial(factory_of(kind), width, width)
        if router is not None:
            # Its routing is handed to each layer, which then needs no router.
            options: dict[str, Any] = {"router": None, "start": "copies"}
            conv = partial(MoEConv, kind, width, width, num_experts=EXPERTS, **options)
        self.atoms = nn.Embedding(ATOM_TYPES, width)
        self.router = router
        self.convs = nn.ModuleList(conv() for _ in range(layers))
        # Only GINE sees bonds: other convs would leave these embeddings without gradients.
        bonded = self.convs if kind == "gine" else ()
        self.bonds = nn.ModuleList(nn.Embedding(BOND_TYPES, width) for _ in bonded)
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(layers))
        self.dropout = nn.Dropout(0.5)
        self.out = nn.Linear(width, 1)

    def forward(self, atom: Tensor, bond: Tensor, adjacency: Any, batch: Tensor) -> Tensor:
        """(molecules, 1) logits, of types of atoms and bonds."""
        h = self.atoms(atom)
        shared = {} if self.router is None else {"routing": self.router(h)}
        of_layers = [{"edge_attr": bonds(bond)} for bonds in self.bonds]
        if not of_layers:
            of_layers = [{} for _ in self.convs]
        for conv, of_edges, norm in zip(self.convs, of_layers, self.norms, strict=True):
            h = h + self.dropout(norm(conv(h, adjacency, **of_edges, **shared)).relu())
        return self.out(global_mean_pool(h, batch))


def molecule_row(kind: str, molecules: int = 128, width: int = 300, layers: int = 5) -> Row:
    """PyG's convs on a batch of molecules, and experts in their place, routed once."""
    made = FakeDataset(num_graphs=molecules, avg_num_nodes=25, avg_degree=2.2)
    # Drawn on the CPU, whatever the device that the caller has chosen.
    batch = Batch.from_data_list(list(made)).to(torch.get_default_device())
    edge_index = batch.edge_index
    molecule = batch.batch
    atom = torch.randint(ATOM_TYPES, molecule.shape)
    bond = torch.randint(BOND_TYPES, edge_index.shape[1:])
    target = torch.randint(2, (molecules, 1)).float()

    def loss(adjacency: Callable[[], Any], model: nn.Module) -> Tensor:
        logits = model(atom, bond, adjacency(), molecule)
        return F.binary_cross_entropy_with_logits(logits, target)

    def plain() -> Tensor:
        return edge_index

    def graph() -> Graph:
        # In each step: a loader gives other molecules each time.
        return Graph(edge_index, len(atom))

    # As GNNMoE routes copies.
    options: dict[str, Any] = {"weight": "straight_through", "balance": None, "noise": True}
    router = TokenChoice(width, num_experts=EXPERTS, **options)
    ours = MoleculeModel(kind, width, layers, router)
    return {
        "PyG": Variant(MoleculeModel(kind, width, layers, None), partial(loss, plain)),
        "gmoe, edge_index": Variant(ours, partial(loss, plain)),
        "gmoe, Graph": Variant(copy.deepcopy(ours), partial(loss, graph)),
    }


def sampled_row(
    nodes: tuple[int, int, int] = (512, 4_600, 25_000),
    edges: tuple[int, int] = (5_000, 42_000),
    features: int = 100,
    hidden: int = 256,
    classes: int = 47,
) -> Row:
    """PyG's GraphSAGE on a batch that NeighborLoader gives, trimmed a layer, and GNNMoE.

    Args:
        nodes: seeds, and what each hop adds, nearest first.
        edges: of each hop.
        features, hidden, classes: widths.
    """
    seeds, near, _ = nodes
    first, second = edges
    # Edges of a hop go from all nodes that were seen by then to those of the hop before it.
    source = torch.cat(
        [
            torch.randint(seeds + near, (first,)),
            torch.randint(sum(nodes), (second,)),
        ]
    )
    destination = torch.cat(
        [
            torch.randint(seeds, (first,)),
            torch.randint(seeds, seeds + near, (second,)),
        ]
    )
    edge_index = torch.stack([source, destination])
    x = torch.randn(sum(nodes), features)
    target = torch.randint(classes, (seeds,))
    trim = {
        "num_sampled_nodes_per_hop": list(nodes),
        "num_sampled_edges_per_hop": list(edges),
    }

    def loss(adjacency: Callable[[], Any], model: nn.Module) -> Tensor:
        return F.cross_entropy(model(x, adjacency(), **trim)[:seeds], target)

    def plain() -> Tensor:
        return edge_index

    def graph() -> Graph:
        # In each step, as above.
        return Graph(edge_index, len(x))

    own = GraphSAGE(features, hidden, 2, classes)
    ours = GNNMoE(features, hidden, classes, 2, conv="sage", num_experts=EXPERTS)
    return {
        "PyG": Variant(own, partial(loss, plain)),
        "gmoe, edge_index": Variant(ours, partial(loss, plain)),
        "gmoe, Graph": Variant(copy.deepcopy(ours), partial(loss, graph)),
    }


def vit_row(name: str, batch: int) -> Row:
    """A ViT of timm's, and the same with experts in every second block, in both starts."""
    import timm  # which graphs do without

    own: Any = timm.create_model(name)
    images = torch.randn(batch, *own.default_cfg["input_size"])
    target = torch.randint(own.num_classes, (batch,))

    def loss(model: nn.Module) -> Tensor:
        return F.cross_entropy(model(images), target)

    def with_experts(**options: Any) -> Variant:
        return Variant(gmoe.moefy(copy.deepcopy(own), num_experts=EXPERTS, **options), loss)

    return {
        "timm": Variant(own, loss),
        "gmoe, moefy": with_experts(),
        "gmoe, moefy, plain": with_experts(start="plain"),
    }


ROWS: dict[str, Callable[[], Row]] = {
    **{f"cora-{kind}": partial(node_row, kind, CORA) for kind in WHOLE_MODELS},
    "example-gcn": partial(example_row, EXAMPLE),
    **{f"molecules-{kind}": partial(molecule_row, kind) for kind in ("gine", "gcn")},
    "sampled-sage": sampled_row,
    "vit-tiny": partial(vit_row, "vit_tiny_patch16_224", 4),
    **{f"small-{kind}": partial(node_row, kind, SMALL) for kind in WHOLE_MODELS},
}
"""What is trained, by the name of the command line."""


def build_row(name: str, device: torch.device) -> Row:
    """The models of a row, drawn from a fixed seed; the first, PyG's or timm's own, twice.

    In turns no model is behind its like, which would leave it warm caches: a tenth of a step of
    30 nodes.
    """
    seed_everything(0)
    with device:
        row = ROWS[name]()
    (own, first), (other, second), *others = row.items()
    again = first._replace(model=copy.deepcopy(first.model))
    return {own: first, other: second, f"{own} again": again, **dict(others)}


class Times(NamedTuple):
    """Seconds of a training step, and of its parts; the forward pass has the loss."""

    forward: float
    backward: float
    optimizer: float
    step: float


class Training:
    """A model with Adam in its fused form; a call is one step, which leaves no gradients behind.

    Times are of the CPU, of all threads; on other devices those of a clock.
    """

    def __init__(self, variant: Variant, device: torch.device) -> None:
        self.model = variant.model.train()
        self.loss = variant.loss
        self.device = device
        self.optimizer = torch.optim.Adam(self.model.parameters(), LEARNING_RATE, fused=True)
        self.times: list[Times] = []

    def forward(self) -> Tensor:
        """The loss of a step."""
        return self.loss(self.model)

    def __call__(self) -> None:
        """Run one step."""
        start = self._now()
        loss = self.forward()
        computed = self._now()
        loss.backward()
        derived = self._now()
        self.optimizer.step()
        self.optimizer.zero_grad()
        end = self._now()
        parts = (computed - start, derived - computed, end - derived)
        self.times.append(Times(*parts, step=end - start))

    def _now(self) -> float:
        wait_for(self.device)
        return time.process_time() if self.device.type == "cpu" else time.perf_counter()


def enough_repeats(trainings: Iterable[Training], repeats: int, seconds: float) -> int:
    """So many, or more where they take less than these seconds: minima of quick steps need it."""
    one_round = 0.0
    for training in trainings:
        # The first step is slow: it meets cold caches, and makes Adam's moments.
        training()
        training()
        one_round += training.times[-1].step
    return max(repeats, math.ceil(seconds / one_round))


def least(training: Training, repeats: int) -> Times:
    """The fastest step, and the fastest of each part, among the last so many."""
    return Times(*(min(of_part) for of_part in zip(*training.times[-repeats:], strict=True)))
