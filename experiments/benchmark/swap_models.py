"""The models of ``benchmark swap``: PyG's examples and this project's presets, dense or with experts."""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric import seed_everything
from torch_geometric.data import Data
from torch_geometric.nn import MLP, DeepGraphInfomax, GATConv, GCNConv, GINConv, SAGEConv
from torch_geometric.transforms import RandomLinkSplit, ToUndirected
from torch_geometric.utils import negative_sampling
from torchmetrics import Metric

import gmoe
from experiments.build import build_model, init_centroids
from experiments.config import GraphConfig, ImageConfig, RouterOptions
from experiments.data import load_tasks
from experiments.data.graph_data import GraphData, Split, Splits
from experiments.data.registry import PYG, load_graph
from experiments.data.user_graph import user_graph
from experiments.loop import attention_kernel, fit, make_fabric, make_optimizer, set_up
from experiments.presets import MOSAIC
from experiments.studies import SHARED, SMALL_VIT

Arm = Literal["dense", "moe", "dense-flops", "random", "oracle", "k-means", "shared-transform"]
"""``dense-flops`` is the dense model, widened to the active FLOPs of ``moe``; ``shared-transform`` has that option of
MoEConv where a layer's input is more than four times as wide as its output."""

WIDE: tuple[Arm, ...] = ("dense-flops", "random", "shared-transform")
"""Arms of rows whose features are wide."""

Say = Callable[[str], None]
Make = Callable[..., Any]
"""``make(conv class, in_channels, out_channels, **kwargs)`` gives a layer."""


class Progress:
    """Lines on the standard output, every five seconds at most.

    Args:
        about: begins each line.
    """

    def __init__(self, about: str) -> None:
        self.about = about
        self.last = time.monotonic()

    def __call__(self, text: str) -> None:
        if time.monotonic() - self.last >= 5:
            self.now(text)

    def now(self, text: str) -> None:
        """A line in any case."""
        self.last = time.monotonic()
        print(f"{self.about}: {text}", flush=True)


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


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A model and what it is trained on, with one seed.

    Args:
        metric: name of the metric.
        width: hidden width of the dense model.
        epochs: epochs.
        build: of an arm and a hidden width, the model; drawn from torch's generator.
        optimizer: of a model.
        loss: of a model in training.
        forward: runs the model on what it is evaluated on (of images, some).
        score: the metric of a model, evaluated on a split.
        validated: validation selects the epoch; otherwise it is the last one.
        eval_every: epochs between validations.
        train: trains a model in a folder in place of the plain loop, resumes there, and leaves the model with the
            selected weights; returns the best validation score and its epoch.
    """

    metric: str
    width: int
    epochs: int
    build: Callable[[Arm, int], nn.Module]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    loss: Callable[[Any], Tensor]
    forward: Callable[[Any], Any]
    score: Callable[[Any, Split], float]
    validated: bool = True
    eval_every: int = 1
    train: Callable[[Any, Arm, Path, Say], tuple[float, int]] | None = None


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


@torch.no_grad()
def evaluated(call: Callable[..., Any], model: nn.Module, *args: Any) -> Any:
    """``call(model, *args)`` of the model in evaluation."""
    return call(model.eval(), *args)


def dense_layer(conv: Any, in_channels: int, out_channels: int, **kwargs: Any) -> Any:
    """PyG's conv, as ``MoEConv`` builds it as its shared expert."""
    if conv is GINConv:
        return GINConv(MLP([in_channels, out_channels, out_channels], norm=None), **kwargs)
    return conv(in_channels, out_channels, **kwargs)


def layers_of(arm: Arm) -> Make:
    """What makes the layers of an arm: gmoe's defaults, all but the router of ``random``."""
    if arm in ("dense", "dense-flops"):
        return dense_layer
    if arm == "shared-transform":
        return narrowed_layer
    return gmoe.MoEConv if arm == "moe" else partial(gmoe.MoEConv, router=arm)


