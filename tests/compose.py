"""One random composer: a number is a configuration.

It is built, run, and compared in float64 with its definition.

``python -m tests.compose 4711`` shows a number, ``python -m tests.compose 0 2000`` runs a range.
What fails is a bug, of the library or of this file. Refusals in the library's own words are counted
apart.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.nn import CGConv, LayerNorm, PNAConv

from gmoe import GNNMoE, Graph, MoEConv, Router, Routing, StoredGraph, neighbor_loader
from gmoe import sums as sums_module
from gmoe._checks import parameters_of
from gmoe.conv.base import GAIN_SCALE
from gmoe.conv.kinds import by_name, class_of, kind_of, of_pyg
from tests.composer import Composer, Outcome, compare, flip, judged
from tests.gmoe.conv import masked as ref
from tests.gmoe.data.stored_files import store

# PyG compiles a class for its first instance: of several aggregations, sparse matrices then fail
for name in ("sage", "graph", "gin"):
    by_name()[name](1, 1)

TOLERANCE = 1e-10
EXPERTS, WIDTH, EDGE_DIM = 3, 4, 3
FLAGS, SPARSE = (False, True), ("coo", "csr")
PLAIN = ("plain", "int32", "not contiguous")
HEADS = {"heads": (1, 2), "concat": FLAGS, "bias": FLAGS}
GAT = {**HEADS, "add_self_loops": FLAGS, "residual": FLAGS, "negative_slope": (0.7,)}
PNA = {
    "aggregators": ["mean", "max", "std"],
    "scalers": ["identity", "amplification"],
    "deg": torch.tensor([1, 3, 2]),
}
RETIRED = ("in_proj", "reduce")
"""Options that are drawn and left out, so that each number keeps its other draws."""
BEFORE = (
    *(
        "no_grad",
        "inference_mode",
        "step",
        "NaN token",
        "other graph",
        "other thread",
        "deepcopy",
        "pickle",
    ),
    *("other edge arguments", "x changed in place"),
)
"""What a module, its graph and its features may have been through before the call that counts."""


class Spec(NamedTuple):
    """What the composer knows of a kind of conv."""

    edges: str = ""
    """The edge argument that it takes."""
    two: str = ""
    """The widths that its two sets of nodes may have: ``"any"`` or ``"one"``."""
    options: Mapping[str, Sequence[Any]] = {}
    """Further options, and their values."""
    dim: str = "edge_dim"
    """The name of its option for the width of edge features."""
    sparse: bool = True
    """It takes sparse matrices."""
    in_models: bool = True
    """Models may have it."""


KINDS: dict[str, Spec] = {
    "gcn": Spec(
        "edge_weight",
        options={"improved": FLAGS, "add_self_loops": FLAGS, "aggr": ("add", "add", "mean")},
    ),
    "sage": Spec(
        "",
        "any",
        {"aggr": ("mean", "max", "sum", ["mean", "max"]), "root_weight": FLAGS, "normalize": FLAGS},
    ),
    "graph": Spec("edge_weight", "any", {"aggr": ("add", "mean", "max"), "bias": FLAGS}),
    "gin": Spec("", "one", {"train_eps": FLAGS, "eps": (0.5, -0.3), "aggr": ("mean", "max")}),
    "gine": Spec("edge_attr", "one", {"train_eps": FLAGS, "eps": (0.5, -0.3)}),
    "gat": Spec("edge_attr", "any", GAT),
    "gatv2": Spec("edge_attr", "any", {**GAT, "share_weights": FLAGS}),
    "transformer": Spec("edge_attr", "any", {**HEADS, "beta": FLAGS, "root_weight": FLAGS}),
    **dict.fromkeys(
        ("low_pass", "high_pass", "two_hop"), Spec("edge_weight", options={"add_self_loops": FLAGS})
    ),
    "filter": Spec(
        "edge_weight", options={"hops": (1, 3), "filter": ("low_pass", "high_pass"), "bias": FLAGS}
    ),
    "identity": Spec(),
    "mlp": Spec("", "any", {"hidden_channels": (3,)}),
    "le": Spec("edge_weight", "one"),
    "film": Spec(),
    "resgatedgraph": Spec("edge_attr", "any", {"root_weight": FLAGS}),
    "general": Spec(
        "edge_attr",
        "one",
        {"attention": FLAGS, "heads": (2,), "l2_normalize": FLAGS},
        "in_edge_channels",
    ),
    "feast": Spec("", "one", sparse=False),
    "mf": Spec("", "any", sparse=False),
    "clustergcn": Spec(sparse=False),
    "simple": Spec("", "one", {"aggr": ("sum", "max")}, in_models=False),
    "cg": Spec("edge_attr", options={"aggr": ("mean", "max")}, dim="dim", in_models=False),
    "pna": Spec("edge_attr", in_models=False),
    **dict.fromkeys(("tag", "sg"), Spec("edge_weight", in_models=False)),
    "cheb": Spec("edge_weight", sparse=False, in_models=False),
}
OFTEN = tuple(KINDS)[: tuple(KINDS).index("le")]


class Sigmoids(Router):
    """A router of somebody else's."""

    def __init__(self, dim: int, *, num_experts: int, k: int = 1) -> None:
        super().__init__(dim, num_experts=num_experts, k=k)
        self.lin = nn.Linear(dim, num_experts)

    def reset_parameters(self) -> None:
        self.lin.reset_parameters()

    def route(self, x_TD: Tensor, group: Tensor | int, edge_index: Tensor | None) -> Routing:
        weight_TK, expert_TK = self.lin(x_TD).sigmoid().topk(self.k, dim=-1)
        return Routing.from_choices(expert_TK, weight_TK, num_experts=self.num_experts)


