"""The configuration of a run: a frozen dataclass for each kind of data.

The command line is made of them. Imports nothing heavy, so that ``--help`` comes at once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import tyro

from experiments.train.checks import (
    check,
    check_installed,
    check_numbers,
    check_object,
    check_seeds,
)
from vision.recipe import Recipe

RouterInput = Literal["node", "neighbors", "degree"]

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


@dataclass(frozen=True, kw_only=True)
class RouterOptions:
    """Options of the routers.

    What a router does not know is an error, what is left out has its own default.
    """

    weight: Literal["score", "normalized", "straight_through"] | None = None
    """How a pair's weight follows from its gate."""
    balance: Literal["none", "switch", "bias"] | None = None
    """Token choice: what keeps the experts equally loaded."""
    scope: Literal["group", "neighbors"] | None = None
    """Attention vote: who votes for whom."""

    def given(self) -> dict[str, Any]:
        """The options that were set."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run: a data set, a model, a recipe, and where it all goes."""

    dataset: tyro.conf.Fixed[str]
    """The data set, by the name that its loader knows."""
    data: str | None = None
    """Your own data: `package.module:function` or `FILE.py:function`.
    The function is called without arguments."""
    data_root: Path = Path("data")
    """Root folder of the data, given to the data set's loader as it is."""

    # model
    router: str = "token_choice"
    """token_choice, expert_choice, attention_vote, multi_centroid, random, uniform, oracle.
    For images also soft_slots. Your own: `package.module:Class` or `FILE.py:Class`.
    `dense` is the model without experts."""
    model: str | None = None
    """Your own model: a function, named as a router is.
    It takes the width of the input (or the image size) and that of the output."""
    experts: int = 8
    """Number of experts, E."""
    k: int = 1
    """Experts per token, K."""
    hidden: int = 32
    """Width of the hidden layers; of a ViT, of its MLPs and of each expert."""
    start: Literal["copies", "shared", "plain"] | None = None
    """Experts start as copies of one layer, beside a shared expert, or each by itself.
    Default: on graphs copies where the router allows it, else beside a shared expert."""
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
    """With --router dense: widen it to the active FLOPs, or parameters, of a MoE.
    That is the MoE of --equal-to."""
    equal_to: str = "token_choice"
    """With --equal: the router of the MoE that the dense baseline is matched to, named as a
    router is. Experts, K and the rest are as given."""

    # recipe
    epochs: int = 100
    """Passes over the training set."""
    batch_size: int = 128
    """Batch size; of molecules and images, how many of them.
    Of other graphs, seed nodes a batch (`neighbor`)."""
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
    device: str = "auto"
    """Fabric's accelerator: auto, cpu, cuda, mps."""
    devices: int = 1
    """Data parallel: processes, which share each batch; as many as `torchrun` starts in all."""
    precision: Literal["32-true", "bf16-mixed", "64-true"] = "32-true"
    """Fabric's precision."""
    offline: bool = False
    """Never download."""
    logger: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Loggers beside the CSV files: TensorBoard, Weights & Biases."""
    progress: bool = True
    """Report progress: a bar, or where the output is a file, a line now and then."""

    def __post_init__(self) -> None:
        check_object("router", self.router, get_args(RouterName))
        check_object("equal_to", self.equal_to, get_args(RouterName))
        check_object("model", self.model, self.own_models())
        check_object("data", self.data)
        check_numbers(asdict(self) | self.options.given())
        check_installed("logger", self.logger)
        if self.router in ("uniform", "oracle"):
            legal = "1: uniform takes all experts, and oracle the planted one"
            check(self.k == 1, "k", f"{self.k} with router={self.router!r}", legal)
        check_seeds(self.seeds)
        if self.devices > 1:
            self._check_processes()

    def _check_processes(self) -> None:
        """Refuse what several processes cannot share."""
        legal = f"a multiple of devices={self.devices}: it is that of all processes together"
        check(self.batch_size % self.devices == 0, "batch_size", self.batch_size, legal)

    # What only some kinds of data have; the classes below answer for theirs.

    def convs(self) -> tuple[str, ...]:
        """The convs by name, of a model that has some."""
        return ()

    def own_models(self) -> tuple[str, ...]:
        """The model by name, where it is a library's and no code of the user."""
        return ()

    def evaluates_whole(self) -> bool:
        """Whether validation is one computation, which several processes cannot share."""
        return False

    def evaluates_by_layer(self) -> bool:
        """Whether the model is evaluated layer by layer, in pieces."""
        return False

    def draws_in_workers(self) -> bool:
        """Whether the number of ``workers`` changes what is drawn."""
        return False

    @property
    def of_images(self) -> Recipe:
        """The recipe of images; of other data one that changes nothing."""
        return Recipe()

    @property
    def step_size(self) -> int:
        """Rows of a step of the optimizer, of all processes together."""
        return self.batch_size * self.of_images.grad_accum_steps

    @property
    def launcher(self) -> str:
        """The command that starts as many processes, on one machine."""
        return "python" if self.devices == 1 else f"torchrun --nproc-per-node {self.devices}"

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
        if self.devices == 1:  # with more, draws are others
            del values["devices"]
        if self.workers and self.draws_in_workers():
            values["workers"] = self.workers
        science: dict[str, Any] = json.loads(json.dumps(values | {"options": self.options.given()}))
        return science


