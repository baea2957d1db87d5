"""Does a swap hurt? Dense layers against gmoe's defaults in their place.

Measured are accuracy over seeds and the time of a step.
"""

from __future__ import annotations

import copy
import itertools
import math
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from filelock import FileLock, Timeout
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn import functional as F
from torch_geometric import seed_everything
from torch_geometric.nn import DeepGraphInfomax, Sequential
from torch_geometric.transforms import RandomLinkSplit
from torch_geometric.utils import negative_sampling
from tqdm import tqdm

import gmoe
from experiments.benchmark.measure import Benchmark, take_turns
from experiments.train.build import build_model, init_centroids
from experiments.train.config import GraphConfig, ImageConfig, RouterOptions
from experiments.train.data.load import load_tasks
from experiments.train.data.task import Split
from experiments.train.files import read_json
from experiments.train.loop import fit
from experiments.train.presets import CORA, GRAPH, MOSAIC, SHARED, SMALL_VIT, TEN
from experiments.train.processes import make_fabric
from experiments.train.progress import Progress
from experiments.train.results import environment, write_json
from experiments.train.routing_stats import noting_added, switched_off, switches
from experiments.train.training import attention_kernel, make_optimizer, set_up
from gmoe._checks import check, check_choice
from gmoe.conv.kinds import factory_of

Arm = Literal[
    "dense",
    "moe",
    "copies",
    "shared",
    "dense-flops",
    "random",
    "oracle",
    "k-means",
    "shared-transform",
]
"""``moe`` has the library's defaults: layers by themselves a shared expert, a GNN that routes once
copies. The other of these two is an arm of its own, ``copies`` or ``shared``; all others with
experts have a shared expert. ``dense-flops`` is the dense model, widened to the active FLOPs of
``shared``; ``shared-transform`` has that option of MoEConv where a layer's input is more than
four times as wide as its output."""
Config = GraphConfig | ImageConfig
PARTS: tuple[Split, ...] = get_args(Split)
load = lru_cache(maxsize=1)(load_tasks)  # the data of one row at a time


@torch.no_grad()
def evaluated(call: Callable[..., Any], model: nn.Module, *args: Any) -> Any:
    """``call(model, *args)`` of the model in evaluation."""
    return call(model.eval(), *args)


