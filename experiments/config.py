"""What a run is: frozen dataclasses that the command line is made of, one for each kind of data.

Imports nothing heavy: `python -m experiments.train NAME --help` is made of this file alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, get_args, get_type_hints

import tyro

from experiments.options import nearest, unknown_name

RouterInput = Literal["node", "neighbors", "degree"]

RouterName = Literal[
    "dense", "token_choice", "expert_choice", "attention_vote", "multi_centroid", "random", "uniform", "oracle"
]

FANOUT = (15, 10, 5)

PAPERS = "ogbn-papers100M"
STORED = "ogbn_papers100M_stored"
"""The folder it is converted to, in the data root."""


@dataclass(frozen=True, kw_only=True)
class RouterOptions:
    """Options of the routers; what a router does not know is an error.

    What is left out has the router's own default.
    """

    weight: Literal["score", "normalized", "straight_through"] | None = None
    """How a pair's weight follows from its gate."""
    noise: bool | None = None
    """Token choice: noisy top-K gating in training."""
    balance: Literal["none", "importance_load", "switch", "bias"] | None = None
    """Token choice: what keeps the experts equally loaded."""
    balance_coef: float | None = None
    """Token choice: coefficient of the balance loss."""
    z_coef: float | None = None
    """Token and expert choice: coefficient of the router z-loss."""
    init_scale: float | None = None
    """Token and expert choice, attention vote: factor of the initial weights."""
    capacity_factor: float | None = None
    """Tokens per expert, relative to an even share."""
    normalize: Literal["experts", "tokens"] | None = None
    """Expert choice: softmax over experts or along tokens."""
    inference: Literal["group", "threshold"] | None = None
    """Expert choice: evaluation by group or by a running threshold."""
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
    temperature: float | None = None
    """Multi-centroid: initial temperature."""
    separation_coef: float | None = None
    """Multi-centroid: coefficient of the separation loss."""

    def given(self) -> dict[str, Any]:
        """The options that were set."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run: a data set, a model, a recipe, and where it all goes."""

    dataset: str
    """The data set, by the name that its loader knows."""
    data: str | None = None
    """Your own data: `package.module:function` or `FILE.py:function`, which is called without arguments."""
    data_root: Path = Path("data")
    """Root folder of the data, given to the data set's loader as it is."""

    # model
    router: str = "token_choice"
    """Who decides: token_choice, expert_choice, attention_vote, multi_centroid, random, uniform, oracle, or your own,
    `package.module:Class` or `FILE.py:Class`; `dense` is the model without experts, the baseline."""
    model: str | None = None
    """Your own model in place of gmoe's: `package.module:function` or `FILE.py:function`, called with the width of the
    input (of images: the height and width) and the number of outputs. Options of the model and of the router do not
    apply."""
    experts: int = 8
    """Number of experts, E."""
    k: int = 1
    """Experts per token, K."""
    hidden: int = 32
    """Width of the hidden layers; of a ViT, of its MLPs and of each expert."""
    layers: int = 2
    """Message-passing layers, or transformer blocks."""
    every: int = 1
    """Layer i holds experts where i % every == every - 1."""
    dropout: float = 0.0
    """Dropout."""
    kmeans_init: bool = False
    """Multi-centroid: begin with k-means centroids of the data."""
    options: tyro.conf.OmitArgPrefixes[RouterOptions] = field(default_factory=RouterOptions)
    """Options of the router."""
    equal: Literal["flops", "parameters"] | None = None
    """With --router dense: widen it until it costs what the MoE of `equal_to` costs (active FLOPs, or parameters)."""
    equal_to: RouterName = "token_choice"
    """The router of the MoE that the dense baseline is matched to; experts, K and the rest as given."""

    # recipe
    epochs: int = 100
    """Epochs. A run may be resumed with more; the schedule is then recomputed, and the run no longer exact."""
    batch_size: int = 128
    """Batch size; of graphs, seed nodes a batch (`neighbor`), or nodes a part (`random_node`)."""
    eval_every: int = 1
    """Epochs between evaluations; validation selects among those."""
    optimizer: Literal["adam", "adamw"] = "adam"
    """Optimizer."""
    lr: float = 0.01
    """Learning rate."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning-rate schedule: constant, or linear warm-up and cosine to 0, step by step."""
    warmup: float = 0.1
    """Share of the steps that warm up, of the cosine schedule."""
    weight_decay: float = 0.0
    """Weight decay; never on biases, norms, temperatures and centroids."""
    clip_norm: float = 0.0
    """Clip the norm of the gradient to this; 0 leaves it."""
    ema: float = 0.0
    """Evaluate an exponential moving average of the weights with this decay; 0 evaluates the weights."""
    seeds: tuple[int, ...] = (0,)
    """Seeds, one after the other."""

    # where
    out: Path | None = None
    """Run folder; where it holds a run, only with `--resume`. By default runs/DATASET-ROUTER, with a number where that
    is taken."""
    resume: bool = False
    """Continue the run of that folder, by default the last one; seeds that it lacks are added."""
    workers: int = 0
    """Processes that sample (graphs, `neighbor`) or load images while the model computes."""
    check_finite: bool = True
    """Refuse NaN and infinity in what the routers see."""
    device: str = "auto"
    """Fabric's accelerator: auto, cpu, cuda, mps."""
    devices: int = 1
    """Data parallel: processes on this machine, one a device. The batch size is that of all of them together. Start
    them by `torchrun --nproc-per-node N -m experiments.train ... --devices N`."""
    nodes: int = 1
    """Data parallel: machines, each with as many devices."""
    precision: Literal["32-true", "bf16-mixed", "64-true"] = "32-true"
    """Fabric's precision."""
    compile: bool = False
    """Run the model through torch.compile."""
    offline: bool = False
    """Never download."""
    logger: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Loggers beside the CSV files: TensorBoard, Weights & Biases."""
    progress: bool = True
    """Report progress: a bar, or where the output is a file, a line every few epochs."""

    def __post_init__(self) -> None:
        for name in ("router", "model", "data"):
            value = getattr(self, name)
            if name == "router" and value in get_args(RouterName):
                continue
            if value is not None and not all(part for part in value.rpartition(":")):
                own = "package.module:name or FILE.py:name"
                if name == "router":
                    raise ValueError(unknown_name(name, value, get_args(RouterName), f", or {own}"))
                raise ValueError(f"{name}: got {value!r}, expected {own}")
        world = self.devices * self.nodes
        if world > 1 and getattr(self, "sampling", None) == "full":
            raise ValueError(
                f"devices: got {self.devices} x {self.nodes} nodes for {self.dataset} with full batches, expected one: "
                "a whole graph is one batch, which cannot be split; sample it, or train seeds side by side: python -m "
                "experiments.sweep grid --jobs N"
            )
        if world > 1 and self.batch_size % world:
            raise ValueError(
                f"batch_size: got {self.batch_size}, that of all processes together, expected a multiple of "
                f"devices x nodes = {world}"
            )
        for name, value in (asdict(self) | self.options.given()).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{name}: got {value}, expected a finite number")
        if self.lr <= 0:
            raise ValueError(f"lr: got {self.lr}, expected a number above 0")
        if self.ema and self.options.inference == "threshold":
            raise ValueError(
                "ema: got an average with inference='threshold', whose cut scores are those of the weights themselves; "
                "expected 0, or inference='group'"
            )
        for option in fields(self):
            value = getattr(self, option.name)
            if value is None:
                continue
            if option.name in COUNTS and value < 1:
                raise ValueError(f"{option.name}: got {value}, expected at least 1")
            if option.name in SHARES and not 0 <= value < 1:
                raise ValueError(f"{option.name}: got {value}, expected a number in [0, 1)")
            if option.name in AMOUNTS and value < 0:
                raise ValueError(f"{option.name}: got {value}, expected a number of at least 0")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: got {self.seeds}, expected at least one, each once")
        if not 0 <= min(self.seeds) <= max(self.seeds) < 2**32:
            raise ValueError(f"seeds: got {self.seeds}, expected numbers from 0 to 2**32 - 1")

    def folder(self) -> Path:
        """The run folder, without a number."""
        if self.out is not None:
            return self.out
        what = [self.dataset if self.data is None else self.data, self.router if self.model is None else self.model]
        return Path("runs") / "-".join(Path(name).name.replace(".py:", ".").replace(":", ".") for name in what)

    def layer_options(self) -> dict[str, Any]:
        """What is asked of the MoE layers; an option that is ``None`` is left to the layer's own default."""
        values = {name: getattr(self, name, None) for name in ("shared_expert", "dense_start", "router_input")}
        return {name: value for name, value in values.items() if value is not None}

    def science(self) -> dict[str, Any]:
        """What the numbers depend on, as JSON: all but where it runs and where it is written."""
        values = {name: value for name, value in asdict(self).items() if name not in WHERE}
        if self.devices * self.nodes == 1:  # with more, draws are others
            del values["devices"], values["nodes"]
        values["options"] = self.options.given()
        found: dict[str, Any] = json.loads(json.dumps(values))
        return found

    def differences(self, there: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Where the :meth:`science` of another run is another: its value and this one's.

        What the other run did not know, since it is older, had the default; what only other kinds of data have is left
        out, and so are digests of the data.
        """
        here = self.science()
        here |= {name: getattr(self, name) for name in PROCESSES}
        defaults = {option.name: option.default for option in fields(self) if option.default is not MISSING}
        before = {name: there.get(name, json.loads(json.dumps(defaults.get(name), default=str))) for name in here}
        return {name: (before[name], value) for name, value in here.items() if value != before[name]}


@dataclass(frozen=True, kw_only=True)
class GraphConfig(RunConfig):
    """Nodes of one graph, in a GNN."""

    conv: tuple[str, ...] = ("gcn",)
    """The conv; several are kinds of experts that alternate (a dense model takes the first)."""
    heads: int = 1
    """Attention heads, of the convs that have them."""
    edge_features: bool = False
    """Give the edge features to convs that take them (GAT, GATv2, Transformer, GINE, ...)."""
    shared_expert: bool | None = None
    """One more expert that runs on every token; by default the layer's own choice: there is one."""
    dense_start: bool | None = None
    """Beside the shared expert, the others start at zero; by default the layer's own choice: they do."""
    in_proj: bool = False
    """Begin with a linear layer."""
    shared_router: bool = False
    """One decision for all layers, not one in each."""
    router_input: tuple[RouterInput, ...] | None = None
    """What the router sees: the node, the mean of its neighbors, log-degree; by default the layer's own choice: the
    node."""
    residual: Literal["none", "identity", "linear"] = "identity"
    """The residual."""
    norm: str | None = None
    """The norm, by PyG's name."""
    jk: Literal["last", "cat", "max"] | None = None
    """Jumping knowledge; with `last`, all convs may hold experts and a linear layer is the output."""
    input_dropout: float = 0.0
    """Dropout of the input features."""
    sampling: Literal["full", "neighbor", "random_node"] = "full"
    """Train on the whole graph, on sampled neighborhoods, or on random parts."""
    fanout: tuple[int, ...] = FANOUT
    """With `neighbor`: neighbors sampled a node, hop by hop; -1 takes all."""
    evaluation: Literal["full", "layerwise", "sampled"] = "full"
    """Evaluate on the whole graph, layer by layer in pieces (same result, less memory), or as in training."""
    undirected: bool = True
    """Add the reverse of every edge."""
    self_loops: bool = False
    """Add a self-loop to every node (GCN and GAT add their own all the same)."""
    adjacency: Literal["auto", "edge_index", "csr"] = "auto"
    """Full-batch: how edges are given; `auto` takes CSR where convs run on it and use no edge features."""
    label_reuse: float = 0.0
    """Full-batch: share of the training labels that are input, drawn anew each epoch, while the loss is on the others;
    at evaluation all of them are input. Off by default."""
    metric: Literal["accuracy", "roc_auc"] | None = None
    """Of your own graph: the metric (default accuracy)."""
    allow_large_downloads: bool = False
    """Download also what is larger than 1 GB."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.conv:
            raise ValueError("conv: got none, expected at least one")
        _check_fanout(self.sampling, self.fanout)
        if self.label_reuse and self.sampling != "full":
            raise ValueError(f"label_reuse: got {self.label_reuse} with sampling={self.sampling!r}, expected 'full'")
        if self.metric is not None and self.dataset != "graph":
            raise ValueError(
                f"metric: got {self.metric!r} for {self.dataset}, expected none; only `graph` leaves it open"
            )


@dataclass(frozen=True, kw_only=True)
class HeteroConfig(RunConfig):
    """Nodes of one type in a heterogeneous graph, in a relational GNN."""

    in_proj: bool = False
    """Begin with a linear layer for each node type with features; where their widths differ there is one anyway."""
    router_input: tuple[RouterInput, ...] | None = None
    """What the router sees: the node, the mean of its neighbors; by default the layer's own choice: the node."""
    residual: Literal["none", "identity", "linear"] = "identity"
    """The residual."""
    norm: str | None = None
    """The norm, by PyG's name."""
    sampling: Literal["full", "neighbor"] = "full"
    """Train on the whole graph, or on sampled neighborhoods."""
    fanout: tuple[int, ...] = FANOUT
    """With `neighbor`: neighbors sampled a node, hop by hop; -1 takes all."""
    evaluation: Literal["full", "sampled"] = "full"
    """Evaluate on the whole graph, or as in training."""
    undirected: bool = True
    """Add the reverse of every edge."""
    self_loops: bool = False
    """Add a self-loop to every node of the relations that link a type to itself."""
    allow_large_downloads: bool = False
    """Download also what is larger than 1 GB."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_fanout(self.sampling, self.fanout)
        if "degree" in (self.router_input or ()):
            raise ValueError(f"router_input: got {self.router_input}, expected node, neighbors, or both of them")


@dataclass(frozen=True, kw_only=True)
class ImageConfig(RunConfig):
    """Patches of images, in a ViT."""

    router: str = "expert_choice"
    """Who decides, as ViTMoE does by default; otherwise as for graphs, and `dense` is the model without experts."""
    equal_to: RouterName = "expert_choice"
    """The router of the MoE that the dense baseline is matched to; experts, K and the rest as given."""
    moe_blocks: tuple[int, ...] = ()
    """The blocks that hold experts, from 0, in place of `every`."""
    shared_expert: bool | None = None
    """One more expert that runs on every token; by default the layer's own choice: there is one."""
    dense_start: bool | None = None
    """Beside the shared expert, the others start at zero; by default the layer's own choice: they do."""
    mlp_scale: float = 1.0
    """Dense: factor of the output of the MLPs in whose place experts would be, which weights by score scale."""
    patch: int | None = None
    """Height and width of a patch; by default that of the size's preset."""
    dim: int | None = None
    """Width of a token; by default that of the size's preset."""
    vit_heads: int | None = None
    """Attention heads; by default those of the size's preset."""
    label_smoothing: float = 0.0
    """Label smoothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.router != "dense" and self.mlp_scale != 1:
            raise ValueError(
                f"mlp_scale: got {self.mlp_scale} with router={self.router!r}, expected 1; dense MLPs take it"
            )
        if self.router == "dense" and self.equal is None and self.moe_blocks:
            raise ValueError(f"moe_blocks: got {self.moe_blocks} with router='dense', expected none: it has no experts")


@dataclass(frozen=True, kw_only=True)
class ImageSetConfig(ImageConfig):
    """Images from files or from your own function, whose size, augmentation and split are up to you."""

    image_size: int | None = None
    """Height and width that images are brought to; by default the data set's."""
    augment: Literal["none", "standard", "randaugment"] = "none"
    """Random crops and flips (`standard`), and RandAugment with them."""
    mixup: float = 0.0
    """Alpha of mixup; 0 is off. With cutmix too, each batch draws one of them."""
    cutmix: float = 0.0
    """Alpha of cutmix; 0 is off."""
    val_share: float = 0.1
    """Share of the training images that validate, stratified; the data set's test images are read once."""
    split_seed: int = 0
    """Seed of that split, and of the test set of a flat folder CLASS/*."""
    skip_broken: bool = False
    """Leave out files that cannot be decoded, and say how many."""


HETERO = ("ogbn-mag", "hetero")
IMAGES = ("digits", "cifar10", "cifar100", "imagenette", "images")
"""Data sets of each kind; all others are graphs."""

WHERE = frozenset({
    "data_root", "out", "resume", "workers", "device", "compile", "offline", "allow_large_downloads", "logger",
    "progress",
})  # fmt: skip
"""Options that no number depends on."""
PROCESSES = ("devices", "nodes")
"""Options that numbers depend on where there is more than one process."""
RECORDS = ("file", "digest", "extended", "moved")
"""What ``config.json`` of a run holds beside the options."""
COUNTS = frozenset({
    "experts", "k", "hidden", "layers", "every", "epochs", "batch_size", "eval_every", "heads", "patch", "dim",
    "vit_heads", "image_size", "devices", "nodes",
})  # fmt: skip
SHARES = frozenset({
    "val_share", "label_smoothing", "warmup", "ema", "dropout", "input_dropout", "label_reuse",
})  # fmt: skip
AMOUNTS = frozenset({"mlp_scale", "mixup", "cutmix", "clip_norm", "weight_decay"})


def config_class(dataset: str) -> type[RunConfig]:
    """The configuration of a data set's kind."""
    if dataset in HETERO:
        return HeteroConfig
    if dataset in IMAGES:
        return ImageConfig if dataset == "digits" else ImageSetConfig
    return GraphConfig


def restore(science: Mapping[str, Any], data_root: Path) -> RunConfig:
    """The configuration that :meth:`RunConfig.science` was written of.

    Options of other kinds of data, which older runs hold, are left out.

    Args:
        science: as JSON.
        data_root: where the data are here, if it does not say; a user's own graph itself, or the folder that holds it.

    Raises:
        ValueError: an option that there is not, or a value that is not legal.
    """
    if "dataset" not in science:
        raise ValueError("config: has no dataset")
    cls = config_class(science["dataset"])
    everywhere = {option.name for kind in (GraphConfig, HeteroConfig, ImageSetConfig) for option in fields(kind)}
    unknown = sorted(set(science) - everywhere - set(RECORDS))
    if unknown:
        raise ValueError(f"config: got {', '.join(unknown)}, expected options of experiments.train")
    types = get_type_hints(cls) | {"file": str | None}
    values = {name: _typed(name, value, types[name]) for name, value in science.items() if name in types}
    root, file = values.pop("data_root", data_root), values.pop("file", None)
    return cls(**values, data_root=root if file in (None, root.name) else root / file)


def _typed(name: str, value: Any, kind: Any) -> Any:
    """A value from JSON in the type of its option."""
    from pydantic import ConfigDict, TypeAdapter, ValidationError

    if kind is RouterOptions:
        if not isinstance(value, dict):
            raise ValueError(f"{name}: got {value!r}, expected an object of options")
        types = get_type_hints(kind)
        for option in value:
            if option not in types:
                raise ValueError(f"options: got {option}, which is no option of routers{nearest(option, types, ', ')}")
        return kind(**{option: _typed(option, given, types[option]) for option, given in value.items()})
    try:
        adapter = TypeAdapter[Any](kind, config=ConfigDict(strict=True, allow_inf_nan=False))
        return adapter.validate_json(json.dumps(value))
    except ValidationError as error:
        what = " or ".join(dict.fromkeys(one["msg"].removeprefix("Input should be ") for one in error.errors()))
        raise ValueError(f"{name}: got {value!r}, expected {what}") from error


def load_object(option: str, name: str) -> Any:
    """What ``package.module:name`` or ``FILE.py:name`` names.

    Raises:
        ValueError: it cannot be imported.
    """
    where, _, attribute = name.rpartition(":")
    try:
        return getattr(_load_file(Path(where)) if where.endswith(".py") else importlib.import_module(where), attribute)
    except (ImportError, AttributeError, FileNotFoundError) as error:
        raise ValueError(
            f"{option}: got {name!r}, which cannot be imported ({error}); modules are found in the working directory "
            f"and in PYTHONPATH, and FILE.py:{attribute} takes a file"
        ) from error


def _load_file(path: Path) -> ModuleType:
    """The module in a file, which runs once."""
    name = re.sub(r"\W", "_", str(path.resolve()))
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _check_fanout(sampling: str, fanout: tuple[int, ...]) -> None:
    if sampling != "neighbor" and fanout != FANOUT:
        raise ValueError(f"fanout: got {fanout} with sampling={sampling!r}, expected 'neighbor'")
    if not fanout or min(fanout) < -1:
        raise ValueError(f"fanout: got {fanout}, expected at least one number, none below -1 (all)")


def check_world(config: RunConfig, world: int) -> None:
    """Refuse a number of processes that is not the run's.

    Args:
        config: the run.
        world: how many processes were started, of all machines.

    Raises:
        ValueError: says what starts it.
    """
    if config.devices * config.nodes == world:
        return
    if config.devices * config.nodes == 1:
        raise ValueError(
            f"devices: got 1 in {world} processes, expected them to be said: --devices N, with --nodes M where there "
            "are several machines"
        )
    raise ValueError(
        f"devices: got {config.devices} x {config.nodes} nodes in {world} process{'es' if world > 1 else ''}, expected "
        f"them to be started by: {launcher(config)} -m experiments.train ..."
    )


def launcher(config: RunConfig) -> str:
    """The command that starts as many processes as a run has."""
    if config.devices * config.nodes == 1:
        return "python"
    machines = "" if config.nodes == 1 else f"--nnodes {config.nodes} "
    return f"torchrun {machines}--nproc-per-node {config.devices}"
