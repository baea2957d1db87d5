"""The rows of ``benchmark swap``: PyG's examples and this project's presets, dense or with experts."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric import seed_everything
from torch_geometric.nn import DeepGraphInfomax, GATConv, GCNConv, GINConv, SAGEConv, Sequential
from torch_geometric.transforms import RandomLinkSplit
from torch_geometric.utils import negative_sampling
from tqdm import trange

import gmoe
from experiments.build import build_model, init_centroids, make_fabric
from experiments.config import GraphConfig, ImageConfig, RouterOptions
from experiments.data import Batch, Split, load_tasks
from experiments.loop import Progress, attention_kernel, fit, make_optimizer, set_up
from experiments.presets import MOSAIC
from experiments.studies import SHARED, SMALL_VIT
from gmoe.conv.kinds import factory_of

Arm = Literal["dense", "moe", "dense-flops", "random", "oracle", "k-means", "shared-transform"]
"""``dense-flops`` is the dense model, widened to the active FLOPs of ``moe``; ``shared-transform`` has that option of
MoEConv where a layer's input is more than four times as wide as its output."""
Config = GraphConfig | ImageConfig
load = lru_cache(maxsize=1)(load_tasks)  # the data of one row at a time


@torch.no_grad()
def evaluated(call: Callable[..., Any], model: nn.Module, *args: Any) -> Any:
    """``call(model, *args)`` of the model in evaluation."""
    return call(model.eval(), *args)


class Problem:
    """A model and what it is trained on, with one seed."""

    validated = True  # validation selects the epoch; otherwise it is the last one

    def __init__(self, config: Config, seed: int) -> None:
        self.config, self.seed, self.task, self.fabric = config, seed, load(config)(seed), make_fabric(config)
        self.batch = cache(self._batch)

    def _batch(self, part: Split) -> Batch:
        """The first batch of a split: of a whole graph, all there is."""
        seed = self.seed if part == "train" else None
        return self.fabric.to_device(next(iter(self.task.loader(part, self.config.batch_size, seed))))

    def build(self, arm: Arm, width: int) -> nn.Module:
        """The model of an arm and a hidden width, drawn from torch's generator."""
        raise NotImplementedError

    def drawn(self, arm: Arm, width: int) -> nn.Module:
        """The model of the seed: an arm with experts has the dense layers of the dense arm."""
        seed_everything(self.seed)
        return self.build(arm, width).to(self.fabric.device)

    def optimizer(self, model: Any) -> torch.optim.Optimizer:
        """Of a model."""
        return torch.optim.Adam(model.parameters(), lr=self.config.lr)

    def logits(self, model: Any, batch: Batch) -> Tensor:
        """Those of a batch that count."""
        with self.fabric.autocast(), attention_kernel(self.fabric.device, self.config):
            return batch.counted(model(*batch.inputs))

    def forward(self, model: Any) -> Any:
        """Run the model on the test set (of images, on some)."""
        return self.logits(model, self.batch("test"))

    def loss(self, model: Any) -> Tensor:
        """Of a model in training."""
        return self.task.loss(self.logits(model, self.batch("train")), self.batch("train").target)

    def score(self, model: Any, part: Split) -> float:
        """The metric on a split, of a model in evaluation."""
        metric = self.task.metric().to(self.fabric.device)
        for batch in map(self.fabric.to_device, self.task.loader(part, self.config.batch_size, None)):
            metric.update(self.logits(model, batch), batch.target)
        return float(metric.compute())

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Forward, loss, backward and optimizer."""
        model.train()
        optimizer.zero_grad()
        self.loss(model).backward()
        optimizer.step()

    def train(self, model: nn.Module, folder: Path) -> tuple[float, int]:
        """Train, and leave the model as it was at the first epoch that validated best; the score and number of it."""
        optimizer, epochs = self.optimizer(model), self.config.epochs
        best, state = (-math.inf, epochs), model.state_dict()
        for epoch in trange(1, epochs + 1, desc=folder.name, leave=False, mininterval=5):
            self.step(model, optimizer)
            if self.validated:
                val = evaluated(self.score, model, "val")
                if val > best[0]:
                    best, state = (val, epoch), copy.deepcopy(model.state_dict())
        model.load_state_dict(state)
        return best


def layer(arm: Arm, conv: Any, in_channels: int, out_channels: int, **kwargs: Any) -> Any:
    """PyG's conv, or gmoe's defaults in its place, all but the router of ``random``."""
    if arm.startswith("dense"):
        return factory_of(conv)(in_channels, out_channels, **kwargs)
    if arm == "shared-transform":
        kwargs["shared_transform"] = in_channels > 4 * out_channels * kwargs.get("heads", 1)
    router = "random" if arm == "random" else "token_choice"
    return gmoe.MoEConv(conv, in_channels, out_channels, router=router, **kwargs)


class GCN(Problem):
    """PyG's examples/gcn.py: dropout, conv, activation, dropout, conv. In pairs, what the first and the second have."""

    conv: Any = GCNConv
    kwargs: ClassVar[tuple[dict[str, Any], ...]] = ({"cached": True}, {"cached": True})
    decay = (5e-4, 0.0)
    dropout = (0.5, 0.5)
    act: type[nn.Module] = nn.ReLU

    def build(self, arm: Arm, width: int, out_channels: int | None = None) -> nn.Module:
        (first, second), (dropout1, dropout2) = self.kwargs, map(nn.Dropout, self.dropout)
        conv1 = layer(arm, self.conv, self.task.in_channels, width, **first)
        width *= first.get("heads", 1)
        conv2 = layer(arm, self.conv, width, out_channels or self.task.num_classes, **second)
        edges = "x, edge_index -> x"
        return Sequential("x, edge_index", [(dropout1, "x -> x"), (conv1, edges), self.act(), dropout2, (conv2, edges)])

    def optimizer(self, model: Any) -> torch.optim.Optimizer:
        convs = zip((model[1], model[4]), self.decay, strict=True)
        groups = [{"params": list(conv.parameters()), "weight_decay": decay} for conv, decay in convs]
        return torch.optim.Adam(groups, lr=self.config.lr)


