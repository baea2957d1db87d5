"""The configuration of a run: a frozen dataclass for each kind of data, from which the command line is made.

And how commands end: by an error of one line, or by a signal. Imports nothing heavy, so that ``--help`` comes at once.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import json
import math
import os
import pkgutil
import re
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from itertools import product
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, Literal, NoReturn, get_args

import tyro

from experiments.train.files import parse_json, read_json

RouterInput = Literal["node", "neighbors", "degree", "graph"]
Pool = Literal["mean", "sum", "max"]

RouterName = Literal[
    "dense",
    "token_choice",
    "expert_choice",
    "attention_vote",
    "multi_centroid",
    "soft_slots",
    "random",
    "uniform",
    "oracle",
]

FANOUT = (15, 10, 5)

PAPERS = "ogbn-papers100M"
STORED = "ogbn_papers100M_stored"
"""The folder it is converted to, in the data root."""


@dataclass(frozen=True, kw_only=True)
class RouterOptions:
    """Options of the routers; what a router does not know is an error, what is left out has its own default."""

    weight: Literal["score", "normalized", "straight_through"] | None = None
    """How a pair's weight follows from its gate."""
    noise: bool | None = None
    """Token choice: noisy top-K gating in training."""
    balance: Literal["none", "importance_load", "switch", "bias"] | None = None
    """Token choice: what keeps the experts equally loaded."""
    balance_coef: float | None = None
    """Token choice: coefficient of the balance loss."""
    init_scale: float | None = None
    """Token and expert choice, attention vote: factor of the initial weights."""
    normalize: Literal["experts", "tokens"] | None = None
    """Expert choice: softmax over experts or along tokens."""
    shared_queries: bool | None = None
    """Attention vote: all experts have the same queries."""
    scope: Literal["group", "neighbors"] | None = None
    """Attention vote: who votes for whom."""
    head_dim: int | None = None
    """Attention vote: width of queries and keys."""
    num_centroids: int | None = None
    """Multi-centroid: centroids per expert."""
    choice: Literal["tokens", "experts"] | None = None
    """Multi-centroid: who chooses."""
    separation_coef: float | None = None
    """Multi-centroid: coefficient of the separation loss."""

    def given(self) -> dict[str, Any]:
        """The options that were set."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run: a data set, a model, a recipe, and where it all goes."""

    dataset: tyro.conf.Fixed[str]
    """The data set, by the name that its loader knows."""
    data: str | None = None
    """Your own data: `package.module:function` or `FILE.py:function`, which is called without arguments."""
    data_root: Path = Path("data")
    """Root folder of the data, given to the data set's loader as it is."""

    # model
    router: str = "token_choice"
    """token_choice, expert_choice, attention_vote, multi_centroid, random, uniform, oracle; of images soft_slots;
    your own, `package.module:Class` or `FILE.py:Class`; or `dense`, the model without experts."""
    model: str | None = None
    """Your own model: a function, named as a router is, of the input's width (or image size) and the outputs'."""
    experts: int = 8
    """Number of experts, E."""
    k: int = 1
    """Experts per token, K."""
    hidden: int = 32
    """Width of the hidden layers; of a ViT, of its MLPs and of each expert."""
    start: Literal["copies", "shared", "plain"] | None = None
    """How layers start: experts as copies of one layer, beside a shared expert, or each by itself; by default the
    layer's own choice: on graphs copies where the router allows it, else beside a shared expert."""
    layers: int = 2
    """Message-passing layers, or transformer blocks."""
    every: int = 1
    """Layer i holds experts where i % every == every - 1."""
    dropout: float = 0.0
    kmeans_init: bool = False
    """Multi-centroid: begin with k-means centroids of the data."""
    options: tyro.conf.OmitArgPrefixes[RouterOptions] = field(default_factory=RouterOptions)
    """Options of the router."""
    equal: Literal["flops", "parameters"] | None = None
    """With --router dense: widen it until it costs what the MoE of `equal_to` costs (active FLOPs, or parameters)."""
    equal_to: RouterName = "token_choice"
    """With --equal: the router of the MoE that the dense baseline is matched to.

    Experts, K and the rest are as given."""

    # recipe
    epochs: int = 100
    """Passes over the training set."""
    batch_size: int = 128
    """Batch size; of graphs, seed nodes a batch (`neighbor`), or nodes a part (`random_node`)."""
    eval_every: int = 1
    """Epochs between evaluations; validation selects among those."""
    optimizer: Literal["adam", "adamw"] = "adam"
    lr: float = 0.01
    """Learning rate."""
    schedule: Literal["constant", "cosine"] = "constant"
    """The learning rate is constant, or warms up and falls to 0, step by step."""
    weight_decay: float = 0.0
    """Weight decay; never on biases, norms, temperatures and centroids."""
    clip_norm: float = 0.0
    """Clip the norm of the gradient to this; 0 leaves it."""
    seeds: tuple[int, ...] = (0,)
    """Seeds, one after the other."""

    # where
    out: Path | None = None
    """Run folder; by default runs/DATASET-ROUTER, with a number where that is taken."""
    resume: bool = False
    """Continue the run of that folder, by default the last one; seeds that it lacks are added."""
    workers: int = 0
    """Processes that sample (graphs, `neighbor`) or load images while the model computes."""
    check_finite: bool = True
    """Refuse NaN and infinity in what the routers see."""
    device: str = "auto"
    """Fabric's accelerator: auto, cpu, cuda, mps."""
    devices: int = 1
    """Data parallel: processes on this machine, as many as `torchrun --nproc-per-node N` starts; batches are shared."""
    nodes: int = 1
    """Data parallel: machines, each with as many devices."""
    jobs: int = 1
    """Seeds trained at once, each in a process of its own; torch's threads are divided among them."""
    precision: Literal["32-true", "bf16-mixed", "64-true"] = "32-true"
    """Fabric's precision."""
    offline: bool = False
    """Never download."""
    logger: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Loggers beside the CSV files: TensorBoard, Weights & Biases."""
    progress: bool = True
    """Report progress: a bar, or where the output is a file, a line now and then."""

    def __post_init__(self) -> None:
        for name in ("router", "model", "data"):
            value = getattr(self, name)
            known = get_args(RouterName) if name == "router" else ()
            if value is not None and value not in known and not all(value.rpartition(":")):
                names = f"{', '.join(known)}, or " if known else ""
                legal = f"{names}package.module:name or FILE.py:name{nearest(value, known)}"
                raise ValueError(f"{name}: got {value!r}, expected {legal}")
        for name, value in (asdict(self) | self.options.given()).items():
            check(
                not isinstance(value, float) or math.isfinite(value), name, value, "a finite number"
            )
            if name in LEAST and value is not None:
                check(value >= LEAST[name], name, value, f"at least {LEAST[name]}")
            check(name not in SHARES or value < 1, name, value, "less than 1")
        for name in self.logger:
            check(
                importlib.util.find_spec(name),
                "logger",
                repr(name),
                f"its package installed: pip install {name}",
            )
        if self.router in ("uniform", "oracle"):
            legal = "1: uniform takes all experts, and oracle the planted one"
            check(self.k == 1, "k", f"{self.k} with router={self.router!r}", legal)
        if (
            not 0 < len(set(self.seeds)) == len(self.seeds)
            or not 0 <= min(self.seeds) <= max(self.seeds) < 2**32
        ):
            raise ValueError(
                f"seeds: got {self.seeds}, expected one number or more from 0 to 2**32 - 1, each once"
            )
        if self.world > 1 and getattr(self, "sampling", None) == "full":
            raise ValueError(
                f"devices: got {self.devices} x {self.nodes} nodes for {self.dataset} with full batches, expected one: "
                "a whole graph is one batch, which cannot be split; sample it, or train seeds side by side by --jobs N"
            )
        if self.world > 1:
            check(
                self.jobs == 1,
                "jobs",
                f"{self.jobs} with {self.world} processes a seed (devices x nodes)",
                1,
            )
        legal = (
            f"a multiple of devices x nodes = {self.world}: it is that of all processes together"
        )
        check(self.batch_size % self.world == 0, "batch_size", self.batch_size, legal)

    @property
    def world(self) -> int:
        """Processes, of all machines."""
        return self.devices * self.nodes

    @property
    def launcher(self) -> str:
        """The command that starts as many processes."""
        machines = "" if self.nodes == 1 else f"--nnodes {self.nodes} "
        return (
            "python" if self.world == 1 else f"torchrun {machines}--nproc-per-node {self.devices}"
        )

    def folder(self) -> Path:
        """The run folder, without a number."""
        if self.out is not None:
            return self.out
        what = [
            self.dataset if self.data is None else self.data,
            self.router if self.model is None else self.model,
        ]
        return Path("runs") / "-".join(
            Path(name).name.replace(".py:", ".").replace(":", ".") for name in what
        )

    def layer_options(self) -> dict[str, Any]:
        """Options of the MoE layers; one that is ``None`` is left to the layer's own default."""
        values = {name: getattr(self, name, None) for name in ("start", "router_input")}
        return {name: value for name, value in values.items() if value is not None}

    def science(self) -> dict[str, Any]:
        """What the numbers depend on, as JSON: all but where it runs and where it is written."""
        values = {name: value for name, value in asdict(self).items() if name not in WHERE}
        if self.world == 1:  # with more, draws are others
            del values["devices"], values["nodes"]
        found: dict[str, Any] = json.loads(json.dumps(values | {"options": self.options.given()}))
        return found


