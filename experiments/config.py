"""What a run is: frozen dataclasses that the command line is made of."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import tyro

from experiments.digest import file_digest, images_digest

RouterInput = Literal["node", "neighbors", "degree"]

RouterName = Literal[
    "dense", "token_choice", "expert_choice", "attention_vote", "multi_centroid", "random", "uniform", "oracle"
]

FANOUT = (15, 10, 5)


@dataclass(frozen=True, kw_only=True)
class RouterOptions:
    """Options of the routers; what a router does not know is an error.

    What is left out takes the value of :func:`pinned` (`weight`, `balance`), or the router's own default.
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


def pinned(run: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a run's router, with weight and balance written out, whatever the library's defaults.

    Args:
        run: as JSON, see :meth:`TrainConfig.science`.
    """
    options: dict[str, Any] = run["options"]
    router = run["equal_to"] if run["router"] == "dense" and run.get("equal") else run["router"]
    by_gate = "normalized" if run["k"] > 1 else None
    pins: dict[str, dict[str, Any]] = {
        "token_choice": {"weight": by_gate or "straight_through", "balance": "none"},
        "random": {"weight": by_gate or "straight_through"},
        "expert_choice": {"weight": "score"},
        "attention_vote": {"weight": "score"},
        "multi_centroid": {"weight": "score" if options.get("choice") == "experts" else by_gate or "score"},
    }
    return pins.get(router, {}) | options


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run: a data set, a model, a recipe, and where it all goes."""

    dataset: str
    """The data: `digits`, `digits-graph`, `mosaic`, a name of `experiments/data/registry.py` or of
    `vision.load_images`, or `graph` and `images`, your own."""

    # model
    router: RouterName = "token_choice"
    """Who decides; `dense` is the model without experts, the baseline."""
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
    moe_blocks: tuple[int, ...] = ()
    """Images: the blocks that hold experts, from 0, in place of `every`."""
    mlp_scale: float = 1.0
    """Images, dense: factor of the output of the MLPs in whose place experts would be, which weights by score scale."""
    image_size: int | None = None
    """Images: height and width that images are brought to; by default the data set's."""
    patch: int | None = None
    """Images: height and width of a patch; by default that of the size's preset."""
    dim: int | None = None
    """Images: width of a token; by default that of the size's preset."""
    vit_heads: int | None = None
    """Images: attention heads of the ViT; by default those of the size's preset."""
    conv: tuple[str, ...] = ("gcn",)
    """Graphs: the conv; several are kinds of experts that alternate (a dense model takes the first)."""
    heads: int = 1
    """Graphs: attention heads, of the convs that have them."""
    edge_features: bool = False
    """Graphs: give the edge features to convs that take them (GAT, GATv2, Transformer, GINE, ...)."""
    shared_expert: bool = False
    """One more expert that runs on every token."""
    dense_start: bool = False
    """Beside the shared expert, the others start at zero."""
    in_proj: bool = False
    """Graphs: begin with a linear layer."""
    tie_routers: bool = False
    """Heterogeneous graphs: one router for all node types, not one for each."""
    tie_experts: bool = False
    """Heterogeneous graphs: the experts of all node types have one root weight and bias."""
    shared_router: bool = False
    """Graphs: one decision for all layers, not one in each."""
    router_input: tuple[RouterInput, ...] = ("node",)
    """Graphs: what the router sees: the node, the mean of its neighbors, log-degree."""
    router_hops: int = 1
    """Graphs, shared router: how far the router sees."""
    residual: Literal["none", "identity", "linear"] = "identity"
    """Graphs: the residual."""
    norm: str | None = None
    """Graphs: the norm, by PyG's name."""
    jk: Literal["last", "cat", "max"] | None = None
    """Graphs: jumping knowledge; with `last`, all convs may hold experts and a linear layer is the output."""
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
    augment: Literal["none", "standard", "randaugment"] = "none"
    """Images: random crops and flips (`standard`), and RandAugment with them."""
    mixup: float = 0.0
    """Images: alpha of mixup; 0 is off. With cutmix too, each batch draws one of them."""
    cutmix: float = 0.0
    """Images: alpha of cutmix; 0 is off."""
    val_share: float = 0.1
    """Images: share of the training images that validate, stratified; the data set's test images are read once."""
    split_seed: int = 0
    """Images: seed of that split."""
    skip_broken: bool = False
    """Images: leave out files that cannot be decoded, and say how many."""
    label_smoothing: float = 0.0
    """Images: label smoothing."""
    epochs: int = 100
    """Epochs."""
    batch_size: int = 128
    """Batch size; of graphs, seed nodes a batch (`neighbor`), or nodes a part (`random_node`)."""
    sampling: Literal["full", "neighbor", "random_node"] = "full"
    """Graphs: train on the whole graph, on sampled neighborhoods, or on random parts."""
    fanout: tuple[int, ...] = FANOUT
    """Graphs, `neighbor`: neighbors sampled a node, hop by hop; -1 takes all."""
    workers: int = 0
    """Processes that sample (graphs, `neighbor`) or load images while the model computes."""
    evaluation: Literal["full", "layerwise", "sampled"] = "full"
    """Graphs: evaluate on the whole graph, layer by layer in pieces (same result, less memory), or as in training."""
    undirected: bool = True
    """Graphs: add the reverse of every edge."""
    self_loops: bool = False
    """Graphs: add a self-loop to every node (GCN and GAT add their own all the same)."""
    adjacency: Literal["auto", "edge_index", "csr"] = "auto"
    """Graphs, full-batch: how edges are given; `auto` takes CSR where convs run on it and use no edge features."""
    label_reuse: float = 0.0
    """Graphs, full-batch: share of the training labels that are input, drawn anew each epoch, while the loss is on the
    others; at evaluation all of them are input. Off by default."""
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
    clip_norm: float = 0.0
    """Clip the norm of the gradient to this; 0 leaves it."""
    ema: float = 0.0
    """Evaluate an exponential moving average of the weights with this decay; 0 evaluates the weights."""
    input_dropout: float = 0.0
    """Graphs: dropout of the input features."""
    weight_decay: float = 0.0
    """Weight decay; never on biases, norms, temperatures and centroids."""
    seeds: tuple[int, ...] = (0,)
    """Seeds, one after the other."""

    # where
    data_root: Path = Path("data")
    """Root folder of the data, given to the data set's loader as it is."""
    offline: bool = False
    """Never download."""
    allow_large_downloads: bool = False
    """Download also what is larger than 1 GB."""
    metric: Literal["accuracy", "roc_auc"] | None = None
    """Of a user's own graph: the metric (default accuracy)."""
    out: Path | None = None
    """Run folder; by default runs/DATASET-ROUTER."""
    resume: bool = False
    """Go on with a run folder that exists; seeds that it lacks are added."""
    checkpoint_every: int = 50
    """Epochs between checkpoints."""
    check_finite: bool = True
    """Refuse NaN and infinity in what the routers see."""
    device: str = "auto"
    """Fabric's accelerator: auto, cpu, cuda, mps."""
    precision: Literal["32-true", "bf16-mixed", "64-true"] = "32-true"
    """Fabric's precision."""
    compile: bool = False
    """Run the model through torch.compile."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        for name in (
            "experts",
            "k",
            "hidden",
            "layers",
            "every",
            "epochs",
            "batch_size",
            "checkpoint_every",
            "eval_every",
            "heads",
            "patch",
            "dim",
            "vit_heads",
            "image_size",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        if not self.conv:
            raise ValueError("conv: got none, expected at least one")
        if not self.lr > 0:
            raise ValueError(f"lr: got {self.lr}, expected a number above 0")
        if self.sampling != "neighbor" and self.fanout != FANOUT:
            raise ValueError(f"fanout: got {self.fanout} with sampling={self.sampling!r}, expected 'neighbor'")
        if not self.fanout or min(self.fanout) < -1:
            raise ValueError(f"fanout: got {self.fanout}, expected at least one number, none below -1 (all)")
        if self.ema and self.options.inference == "threshold":
            raise ValueError(
                "ema: got an average with inference='threshold', whose cut scores are those of the weights themselves; "
                "expected 0, or inference='group'"
            )
        if not 0 <= self.label_reuse < 1:
            raise ValueError(f"label_reuse: got {self.label_reuse}, expected a share in [0, 1)")
        if self.label_reuse and self.sampling != "full":
            raise ValueError(f"label_reuse: got {self.label_reuse} with sampling={self.sampling!r}, expected 'full'")
        for name, value, least, below in (
            ("val_share", self.val_share, 0, 1),
            ("label_smoothing", self.label_smoothing, 0, 1),
            ("warmup", self.warmup, 0, 1),
            ("ema", self.ema, 0, 1),
            ("dropout", self.dropout, 0, 1),
            ("input_dropout", self.input_dropout, 0, 1),
            ("mlp_scale", self.mlp_scale, 0, math.inf),
            ("mixup", self.mixup, 0, math.inf),
            ("cutmix", self.cutmix, 0, math.inf),
            ("clip_norm", self.clip_norm, 0, math.inf),
            ("weight_decay", self.weight_decay, 0, math.inf),
        ):
            if not least <= value < below:
                raise ValueError(f"{name}: got {value}, expected a number in [{least}, {below})")
        if self.metric is not None and self.dataset != "graph":
            raise ValueError(
                f"metric: got {self.metric!r} for {self.dataset}, expected none; only `graph` leaves it open"
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: got {self.seeds}, expected at least one, each once")
        if not 0 <= min(self.seeds) <= max(self.seeds) < 2**32:
            raise ValueError(f"seeds: got {self.seeds}, expected numbers from 0 to 2**32 - 1")
        if self.router != "dense" and self.mlp_scale != 1:
            raise ValueError(
                f"mlp_scale: got {self.mlp_scale} with router={self.router!r}, expected 1; dense MLPs take it"
            )
        if self.router == "dense" and self.equal is None and self.moe_blocks:
            raise ValueError(f"moe_blocks: got {self.moe_blocks} with router='dense', expected none: it has no experts")

    def folder(self) -> Path:
        """The run folder."""
        return self.out if self.out is not None else Path("runs") / f"{self.dataset}-{self.router}"

    def router_options(self) -> dict[str, Any]:
        """The options of the router, see :func:`pinned`."""
        return pinned({**vars(self), "options": self.options.given()})

    def science(self) -> dict[str, Any]:
        """What the numbers depend on, as JSON: all but where it runs and where it is written."""
        where = {
            "offline",
            "allow_large_downloads",
            "out",
            "resume",
            "checkpoint_every",
            "progress",
            "device",
            "workers",
            "compile",
        }
        values = {name: value for name, value in asdict(self).items() if name not in where | {"data_root"}}
        if self.dataset == "graph":
            values["file"] = self.data_root.name
            values["digest"] = file_digest(self.data_root)
        if self.dataset in IMAGE_FOLDERS:
            values["digest"] = images_digest(self.dataset, self.data_root)
        values["options"] = self.router_options()
        found: dict[str, Any] = json.loads(json.dumps(values))
        return found

    @staticmethod
    def restore(science: dict[str, Any], data_root: Path) -> TrainConfig:
        """The configuration that :meth:`science` was written of.

        Args:
            science: as JSON.
            data_root: where the data are here; a user's own graph itself, or the folder that holds it.

        Raises:
            ValueError: an option that there is not, or a value that is not legal.
        """
        values = {name: value for name, value in science.items() if name not in ("file", "digest")}
        known = {option.name for option in fields(TrainConfig)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"config: got {', '.join(unknown)}, expected options of experiments.train")
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        values["options"] = RouterOptions(**values.get("options", {}))
        if science.get("file") and data_root.name != science["file"]:
            data_root = data_root / science["file"]
        return TrainConfig(**values, data_root=data_root)

    def differences(self, there: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Where the :meth:`science` of another run is another: its value and this one's.

        What the other run did not know, since it is older, had the default.
        """
        here = self.science()
        defaults = json.loads(json.dumps({option.name: option.default for option in fields(self) if _plain(option)}))
        before = {name: there.get(name, defaults.get(name)) for name in here} | there
        return {name: (value, here.get(name)) for name, value in before.items() if value != here.get(name)}

    def refuse(self, names: tuple[str, ...], kind: str) -> None:
        """Refuse options that a data set would ignore.

        Args:
            names: the options.
            kind: what takes them.

        Raises:
            ValueError: one of them is not at its default.
        """
        for option in fields(self):
            value = getattr(self, option.name)
            if option.name in names and value != option.default:
                raise ValueError(
                    f"{option.name}: got {value!r} for {self.dataset}, expected {option.default!r}; only {kind} take it"
                )


IMAGES_ONLY = (
    "mlp_scale",
    "moe_blocks",
    "image_size",
    "patch",
    "dim",
    "vit_heads",
    "augment",
    "mixup",
    "cutmix",
    "val_share",
    "split_seed",
    "skip_broken",
    "label_smoothing",
)
"""Options that mean nothing on a graph."""

GRAPHS_ONLY = (
    "conv",
    "heads",
    "edge_features",
    "in_proj",
    "tie_routers",
    "tie_experts",
    "shared_router",
    "router_input",
    "router_hops",
    "residual",
    "norm",
    "jk",
    "input_dropout",
    "sampling",
    "fanout",
    "evaluation",
    "undirected",
    "self_loops",
    "adjacency",
    "label_reuse",
)
"""Options that mean nothing on images."""


IMAGE_FOLDERS = ("cifar10", "imagenette", "images")
"""Image data that may be any files in folders; the others are the published ones, or refused."""


def _plain(option: Field[Any]) -> bool:
    return isinstance(option.default, int | float | str | tuple | None)
