"""The models of ``benchmark swap``: PyG's examples and this project's presets, dense or with experts."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric import seed_everything
from torch_geometric.data import Data
from torch_geometric.nn import MLP, DeepGraphInfomax, GATConv, GCNConv, GINConv, SAGEConv
from torch_geometric.transforms import RandomLinkSplit, ToUndirected
from torch_geometric.utils import negative_sampling

import gmoe
from experiments.benchmark.measure import told
from experiments.build import build_model, init_centroids
from experiments.checkpoint import make_fabric
from experiments.config import GraphConfig, ImageConfig, RouterOptions
from experiments.data import GraphData, Split, load_tasks
from experiments.data.graphs import make_metric
from experiments.data.named import PYG, load_graph
from experiments.data.own_graph import own_graph
from experiments.loop import attention_kernel, fit, make_optimizer, set_up
from experiments.presets import MOSAIC
from experiments.progress import Progress
from experiments.studies import SHARED, SMALL_VIT

Arm = Literal["dense", "moe", "dense-flops", "random", "oracle", "k-means", "shared-transform"]
"""``dense-flops`` is the dense model, widened to the active FLOPs of ``moe``; ``shared-transform`` has that option of
MoEConv where a layer's input is more than four times as wide as its output."""

WIDE: tuple[Arm, ...] = ("dense-flops", "random", "shared-transform")
"""Arms of rows whose features are wide."""

Make: TypeAlias = Callable[..., Any]
"""``make(conv class, in_channels, out_channels, **kwargs)`` gives a layer."""


@dataclass(frozen=True, kw_only=True)
class Where:
    """Where the data are, and where it runs.

    Args:
        data_root: folder that holds ``planetoid``, ``heterophilous``, ``facebook.npz`` and ``cifar10``.
        offline: never download.
        device: torch's.
        epochs: in place of the rows' own.
    """

    data_root: Path
    offline: bool
    device: torch.device
    epochs: int | None = None

    def graph(self, name: str) -> GraphData:
        """One of the Planetoid graphs."""
        return load_graph(name, self.data_root / "planetoid", offline=self.offline)


@torch.no_grad()
def evaluated(call: Callable[..., Any], model: nn.Module, *args: Any) -> Any:
    """``call(model, *args)`` of the model in evaluation."""
    return call(model.eval(), *args)


class Problem(ABC):
    """A model and what it is trained on, with one seed.

    Attributes:
        metric: its name.
        width: hidden width of the dense model.
        epochs: epochs.
        lr: of Adam.
        validated: validation selects the epoch; otherwise it is the last one.
        eval_every: epochs between validations.
    """

    metric: str
    width: int
    epochs: int
    lr = 0.01
    validated = True
    eval_every = 1

    @abstractmethod
    def build(self, arm: Arm, width: int) -> nn.Module:
        """The model of an arm and a hidden width, drawn from torch's generator."""

    def optimizer(self, model: Any) -> torch.optim.Optimizer:
        """Of a model."""
        return torch.optim.Adam(model.parameters(), lr=self.lr)

    @abstractmethod
    def forward(self, model: Any) -> Any:
        """Run the model on what it is evaluated on (of images, some)."""

    @abstractmethod
    def loss(self, model: Any) -> Tensor:
        """Of a model in training."""

    @abstractmethod
    def score(self, model: Any, part: Split) -> float:
        """The metric on a split, of a model in evaluation."""

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
        """Forward, loss, backward and optimizer."""
        model.train()
        optimizer.zero_grad()
        loss = self.loss(model)
        loss.backward()
        optimizer.step()
        return loss.detach()

    def train(self, model: nn.Module, arm: Arm, folder: Path) -> tuple[float, int]:
        """Train, and leave the model as it was at the first epoch that validated best; the score and number of it.

        What is not finished may be kept in the folder.
        """
        optimizer = self.optimizer(model)
        best: tuple[float, int] = (-math.inf, self.epochs)
        state: dict[str, Tensor] = model.state_dict()
        for epoch in told(range(1, self.epochs + 1), f"{arm} epoch", every=5):
            self.step(model, optimizer)
            if self.validated and (epoch % self.eval_every == 0 or epoch == self.epochs):
                val = evaluated(self.score, model, "val")
                if val > best[0]:
                    best, state = (val, epoch), copy.deepcopy(model.state_dict())
        model.load_state_dict(state)
        return best


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table.

    Args:
        about: the model and its recipe.
        load: the data; the result gives the problem of a seed.
        seeds: how many seeds by default.
        arms: beside ``dense`` and ``moe``.
    """

    about: str
    load: Callable[[Where], Callable[[int], Problem]]
    seeds: int = 10
    arms: tuple[Arm, ...] = ("dense-flops", "random")


def dense_layer(conv: Any, in_channels: int, out_channels: int, **kwargs: Any) -> Any:
    """PyG's conv, as ``MoEConv`` builds it as its shared expert."""
    if conv is GINConv:
        return GINConv(MLP([in_channels, out_channels, out_channels], norm=None), **kwargs)
    return conv(in_channels, out_channels, **kwargs)