class Problem:
    """PyG's examples/gcn.py and gat.py, and the former with other convs: dropout, conv,
    activation, dropout, conv.

    A model and what it is trained on, with one seed. Validation selects the epoch.
    """

    def __init__(self, config: Config, seed: int) -> None:
        self.config: Any = config
        self.seed, self.task, self.fabric = seed, load(config)(seed), make_fabric(config)
        firsts = {
            part: next(iter(self.task.loader(part, config.batch_size, None))) for part in PARTS
        }
        # Of a whole graph, all there is
        self.batch: dict[Split, Any] = self.fabric.to_device(firsts)
        self.out_channels, self.cached = self.task.num_classes, True

    def build(self, arm: Arm, width: int) -> nn.Module:
        """The model of an arm and a hidden width, drawn from torch's generator."""
        (conv,), edges = self.config.conv, "x, edge_index -> x"
        first: dict[str, Any] = {"cached": self.cached} if conv == "gcn" else {}
        second = first
        if conv == "gat":
            first, second = {"heads": 8, "dropout": 0.6}, {"concat": False, "dropout": 0.6}
        conv1 = layer(arm, conv, self.task.in_channels, width, **first)
        conv2 = layer(arm, conv, width * first.get("heads", 1), self.out_channels, **second)
        before, between = nn.Dropout(self.config.input_dropout), nn.Dropout(self.config.dropout)
        act = nn.ELU() if conv == "gat" else nn.ReLU()
        return Sequential(
            "x, edge_index", [(before, "x -> x"), (conv1, edges), act, between, (conv2, edges)]
        )

    def drawn(self, arm: Arm, width: int) -> nn.Module:
        """The model of the seed: an arm with experts has the dense layers of the dense arm."""
        seed_everything(self.seed)
        return self.build(arm, width).to(self.fabric.device)

    def optimizer(self, model: Any) -> torch.optim.Optimizer:
        """Of a model."""
        decays = {
            1: self.config.weight_decay,
            4: self.config.weight_decay * (self.config.conv == ("gat",)),
        }
        groups = [
            {"params": list(model[at].parameters()), "weight_decay": decay}
            for at, decay in decays.items()
        ]
        return torch.optim.Adam(groups, lr=self.config.lr)  # gcn.py decays the first layer only

    def forward(self, model: Any, batch: Any = None) -> Any:
        """Run the model on a batch, by default of the test set."""
        batch = batch or self.batch["test"]
        with self.fabric.autocast(), attention_kernel(self.fabric.device, self.config):
            return batch.counted(model(*batch.inputs))

    def loss(self, model: Any) -> Any:
        """Of a model in training."""
        return self.task.loss(self.forward(model, self.batch["train"]), self.batch["train"].target)

    def score(self, model: Any, part: Split) -> float:
        """The metric on a split, of a model in evaluation."""
        metric = self.task.metric().to(self.fabric.device)
        for batch in map(
            self.fabric.to_device, self.task.loader(part, self.config.batch_size, None)
        ):
            metric.update(self.forward(model, batch), batch.target)
        return float(metric.compute())

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Forward, loss, backward and optimizer."""
        model.train()
        optimizer.zero_grad()
        self.loss(model).backward()
        optimizer.step()

    def train(self, model: nn.Module, folder: Path) -> tuple[float, int]:
        """Train; return score and number of the first epoch that validated best.

        Leaves the model as it was then.
        """
        optimizer, epochs = self.optimizer(model), self.config.epochs
        best, state = (-math.inf, epochs), model.state_dict()
        for epoch in tqdm(range(1, epochs + 1), desc=folder.name, leave=False, mininterval=5):
            self.step(model, optimizer)
            val = evaluated(self.score, model, "val")
            if val > best[0]:
                best, state = (val, epoch), copy.deepcopy(model.state_dict())
        model.load_state_dict(state)
        return best


def layer(arm: Arm, conv: str, in_channels: int, out_channels: int, **kwargs: Any) -> Any:
    """PyG's conv, or experts in its place, with gmoe's defaults but for what the arm says."""
    if arm.startswith("dense"):
        return factory_of(conv)(in_channels, out_channels, **kwargs)
    if arm != "moe":
        kwargs["start"] = "copies" if arm == "copies" else "shared"
    if arm == "shared-transform":
        kwargs["shared_transform"] = in_channels > 4 * out_channels * kwargs.get("heads", 1)
    router = "random" if arm == "random" else "token_choice"
    return gmoe.MoEConv(conv, in_channels, out_channels, router=router, **kwargs)


class Links(Problem):
    """PyG's examples/link_pred.py.

    The split is drawn by the seed. A link's logit is the product of its ends.
    """

    def __init__(self, config: Config, seed: int) -> None:
        super().__init__(config, seed)
        self.out_channels, self.cached = 64, False  # each part has edges of its own
        seed_everything(seed)
        split = RandomLinkSplit(
            num_val=0.05, num_test=0.1, is_undirected=True, add_negative_train_samples=False
        )
        parts = [part.to(self.fabric.device) for part in split(copy.copy(self.task.graph))]
        self.batch = dict(zip(PARTS, parts, strict=True))

    def forward(self, model: Any, batch: Any = None) -> Any:
        batch = batch or self.batch["test"]
        return model(batch.x, batch.edge_index)

    def loss(self, model: Any) -> Any:
        train = self.batch["train"]
        nodes, label, links = self.forward(model, train), train.edge_label, train.edge_label_index
        none = negative_sampling(train.edge_index, train.num_nodes, label.numel(), method="sparse")
        label, (a, b) = (
            torch.cat([label, label.new_zeros(none.size(1))]),
            torch.cat([links, none], dim=-1),
        )
        return F.binary_cross_entropy_with_logits((nodes[a] * nodes[b]).sum(dim=-1), label)

    def score(self, model: Any, part: Split) -> float:
        nodes, batch = self.forward(model, self.batch[part]), self.batch[part]
        a, b = batch.edge_label_index
        return float(
            roc_auc_score(batch.edge_label.cpu(), (nodes[a] * nodes[b]).sum(dim=-1).sigmoid().cpu())
        )


class Infomax(Problem):
    """PyG's examples/infomax_transductive.py: no labels in training, no validation."""

    def __init__(self, config: Config, seed: int) -> None:
        super().__init__(config, seed)
        x, edge_index = self.batch["train"].inputs
        # The example does not normalize the features, which are 0 or 1
        self.inputs = (
            (x > 0).float(),
            edge_index,
        )

    def build(self, arm: Arm, width: int) -> Any:
        conv = layer(arm, "gcn", self.task.in_channels, width, cached=True)
        encoder = Sequential("x, edge_index", [(conv, "x, edge_index -> x"), nn.PReLU(width)])
        return DeepGraphInfomax(  # summary, corruption
            width,
            encoder,
            lambda z, *_: z.mean(dim=0).sigmoid(),
            lambda x, edges: (x[torch.randperm(len(x))], edges),
        )

    def optimizer(self, model: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters(), lr=self.config.lr)

    def forward(self, model: Any, batch: Any = None) -> Any:
        return model.encoder(*self.inputs)

    def loss(self, model: Any) -> Any:
        return model.loss(*model(*self.inputs))

    def score(self, model: Any, part: Split) -> float:
        if part == "val":
            return math.nan  # the last epoch is tested
        z, fitted, tested = self.forward(model), self.batch["train"], self.batch[part]
        return float(
            model.test(z[fitted.rows], fitted.target, z[tested.rows], tested.target, max_iter=150)
        )