@dataclass(frozen=True, kw_only=True)
class NodeConfig(RunConfig):
    """Nodes of a graph, in a GNN."""

    residual: Literal["none", "identity", "linear"] = "identity"
    norm: str | None = None
    """The norm, by PyG's name."""
    sampling: Literal["full", "neighbor", "random_node"] = "full"
    """Train on the whole graph, on sampled neighborhoods, or on random parts."""
    fanout: tuple[int, ...] = FANOUT
    """With `neighbor`: neighbors sampled a node, hop by hop; -1 takes all."""
    evaluation: Literal["full", "layerwise", "sampled"] = "full"
    """Evaluate on the whole graph, layer by layer in pieces (same result, less memory), or as in training."""
    undirected: bool = True
    """Add the reverse of every edge."""
    allow_large_downloads: bool = False
    """Download also what is larger than 1 GB."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (
            not self.fanout
            or min(self.fanout) < -1
            or (self.sampling != "neighbor" and self.fanout != FANOUT)
        ):
            expected = "numbers from -1 (all), with sampling='neighbor'"
            raise ValueError(
                f"fanout: got {self.fanout} with sampling={self.sampling!r}, expected {expected}"
            )


@dataclass(frozen=True, kw_only=True)
class GraphConfig(NodeConfig):
    """Nodes of a graph of one node type."""

    conv: tuple[str, ...] = ("gcn",)
    """The conv; several are kinds of experts that alternate (a dense model takes the first)."""
    router_input: tuple[RouterInput, ...] | None = None
    """What the router sees: the node (the default), the mean of its neighbors, log-degree; or the graph, by itself."""
    shared_router: bool | None = None
    """One decision for all layers, or one in each; by default one where layers start as copies."""
    jk: Literal["last", "cat", "max"] | None = None
    """Jumping knowledge; with `last`, all convs may hold experts and a linear layer is the output."""
    input_dropout: float = 0.0
    """Dropout of the input features."""
    adjacency: Literal["auto", "edge_index"] = "auto"
    """Full-batch: how edges are given; `auto` takes CSR where convs run on it and use no edge weights of some only."""
    metric: Literal["accuracy", "roc_auc"] | None = None
    """Of your own graph: the metric (default accuracy)."""
    features: str | None = None
    """Of a named set: a .npy file of (nodes, width) numbers in place of its features, such as GIANT's or TAPE's."""
    correct_and_smooth: bool = False
    """Score PyG's CorrectAndSmooth of what the trained model predicts; 50 steps each, alpha 1 and 0.8."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.conv, "conv", "none", "at least one")
        if self.metric is not None and self.dataset != "graph":
            raise ValueError(
                f"metric: got {self.metric!r} for {self.dataset}, expected none; `graph` leaves it open"
            )
        if self.features is not None and (
            self.dataset in ("graph", PAPERS) or self.data is not None
        ):
            raise ValueError(
                f"features: got {self.features!r}, expected none for {self.dataset}, which has its own"
            )