def narrowed_layer(conv: Any, in_channels: int, out_channels: int, **kwargs: Any) -> gmoe.MoEConv:
    """MoEConv as docs/which-settings-first.md has it for wide inputs."""
    width = out_channels * (kwargs.get("heads", 1) if kwargs.get("concat", True) else 1)
    return gmoe.MoEConv(conv, in_channels, out_channels, shared_transform=in_channels > 4 * width, **kwargs)


def layers_of(arm: Arm) -> Make:
    """What makes the layers of an arm: gmoe's defaults, all but the router of ``random``."""
    makers: dict[Arm, Make] = {"moe": gmoe.MoEConv, "shared-transform": narrowed_layer}
    return dense_layer if arm.startswith("dense") else makers.get(arm, partial(gmoe.MoEConv, router=arm))


class TwoLayers(nn.Module):
    """Dropout, conv, activation, dropout, conv."""

    def __init__(
        self,
        conv1: Any,
        conv2: Any,
        act: Callable[[Tensor], Tensor] = F.relu,
        dropout: tuple[float, float] = (0.0, 0.0),
    ) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv1, conv2
        self.act, self.dropout = act, dropout

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """(N, out) nodes."""
        x = F.dropout(x, self.dropout[0], self.training)
        x = self.act(self.conv1(x, edge_index))
        x = F.dropout(x, self.dropout[1], self.training)
        out: Tensor = self.conv2(x, edge_index)
        return out


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A two-layer GNN and how it is trained.

    Args:
        conv, kwargs: PyG's class, and its arguments.
        hidden: width, a head.
        heads: of the hidden layer; the output has one.
        lr, decay: Adam's learning rate, and weight decay of the first and of the second conv.
        dropout: before the first and before the second conv.
        act: activation.
    """

    conv: Any
    kwargs: dict[str, Any]
    hidden: int = 16
    heads: int | None = None
    lr: float = 0.01
    decay: tuple[float, float] = (5e-4, 0.0)
    dropout: tuple[float, float] = (0.5, 0.5)
    act: Callable[[Tensor], Tensor] = F.relu


RECIPES = {
    "gcn": Recipe(conv=GCNConv, kwargs={"cached": True}),
    "gat": Recipe(
        conv=GATConv,
        kwargs={"dropout": 0.6},
        hidden=8,
        heads=8,
        lr=0.005,
        decay=(5e-4, 5e-4),
        dropout=(0.6, 0.6),
        act=F.elu,
    ),
    "sage": Recipe(conv=SAGEConv, kwargs={}),
    "gin": Recipe(conv=GINConv, kwargs={}),
}
"""PyG's examples/gcn.py and examples/gat.py; SAGE and GIN on the recipe of gcn.py."""

PLAIN_SAGE = Recipe(conv=SAGEConv, kwargs={}, hidden=64, decay=(0.0, 0.0), dropout=(0.0, 0.5))
"""As PyG's full-batch SAGE: 64 wide, dropout .5 between the layers, lr .01."""