@dataclass(frozen=True, kw_only=True)
class NodeConfig(RunConfig):
    """Nodes of a graph, in a GNN."""

    undirected: bool = True
    """Add the reverse of every edge."""

    def trains_whole(self) -> bool:
        """Whether the whole graph is one batch."""
        return True

    def _check_processes(self) -> None:
        check(
            not self.trains_whole(),
            "devices",
            f"{self.devices} for {self.dataset} with full batches",
            "one: a whole graph is one batch, which cannot be split; sample it",
        )
        super()._check_processes()

    def evaluates_whole(self) -> bool:
        return True


@dataclass(frozen=True, kw_only=True)
class GraphConfig(NodeConfig):
    """Nodes of a graph of one node type."""

    residual: Literal["none", "identity", "linear"] = "identity"
    norm: str | None = None
    """The norm, by PyG's name."""
    sampling: Literal["full", "neighbor"] = "full"
    """Train on the whole graph, or on sampled neighborhoods."""
    fanout: tuple[int, ...] = FANOUT
    """With `neighbor`: neighbors sampled a node, hop by hop; -1 takes all."""
    evaluation: Literal["full", "layerwise"] = "full"
    """Evaluate on the whole graph at once, or layer by layer in pieces.
    By layers the result is the same, and takes less memory."""
    conv: tuple[str, ...] = ("gcn",)
    """The conv; several are kinds of experts that alternate (a dense model takes the first).
    Your own: `package.module:Class` or `FILE.py:Class`."""
    router_input: tuple[RouterInput, ...] | None = None
    """What the router sees: the node (the default), the mean of its neighbors, log-degree.
    Or the graph, by itself."""
    shared_router: bool | None = None
    """One decision for all layers, or one in each; by default one where layers start as copies."""
    jk: Literal["last", "cat", "max"] | None = None
    """Jumping knowledge.
    With `last`, all convs may hold experts and a linear layer is the output."""
    input_dropout: float = 0.0
    """Dropout of the input features."""
    ffn: Literal["experts"] | None = None
    """Pre-norm residual blocks, with experts in the feed-forward part behind each conv.
    Their residual is the identity."""
    act: str = "relu"
    """The activation, by PyTorch's name."""
    routing: str | None = None
    """A .npy file with an expert for each node, 0 to E - 1, which all layers replay.
    With it the router is `oracle`. `experiments.advise` writes one."""
    input_again: bool = False
    """With --router dense: layers behind the first see the input beside what they see now.
    A control of routers, which see the input."""
    metric: Literal["accuracy", "roc_auc"] | None = None
    """Of your own graph: the metric (default accuracy)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        are_numbers = self.fanout and min(self.fanout) >= -1
        is_used = self.sampling == "neighbor" or self.fanout == FANOUT
        got = f"{self.fanout} with sampling={self.sampling!r}"
        legal = "numbers from -1 (all), with sampling='neighbor'"
        check(are_numbers and is_used, "fanout", got, legal)
        check(self.conv, "conv", "none", "at least one")
        is_open = self.metric is None or self.dataset == "graph"
        legal = "none; `graph` leaves it open"
        check(is_open, "metric", f"{self.metric!r} for {self.dataset}", legal)
        is_whole = self.sampling == self.evaluation == "full"
        is_told = self.routing is None or (self.router == "oracle" and is_whole)
        got = f"{self.routing!r} with router={self.router!r}, sampling={self.sampling!r}"
        check(is_told, "routing", got, "router='oracle' on the whole graph")
        is_control = self.router == "dense" and self.ffn is None and is_whole
        got = f"True with router={self.router!r}, ffn={self.ffn!r}, sampling={self.sampling!r}"
        legal = "a dense model without ffn, on the whole graph"
        check(not self.input_again or is_control, "input_again", got, legal)

    def convs(self) -> tuple[str, ...]:
        return self.conv

    def trains_whole(self) -> bool:
        return self.sampling == "full"

    def evaluates_by_layer(self) -> bool:
        return self.evaluation == "layerwise"

    def draws_in_workers(self) -> bool:
        return self.sampling == "neighbor"


@dataclass(frozen=True, kw_only=True)
class TypedConfig(NodeConfig):
    """Nodes of one type in a typed graph, in PyG's HeteroConv of a SAGE a relation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        legal = f"none for {self.dataset}; swap convs in a model of typed nodes of your own"
        check(self.data is None, "data", repr(self.data), legal)