@dataclass(frozen=True, kw_only=True)
class HeteroConfig(NodeConfig):
    """Nodes of one type in a heterogeneous graph, in a relational GNN."""

    sampling: Literal["full", "neighbor"] = "full"
    evaluation: Literal["full", "sampled"] = "full"


@dataclass(frozen=True, kw_only=True)
class MoleculeConfig(RunConfig):
    """Labels of molecules, each a graph, in a GNN as OGB's examples build it."""

    conv: tuple[str, ...] = ("gcn",)
    """The conv; several are kinds of experts that alternate (a dense model takes the first). `gcn` and `gin` are OGB's
    of molecules, `gine` PyG's; GIN's batch norm has each expert run on all atoms."""
    router_input: tuple[RouterInput, ...] | None = None
    """What the router sees: the atom (`node`, the default), the mean of its neighbors, log-degree; or the `graph`, by
    itself: the mean of its atoms, which then go to the same expert."""
    shared_router: bool | None = None
    """One decision for all layers, or one in each; by default one where layers start as copies."""
    residual: Literal["none", "identity", "linear"] = "none"
    norm: str | None = "batch_norm"
    """The norm, by PyG's name."""
    virtual_node: bool = False
    """Join all atoms of a molecule by a further node, as OGB does."""
    pool: Pool = "mean"
    """How atoms become a molecule."""
    input_dropout: float = 0.0
    """Dropout of the atoms' embeddings."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.conv, "conv", "none", "at least one")
        legal = f"none for {self.dataset}; your own molecules are files in OGB's layout"
        check(self.data is None, "data", repr(self.data), legal)


@dataclass(frozen=True, kw_only=True)
class ImageConfig(RunConfig):
    """Patches of images, in a ViT."""

    router: str = "expert_choice"
    equal_to: RouterName = "expert_choice"
    mlp_scale: float = 1.0
    """Dense: factor of the output of the MLPs in whose place experts would be, which weights by score scale."""
    patch: int | None = None
    """Height and width of a patch; by default that of the size's preset."""
    dim: int | None = None
    """Width of a token; by default that of the size's preset."""
    vit_heads: int | None = None
    """Attention heads; by default those of the size's preset."""
    label_smoothing: float = 0.0
    image_size: int | None = None
    """Height and width that images are brought to; by default the data set's."""
    augment: Literal["none", "standard"] = "none"
    """Random crops and flips."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.router != "dense" and self.mlp_scale != 1:
            raise ValueError(
                f"mlp_scale: got {self.mlp_scale} with router={self.router!r}, expected router='dense'"
            )
        soft = self.router != "soft_slots" or (self.k == 1 and self.start in (None, "shared"))
        check(soft, "router", "'soft_slots' with another k or start", "the defaults of these")
        check(
            self.options.scope != "neighbors",
            "scope",
            "'neighbors'",
            "'group': images have no edges",
        )


HETERO = ("ogbn-mag", "hetero")
IMAGES = ("digits", "cifar10", "cifar100", "imagenette", "images")
"""Data sets of each kind; all others are graphs, but OGB's molecules, ``ogbg-mol...``."""
ERRORS = ("rmse",)
"""Metrics of which less is better, and which are no shares."""