class NodeClassification(Problem):
    """Node classification on the whole graph."""

    def __init__(self, graph: GraphData, recipe: Recipe, where: Where, seed: int) -> None:
        self.graph, self.recipe, self.split = graph, recipe, graph.splits(seed)
        self.data: Any = graph.data.to(where.device)
        self.metric, self.width, self.epochs = graph.metric_name, recipe.hidden, where.epochs or 200

    def build(self, arm: Arm, width: int) -> nn.Module:
        make, recipe, heads = layers_of(arm), self.recipe, self.recipe.heads
        first: dict[str, Any] = {} if heads is None else {"heads": heads}
        second: dict[str, Any] = {} if heads is None else {"heads": 1, "concat": False}
        conv1 = make(recipe.conv, self.data.num_features, width, **first, **recipe.kwargs)
        conv2 = make(recipe.conv, (heads or 1) * width, self.graph.num_outputs, **second, **recipe.kwargs)
        return TwoLayers(conv1, conv2, recipe.act, recipe.dropout)

    def optimizer(self, model: Any) -> torch.optim.Optimizer:
        convs = zip((model.conv1, model.conv2), self.recipe.decay, strict=True)
        groups: Any = [{"params": list(conv.parameters()), "weight_decay": decay} for conv, decay in convs]
        return torch.optim.Adam(groups, lr=self.recipe.lr)

    def forward(self, model: Any) -> Any:
        return model(self.data.x, self.data.edge_index)

    def loss(self, model: Any) -> Tensor:
        rows = self.split["train"]
        return F.cross_entropy(self.forward(model)[rows], self.data.y[rows])

    def score(self, model: Any, part: Split) -> float:
        metric, rows = make_metric(self.graph.metric_name, self.graph.num_outputs)(), self.split[part]
        metric.update(self.forward(model)[rows].cpu(), self.data.y[rows].cpu())
        return float(metric.compute())


class LinkPrediction(Problem):
    """PyG's examples/link_pred.py; the split is drawn by the seed. A link's logit is the product of its ends."""

    metric, width = "roc_auc", 128

    def __init__(self, graph: GraphData, where: Where, seed: int) -> None:
        seed_everything(seed)
        split = RandomLinkSplit(num_val=0.05, num_test=0.1, is_undirected=True, add_negative_train_samples=False)
        parts = (part.to(where.device) for part in split(copy.copy(graph.data)))
        self.parts: dict[str, Data] = dict(zip(("train", "val", "test"), parts, strict=True))
        self.epochs = where.epochs or 100

    def build(self, arm: Arm, width: int) -> nn.Module:
        make = layers_of(arm)
        return TwoLayers(make(GCNConv, self.parts["train"].num_features, width), make(GCNConv, width, 64))

    def forward(self, model: Any, part: Split = "test") -> Any:
        return model(self.parts[part].x, self.parts[part].edge_index)

    @staticmethod
    def logits(nodes: Tensor, links: Tensor) -> Tensor:
        """(L,) of (2, L) links."""
        return (nodes[links[0]] * nodes[links[1]]).sum(dim=-1)

    def loss(self, model: Any) -> Tensor:
        nodes, train = self.forward(model, "train"), self.parts["train"]
        label, links = train.edge_label, train.edge_label_index
        none = negative_sampling(train.edge_index, train.num_nodes, label.numel(), method="sparse")
        label = torch.cat([label, label.new_zeros(none.size(1))])
        return F.binary_cross_entropy_with_logits(self.logits(nodes, torch.cat([links, none], dim=-1)), label)

    def score(self, model: Any, part: Split) -> float:
        data = self.parts[part]
        logits = self.logits(self.forward(model, part), data.edge_label_index)
        return float(roc_auc_score(data.edge_label.cpu().numpy(), logits.sigmoid().cpu().numpy()))


class Encoder(nn.Module):
    """A conv and a PReLU."""

    def __init__(self, conv: Any, width: int) -> None:
        super().__init__()
        self.conv = conv
        self.prelu = nn.PReLU(width)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """(N, width) nodes."""
        out: Tensor = self.prelu(self.conv(x, edge_index))
        return out