ROUTERS: dict[Arm, str] = {
    "dense-flops": "dense",
    "moe": "token_choice",
    "shared": "token_choice",
    "k-means": "multi_centroid",
}
OPTIONS = {
    "random": RouterOptions(weight="straight_through"),
    "k-means": RouterOptions(num_centroids=1),
}


class Preset(Problem):
    """A preset of this project, in the loop that trains it.

    A GNNMoE, or a dense ViT and :func:`gmoe.moefy` of it.
    """

    def build(self, arm: Arm, width: int) -> nn.Module:
        router = ROUTERS.get(arm, arm)
        if isinstance(self.config, ImageConfig) and router != "dense":
            return gmoe.moefy(self.build("dense", width), router=router)
        config = replace(
            self.config,
            hidden=width,
            router=router,
            start=None if arm == "moe" or router == "dense" else "shared",
            options=OPTIONS.get(arm, RouterOptions()),
        )
        model = build_model(config, self.task)
        if arm == "k-means":
            init_centroids(model, self.batch["train"].inputs, self.seed)
        return model

    def optimizer(self, model: Any) -> torch.optim.Optimizer:
        return make_optimizer(self.config, model)

    def train(self, model: nn.Module, folder: Path) -> tuple[float, int]:
        folder.mkdir(parents=True, exist_ok=True)
        with set_up(self.fabric, model, self.config, self.task) as training:
            # Resumes what the folder holds
            reached = fit(training, self.seed, folder, Progress(self.config.epochs))
            # Where all epochs were done already, nothing was recorded yet
            evaluated(self.forward, model)
        return reached.best_val, reached.best_epoch + 1