WHERE = frozenset({
    "data_root", "out", "resume", "workers", "device", "offline", "allow_large_downloads", "logger", "progress", "jobs",
})  # fmt: skip
"""Options that no number depends on."""
SHARES = ("label_smoothing", "dropout", "input_dropout")
LEAST = dict.fromkeys((*SHARES, "mlp_scale", "clip_norm", "weight_decay", "lr", "workers"), 0) | dict.fromkeys(
    ("experts", "k", "hidden", "layers", "every", "epochs", "batch_size", "eval_every", "patch", "dim", "vit_heads",
     "image_size", "devices", "nodes", "jobs"), 1,
)  # fmt: skip
"""The smallest legal values."""
RECORDS = ("file", "digest")
"""What ``config.json`` holds beside the options: the name of your own graph's file, a digest of your own data."""
RETIRED: dict[str, Any] = {
    "ema": 0.0, "warmup": 0.1, "heads": 1, "edge_features": False, "in_proj": False, "self_loops": False,
    "moe_blocks": [], "mixup": 0.0, "cutmix": 0.0, "val_share": 0.1, "split_seed": 0, "skip_broken": False,
    "tie_experts": False, "tie_routers": False, "sharing": None, "anneal_noise": False,
    # once of all kinds of data
    "conv": ["gcn"], "jk": None, "norm": None, "residual": "identity", "router_input": ["node"], "sampling": "full",
    "shared_router": False, "adjacency": "auto", "evaluation": "full", "fanout": list(FANOUT), "input_dropout": 0.0,
    "label_reuse": 0.0, "metric": None, "undirected": True, "augment": "none", "dim": None, "image_size": None,
    "label_smoothing": 0.0, "patch": None, "vit_heads": None, "virtual_node": False, "pool": "mean",
}  # fmt: skip
"""Options that older configurations hold where there are none now, each with the only value that is still meant."""


