"""What a run is: frozen dataclasses that the command line is made of."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

RouterName = Literal[
    "dense", "token_choice", "expert_choice", "attention_vote", "multi_centroid", "random", "uniform", "oracle"
]


@dataclass(frozen=True, kw_only=True)
class RouterOptions:
    """Options of the routers; what is left out takes the router's own default, what it does not know is an error."""

    weight: Literal["score", "normalized", "straight_through"] | None = None
    """How a pair's weight follows from its gate."""
    noise: bool | None = None
    """Token choice: noisy top-K gating in training."""
    balance: Literal["importance_load", "switch", "bias"] | None = None
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
    inference: Literal["pool", "threshold"] | None = None
    """Expert choice: evaluation by pool or by a running threshold."""
    queries: Literal["per_expert", "shared"] | None = None
    """Attention vote: whose queries."""
    scope: Literal["pool", "neighbours"] | None = None
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
class TrainConfig:
    """One training run: a data set, a model, a recipe, and where it all goes."""

    dataset: Literal["digits", "digits-graph", "mosaic", "cora", "citeseer"]
    """The data."""

    # model
    router: RouterName = "token_choice"
    """Who decides; `dense` is the model without experts, the control."""
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
    conv: str = "gcn"
    """Graphs: the conv."""
    routing: Literal["layer", "shared"] = "layer"
    """Graphs: each layer routes, or one decision for all layers."""
    route_on: Literal["input", "aggregate", "both"] = "both"
    """Graphs: what the router sees."""
    route_hops: int = 1
    """Graphs, shared routing: how far the router sees."""
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
    """The router of the MoE that the dense control is matched to; experts, K and the rest as given."""

    # recipe
    epochs: int = 100
    """Epochs."""
    batch_size: int = 128
    """Images: batch size. Graphs of these data sets are trained full-batch."""
    optimizer: Literal["adam", "adamw"] = "adam"
    """Optimizer."""
    lr: float = 0.01
    """Learning rate."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning-rate schedule: constant, or 10 % linear warm-up and cosine."""
    weight_decay: float = 0.0
    """Weight decay; never on biases, norms, temperatures and centroids."""
    seeds: tuple[int, ...] = (0,)
    """Seeds, one after the other."""

    # where
    data_root: Path = Path("data")
    """Root folder of the data, given to the data set's loader as it is."""
    offline: bool = False
    """Never download."""
    out: Path | None = None
    """Run folder; by default runs/DATASET-ROUTER."""
    resume: bool = False
    """Go on with a run folder that exists."""
    checkpoint_every: int = 50
    """Epochs between checkpoints."""
    check_finite: bool = True
    """Refuse NaN and infinity in what the routers see."""
    device: str = "auto"
    """Fabric's accelerator: auto, cpu, cuda, mps."""
    precision: Literal["32-true", "bf16-mixed", "64-true"] = "32-true"
    """Fabric's precision."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        for name in ("experts", "k", "hidden", "layers", "every", "epochs", "batch_size", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: got {self.seeds}, expected at least one, each once")

    def folder(self) -> Path:
        """The run folder."""
        return self.out if self.out is not None else Path("runs") / f"{self.dataset}-{self.router}"

    def science(self) -> dict[str, Any]:
        """What the numbers depend on, as JSON: all but where it runs and where it is written."""
        where = {"data_root", "offline", "out", "resume", "checkpoint_every", "progress", "device"}
        values = {name: value for name, value in asdict(self).items() if name not in where}
        values["options"] = self.options.given()
        values["seeds"] = list(self.seeds)
        return values