CITED = replace(
    CORA, data_root=Path("planetoid"), undirected=False, adjacency="edge_index", input_dropout=0.5
)
GAT = replace(CITED, hidden=8, lr=0.005, input_dropout=0.6, dropout=0.6)
LINKS = replace(CITED, hidden=128, epochs=100, weight_decay=0.0, input_dropout=0.0, dropout=0.0)
FACEBOOK = replace(
    GRAPH, data_root=Path("facebook.npz"), dropout=0.5, seeds=TEN, adjacency="edge_index"
)
CONTROLS: tuple[Arm, ...] = ("dense-flops", "random")
NARROWED: tuple[Arm, ...] = ("copies", *CONTROLS, "shared-transform")
PLAIN: dict[str, Any] = {
    "seeds": TEN,
    "adjacency": "edge_index",
    "shared_router": True,
    "check_finite": False,
}
PLAIN["router_input"] = ("node", "neighbors")
ROWS: dict[str, tuple[type[Problem], Config, tuple[Arm, ...]]] = {
    **{
        f"{name}-{conv}": (
            Problem,
            replace(GAT if conv == "gat" else CITED, dataset=name, conv=(conv,)),
            NARROWED,
        )
        for conv in ("gcn", "gat", "sage", "gin")
        for name in ("cora", "citeseer")
    },
    "facebook-sage": (Problem, FACEBOOK, ("copies", *CONTROLS)),
    "minesweeper": (
        Preset,
        replace(SHARED, data_root=Path("heterophilous"), **PLAIN),
        ("shared", *CONTROLS),
    ),
    "mosaic": (Preset, replace(MOSAIC, **PLAIN), ("shared", *CONTROLS, "oracle", "k-means")),
    "cora-linkpred": (Links, LINKS, NARROWED),
    "cora-infomax": (Infomax, replace(CITED, hidden=512, epochs=300, lr=0.001), NARROWED),
    "cifar10-vit": (Preset, replace(SMALL_VIT, data_root=Path()), CONTROLS),
}
"""Problem, configuration, with a data root inside that of the command line, and the arms beside
dense and moe."""


@dataclass(frozen=True, kw_only=True)
class SwapBenchmark(Benchmark):
    """The class swapped and nothing else: PyG's examples, presets, a ViT.

    Resumes from the file of `--json`.
    """

    rows: tuple[str, ...] = tuple(ROWS)
    """Names of rows."""
    arms: tuple[Arm, ...] = get_args(Arm)
    """What is trained beside `dense` and `moe`, where a row has it.
    The column off is read off the run of a shared expert."""
    seeds: int = 10
    """Seeds at most; images have 3."""
    threads: int = 1
    repeats: int = 15
    """Timed steps of each arm, after three that are not; 0 takes no times."""
    data_root: Path = Path("data")
    """Folder that holds planetoid, heterophilous, facebook.npz and cifar10."""
    offline: bool = False
    """Never download."""
    json: Path = Path("runs/swap.json")

    def run(self) -> dict[str, Any]:
        """By row ``runs`` by arm and ``time`` of a step.

        A folder beside the file holds what is not finished.

        Raises:
            ValueError: see :meth:`Measurement.run`; a file of another number of threads, on which
                rounding and times depend.
        """
        replace(self, repeats=self.repeats or 1).check_options()
        for name in self.rows:
            check_choice("rows", name, ROWS)
        # Two processes would overwrite each other's runs
        with _alone(self.json):
            found = self.kept()
            for name in self.rows:
                (problem, config, others), row = ROWS[name], found.setdefault(name, {"runs": {}})
                root = self.data_root / config.data_root
                config = replace(config, data_root=root, offline=self.offline, device=self.device)
                arms: list[Arm] = ["dense", "moe", *(arm for arm in others if arm in self.arms)]
                for seed, arm in itertools.product(config.seeds[: self.seeds], arms):
                    runs = row["runs"].setdefault(arm, [])
                    if seed in [run["seed"] for run in runs]:
                        continue
                    part = self.json.with_suffix("") / f"{name}-{arm}-{seed}"
                    runs.append(
                        train_arm(problem(config, seed), arm, width_of(arm, name, config), part)
                    )
                    write_json(self.json, self.content(found))
                    shutil.rmtree(part, ignore_errors=True)
                timed = [arm for arm in arms if arm not in ("random", "oracle", "k-means")]
                if self.repeats and self.lacks_times(row, timed):
                    row["time"] = step_times(name, config, timed, self.repeats)
                    write_json(self.json, self.content(found))
        return found

    def kept(self) -> dict[str, Any]:
        """What the file has, by row."""
        if not self.json.exists():
            return {}
        there = read_json(self.json, dict[str, Any])
        settings: dict[str, Any] = there.get("config") or {}
        found: dict[str, Any] = there.get("variants") or {}
        is_ours = {"device", "threads"} <= {*settings} and {*found} <= {*ROWS}
        check(is_ours, "json", f"{self.json}, of something else", "a file of swap, or a new one")
        for name in ("device", "threads"):
            value, then = getattr(self, name), settings[name]
            check(value == then, name, value, f"{then}, as in {self.json}, or another --json")
        return found

    def lacks_times(self, row: dict[str, Any], arms: Sequence[Arm]) -> bool:
        """True if a row has no times of some arms, or of another number of repeats."""
        times = row.get("time", {})
        return any(
            arm not in times or len(times[arm]["wall"]["values"]) != self.repeats for arm in arms
        )

    def content(self, found: dict[str, Any]) -> dict[str, Any]:
        """The content of the file: of the settings, those that are of all its figures."""
        content = super().content(found)
        content["config"] = {name: content["config"][name] for name in ("device", "threads")}
        return content

    def measured_on(self, found: dict[str, Any]) -> str:
        """Also the commits of runs that were kept from earlier commands."""
        runs = (run for row in found.values() for arm in row["runs"].values() for run in arm)
        of_runs = {str(run["commit"])[:7] for run in runs}
        line = super().measured_on(found)
        earlier = sorted(of_runs - {str(environment()["commit"])[:7]})
        return f"{line} Some runs are of {', '.join(earlier)}." if earlier else line