def config_class(dataset: str) -> type[RunConfig]:
    """The configuration of a data set's kind."""
    if dataset in HETERO:
        return HeteroConfig
    if dataset.startswith("ogbg-"):
        return MoleculeConfig
    return ImageConfig if dataset in IMAGES else GraphConfig


OF_EXPERTS = (
    "experts", "k", "start", "kmeans_init", "options", "equal", "equal_to",
    "router_input", "shared_router",
)  # fmt: skip
"""Options that a dense model has no use for."""


def dense_of(config: RunConfig) -> RunConfig:
    """The run of the dense model that stands where the one with experts does."""
    usual = type(config)(dataset=config.dataset)
    changes = {name: getattr(usual, name) for name in OF_EXPERTS if hasattr(usual, name)}
    if isinstance(
        config, GraphConfig | MoleculeConfig
    ):  # of several kinds of experts a dense model takes the first
        changes["conv"] = config.conv[:1]
    return replace(config, router="dense", **changes)


def stored_folder(config: RunConfig) -> Path | None:
    """The folder of a graph that stays on disk, see ``experiments.convert``; ``None`` in memory."""
    if config.dataset == PAPERS:
        return config.data_root / STORED
    is_stored = config.dataset == "graph" and (config.data_root / "graph.json").is_file()
    return config.data_root if is_stored else None


def fit_to_disk(config: RunConfig) -> RunConfig:
    """The same; of a graph on disk with the only sampling, evaluation and direction that fit it."""
    folder = stored_folder(config)
    if folder is None or not (folder / "graph.json").is_file():
        return config
    said = read_json(folder / "graph.json", dict[str, Any])
    legal: dict[str, Any] = {"sampling": "neighbor", "evaluation": "sampled"}
    return replace(config, **legal | {"undirected": said.get("undirected", True)})


def restore(science: Mapping[str, Any], data_root: Path) -> RunConfig:
    """The configuration of which :meth:`RunConfig.science` was written, also by an earlier version.

    ``data_root`` is where the data are here, if it does not say: your own graph, or the folder that holds it.
    """
    check(
        isinstance(science.get("dataset"), str),
        "dataset",
        repr(science.get("dataset")),
        "the name of one",
    )
    science = _with_start(science)
    kind = config_class(science["dataset"])
    retired = RETIRED.keys() - {option.name for option in fields(kind)}
    for name in retired & science.keys():
        legal = f"{RETIRED[name]!r}: there is no such option now"
        check(science[name] in (RETIRED[name], None), name, repr(science[name]), legal)
    given = {name: value for name, value in science.items() if name not in retired | set(RECORDS)}
    file = str(science.get("file", data_root.name))
    root = data_root if file == data_root.name else data_root / file
    return parse_json(json.dumps({"data_root": str(root)} | given), kind)


def _with_start(science: Mapping[str, Any]) -> dict[str, Any]:
    """The same with ``start`` in place of the two options that it stands for."""
    known = dict(science)
    is_old = "shared_expert" in known or "dense_start" in known
    shared, dense_start = known.pop("shared_expert", None), known.pop("dense_start", None)
    if not is_old:
        return known
    if known.get("shared_router") is False:
        known["shared_router"] = None  # which means the same beside a shared expert
    if shared is None and dense_start is None:
        return (
            known
            if known.get("router") == "dense"
            else known | {"start": known.get("start") or "shared"}
        )
    gone = shared is not False and dense_start is False and known.get("router") != "dense"
    check(
        not gone,
        "dense_start",
        "False beside a shared expert",
        "another: there are no such layers any more",
    )
    return known | {"start": "plain" if shared is False else "shared"}


def read_options(path: Path, data_root: Path, base: RunConfig | None = None) -> RunConfig:
    """The configuration in a JSON file, such as the ``config.json`` of a run; of options that it lacks, those of
    ``base``."""
    try:
        given = read_json(path, dict[str, Any])
        if base is not None:
            if given.get("dataset", base.dataset) != base.dataset:
                raise ValueError(
                    f"dataset: got {given['dataset']!r}, expected {base.dataset}, that of the preset"
                )
            given = base.science() | given
        return restore(given, data_root)
    except ValueError as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from error