class GAT(GCN):
    """PyG's examples/gat.py."""

    conv, act = GATConv, nn.ELU
    kwargs = ({"heads": 8, "dropout": 0.6}, {"heads": 1, "concat": False, "dropout": 0.6})
    decay, dropout = (5e-4, 5e-4), (0.6, 0.6)


class SAGE(GCN):
    """PyG's examples/gcn.py with SAGEConv."""

    conv, kwargs = SAGEConv, ({}, {})


class GIN(SAGE):
    """The same with GINConv of a two-layer MLP."""

    conv = GINConv


class PlainSAGE(SAGE):
    """As PyG's full-batch SAGE: no weight decay, dropout between the layers."""

    decay, dropout = (0.0, 0.0), (0.0, 0.5)


class Links(GCN):
    """PyG's examples/link_pred.py; the split is drawn by the seed. A link's logit is the product of its ends."""

    kwargs, decay, dropout = ({}, {}), (0.0, 0.0), (0.0, 0.0)

    def __init__(self, config: Config, seed: int) -> None:
        super().__init__(config, seed)
        seed_everything(seed)
        split = RandomLinkSplit(num_val=0.05, num_test=0.1, is_undirected=True, add_negative_train_samples=False)
        parts = [part.to(self.fabric.device) for part in split(copy.copy(self.task.graph))]
        self.parts: dict[Split, Any] = dict(zip(("train", "val", "test"), parts, strict=True))

    def build(self, arm: Arm, width: int, out_channels: int | None = 64) -> nn.Module:
        return super().build(arm, width, out_channels)

    def forward(self, model: Any, part: Split = "test") -> Any:
        return model(self.parts[part].x, self.parts[part].edge_index)

    def loss(self, model: Any) -> Tensor:
        nodes, train = self.forward(model, "train"), self.parts["train"]
        label, links = train.edge_label, train.edge_label_index
        none = negative_sampling(train.edge_index, train.num_nodes, label.numel(), method="sparse")
        label, (a, b) = torch.cat([label, label.new_zeros(none.size(1))]), torch.cat([links, none], dim=-1)
        return F.binary_cross_entropy_with_logits((nodes[a] * nodes[b]).sum(dim=-1), label)

    def score(self, model: Any, part: Split) -> float:
        nodes, label, (a, b) = self.forward(model, part), self.parts[part].edge_label, self.parts[part].edge_label_index
        return float(roc_auc_score(label.cpu().numpy(), (nodes[a] * nodes[b]).sum(dim=-1).sigmoid().cpu().numpy()))