def narrowed_layer(conv: Any, in_channels: int, out_channels: int, **kwargs: Any) -> gmoe.MoEConv:
    """MoEConv as docs/which-settings-first.md has it for wide inputs."""
    width = out_channels * (kwargs.get("heads", 1) if kwargs.get("concat", True) else 1)
    return gmoe.MoEConv(conv, in_channels, out_channels, shared_transform=in_channels > 4 * width, **kwargs)


class TwoLayers(nn.Module):
    """Dropout, conv, activation, dropout, conv."""

    def __init__(self, conv1: Any, conv2: Any, act: Callable[[Tensor], Tensor], dropout: tuple[float, float]) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv1, conv2
        self.act, self.dropout = act, dropout

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """(N, classes) logits."""
        x = F.dropout(x, self.dropout[0], self.training)
        x = self.act(self.conv1(x, edge_index))
        x = F.dropout(x, self.dropout[1], self.training)
        out: Tensor = self.conv2(x, edge_index)
        return out


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A two-layer GNN and how it is trained.

    Args:
        convs: of what makes layers, and the widths of input, hidden layer and output.
        hidden: width, a head.
        lr, decay: Adam's learning rate, and weight decay of the first and of the second conv.
        dropout: before the first and before the second conv.
        act: activation.
    """

    convs: Callable[[Make, int, int, int], tuple[Any, Any]]
    hidden: int = 16
    lr: float = 0.01
    decay: tuple[float, float] = (5e-4, 0.0)
    dropout: tuple[float, float] = (0.5, 0.5)
    act: Callable[[Tensor], Tensor] = F.relu


def _plain(conv: Any, **kwargs: Any) -> Callable[[Make, int, int, int], tuple[Any, Any]]:
    return lambda make, width, hidden, out: (make(conv, width, hidden, **kwargs), make(conv, hidden, out, **kwargs))


def _heads(make: Make, width: int, hidden: int, out: int) -> tuple[Any, Any]:
    first = make(GATConv, width, hidden, heads=8, dropout=0.6)
    return first, make(GATConv, 8 * hidden, out, heads=1, concat=False, dropout=0.6)


RECIPES = {
    "gcn": Recipe(convs=_plain(GCNConv, cached=True)),
    "gat": Recipe(convs=_heads, hidden=8, lr=0.005, decay=(5e-4, 5e-4), dropout=(0.6, 0.6), act=F.elu),
    "sage": Recipe(convs=_plain(SAGEConv)),
    "gin": Recipe(convs=_plain(GINConv)),
}
"""PyG's examples/gcn.py and examples/gat.py; SAGE and GIN on the recipe of gcn.py."""

PLAIN_SAGE = Recipe(convs=_plain(SAGEConv), hidden=64, decay=(0.0, 0.0), dropout=(0.0, 0.5))
"""As PyG's full-batch SAGE: 64 wide, dropout .5 between the layers, lr .01."""


def classification(graph: GraphData, recipe: Recipe, where: Where, epochs: int = 200) -> Callable[[int], Problem]:
    """Node classification on the whole graph."""
    data = graph.data.to(where.device)
    assert isinstance(data, Data)

    def build(arm: Arm, hidden: int) -> nn.Module:
        convs = recipe.convs(layers_of(arm), data.num_features, hidden, graph.num_outputs)
        return TwoLayers(*convs, recipe.act, recipe.dropout)

    def optimizer(model: Any) -> torch.optim.Optimizer:
        convs = zip((model.conv1, model.conv2), recipe.decay, strict=True)
        groups: list[dict[str, Any]] = [
            {"params": list(conv.parameters()), "weight_decay": decay} for conv, decay in convs
        ]
        return torch.optim.Adam(groups, lr=recipe.lr)

    def problem(seed: int) -> Problem:
        split = graph.splits(seed)
        target = data.y[split["train"]]
        return Problem(
            metric=graph.metric_name,
            width=recipe.hidden,
            epochs=where.epochs or epochs,
            build=build,
            optimizer=optimizer,
            loss=lambda model: F.cross_entropy(model(data.x, data.edge_index)[split["train"]], target),
            forward=lambda model: model(data.x, data.edge_index),
            score=node_score(data, split, graph.metric),
        )

    return problem