def load_object(option: str, name: str) -> Any:
    """What ``package.module:name`` or ``FILE.py:name`` names."""
    where, _, attribute = name.rpartition(":")
    try:
        if not where.endswith(".py"):
            return pkgutil.resolve_name(name)
        return getattr(_load_file(Path(where).resolve()), attribute)
    except (ImportError, AttributeError, FileNotFoundError) as error:
        raise ValueError(
            f"{option}: got {name!r}, which cannot be imported ({error}); modules are found in the working directory "
            f"and in PYTHONPATH, and FILE.py:{attribute} takes a file"
        ) from error


def check_trusted(config: RunConfig, folder: Path) -> None:
    """Refuse a run whose folder holds the code that its configuration names.

    Somebody else may have put it there, and it would run with all rights of the user.
    """
    for option in ("router", "model", "data"):
        name = getattr(config, option)
        if name is not None and ":" in name and _code_lies_in(name.rpartition(":")[0], folder):
            legal = "code that lies elsewhere, or --trust after you read it"
            got = f"{name!r}, code in the run folder {folder}"
            raise ValueError(f"{option}: got {got}, expected {legal}")


def _code_lies_in(where: str, folder: Path) -> bool:
    """Whether a file, or a module or a package that it is in, would be imported from a folder."""
    paths = [Path(where)]
    if not where.endswith(".py"):
        parts, paths = where.split("."), []
        for entry, depth in product(sys.path, range(1, len(parts) + 1)):
            place = Path(entry, *parts[:depth])  # a package, or a file of this name
            paths += [place] if place.exists() else []
            paths += place.parent.glob(f"{place.name}.*")
    inside = [Path(os.path.abspath(folder)), folder.resolve()]  # a link may lead in or out
    return any(
        way.is_relative_to(one)
        for path in paths
        for way in (Path(os.path.abspath(path)), path.resolve())
        for one in inside
    )


@cache
def _load_file(path: Path) -> ModuleType:
    """The module in a file, which runs once."""
    name = re.sub(r"\W", "_", str(path))
    spec: Any = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(fits: object, name: str, got: object, expected: object) -> None:
    """Refuse what does not fit; as gmoe's, without torch."""
    if not fits:
        raise ValueError(f"{name}: got {got}, expected {expected}")


def check_choice(name: str, got: str, legal: Iterable[str]) -> None:
    """Refuse a name that is not one of ``legal``, and suggest the nearest of them."""
    known = list(legal)
    check(got in known, name, repr(got), f"one of {', '.join(known)}{nearest(got, known)}")


def check_first(name: str, args: Sequence[str], legal: Iterable[str]) -> None:
    """Refuse a command line that does not begin with one of the names whose options follow."""
    check(not args[0].startswith("-"), name, repr(args[0]), f"the {name} first, then its options")
    check_choice(name, args[0], legal)


def nearest(got: str, legal: Iterable[str]) -> str:
    """The end of a message: the legal name that an unknown one is like, if there is one."""
    found = difflib.get_close_matches(got, legal, n=1)
    return f"; did you mean {found[0]!r}?" if found else ""


def fail(error: Exception, where: str = "") -> NoReturn:
    """End the command with an error of whoever called it."""
    print(f"error: {error}{where}", file=sys.stderr)
    sys.exit(2)


def program(
    name: str, function: Callable[..., Any], about: str | None, extra: str = "convert"
) -> Callable[..., Any]:
    """The entry point of ``python -m experiments.NAME``: calls a function with the options of the command line.

    ``extra`` has all packages that it needs.
    """

    def main(args: Sequence[str] | None = None) -> Any:
        try:
            return tyro.cli(
                function, args=args, prog=f"python -m experiments.{name}", description=about
            )
        except ModuleNotFoundError as error:
            fail(error, where=f"; all that experiments need: pip install -e '.[{extra}]'")
        except (ValueError, OSError, ImportError) as error:
            fail(error)
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)

    return main


class InterruptedRunError(KeyboardInterrupt):
    """SIGINT or SIGTERM arrived; what was trained is on disk."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def interrupt(number: int, _: FrameType | None = None) -> NoReturn:
    """A handler of signals, which raises."""
    raise InterruptedRunError(number)