@dataclass(frozen=True, kw_only=True)
class MoleculeConfig(RunConfig):
    """Labels of molecules, each a graph, in a GNN as OGB's examples build it."""

    conv: tuple[str, ...] = ("gcn",)
    """The conv; several are kinds of experts that alternate (a dense model takes the first).
    `gcn` and `gin` are OGB's of molecules, `gine` PyG's.
    GIN's batch norm has each expert run on all atoms."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.conv, "conv", "none", "at least one")
        legal = f"none for {self.dataset}; your own molecules are files in OGB's layout"
        check(self.data is None, "data", repr(self.data), legal)

    def convs(self) -> tuple[str, ...]:
        return self.conv


@dataclass(frozen=True, kw_only=True)
class ImageConfig(RunConfig):
    """Patches of images, in a ViT."""

    model: str | None = None
    """A model of timm, `timm/NAME`, with experts in the place of MLPs.
    Or your own: a function, named as a router is, of the image size and the number of classes."""
    model_kwargs: tuple[str, ...] = ()
    """Of a model of timm: its own arguments, as patch_size=8 embed_dim=96 depth=6 num_heads=3."""
    checkpoint: str | None = None
    """Of a model of timm: a file of weights of the dense model, .safetensors or .pth.
    Experts start from its MLPs. A head of another number of classes is drawn anew."""
    targets: tuple[str, ...] = ()
    """Of a model of timm: names of the MLPs that become experts, or patterns of them, in place of
    `every`: `blocks.9.mlp blocks.11.mlp`."""
    router: str = "expert_choice"
    equal_to: str = "expert_choice"
    patch: int | None = None
    """Height and width of a patch; by default that of the size's preset."""
    dim: int | None = None
    """Width of a token; by default that of the size's preset."""
    vit_heads: int | None = None
    """Attention heads; by default those of the size's preset."""
    label_smoothing: float = 0.0
    """timm's smoothing."""
    image_size: int | None = None
    """Height and width that images are brought to; by default the data set's.
    Of a model of timm, the model's."""
    augment: Literal["none", "standard"] = "none"
    """Crops after padding by an eighth, and flips; for small images. `--scale` has its own."""
    recipe: tyro.conf.OmitArgPrefixes[Recipe] = field(default_factory=Recipe)
    """The recipe of images, by timm's names."""

    def __post_init__(self) -> None:
        super().__post_init__()
        legal = "none: images of your own are a folder, `images --data-root DIR`"
        check(self.data is None, "data", repr(self.data), legal)
        soft = self.router != "soft_slots" or (self.k == 1 and self.start in (None, "shared"))
        check(soft, "router", "'soft_slots' with another k or start", "the defaults of these")
        check(
            self.options.scope != "neighbors",
            "scope",
            "'neighbors'",
            "'group': images have no edges",
        )
        self._check_recipe()
        self._check_timm()

    def _check_recipe(self) -> None:
        """Refuse a recipe that is none."""
        recipe = self.recipe
        check_numbers(asdict(recipe))
        check(0 < recipe.crop_pct <= 1, "crop_pct", recipe.crop_pct, "more than 0, at most 1")
        check(recipe.reprob <= 1, "reprob", recipe.reprob, "at most 1")
        low, high = recipe.scale or (1.0, 1.0)
        check(0 < low <= high <= 1, "scale", recipe.scale, "two shares, 0 < LOW <= HIGH <= 1")
        is_one = recipe.scale is None or self.augment == "none"
        check(is_one, "augment", f"{self.augment!r} with scale={recipe.scale}", "one of both")
        decay = 1.0 if recipe.layer_decay is None else recipe.layer_decay
        check(0 < decay <= 1, "layer_decay", decay, "more than 0, at most 1")
        warmup = recipe.warmup_epochs
        is_used = warmup is None or (self.schedule == "cosine" and 0 <= warmup <= self.epochs)
        got = f"{warmup} with schedule={self.schedule!r} and {self.epochs} epochs"
        check(is_used, "warmup_epochs", got, "0 to all, with schedule='cosine'")
        if self.timm_model is None:
            legal = "0, without --model timm/NAME"
            check(not recipe.drop_path, "drop_path", recipe.drop_path, legal)
            legal = "none, without --model timm/NAME"
            check(recipe.layer_decay is None, "layer_decay", recipe.layer_decay, legal)

    def _check_timm(self) -> None:
        """Refuse options of a model of timm without one, and with one those of a ViT of gmoe."""
        if self.timm_model is not None:
            check(self.equal is None, "equal", self.equal, "none with a model of timm")
            check(self.router != "soft_slots", "router", "'soft_slots'", "another, with timm's")
            legal = "KEY=VALUE, as embed_dim=96"
            for argument in self.model_kwargs:
                check(argument.partition("=")[2], "model_kwargs", repr(argument), legal)
            return
        for name in ("model_kwargs", "checkpoint", "targets"):
            value = getattr(self, name)
            check(not value, name, value, "none, without --model timm/NAME")

    @property
    def timm_model(self) -> str | None:
        """The name by which timm knows the model, if it is one of timm's."""
        if self.model is None or ":" in self.model or not self.model.startswith(TIMM):
            return None
        return self.model.removeprefix(TIMM)

    def own_models(self) -> tuple[str, ...]:
        return () if self.timm_model is None else (str(self.model),)

    @property
    def of_images(self) -> Recipe:
        return self.recipe