def _alone(file: Path) -> AbstractContextManager[Any]:
    """Refuse a file that another process writes."""
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(file.with_suffix(".lock"), timeout=0).acquire()
    except Timeout as error:
        raise ValueError(
            f"json: {file} is being written by another process; wait, or choose another"
        ) from error


def train_arm(problem: Problem, arm: Arm, width: int, folder: Path) -> dict[str, Any]:
    """Train one arm, and test it at the epoch that validation selects.

    An arm with experts is also tested with these switched off.
    """
    model = problem.drawn(arm, width)
    val, best_epoch = problem.train(model, folder)
    result = {
        "seed": problem.seed,
        "commit": environment()["commit"],
        "hidden": width,
        "test": evaluated(problem.score, model, "test"),
        "val": val if math.isfinite(val) else None,
        "best_epoch": best_epoch,  # from 1
        "epochs": problem.config.epochs,
    }
    if arm not in ("dense", "dense-flops"):
        result["live"] = live_experts(model, problem.forward)
    if switches(model):
        result["share"] = routed_share(model, problem.forward)
        result["off"] = evaluated(problem.score, switched_off(model), "test")
    tqdm.write(f"{folder.name}: test {100 * result['test']:.2f}")
    return result


def routed_share(model: nn.Module, forward: Callable[[Any], Any]) -> list[float]:
    """By layer the norm of what routed experts add, over that of the output, in evaluation."""
    share: list[float] = []
    evaluated(
        forward,
        noting_added(model, lambda _, added, y: share.append(float(added.norm() / y.norm()))),
    )
    return share


def live_experts(model: nn.Module, forward: Callable[[Any], Any]) -> list[float]:
    """By decision of a router, how many experts take more than 1 % of the tokens in evaluation."""
    with gmoe.record_routing(model) as routings:
        evaluated(forward, model)
    return [float((routing.load > 0.01 * routing.num_tokens).sum()) for routing in routings]


@cache
def width_of(arm: Arm, name: str, config: Config) -> int:
    """The hidden width of an arm.

    At that of ``dense-flops`` the dense model has the active FLOPs of ``shared``.
    """
    if arm != "dense-flops":
        return config.hidden
    problem = ROWS[name][0](config, 0)

    def cost(arm: Arm, width: int) -> int:
        return gmoe.count_flops(partial(evaluated, problem.forward), problem.drawn(arm, width))

    return gmoe.match_width(
        partial(cost, "dense"), cost("shared", config.hidden), start=config.hidden, tolerance=0.5
    )


def step_times(name: str, config: Config, arms: Sequence[Arm], repeats: int) -> dict[str, Any]:
    """Seconds of a training step of some arms in turns, see :func:`take_turns`.

    ``layers`` is how many layers have experts.
    """
    problem = ROWS[name][0](config, 0)
    models = {arm: problem.drawn(arm, width_of(arm, name, config)) for arm in arms}
    steps = {
        str(arm): partial(problem.step, model, problem.optimizer(model))
        for arm, model in models.items()
    }
    return {
        **take_turns(steps, repeats, problem.fabric.device, warmup=3),
        "layers": sum(isinstance(part, gmoe.MoELayer) for part in models["moe"].modules()),
    }