class Infomax(Problem):
    """PyG's examples/infomax_transductive.py: no labels in training, no validation, the last epoch is tested."""

    metric, width, lr, validated = "accuracy", 512, 0.001, False

    def __init__(self, graph: GraphData, where: Where, seed: int) -> None:
        self.data: Any = graph.data.to(where.device)
        self.split = graph.splits(seed)
        self.epochs = where.epochs or 300

    def build(self, arm: Arm, width: int) -> nn.Module:
        model: nn.Module = DeepGraphInfomax(
            hidden_channels=width,
            encoder=Encoder(layers_of(arm)(GCNConv, self.data.num_features, width, cached=True), width),
            summary=lambda z, *_, **__: z.mean(dim=0).sigmoid(),
            corruption=lambda x, edge_index: (x[torch.randperm(x.size(0), device=x.device)], edge_index),
        )
        return model

    def forward(self, model: Any) -> Any:
        return model.encoder(self.data.x, self.data.edge_index)

    def loss(self, model: Any) -> Tensor:
        loss: Tensor = model.loss(*model(self.data.x, self.data.edge_index))
        return loss

    def score(self, model: Any, part: Split) -> float:
        z, y, fitted, tested = self.forward(model), self.data.y, self.split["train"], self.split[part]
        return float(model.test(z[fitted], y[fitted], z[tested], y[tested], max_iter=150))


ROUTERS: dict[Arm, dict[str, Any]] = {
    "dense": {"router": "dense"},
    "dense-flops": {"router": "dense"},
    "moe": {"router": "token_choice"},
    "random": {"router": "random", "options": RouterOptions(weight="straight_through")},
    "oracle": {"router": "oracle"},
    "k-means": {"router": "multi_centroid", "options": RouterOptions(num_centroids=1)},
}


class Configured(Problem):
    """A task of this project.

    Args:
        config: how it is trained.
        task_of: the task of a seed.
        seed: the seed.
    """

    def __init__(self, config: GraphConfig | ImageConfig, task_of: Callable[[int], Any], seed: int) -> None:
        self.config, self.task, self.seed = config, task_of(seed), seed
        self.metric, self.width, self.epochs = self.task.metric_name, config.hidden, config.epochs
        self.eval_every = config.eval_every
        self.fabric = make_fabric(config)
        self.batch = cache(self._batch)

    def _batch(self, part: Split) -> Any:
        """The first batch of a split: of a whole graph, all there is."""
        shuffle = self.seed if part == "train" and self.task.kind == "image" else None
        return self.fabric.to_device(next(iter(self.task.loader(part, self.config.batch_size, shuffle))))

    def optimizer(self, model: Any) -> torch.optim.Optimizer:
        return make_optimizer(self.config, model)


class Nodes(Configured):
    """A GNNMoE of this project's presets on one whole graph, on plain edges; ``dense`` is the same with plain convs."""

    def build(self, arm: Arm, width: int) -> nn.Module:
        model = build_model(replace(self.config, hidden=width, **ROUTERS[arm]), self.task)
        if arm == "k-means":
            init_centroids(model, self.batch("train").inputs, self.seed)
        return model

    def forward(self, model: Any) -> Any:
        return model(*self.batch("train").inputs)

    def loss(self, model: Any) -> Tensor:
        batch = self.batch("train")
        logits, routings = model(*batch.inputs, return_routing=True)
        loss: Tensor = self.task.loss(batch.counted(logits), batch.target)
        return loss + gmoe.aux_loss(routings).to(loss.device)

    def score(self, model: Any, part: Split) -> float:
        metric, batch = self.task.metric(), self.batch(part)
        metric.update(batch.counted(self.forward(model)).cpu(), batch.target.cpu())
        return float(metric.compute())