TIMM = "timm/"
"""What the names of timm's models begin with."""
TYPED = ("ogbn-mag",)
IMAGES = ("digits", "cifar10", "cifar100", "imagenette", "images")
"""Data sets of each kind; all others are graphs, but OGB's molecules, ``ogbg-mol...``."""
ERRORS = ("rmse",)
"""Metrics of which less is better, and which are not shares."""

WHERE = frozenset(
    {
        "data_root",
        "out",
        "resume",
        "workers",
        "device",
        "offline",
        "logger",
        "progress",
    }
)
"""Options that no number depends on; but for ``workers``, where these draw neighborhoods."""
OF_MODEL = frozenset(
    {
        "router",
        "experts",
        "k",
        "hidden",
        "start",
        "layers",
        "every",
        "dropout",
        "kmeans_init",
        "residual",
        "norm",
        "router_input",
        "shared_router",
        "routing",
        "input_again",
        "jk",
        "input_dropout",
        "ffn",
        "act",
        "patch",
        "dim",
        "vit_heads",
        *(field.name for field in fields(RouterOptions)),
    }
)
"""Options that only say how a model is built, so that a model of one's own has none of them.

``conv`` says what a model is called with, too.
"""
OF_VIT = frozenset({"hidden", "layers", "dropout", "patch", "dim", "vit_heads"})
"""Those of them that a model of timm has none of: its ``model_kwargs`` say it."""
RECORDS = ("file", "digest", "contents", "weights")
"""What ``config.json`` holds beside the options: the name of your own graph's file, a digest of
your own data, where that is of the names and sizes of images, one of what they contain, and one of
the weights that a run started from."""
DATA_RECORDS = ("digest", "contents")
"""Those of them that say whether data are the same."""


def config_class(dataset: str) -> type[RunConfig]:
    """The configuration of a data set's kind."""
    if dataset in TYPED:
        return TypedConfig
    if dataset.startswith("ogbg-"):
        return MoleculeConfig
    return ImageConfig if dataset in IMAGES else GraphConfig


OF_EXPERTS = (
    "experts", "k", "start", "kmeans_init", "options", "equal", "equal_to",
    "router_input", "shared_router", "targets", "routing",
)  # fmt: skip
"""Options that a dense model has no use for."""


def dense_of(config: RunConfig) -> RunConfig:
    """The run of the dense model that stands where the one with experts does."""
    changes = usual(config, OF_EXPERTS)
    if config.convs():  # of several kinds of experts a dense model takes the first
        changes["conv"] = config.convs()[:1]
    return replace(config, router="dense", **changes)


def moe_of(config: RunConfig) -> RunConfig:
    """The run of the MoE that a dense model is matched to by ``equal``."""
    return replace(config, router=config.equal_to, **usual(config, ("equal",)))


def usual(config: RunConfig, names: Sequence[str]) -> dict[str, Any]:
    """The defaults of some options, as far as the kind of data has these."""
    defaults = type(config)(dataset=config.dataset)
    return {name: getattr(defaults, name) for name in names if hasattr(defaults, name)}