def node_score(data: Data, split: Splits, metric: Callable[[], Metric]) -> Callable[[Any, Split], float]:
    """The metric of a model on the nodes of a split."""

    def score(model: Any, part: Split) -> float:
        found, rows = metric(), split[part]
        found.update(model(data.x, data.edge_index)[rows].cpu(), data.y[rows].cpu())
        return float(found.compute())

    return score


def _citation(name: str, recipe: str) -> Callable[[Where], Callable[[int], Problem]]:
    def load(where: Where) -> Callable[[int], Problem]:
        graph = load_graph(name, where.data_root / "planetoid", offline=where.offline)
        return classification(graph, RECIPES[recipe], where)

    return load


def _facebook(where: Where) -> Callable[[int], Problem]:
    graph = user_graph(where.data_root / "facebook.npz")
    return classification(replace(graph, data=ToUndirected()(graph.data)), PLAIN_SAGE, where)


class LinkPredictor(nn.Module):
    """Two convs; a link's logit is the product of the ends."""

    def __init__(self, conv1: Any, conv2: Any) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv1, conv2

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        """(N, out) nodes."""
        out: Tensor = self.conv2(self.conv1(x, edge_index).relu(), edge_index)
        return out


def link_logits(nodes: Tensor, links: Tensor) -> Tensor:
    """(L,) of (2, L) links."""
    return (nodes[links[0]] * nodes[links[1]]).sum(dim=-1)


def link_prediction(graph: GraphData, where: Where, hidden: int = 128, out: int = 64) -> Callable[[int], Problem]:
    """PyG's examples/link_pred.py; the split is drawn by the seed."""
    whole = graph.data
    assert isinstance(whole, Data)

    def build(arm: Arm, width: int) -> nn.Module:
        make = layers_of(arm)
        return LinkPredictor(make(GCNConv, whole.num_features, width), make(GCNConv, width, out))

    def problem(seed: int) -> Problem:
        seed_everything(seed)
        split = RandomLinkSplit(num_val=0.05, num_test=0.1, is_undirected=True, add_negative_train_samples=False)
        train, val, test = (part.to(where.device) for part in split(copy.copy(whole)))
        parts = {"train": train, "val": val, "test": test}

        def loss(model: Any) -> Tensor:
            nodes = model(train.x, train.edge_index)
            links, sizes = (
                train.edge_label_index,
                {"num_nodes": train.num_nodes, "num_neg_samples": train.edge_label.numel()},
            )
            none = negative_sampling(train.edge_index, **sizes, method="sparse")
            label = torch.cat([train.edge_label, train.edge_label.new_zeros(none.size(1))])
            return F.binary_cross_entropy_with_logits(link_logits(nodes, torch.cat([links, none], dim=-1)), label)

        def score(model: Any, part: Split) -> float:
            data = parts[part]
            logits = link_logits(model(data.x, data.edge_index), data.edge_label_index)
            return float(roc_auc_score(data.edge_label.cpu().numpy(), logits.sigmoid().cpu().numpy()))

        return Problem(
            metric="roc_auc",
            width=hidden,
            epochs=where.epochs or 100,
            build=build,
            optimizer=lambda model: torch.optim.Adam(model.parameters(), lr=0.01),
            loss=loss,
            forward=lambda model: model(test.x, test.edge_index),
            score=score,
        )

    return problem


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