BY_EXPERTS = {
    "capacity_factor": (0.6, 1.3),
    "normalize": ("experts", "tokens"),
    "inference": ("threshold",),
}
ROUTERS: dict[Any, Mapping[str, Sequence[Any]]] = {
    "token_choice": {
        **{
            "balance": ("bias", "importance_load", "switch", None),
            "noise": (True, "spread"),
            "z_coef": (0.1,),
        },
        **{"capacity_factor": (0.75, 1.5), "init_scale": (1.0,)},
    },
    "expert_choice": {**BY_EXPERTS, "z_coef": (0.1,)},
    "attention_vote": {
        "shared_queries": (True,),
        "capacity_factor": (0.6,),
        "scope": ("neighbors",),
    },
    "multi_centroid": {
        "num_centroids": (1, 2),
        "reduce": ("logsumexp",),
        "choice": ("experts",),
        **BY_EXPERTS,
    },
    **{"random": {}, "uniform": {}, Sigmoids: {}, None: {}},  # None: weights are given
}


class Kind(NamedTuple):
    """A kind of conv with options."""

    name: str
    options: dict[str, Any]

    def build(self) -> Any:
        """As a layer takes it."""
        cls: Any = {"cg": CGConv, "pna": PNAConv}.get(self.name) or by_name()[self.name]
        return partial(cls, **self.options) if self.options else self.name


@dataclass(frozen=True)
class Config:
    """A MoEConv (``way="layer"``) or a GNNMoE, and what it is compared with.

    Also its input, and what happened before.
    """

    number: int
    way: str
    training: bool
    two: bool
    alone: bool
    form: str
    graph: str
    sizes: tuple[int, int]
    edges: int
    edge_dim: int | None
    kinds: tuple[Kind, ...]
    start: str
    partials: bool
    widths: tuple[int, int, int]
    edge_args: tuple[str, ...]
    values: str
    in_graph: tuple[str, ...]
    learned: tuple[str, ...]
    options: dict[str, Any]
    batch: int
    before: tuple[str, ...]
    positional: bool
    as_on_gpus: bool
    low: str


# Drawing: what would be nonsense is left out