class Images(Configured):
    """A dense ViT, or the same through :func:`gmoe.moefy`, in the loop that trains all of this project's runs."""

    def build(self, arm: Arm, width: int) -> nn.Module:
        model = build_model(replace(self.config, router="dense", hidden=width), self.task)
        if arm in ("dense", "dense-flops"):
            return model
        return gmoe.moefy(model) if arm == "moe" else gmoe.moefy(model, router=arm)

    def forward(self, model: Any, part: Split = "test") -> Tensor:
        with self.fabric.autocast(), attention_kernel(self.fabric.device, self.config):
            logits: Tensor = model(*self.batch(part).inputs)
        return logits

    def loss(self, model: Any) -> Tensor:
        loss: Tensor = self.task.loss(self.forward(model, "train"), self.batch("train").target)
        return loss

    def score(self, model: Any, part: Split) -> float:
        metric = self.task.metric().to(self.fabric.device)
        with self.fabric.autocast(), attention_kernel(self.fabric.device, self.config):
            for batch in self.task.loader(part, self.config.batch_size, None):
                batch = self.fabric.to_device(batch)
                metric.update(model(*batch.inputs), batch.target)
        return float(metric.compute())

    def train(self, model: Any, arm: Arm, folder: Path) -> tuple[float, int]:
        run = replace(self.config, router="dense" if arm.startswith("dense") else "token_choice")
        with set_up(self.fabric, model, run, self.task) as training:
            reached = fit(training, self.seed, folder, Progress(run.epochs, shown=False))
            evaluated(self.forward, model)  # where all epochs were done already, nothing was recorded yet
        return reached.best_val, reached.best_epoch + 1


def _citation(name: str, recipe: str, where: Where) -> Callable[[int], Problem]:
    return partial(NodeClassification, where.graph(name), RECIPES[recipe], where)


def _facebook(where: Where) -> Callable[[int], Problem]:
    graph = own_graph(where.data_root / "facebook.npz")
    return partial(NodeClassification, replace(graph, data=ToUndirected()(graph.data)), PLAIN_SAGE, where)


def _infomax(where: Where) -> Callable[[int], Problem]:
    unscaled = replace(PYG["cora"], kwargs={"name": "Cora"})  # the example does not normalize the features
    return partial(Infomax, unscaled.load("cora", where.data_root / "planetoid", where.offline), where)


def configured(kind: type[Configured], config: GraphConfig | ImageConfig, where: Where) -> Callable[[int], Problem]:
    """Problems of this project's tasks; of graphs, on plain edges."""
    root = where.data_root / "heterophilous" if config.dataset in PYG else where.data_root
    config = replace(config, data_root=root, offline=where.offline, epochs=where.epochs or config.epochs)
    if isinstance(config, GraphConfig):
        config = replace(config, adjacency="edge_index", router_input=("node", "neighbors"), check_finite=False)
    return partial(kind, replace(config, device=where.device.type), load_tasks(config))


ROWS: dict[str, Row] = {
    **{
        f"{name}-{recipe}": Row(about=about, load=partial(_citation, name, recipe), arms=WIDE)
        for recipe, about in (
            ("gcn", "examples/gcn.py of PyG, cached"),
            ("gat", "examples/gat.py of PyG"),
            ("sage", "examples/gcn.py of PyG with SAGEConv"),
            ("gin", "examples/gcn.py of PyG with GINConv of a two-layer MLP"),
        )
        for name in ("cora", "citeseer")
    },
    "facebook-sage": Row(about="a graph of one's own: 2 SAGE layers of 64, dropout .5, 10 splits", load=_facebook),
    "minesweeper": Row(
        about="GNNMoE, 8 SAGE layers of 16, E = 4, a shared router, 200 epochs, 10 splits",
        load=partial(configured, Nodes, SHARED),
    ),
    "mosaic": Row(
        about="GNNMoE, 2 SAGE layers of 16, a shared router, 150 epochs; 8 planted regions",
        load=partial(configured, Nodes, replace(MOSAIC, shared_router=True)),
        arms=("dense-flops", "random", "oracle", "k-means"),
    ),
    "cora-linkpred": Row(
        about="examples/link_pred.py of PyG, split drawn by seed",
        load=lambda where: partial(LinkPrediction, where.graph("cora"), where),
        arms=WIDE,
    ),
    "cora-infomax": Row(about="examples/infomax_transductive.py of PyG", load=_infomax, arms=WIDE),
    "cifar10-vit": Row(
        about="6 blocks of 96, MLPs of 192, 5 epochs in bf16, through moefy; the recipe of the study cifar10-claims",
        load=partial(configured, Images, SMALL_VIT),
        seeds=3,
    ),
}
"""The class swapped, and nothing else."""