def infomax(graph: GraphData, where: Where, hidden: int = 512) -> Callable[[int], Problem]:
    """PyG's examples/infomax_transductive.py: no labels in training, no validation, the last epoch is tested."""
    data = graph.data.to(where.device)
    assert isinstance(data, Data)

    def build(arm: Arm, width: int) -> nn.Module:
        model: nn.Module = DeepGraphInfomax(
            hidden_channels=width,
            encoder=Encoder(layers_of(arm)(GCNConv, data.num_features, width, cached=True), width),
            summary=lambda z, *_, **__: z.mean(dim=0).sigmoid(),
            corruption=lambda x, edge_index: (x[torch.randperm(x.size(0), device=x.device)], edge_index),
        )
        return model

    def problem(seed: int) -> Problem:
        split = graph.splits(seed)

        def score(model: Any, part: Split) -> float:
            z, fitted, tested = model.encoder(data.x, data.edge_index), split["train"], split[part]
            return float(model.test(z[fitted], data.y[fitted], z[tested], data.y[tested], max_iter=150))

        return Problem(
            metric="accuracy",
            width=hidden,
            epochs=where.epochs or 300,
            build=build,
            optimizer=lambda model: torch.optim.Adam(model.parameters(), lr=0.001),
            loss=lambda model: model.loss(*model(data.x, data.edge_index)),
            forward=lambda model: model.encoder(data.x, data.edge_index),
            score=score,
            validated=False,
        )

    return problem


DEFAULTS = RouterOptions(weight="score", balance="bias")
"""gmoe's, which a configuration of this project pins to older ones where they are not given."""


def configured(config: GraphConfig, where: Where) -> Callable[[int], Problem]:
    """A GNNMoE of this project's presets on one whole graph, on plain edges; ``dense`` is the same with plain convs."""
    config = replace(config, adjacency="edge_index", shared_expert=True, dense_start=True, check_finite=False)
    root = where.data_root / "heterophilous" if config.dataset in PYG else where.data_root
    config = replace(config, data_root=root, offline=where.offline, epochs=where.epochs or config.epochs)
    task_of = load_tasks(config)
    router: dict[Arm, dict[str, Any]] = {
        "dense": {"router": "dense"},
        "dense-flops": {"router": "dense"},
        "moe": {"router": "token_choice", "options": DEFAULTS},
        "random": {"router": "random"},
        "oracle": {"router": "oracle"},
        "k-means": {"router": "multi_centroid", "options": RouterOptions(num_centroids=1)},
    }

    def problem(seed: int) -> Problem:
        task = task_of(seed)
        batches = {part: next(iter(task.loader(part, config.batch_size, None))) for part in ("train", "val", "test")}
        inputs = tuple(value.to(where.device) for value in batches["train"].inputs)
        train = batches["train"]

        def build(arm: Arm, width: int) -> nn.Module:
            model = build_model(replace(config, hidden=width, **router[arm]), task)
            if arm == "k-means":
                init_centroids(model, batches["train"].inputs, seed)
            return model

        def loss(model: Any) -> Tensor:
            logits, routings = model(*inputs, return_routing=True)
            return task.loss(train.counted(logits), train.target.to(logits.device)) + gmoe.aux_loss(routings).to(
                logits.device
            )

        def score(model: Any, part: Split) -> float:
            metric, batch = task.metric(), batches[part]
            metric.update(batch.counted(model(*inputs)).cpu(), batch.target)
            return float(metric.compute())

        return Problem(
            metric=task.metric_name,
            width=config.hidden,
            epochs=config.epochs,
            build=build,
            optimizer=lambda model: make_optimizer(config, model),
            loss=loss,
            forward=lambda model: model(*inputs),
            score=score,
            eval_every=config.eval_every,
        )

    return problem