def some(random: Random, choices: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Some of the options, each with one of its values."""
    drawn = {name: random.choice(values) for name, values in choices.items() if flip(random)}
    return {name: value for name, value in drawn.items() if name not in RETIRED}


def draw_graph(random: Random, way: str) -> dict[str, Any]:
    """The edges and their form; two sets of nodes, the second one perhaps without features."""
    two = way == "layer" and flip(random, 0.2)
    form = "plain" if way in ("sampled", "disk") else random.choice(["plain"] * 6 + list(ref.FORMS))
    # Of several loops GCN keeps the last one's weight
    simple = form not in PLAIN or way == "sampled"
    sizes = (random.randint(1, 9), random.randint(1, 9)) if two else (random.randint(2, 14),) * 2
    # Else PyG fails to make loops of a matrix's values
    sizes = (max(sizes), min(sizes)) if form in SPARSE else sizes
    graph, edges = (
        "simple" if simple else "random",
        random.choice((0, 5, 20, 30) if not simple else (5, 20, 30)),
    )
    if not two and not simple and flip(random, 0.35):
        graph = random.choice(list(ref.GRAPHS))
        sizes, edges = (ref.GRAPHS[graph][0],) * 2, ref.GRAPHS[graph][1].size(1)
    alone = two and flip(random, 0.3)
    return {
        "two": two,
        "alone": alone,
        "form": form,
        "graph": graph,
        "sizes": sizes,
        "edges": edges,
    }


def draw_kind(random: Random, name: str, found: Mapping[str, Any], alike: bool) -> Kind:
    """One kind; ``alike``: outputs are as wide as asked for."""
    spec, edge_dim = KINDS[name], found["edge_dim"]
    options = some(random, spec.options) | (
        PNA if name == "pna" else {"K": 2} if name in ("cheb", "tag", "sg") else {}
    )
    if name == "gcn" and flip(random, 0.1):
        options |= {"normalize": False, "add_self_loops": False}
    if "concat" in spec.options and alike:
        options["concat"] = False
    if (
        spec.edges == "edge_attr"
        and edge_dim is not None
        and (name != "gine" or edge_dim == EDGE_DIM)
    ):
        options[spec.dim] = edge_dim
    if spec.options.get("residual") and edge_dim is not None:
        few = found["sizes"][0] < found["sizes"][1]  # then PyG fails to reduce
        options["fill_value"] = random.choice((0.5, 2.0) if few else ("mean", "max", "add", 0.5))
    if (
        found["form"] in PLAIN
        and not found["two"]
        and found["way"] not in ("sampled", "disk")
        and of_pyg(class_of(by_name()[name]))
    ):
        options |= {"flow": "target_to_source"} if flip(random, 0.1) else {}
    return Kind(name, options)


def draw_kinds(random: Random, found: Mapping[str, Any]) -> dict[str, Any]:
    """Draw a kind for all experts or a list, and how they start.

    Either all kinds that take edge features get them, or none does.
    """
    sparse, way = found["form"] in SPARSE, found["way"]
    edge_dim = None if way == "disk" or flip(random) else random.choice((EDGE_DIM, EDGE_DIM, WIDTH))
    found = {**found, "edge_dim": edge_dim}

    def fits(name: str) -> bool:
        spec = KINDS[name]
        rows = sparse and edge_dim is not None  # of values, which attention takes
        return (
            (not found["two"] or spec.two != "")
            and (not sparse or spec.sparse)
            and (not rows or "heads" in spec.options)
            and (not found["alone"] or not kind_of(class_of(by_name()[name])).needs_destinations)
            and (name not in ("gine", "cg") or edge_dim is not None)
            and (way == "layer" or spec.in_models)
            and (way != "disk" or name not in ("two_hop", "filter"))
        )

    pool = [name for name in (OFTEN if flip(random, 0.7) else KINDS) if fits(name)] or ["gat"]
    names = random.choices(pool, k=random.choice((1, 1, 2, 3)))
    partials = len(names) > 1 or names == ["mlp"] or flip(random)
    alike = len(names) > 1 or (way != "layer" and partials)
    kinds = tuple(draw_kind(random, name, found, alike) for name in names)
    starts = (
        ("shared", "shared", "plain") if len(names) > 1 else ("shared", "shared", "plain", "copies")
    )
    return {
        "edge_dim": edge_dim,
        "kinds": kinds,
        "start": random.choice(starts),
        "partials": partials,
    }


def draw_widths(random: Random, found: Mapping[str, Any]) -> dict[str, Any]:
    """Of sources, destinations and outputs: of a model, of hidden layers."""
    kinds, width = found["kinds"], random.choice((WIDTH, WIDTH, 9))
    if any(kind.name in ("simple", "cg", "gine") for kind in kinds):
        return {"widths": (WIDTH,) * 3}
    same = any(KINDS[kind.name].two == "one" or kind.options.get("share_weights") for kind in kinds)
    return {
        "widths": (width, 6 if found["two"] and not same else width, random.choice((WIDTH, 2, 6)))
    }


def draw_edge_args(random: Random, found: Mapping[str, Any]) -> dict[str, Any]:
    """Which edge arguments there are, where they are given, and which need gradients."""
    sparse, wraps = (
        found["form"] in SPARSE,
        found["way"] not in ("sampled", "disk") and flip(random, 0.6),
    )
    taken = (
        set()
        if sparse or found["way"] == "disk"
        else {KINDS[kind.name].edges for kind in found["kinds"]}
    )
    args = [name for name in ("edge_weight",) if name in taken and flip(random, 0.7)]
    args += ["edge_attr"] if "edge_attr" in taken and found["edge_dim"] is not None else []
    values = (
        ""
        if not sparse
        else "rows"
        if found["edge_dim"] is not None
        else random.choice(("ones", "some"))
    )
    in_graph = ("Graph", *(name for name in ("x", *args) if flip(random, 0.7))) if wraps else ()
    learned = tuple(name for name in ("x", "edge_weight", "edge_attr") if flip(random, 0.7))
    return {"edge_args": tuple(args), "values": values, "in_graph": in_graph, "learned": learned}


def draw_router(random: Random, found: Mapping[str, Any]) -> dict[str, Any]:
    """The router, what it sees, and K."""
    k = random.randint(1, len(found["kinds"]) if len(found["kinds"]) > 1 else EXPERTS)
    names = ["token_choice", *ROUTERS]
    if found["way"] in ("sampled", "disk"):  # where tokens decide alone
        names = ["token_choice", "token_choice", "multi_centroid", "random", "uniform"]
    if found["start"] == "copies":  # where a token's weights sum to 1
        names = ["token_choice", "token_choice", "multi_centroid", "random", "uniform", None]
    router = random.choice(
        names if found["way"] == "layer" else [name for name in names if name is not None]
    )
    options = some(random, ROUTERS[router])
    if options.get("balance") == "importance_load":
        options["noise"] = True
    if found["two"] or found["way"] in ("sampled", "disk"):
        options = {
            name: value for name, value in options.items() if name not in ("scope", "choice")
        }
    if router not in ("uniform", Sigmoids, None) and flip(random):
        options["weight"] = random.choice(
            ("score", "straight_through", *(["normalized"] if k > 1 else []))
        )
    if found["start"] == "copies":
        drops = ("capacity_factor", "choice", "normalize", "inference")
        options = {name: value for name, value in options.items() if name not in drops}
        if router not in ("uniform", None):
            options["weight"] = "normalized" if k > 1 else "straight_through"
    if router == "token_choice" and found["number"] % 13 == 5:
        # Not drawn, which would make all numbers others; none of these is in compose.md.
        options = {name: value for name, value in options.items() if name != "capacity_factor"}
        if options.get("balance") == "importance_load":
            options["balance"] = "switch"
        options |= {"top_p": 0.6, "entropy_coef": 0.1}
        if found["start"] == "copies":
            options["weight"] = "normalized"
    sees = tuple(part for part in ("node", "neighbors", "degree") if flip(random, 0.4)) or ("node",)
    return {"k": k, "router": router, "router_kwargs": options, "router_input": sees}


def draw_model(random: Random, found: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a model beside its experts'."""
    layers, local = random.choice((1, 2, 2, 3, 6)), found["way"] in ("sampled", "disk")
    jk = random.choice(
        (None, None, "last", *(() if found["way"] == "disk" else ("cat", "max", "lstm")))
    )
    norms: list[dict[str, Any]] = [{"norm": "batch_norm"}, {"norm": "by node"}]
    norms[:1] = [{}] if found["sizes"][0] == 1 else norms[:1]  # one row has no variance
    norms += [{}, {}] if local else [{}, {}, {"norm": "graph_norm"}, {"norm": "layer_norm"}]
    choices = {"residual": ("none", "linear"), "in_proj": (True,), "act": ("elu",)}
    deep = {"every": (2,)} if layers > 2 and flip(random) else {}
    own = {
        "num_layers": layers,
        "jk": "last" if layers == 1 else jk,
        "shared_router": flip(random, 0.4),
    }
    return own | random.choice(norms) | some(random, {**choices, **deep})


def draw_past(random: Random, found: Mapping[str, Any]) -> dict[str, Any]:
    """What happened before."""
    # PyG fails
    known = [
        name for name in BEFORE if name != "inference_mode" or not found["form"].startswith("Edge")
    ]
    # To what float32 holds
    known = [name for name in known if name != "x changed in place" or found["way"] != "disk"]
    return {
        "before": ()
        if flip(random, 0.25)
        else tuple(random.sample(known, random.choice((1, 1, 2))))
    }


STACKED = ("gcn", "sage", "graph", "gin", "gat", "gatv2", "transformer")
"""Kinds of which a model's layers start as copies by default, if they are given by name."""


def default_start(found: Mapping[str, Any], options: Mapping[str, Any]) -> str | None:
    """What ``start=None`` becomes; ``None`` where that is not predicted.

    A layer starts beside a shared expert, and so do those of a model with a router in each. A model
    that routes once starts as copies of one kind, where a node's weights sum to 1.
    """
    if found["way"] == "layer" or not options["shared_router"]:
        return "shared"
    router, kwargs = options["router"], options["router_kwargs"]
    tokens_choose = {
        "token_choice": "capacity_factor" not in kwargs,
        "multi_centroid": kwargs.get("choice") != "experts",
        "random": True,
        "uniform": True,
    }
    to_one = "straight_through" if options["k"] == 1 else "normalized"
    sums_to_one = tokens_choose.get(router, False) and kwargs.get("weight", to_one) == to_one
    if not sums_to_one or options.get("shared_transform"):
        return "shared"
    if len(found["kinds"]) > 1:  # a list of one kind may be copies
        return "shared" if len({kind.name for kind in found["kinds"]}) > 1 else None
    is_named = found["kinds"][0].name in STACKED and not found["partials"]
    return "copies" if is_named else None


def left_out(random: Random, found: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """Some options in the words of the default, where that means what was drawn.

    By random numbers of their own, so that each number keeps its other draws.
    """
    left: dict[str, Any] = {}
    if found["start"] == default_start(found, options) and flip(random, 0.6):
        left["start"] = None
    is_default = options.get("shared_router") == (found["start"] == "copies")
    says_start = "start" not in left or found["start"] == "copies"
    if found["way"] != "layer" and is_default and says_start and flip(random, 0.6):
        left["shared_router"] = None
    if found["start"] == "copies" and flip(random):  # by default their weights sum to 1
        kwargs = options["router_kwargs"]
        left["router_kwargs"] = {name: kwargs[name] for name in kwargs if name != "weight"}
    return left


def draw(number: int) -> Config:
    """The configuration of a number."""
    random = Random(number)
    way = random.choice(("layer",) * 20 + ("forward", "forward", "inference", "sampled", "disk"))
    found: dict[str, Any] = {"number": number, "way": way}
    found |= draw_graph(random, way)
    for dimension in (draw_kinds, draw_widths, draw_edge_args, draw_past):
        found |= dimension(random, found)
    backend = random.choice(("auto", "auto", "grouped", "padded", "loop"))
    options = {**draw_router(random, found), "start": found["start"], "backend": backend}
    keeps = {kind.name for kind in found["kinds"]} & {"simple", "cg", "gine"}
    keeps = keeps or found["start"] == "copies"
    options |= (
        {"shared_transform": not keeps and flip(random, 0.15)}
        if way == "layer"
        else draw_model(random, found)
    )
    found["batch"] = random.choice((1, 3, 7, 100)) * (
        way in ("sampled", "disk", "inference") or flip(random, 0.3)
    )
    classes = [class_of(by_name()[kind.name]) for kind in found["kinds"]]
    found["alone"] &= not any(kind_of(cls).needs_destinations for cls in classes)
    training = way in ("layer", "forward") and flip(random, 0.6)
    positional = (
        way == "layer"
        and found["edge_args"] == (KINDS[found["kinds"][0].name].edges,)
        and flip(random, 0.3)
    )
    found |= {
        "positional": positional and len(found["kinds"]) == 1,
        "as_on_gpus": flip(random, 0.25),
    }
    lowers = way == "layer" and found["form"] in PLAIN and flip(random, 0.15)
    # Which fails under autocast
    lowers = lowers and all(kind.name != "mf" for kind in found["kinds"])
    low = random.choice(("float32", "bfloat16")) if lowers else ""
    # Each conv on its own; not gmoe's own convs, so that each number keeps its draws
    if all(kind_of(cls).is_local and of_pyg(cls) for cls in classes):
        options |= some(
            random, {"local": (True, False) if way in ("layer", "forward") else (True,)}
        )
    options |= left_out(Random(f"defaults of {number}"), found, options)
    return Config(**found, options=options, training=training, low=low)


# Building


def build(c: Config) -> Any:
    """The layer or model, drawn anew.

    No option is left without effect: gains, counters and noise are not zero.
    """
    torch.manual_seed(c.number)
    several = len(c.kinds) > 1
    made = [kind.build() if c.partials else kind.name for kind in c.kinds]
    options = {
        "conv": made if several else made[0],
        "num_experts": None if several else EXPERTS,
        **c.options,
    }
    options |= {} if c.partials else c.kinds[0].options
    if c.way == "layer":
        widths: Any = c.widths[:2] if c.two else c.widths[0]
        module: Any = MoEConv(in_channels=widths, out_channels=c.widths[2], **options)
    else:
        hidden = 2 * (c.widths[2] // 2)
        if options.get("norm") == "by node":
            options["norm"] = LayerNorm(hidden, mode="node")
        module = GNNMoE(in_channels=c.widths[0], hidden_channels=hidden, out_channels=3, **options)
    check_defaults(c, module)
    for parameter in module.double().parameters():
        nn.init.constant_(parameter, torch.nan)
    module.reset_parameters()
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        leaf = name.rpartition(".")[2]
        if leaf == "gain" or leaf == "steps":
            nn.init.constant_(
                value, 1 if leaf == "steps" else Random(c.number).choice((-1.0, 0.5, 2.0))
            )
        elif re.match(
            r"(next_)?(bias_E|mean_D)$|center_D|threshold_E|log_scale_E|running_mean", leaf
        ):
            nn.init.normal_(value, -1.0 if leaf == "threshold_E" else 0.0, std=0.2)
        elif leaf == "bias" or name.endswith("noise.weight"):
            nn.init.normal_(value, std=0.2)
        elif (
            c.start == "copies"
            and re.search(r"(^|\.)experts\.", name)
            and value.is_floating_point()
        ):
            # Experts that are equal would hide who took a token
            value.data.add_(0.1 * torch.randn_like(value))
    return module.train(c.training)


def check_defaults(c: Config, module: nn.Module) -> None:
    """Raise where what was left to the defaults became something else than what was drawn."""
    found = {part.start for part in module.modules() if isinstance(part, MoEConv)}
    if found - {c.start}:
        raise AssertionError(f"start={c.options['start']} became {found}, not {c.start!r}")
    if isinstance(module, GNNMoE) and c.options["shared_router"] is None:
        is_one = module.shared_router is not None
        if is_one != (c.start == "copies"):
            raise AssertionError(f"shared_router=None became {is_one} with start={c.start!r}")


class Given(NamedTuple):
    """What a call gets: ``adj`` for the module and, in the same order, ``plain`` for PyG."""

    x: tuple[Tensor, Tensor | None]
    adj: Any
    plain: Tensor
    args: dict[str, Tensor]
    batch: Tensor | None
    weight_TE: Tensor | None

    @property
    def leaves(self) -> dict[str, Tensor]:
        """All that may need a gradient."""
        x_src, x_dst = self.x
        ends = {"x": x_src} if x_dst is None or x_dst is x_src else {"x": x_src, "x_dst": x_dst}
        return ends | self.args | ({} if self.weight_TE is None else {"weight_TE": self.weight_TE})


def given_of(c: Config, seed: int, dtype: torch.dtype = torch.float64) -> Given:
    """Fresh leaves of a seed."""

    def leaf(*shape: int, of: int = seed) -> Tensor:
        return ref.features(*shape, seed=of).float().to(dtype)

    num_experts = EXPERTS if len(c.kinds) == 1 else len(c.kinds)
    edges = (
        ref.GRAPHS[c.graph][1]
        if c.graph in ref.GRAPHS
        else ref.random_graph(*c.sizes, c.edges, seed)
    )
    if c.graph == "simple":
        edges = edges.unique(dim=1)
        # PyG adds to a matrix's loops between two sets
        edges = edges[:, edges[0] != edges[1]] if c.two else edges
        edges = edges[
            :, torch.randperm(edges.size(1), generator=torch.Generator().manual_seed(seed))
        ]
    number, width = edges.size(1), c.edge_dim or 1
    adj: Any
    if c.form in SPARSE:
        value = leaf(number, *((width,) if c.values == "rows" else ())).abs() + 0.1
        value = torch.ones_like(value) if c.values == "ones" else value
        make: Callable[..., Any] = ref.FORMS[c.form]
        # PyG writes to coo
        adj, plain = (
            make(edges, c.sizes, value),
            ref.csr(edges, c.sizes, value),
        )
    else:
        adj = edges if c.form == "plain" else ref.FORMS[c.form](edges, c.sizes)
        plain = (adj.as_tensor() if c.form.startswith("Edge") else adj).long()
    every = {"edge_weight": leaf(number).abs() + 0.1, "edge_attr": leaf(number, width)}
    args = {name: every[name].requires_grad_(name in c.learned) for name in c.edge_args}
    x_src, x_dst = (
        leaf(*shape).requires_grad_("x" in c.learned)
        for shape in zip(c.sizes, c.widths[:2], strict=True)
    )
    of_graph: dict[str, Any] = {
        name: value for name, value in {"x": x_src, **args}.items() if name in c.in_graph
    }
    # Of several, all are refused
    flow = {kind.options.get("flow", "source_to_target") for kind in c.kinds}.pop()
    adj = Graph(adj, c.sizes, flow=flow, **of_graph) if c.in_graph else adj
    batch = (
        torch.arange(c.sizes[1]) * 7 % 3 * 2
        if c.batch and c.way in ("layer", "forward", "inference")
        else None
    )
    weight_TE = None
    if c.options["router"] is None:  # all tokens have all experts, some have some, or none has any
        chosen_TE = leaf(c.sizes[1], num_experts, of=4).abs() < Random(seed).choice(
            (0.0, 0.7, 0.7, 9.0)
        )
        weight_TE = (leaf(c.sizes[1], num_experts, of=3) * chosen_TE).requires_grad_()
    return Given(
        (x_src, None if c.alone else x_dst if c.two else x_src), adj, plain, args, batch, weight_TE
    )


# Running


def call(module: Any, c: Config, given: Given) -> tuple[Tensor, list[Routing]]:
    """Output and routings, under the seed of the noise."""
    torch.manual_seed(c.number)
    options: dict[str, Any] = {
        name: value for name, value in given.args.items() if name not in c.in_graph
    }
    if c.alone:
        options["size"] = c.sizes
    if given.weight_TE is not None:
        options["routing"] = ref.routing_of(given.weight_TE)
    x = given.x if c.two else given.x[0]
    first = [options.pop(name, None) for name in given.args] if c.positional else []
    y, routings = module(x, given.adj, *first, **options, batch=given.batch, return_routing=True)
    return y, [routings] if isinstance(routings, Routing) else routings


def go_through(module: Any, c: Config, given: Given, before: str) -> Any:
    """What happens to module, graph and features; the module after it."""
    mode: Any = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(
        before, nullcontext
    )
    counters = {name: value.clone() for name, value in module.named_buffers()}
    if before == "NaN token":
        x = given.x[0].detach().clone()
        x[-1] = torch.nan
        _, routings = call(
            module, c, given._replace(x=(x, x if given.x[1] is given.x[0] else given.x[1]))
        )
        _check_rest(module, c, counters, routings[0])
    elif before == "other graph":
        call(module, c, given_of(c, c.number + 1))
    elif before == "other edge arguments" and given.args and c.in_graph:
        args = {name: value.detach() * 1.5 for name, value in given.args.items()}
        sizes = given.adj.num_src, given.adj.num_rows
        graph = given.adj.fitting(
            sizes, given.adj.flow, args.get("edge_weight"), args.get("edge_attr")
        )
        call(module, c, given._replace(adj=graph, args={}))
    elif before == "other thread":
        with ThreadPoolExecutor(1) as pool:
            pool.submit(call, module, c, given).result()
    else:
        with mode():
            y, routings = call(module, c, given)
        if before == "step" and y.requires_grad:
            (y.sum() + sum(routing.aux_loss for routing in routings)).backward()
    if before == "x changed in place":
        change(given)
    for leaf in (*given.leaves.values(), *module.parameters()):
        leaf.grad = None
    copied: Any = {
        "deepcopy": copy.deepcopy,
        "pickle": lambda part: pickle.loads(pickle.dumps(part)),
    }.get(before)
    return module if copied is None else copied(module)


@torch.no_grad()
def change(given: Given) -> None:
    for name, value in given.leaves.items():
        if name.startswith("x"):
            value.mul_(-1.5)


def told_of_the_change(given: Given) -> Given:
    """A graph is frozen: another is made for features that changed, unless they learn."""
    graph = given.adj
    if not isinstance(graph, Graph) or graph.x is None or graph.x.requires_grad:
        return given
    return given._replace(adj=graph.with_x(graph.x))


def _check_rest(module: Any, c: Config, before: Mapping[str, Tensor], routing: Routing) -> None:
    """Raise if a NaN token, the last one, changed another token's decision.

    Or if it changed what the router had planned.
    """
    options, seen = c.options["router_kwargs"], c.options["router_input"]
    if c.way != "layer" or c.two or "node" not in seen:
        return
    for name, value in module.named_buffers():
        planned = name.replace("router.", "router.next_")
        kept = before[planned if c.training and planned in before else name]
        if name.startswith("router.") and not torch.equal(value, kept):
            raise AssertionError(f"{name} changed in a step that was not finite")
    alone = (
        c.options["router"] == "token_choice"
        and "capacity_factor" not in options
        and seen == ("node",)
    )
    if alone and not routing.to_dense()[:-1].isfinite().all():
        raise AssertionError("a token's weights are not finite because of another one")


def define(
    layer: MoEConv, c: Config, x: Any, adj: Any, routing: Routing, args: Any
) -> tuple[Tensor, list[Any]]:
    """Each expert a PyG conv on the whole graph, masked by the routing; and these convs."""
    convs = [layer.experts.expert(index) for index in range(layer.num_experts)]
    always = [] if layer.shared_expert is None else [layer.shared_expert.expert(0)]
    args, u = {**args, **({"size": c.sizes} if c.alone else {})}, x
    if layer.transform is not None:
        pair = x if isinstance(x, tuple) else (x, x)
        x_dst = pair[0].new_zeros(c.sizes[1], c.widths[1]) if pair[1] is None else pair[1]
        u_dst = layer.transform[-1](x_dst)
        u = (layer.transform[0](pair[0]), u_dst) if isinstance(x, tuple) else u_dst
    y = ref.masked(convs, u, adj, routing, **args)
    y = y if layer.gain is None else GAIN_SCALE * layer.gain * y
    if always:
        y = y + ref.masked(always, x, adj, ref.routing_of(torch.ones_like(y[:, :1])), **args)
    return y, [*convs, *always]


def by_hand(
    model: GNNMoE, c: Config, given: Given
) -> tuple[Tensor, list[Routing], dict[str, list[Any]]]:
    """The definition of a model, layer by layer of its own parts.

    Returns its output, the routings, and the experts' convs.
    """
    torch.manual_seed(c.number)
    x, convs = given.x[0], {}
    decision, graph = None, Graph(given.plain, x.size(0), flow=model.flow)
    if model.shared_router is not None:
        decision = model.shared_router(
            model.shared_router_input(x, graph), given.batch, graph.edge_index
        )
    routings = [] if decision is None else [decision]
    xs = []
    for layer, conv in enumerate(model.convs):
        if isinstance(conv, MoEConv):
            own: Any = {
                name: value for name, value in given.args.items() if name in conv.edge_names
            }
            how = {"batch": given.batch, "routing": decision, "return_routing": True}
            routing = conv(x, given.plain, **own, **how)[1]
            out, convs[f"convs.{layer}"] = define(conv, c, x, given.plain, routing, given.args)
            routings += [routing] if decision is None else []
        else:
            own = {name: value for name, value in given.args.items() if name in parameters_of(conv)}
            out = conv(x, given.plain, **own)
        out = out + model.residuals[layer](x) if layer < len(model.residuals) else out
        if layer < model.num_layers - 1 or model.jk_mode is not None:
            norm = model.norms[layer]
            groups = (
                (given.batch, None) if "batch" in inspect.signature(norm.forward).parameters else ()
            )
            out = model.act(norm(out, *groups))
        x = out
        xs.append(x)
    x = model.jk(xs) if hasattr(model, "jk") else x
    return (model.lin(x) if hasattr(model, "lin") else x), routings, convs


def gradients(module: Any, convs: Mapping[str, list[Any]] | None) -> dict[str, Any]:
    """Gradients by the names of plain convs' parameters.

    Those of ``convs``, by layer; else those of the stacked experts of the module.
    """
    found: dict[str, Any] = {}
    for name, value in module.named_parameters():
        if not re.match(r"(convs\.\d+\.)?(experts|shared_expert)\.", name):
            found[name] = ref.gradient(value)
    for place, layer in module.named_modules():
        if not isinstance(layer, MoEConv):
            continue
        own = ref.as_convs(layer.experts, layer.num_experts) if convs is None else []
        own += (
            []
            if layer.shared_expert is None or convs is not None
            else ref.as_convs(layer.shared_expert, 1)
        )
        for conv in [] if convs is None else convs[place]:
            own.append({name: value.grad for name, value in conv.named_parameters()})
        found |= {
            f"{place}.{e}.{name}": value
            for e, part in enumerate(own)
            for name, value in part.items()
        }
    return found


def compute(c: Config) -> Outcome:
    """Build, run, and compare with the definition."""
    module = build(c)
    twin, given, theirs = copy.deepcopy(module), *(given_of(c, c.number) for _ in range(2))
    # Small blocks, no products
    as_on_gpus: Any = mock.patch.multiple(sums_module, SPARSE_DEVICES=(), NUMBERS=20)
    with as_on_gpus if c.as_on_gpus else nullcontext():
        for before in c.before:
            module = go_through(module, c, given, before)
            if before == "x changed in place":
                given = told_of_the_change(given)
        twin.load_state_dict(module.state_dict())
        y, routings = call(module, c, given)
        results = [finish(y, routings, given, module, None)]
    if "x changed in place" in c.before:
        change(theirs)
    if isinstance(twin, MoEConv):
        _, routings = call(twin, c, theirs)
        x = theirs.x if c.two else theirs.x[0]
        y, experts = define(twin, c, x, theirs.plain, routings[0], theirs.args)
        convs = {"": experts}
    else:
        y, routings, convs = by_hand(twin, c, theirs)
    results.append(finish(y, routings, theirs, twin, convs))
    found = compare(results[0], results[1], TOLERANCE)
    if found.kind == "equal" and c.way in OTHER_WAYS:
        with torch.no_grad():
            found = max(
                found,
                compare(
                    {c.way: OTHER_WAYS[c.way](c, module, given)}, {c.way: y.detach()}, TOLERANCE
                ),
            )
    return (
        max(found, in_low_precision(c, module, routings[0]))
        if found.kind == "equal" and c.low
        else found
    )


def in_low_precision(c: Config, module: MoEConv, routing: Routing) -> Outcome:
    """Run in float32, or under autocast to bfloat16, with the same routing.

    The gradients are those of a sum, whose own gradient is expanded.
    """
    results = []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)  # of what PyG makes; :func:`run` sets it back
        layer, given = copy.deepcopy(module).to(dtype), given_of(c, c.number, dtype)
        given = given._replace(weight_TE=routing.to_dense().detach().to(dtype).requires_grad_())
        half = c.low == "bfloat16" and dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            y, _ = call(layer, c, given)
        y.sum().backward()
        found = {
            "low y": y.detach(),
            **{f"low {name}": ref.gradient(leaf) for name, leaf in given.leaves.items()},
        }
        results.append(
            {name: value for name, value in found.items() if c.low == "float32" or name == "low y"}
        )
    return compare(results[0], results[1], {"float32": 1e-4, "bfloat16": 0.1}[c.low])


def finish(
    y: Tensor, routings: list[Routing], given: Given, module: Any, convs: Any
) -> dict[str, Any]:
    """Outputs, routings and all gradients."""
    loss = (y * ref.features(*y.shape, seed=5)).sum() + sum(
        routing.aux_loss for routing in routings
    )
    if loss.requires_grad:
        loss.backward()
    found = {
        "y": y.detach(),
        **{f"routing {i}": one.to_dense().detach() for i, one in enumerate(routings)},
    }
    return (
        found
        | {name: ref.gradient(leaf) for name, leaf in given.leaves.items()}
        | gradients(module, convs)
    )


# Other ways to a model's output


def inference(c: Config, model: GNNMoE, given: Given) -> Tensor:
    """Layer by layer in chunks."""
    args = {name: value for name, value in given.args.items() if name not in c.in_graph}
    data = Data(
        x=given.x[0],
        edge_index=given.adj,
        **args,
        **({} if given.batch is None else {"batch": given.batch}),
    )
    found: Tensor = model.inference(data, batch_size=c.batch)
    return found


def sampled(c: Config, model: GNNMoE, given: Given) -> Tensor:
    """With all neighbors of so many hops that the degrees of all that count are whole."""
    data = Data(x=given.x[0], edge_index=given.adj, **given.args)
    found = []
    for part in neighbor_loader(
        data, [-1] * (3 * model.num_layers + 3), batch_size=c.batch, backend="gmoe"
    ):
        own: Any = {name: part[name] for name in given.args}
        if c.number % 2 and len(own) < 2:
            own["num_sampled_nodes_per_hop"] = part.num_sampled_nodes
            own["num_sampled_edges_per_hop"] = part.num_sampled_edges
        found.append(model(part.x, part.edge_index, **own)[: part.batch_size])
    return torch.cat(found)


def from_disk(c: Config, model: GNNMoE, given: Given) -> Tensor:
    """Layer by layer, the graph and the embeddings on disk."""
    with tempfile.TemporaryDirectory() as folder:
        store(Path(folder, "graph"), Data(x=given.x[0].detach(), edge_index=given.adj))
        stored = StoredGraph(Path(folder, "graph"))
        found: Tensor = model.inference(stored, batch_size=c.batch, folder=Path(folder, "out"))
        return found.clone()


OTHER_WAYS = {"inference": inference, "sampled": sampled, "disk": from_disk}


# Judging


def run(number: int) -> Outcome:
    """A number's outcome; any refusal in gmoe's own words is one."""
    return judged(draw, compute, lambda *_: True, number)


COMPOSER = Composer("compose", draw, run, lambda c: {c.way, *(kind.name for kind in c.kinds)})

if __name__ == "__main__":
    raise SystemExit(COMPOSER.main(*map(int, sys.argv[1:])))