class Infomax(Problem):
    """PyG's examples/infomax_transductive.py: no labels in training, no validation, the last epoch is tested."""

    validated = False

    def __init__(self, config: Config, seed: int) -> None:
        super().__init__(config, seed)
        x, edge_index = self.batch("train").inputs
        self.inputs = ((x > 0).float(), edge_index)  # the example does not normalize the features, which are 0 or 1

    def build(self, arm: Arm, width: int) -> nn.Module:
        conv = layer(arm, GCNConv, self.task.in_channels, width, cached=True)
        encoder = Sequential("x, edge_index", [(conv, "x, edge_index -> x"), nn.PReLU(width)])

        def corruption(x: Tensor, edge_index: Tensor) -> tuple[Tensor, Tensor]:
            return x[torch.randperm(x.size(0), device=x.device)], edge_index

        model: nn.Module = DeepGraphInfomax(width, encoder, lambda z, *_: z.mean(dim=0).sigmoid(), corruption)
        return model

    def forward(self, model: Any) -> Any:
        return model.encoder(*self.inputs)

    def loss(self, model: Any) -> Tensor:
        loss: Tensor = model.loss(*model(*self.inputs))
        return loss

    def score(self, model: Any, part: Split) -> float:
        z, fitted, tested = self.forward(model), self.batch("train"), self.batch(part)
        return float(model.test(z[fitted.rows], fitted.target, z[tested.rows], tested.target, max_iter=150))


ROUTERS: dict[Arm, dict[str, Any]] = {
    "dense": {"router": "dense"},
    "dense-flops": {"router": "dense"},
    "moe": {"router": "token_choice"},
    "random": {"router": "random", "options": RouterOptions(weight="straight_through")},
    "oracle": {"router": "oracle"},
    "k-means": {"router": "multi_centroid", "options": RouterOptions(num_centroids=1)},
}


class Preset(Problem):
    """A GNNMoE of this project's presets, in the loop that trains them; ``dense`` is the same with plain convs."""

    def build(self, arm: Arm, width: int) -> nn.Module:
        model = build_model(replace(self.config, hidden=width, **ROUTERS[arm]), self.task)
        if arm == "k-means":
            init_centroids(model, self.batch("train").inputs, self.seed)
        return model

    def optimizer(self, model: Any) -> torch.optim.Optimizer:
        return make_optimizer(self.config, model)

    def train(self, model: nn.Module, folder: Path) -> tuple[float, int]:
        folder.mkdir(parents=True, exist_ok=True)
        with set_up(self.fabric, model, self.config, self.task) as training:
            reached = fit(training, self.seed, folder, Progress(self.config.epochs))  # resumes what the folder holds
            evaluated(self.forward, model)  # where all epochs were done already, nothing was recorded yet
        return reached.best_val, reached.best_epoch + 1


class Images(Preset):
    """A dense ViT, or the same through :func:`gmoe.moefy`."""

    def build(self, arm: Arm, width: int) -> nn.Module:
        model = super().build("dense", width)
        return model if arm.startswith("dense") else gmoe.moefy(model, router=ROUTERS[arm]["router"])


class Row(NamedTuple):
    """A line of the table: its problems, their configuration, and the arms beside ``dense`` and ``moe``."""

    problem: type[Problem]
    config: Config
    arms: tuple[Arm, ...] = ("dense-flops", "random")


def citation(problem: type[Problem], dataset: str, hidden: int = 16, epochs: int = 200, lr: float = 0.01) -> Row:
    """A row of a citation graph."""
    recipe: dict[str, Any] = {"hidden": hidden, "epochs": epochs, "lr": lr, "undirected": False}
    config = GraphConfig(dataset=dataset, data_root=Path("planetoid"), adjacency="edge_index", seeds=TEN, **recipe)
    return Row(problem, config, ("dense-flops", "random", "shared-transform"))


TEN = tuple(range(10))
OWN: dict[str, Any] = {"data_root": Path("facebook.npz"), "hidden": 64, "epochs": 200}
PLAIN: dict[str, Any] = {
    "adjacency": "edge_index", "router_input": ("node", "neighbors"), "shared_router": True, "check_finite": False,
}  # fmt: skip
CITED = ("cora", "citeseer")
ROWS: dict[str, Row] = {
    **{f"{name}-gcn": citation(GCN, name) for name in CITED},
    **{f"{name}-gat": citation(GAT, name, hidden=8, lr=0.005) for name in CITED},
    **{f"{name}-sage": citation(SAGE, name) for name in CITED},
    **{f"{name}-gin": citation(GIN, name) for name in CITED},
    "facebook-sage": Row(PlainSAGE, GraphConfig(dataset="graph", adjacency="edge_index", seeds=TEN, **OWN)),
    "minesweeper": Row(Preset, replace(SHARED, data_root=Path("heterophilous"), seeds=TEN, **PLAIN)),
    "mosaic": Row(Preset, replace(MOSAIC, seeds=TEN, **PLAIN), ("dense-flops", "random", "oracle", "k-means")),
    "cora-linkpred": citation(Links, "cora", hidden=128, epochs=100),
    "cora-infomax": citation(Infomax, "cora", hidden=512, epochs=300, lr=0.001),
    "cifar10-vit": Row(Images, replace(SMALL_VIT, data_root=Path())),
}
"""The class swapped, and nothing else; data roots are inside that of the command line."""