def images(config: ImageConfig, where: Where) -> Callable[[int], Problem]:
    """A dense ViT, or the same through :func:`gmoe.moefy`, in the loop that trains all of this project's runs."""
    config = replace(config, data_root=where.data_root, offline=where.offline, epochs=where.epochs or config.epochs)
    config = replace(config, progress=False, device=where.device.type)
    task_of = load_tasks(config)

    def problem(seed: int) -> Problem:
        task, fabric = task_of(seed), make_fabric(config)

        @cache
        def batch(part: Split) -> Any:
            return fabric.to_device(next(iter(task.loader(part, config.batch_size, seed if part == "train" else None))))

        def build(arm: Arm, width: int) -> nn.Module:
            model = build_model(replace(config, router="dense", hidden=width), task)
            if arm in ("dense", "dense-flops"):
                return model
            return gmoe.moefy(model) if arm == "moe" else gmoe.moefy(model, router=arm)

        def forward(model: Any, part: Split = "test") -> Tensor:
            with fabric.autocast(), attention_kernel(fabric.device, config):
                logits: Tensor = model(*batch(part).inputs)
            return logits

        def score(model: Any, part: Split) -> float:
            metric, say = task.metric().to(fabric.device), Progress(f"{task.name} {part}")
            with fabric.autocast(), attention_kernel(fabric.device, config):
                for pictures, target, _ in map(fabric.to_device, task.loader(part, config.batch_size, None)):
                    metric.update(model(*pictures), target)
                    say("evaluates")
            return float(metric.compute())

        def train(model: Any, arm: Arm, folder: Path, say: Say) -> tuple[float, int]:
            epochs = itertools.count(1)
            steps = task.steps(config.batch_size)

            def loader(part: Split, batch_size: int, shuffle: int | None) -> Any:
                about = f"epoch {next(epochs)} here" if part == "train" else part
                for step, drawn in enumerate(task.loader(part, batch_size, shuffle)):
                    say(f"{about}, batch {step + 1}" + (f" of {steps}" if part == "train" else ""))
                    yield drawn

            run = replace(config, router="dense" if arm.startswith("dense") else "token_choice")
            with set_up(fabric, model, run, replace(task, loader=loader)) as training:
                progress = fit(training, seed, folder)
                evaluated(forward, model)  # where all epochs were done already, nothing was recorded yet
            return progress["best_val"], progress["best_epoch"] + 1

        return Problem(
            metric=task.metric_name,
            width=config.hidden,
            epochs=config.epochs,
            build=build,
            optimizer=lambda model: make_optimizer(config, model),
            loss=lambda model: task.loss(forward(model, "train"), batch("train").target),
            forward=forward,
            score=score,
            train=train,
        )

    return problem


def _cora(make: Callable[[GraphData, Where], Callable[[int], Problem]]) -> Callable[[Where], Callable[[int], Problem]]:
    return lambda where: make(load_graph("cora", where.data_root / "planetoid", offline=where.offline), where)


def _infomax(where: Where) -> Callable[[int], Problem]:
    unscaled = replace(PYG["cora"], kwargs={"name": "Cora"})  # the example does not normalize the features
    return infomax(unscaled.load("cora", where.data_root / "planetoid", where.offline), where)


MINESWEEPER_SWAP = SHARED
MOSAIC_SWAP = replace(MOSAIC, shared_router=True)

ROWS: dict[str, Row] = {
    **{
        f"{name}-{recipe}": Row(about=about, load=_citation(name, recipe), arms=WIDE)
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
        load=lambda where: configured(MINESWEEPER_SWAP, where),
    ),
    "mosaic": Row(
        about="GNNMoE, 2 SAGE layers of 16, a shared router, 150 epochs; 8 planted regions",
        load=lambda where: configured(MOSAIC_SWAP, where),
        arms=("dense-flops", "random", "oracle", "k-means"),
    ),
    "cora-linkpred": Row(
        about="examples/link_pred.py of PyG, split drawn by seed", load=_cora(link_prediction), arms=WIDE
    ),
    "cora-infomax": Row(about="examples/infomax_transductive.py of PyG", load=_infomax, arms=WIDE),
    "cifar10-vit": Row(
        about="6 blocks of 96, MLPs of 192, 5 epochs in bf16, through moefy; the recipe of the study cifar10-claims",
        load=lambda where: images(SMALL_VIT, where),
        seeds=3,
    ),
}
"""The class swapped, and nothing else."""
