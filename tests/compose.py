"""One random composer: a number is a configuration, built, run, and compared in float64 with its definition.

``python -m tests.compose 4711`` shows one number, ``python -m tests.compose 0 2000`` runs a range. A number outside of
:data:`KNOWN` that fails is a bug, of the library or of this file. Refusals in the library's own words are counted apart.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.nn import CGConv, PNAConv

from gmoe import ExpertChoice, GNNMoE, Graph, MoEConv, MultiCentroid, Router, Routing, StoredGraph, neighbor_loader
from gmoe.conv import graph as graph_module
from gmoe.conv.graph import parameters_of
from gmoe.conv.kinds import CONVS, OWN, SOURCES_ALONE
from gmoe.routing import GAIN_SCALE
from tests.gmoe.conv import masked as reference
from tests.gmoe.conv.masked import FORMS, GRAPHS, default_float64, features, gradient
from tests.gmoe.data.stored_files import store

KNOWN: dict[int, str] = {}
"""Numbers that fail for a bug that is real and documented, and which."""

TOLERANCE = 1e-10
EXPERTS, WIDTH, EDGE_DIM = 3, 4, 3
DEGREES = torch.tensor([1, 3, 3, 2, 1])
BEFORE = (
    *("no_grad", "inference_mode", "step", "NaN token", "other graph", "other thread", "deepcopy", "pickle"),
    *("other edge arguments", "x changed in place"),
)
"""What the layer, and the Graph, may have been through before the call that counts."""


class Spec(NamedTuple):
    """What a kind of conv takes beside nodes: ``two`` sets of nodes of "any" or "one" width, sparse matrices."""

    edges: str = ""
    two: str = ""
    sparse: bool = True
    in_models: bool = True


SPECS: dict[str, Spec] = {
    "gcn": Spec("edge_weight"),
    "sage": Spec(two="any"),
    "graph": Spec("edge_weight", "any"),
    "gin": Spec(two="one"),
    "gine": Spec("edge_attr", "one"),
    **dict.fromkeys(("gat", "gatv2", "transformer"), Spec("edge_attr", "any")),
    **dict.fromkeys(("low_pass", "high_pass", "filter"), Spec("edge_weight")),
    "two_hop": Spec("edge_weight"),
    "identity": Spec(),
    "mlp": Spec(two="any"),
    "le": Spec("edge_weight", "one"),
    "film": Spec(),
    "resgatedgraph": Spec("edge_attr", "any"),
    "general": Spec("edge_attr", "one"),
    "feast": Spec(two="one", sparse=False),
    "mf": Spec(two="any", sparse=False),
    "clustergcn": Spec(sparse=False),
    "simple": Spec(two="one"),
    "cg": Spec("edge_attr"),
    "pna": Spec("edge_attr", in_models=False),
    "tag": Spec("edge_weight", in_models=False),
    "sg": Spec("edge_weight", in_models=False),
    "cheb": Spec("edge_weight", sparse=False, in_models=False),
}
STACKED = tuple(SPECS)[:13]
ATTENTION = ("gat", "gatv2", "transformer")
ONE_WIDTH = ("simple", "cg")


class Sigmoids(Router):
    """A router of somebody else: the best experts by a sigmoid each."""

    def __init__(self, dim: int, num_experts: int, k: int = 1) -> None:
        super().__init__(dim, num_experts, k)
        self.lin = nn.Linear(dim, num_experts)

    def reset_parameters(self) -> None:
        self.lin.reset_parameters()

    def route(self, x_TD: Tensor, group: Tensor | int, edge_index: Tensor | None) -> Routing:
        weight_TK, expert_TK = self.lin(x_TD).sigmoid().topk(self.k, dim=-1)
        return Routing.from_choices(expert_TK, weight_TK, self.num_experts)


@dataclass(frozen=True)
class Kind:
    """A kind of conv with options."""

    name: str
    options: Mapping[str, Any]

    @property
    def spec(self) -> Spec:
        return SPECS[self.name]

    def build(self) -> Any:
        """As ``conv`` of a layer takes it."""
        if not self.options:
            return self.name
        cls: Any = {"cg": CGConv, "pna": PNAConv}.get(self.name) or (OWN | CONVS)[self.name]
        return partial(cls, **self.options)

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{name}={value}' for name, value in self.options.items())})"


@dataclass(frozen=True)
class Layer:
    """A MoEConv, its input, and what happened before."""

    number: int
    kinds: tuple[Kind, ...]
    partials: bool
    shared: bool | Kind
    widths: tuple[int, int, int]
    k: int
    router: Any
    router_options: Mapping[str, Any]
    router_input: tuple[str, ...]
    dense_start: bool
    shared_transform: bool
    backend: str
    training: bool
    two: bool
    alone: bool
    graph: str
    sizes: tuple[int, int]
    edges: int
    form: str
    values: str
    in_graph: tuple[str, ...]
    edge_args: tuple[str, ...]
    edge_dim: int | None
    learned: tuple[str, ...]
    batch: bool
    before: tuple[str, ...]
    as_on_gpus: bool

    @property
    def name(self) -> str:
        return "+".join(kind.name for kind in self.kinds)


@dataclass(frozen=True)
class Model:
    """A GNNMoE, its graph, and what its forward is compared with."""

    number: int
    kinds: tuple[Kind, ...]
    options: Mapping[str, Any]
    way: str
    training: bool
    nodes: int
    edges: int
    edge_args: tuple[str, ...]
    edge_dim: int | None
    wrapped: bool
    batch: bool
    batch_size: int

    @property
    def name(self) -> str:
        return f"GNNMoE {self.way}"


class Outcome(NamedTuple):
    """``"equal"`` up to a difference, ``"refused"`` or ``"failed"``."""

    kind: str
    difference: float
    message: str = ""


# Drawing


def flip(random: Random, probability: float = 0.5) -> bool:
    return random.random() < probability


def some(random: Random, **choices: tuple[Any, ...]) -> dict[str, Any]:
    """Some of the options, each with one of its values."""
    return {name: random.choice(values) for name, values in choices.items() if flip(random)}


def draw_options(random: Random, name: str, edge_dim: int | None, alike: bool, reducible: bool) -> dict[str, Any]:
    """Of a kind. ``alike``: outputs are no wider than asked for; ``reducible``: PyG can make loops of in-edges."""
    flags = (False, True)
    heads: dict[str, Any] = {"concat": (False,) if alike else flags, "heads": (1, 2), "bias": flags}
    found: dict[str, Any] = {}
    if name == "gcn":
        found = some(random, improved=flags, bias=flags, add_self_loops=flags)
        if flip(random, 0.2):
            found |= random.choice(({"aggr": "mean"}, {"normalize": False, "add_self_loops": False}))
    elif name == "sage":
        found = some(random, aggr=("mean", "max", "sum", ["mean", "max"]), root_weight=flags, normalize=flags)
        found |= some(random, bias=flags) | ({"project": True} if flip(random, 0.1) else {})
    elif name == "graph":
        found = some(random, aggr=("add", "mean", "max"), bias=flags)
    elif name in ("gin", "gine"):
        found = some(random, train_eps=flags, eps=(0.5, -0.3), **({"aggr": ("mean", "max")} if name == "gin" else {}))
        found |= {"edge_dim": edge_dim} if name == "gine" and edge_dim == EDGE_DIM else {}
    elif name in ATTENTION:
        heads |= {"concat": (False,)} if alike else {}
        found = some(random, **heads, **({"beta": flags, "root_weight": flags} if name == "transformer" else {}))
        found |= {"concat": False} if alike and found.get("heads", 1) > 1 else {}
        if name != "transformer":
            found |= some(random, add_self_loops=flags, residual=flags, negative_slope=(0.7,))
        found |= {"share_weights": True} if name == "gatv2" and flip(random, 0.3) else {}
        found |= {} if edge_dim is None else {"edge_dim": edge_dim}
        if edge_dim is not None and name != "transformer":
            found["fill_value"] = random.choice(("mean", "max", "add", 0.5) if reducible else (0.5, 2.0))
    elif name == "filter":
        kind, hops = random.choice((("low_pass", 1), ("low_pass", 3), ("high_pass", 2), ("identity", 1)))
        found = {"filter": kind, "hops": hops, **some(random, add_self_loops=flags, bias=flags)}
    elif name == "general":
        found = some(random, attention=flags, heads=(2,), l2_normalize=flags, directed_msg=flags)
        found |= {} if edge_dim is None else {"in_edge_channels": edge_dim}
    elif name == "resgatedgraph":
        found = some(random, root_weight=flags) | ({} if edge_dim is None else {"edge_dim": edge_dim})
    elif name == "cg":
        found = some(random, aggr=("mean", "max")) | ({} if edge_dim is None else {"dim": edge_dim})
    elif name == "pna":
        found = {"aggregators": ["mean", "max", "std"], "scalers": ["identity", "amplification"], "deg": DEGREES}
        found |= {} if edge_dim is None else {"edge_dim": edge_dim}
    elif name in ("tag", "sg", "cheb"):
        found = {"K": random.choice((2, 3))}
    elif name == "simple":
        found = some(random, aggr=("sum", "max"))
    return found


def draw_kinds(random: Random, pool: list[str], flows: bool, **how: Any) -> tuple[Kind, ...]:
    """One kind for all experts, or a kind for each."""
    several = flip(random, 0.35)
    pool = [name for name in STACKED if name in pool] if flip(random, 0.7) else pool
    names = random.choices(pool, k=random.choice((2, EXPERTS)) if several else 1)
    kinds = []
    for name in names:
        options = draw_options(random, name, alike=several or how["alike"], **{k: how[k] for k in how if k != "alike"})
        if flows and name not in ("mlp", *OWN) and flip(random, 0.15):
            options["flow"] = "target_to_source"
        kinds.append(Kind(name, options))
    return tuple(kinds)


def draw_router(random: Random, k: int, two: bool, explicit: bool) -> tuple[Any, dict[str, Any]]:
    """``None``: weights are given."""
    router = random.choice(
        [
            *["token_choice"] * 4,
            *["expert_choice", "attention_vote", "multi_centroid"] * 2,
            *["random", "uniform", Sigmoids],
            *([None, None] if explicit else []),
        ]
    )
    weights = ("score", "straight_through", *(["normalized"] if k > 1 else []))
    found = {} if router in (None, "uniform", Sigmoids) else some(random, weight=weights)
    chosen_by_experts = {"capacity_factor": (0.6, 1.3), "normalize": ("experts", "tokens"), "inference": ("threshold",)}
    if router == "token_choice":
        found |= some(random, capacity_factor=(0.75, 1.5), z_coef=(0.1,), init_scale=(1.0,))
        balance = random.choice(("bias", "bias", "importance_load", "switch", None))
        found |= {"balance": balance} | ({} if balance == "importance_load" else some(random, noise=(True, "spread")))
    elif router == "expert_choice":
        found |= some(random, **chosen_by_experts, z_coef=(0.1,))
    elif router == "attention_vote":
        found |= some(random, shared_queries=(True,), capacity_factor=(0.6,)) | {"head_dim": 4}
        found |= some(random, scope=("group",) if two else ("neighbors",))
    elif router == "multi_centroid":
        found |= some(random, num_centroids=(1, 2), reduce=("logsumexp",), separation_coef=(0.0,))
        found |= {"choice": "experts", **some(random, **chosen_by_experts)} if flip(random) else {}
    return router, found


def draw_router_input(random: Random) -> tuple[str, ...]:
    parts = [part for part in ("node", "neighbors", "degree") if flip(random, 0.4)]
    return tuple(parts) or ("node",)


def draw_edges(random: Random, two: bool, simple: bool) -> tuple[str, tuple[int, int], int]:
    """The name of a graph, its numbers of nodes, and how many random edges."""
    if not two and not simple and flip(random, 0.35):
        name = random.choice(list(GRAPHS))
        return name, (GRAPHS[name][0],) * 2, GRAPHS[name][1].size(1)
    sizes = (random.randint(1, 9), random.randint(1, 9)) if two else (random.randint(2, 9),) * 2
    return "simple" if simple else "random", sizes, 0 if not simple and flip(random, 0.05) else random.randint(1, 30)


def draw_layer(random: Random, number: int) -> Layer:
    """Each dimension in its turn; what would be nonsense is left out."""
    two = flip(random, 0.2)
    alone = two and flip(random, 0.3)
    form = random.choice(["plain"] * 6 + list(FORMS))
    sparse = form in ("coo", "csr")
    edge_dim = random.choice((None, EDGE_DIM)) if flip(random, 0.9) else WIDTH
    edge_dim = None if sparse and flip(random) else edge_dim
    graph, sizes, edges = draw_edges(random, two, sparse or form.startswith("EdgeIndex"))
    flows = not two and form in ("plain", "int32", "not contiguous")
    needs = [name for name in SPECS if edge_dim is None or not sparse or name in ATTENTION]
    pool = [
        name
        for name in needs
        if (not two or SPECS[name].two)
        and (not sparse or SPECS[name].sparse)
        and (not alone or CONVS.get(name) in SOURCES_ALONE)
        and (name not in ("gine", "cg") or edge_dim is not None)
        and not (name == "gine" and sparse)
    ]
    other = flip(random, 0.15)
    how = {"edge_dim": edge_dim, "reducible": not two or sizes[0] >= sizes[1]}
    kinds = draw_kinds(random, pool, flows, alike=other, **how)
    shared: bool | Kind = flip(random, 0.7)
    if other:
        shared = draw_kinds(random, pool, flows, alike=True, **how)[0]
    every = [*kinds, *([shared] if isinstance(shared, Kind) else [])]
    one = any(kind.name in ONE_WIDTH or kind.name == "gine" and edge_dim == WIDTH for kind in every)
    same = any(kind.spec.two == "one" or kind.options.get("share_weights") for kind in every)
    width = WIDTH if one else random.choice((WIDTH, WIDTH, 9))
    widths = (width, width if not two or same or one else 6, WIDTH if one else random.choice((WIDTH, 2, 6)))
    k = random.randint(1, len(kinds) if len(kinds) > 1 else EXPERTS)
    router, router_options = draw_router(random, k, two, explicit=True)
    taken = {kind.spec.edges for kind in every if kind.spec.edges != "edge_attr" or edge_dim is not None}
    args = [] if sparse else sorted(taken & {"edge_weight", "edge_attr"})
    args = [name for name in args if name == "edge_attr" or flip(random, 0.7)]
    before = () if flip(random, 0.4) else tuple(random.sample(BEFORE, random.choice((1, 1, 2))))
    values = "rows" if edge_dim is not None else random.choice(("ones", "some"))
    return Layer(
        number,
        kinds,
        partials=len(kinds) > 1 or other or flip(random),
        shared=shared,
        widths=widths,
        k=k,
        router=router,
        router_options=router_options,
        router_input=draw_router_input(random),
        dense_start=flip(random, 0.7),
        shared_transform=not one and flip(random, 0.15),
        backend=random.choice(("auto", "auto", "grouped", "padded", "loop")),
        training=flip(random, 0.6),
        two=two,
        alone=alone and all(CONVS.get(kind.name) in SOURCES_ALONE for kind in every),
        graph=graph,
        sizes=sizes,
        edges=edges,
        form=form,
        values=values if sparse else "",
        in_graph=("Graph", *(name for name in args if flip(random))) if flip(random) else (),
        edge_args=tuple(args),
        edge_dim=edge_dim,
        learned=tuple(name for name in ("x", "edge_weight", "edge_attr") if flip(random, 0.7)),
        batch=flip(random, 0.3),
        before=before,
        as_on_gpus=flip(random, 0.25),
    )


def draw_model(random: Random, number: int) -> Model:
    way = random.choice(("forward", "forward", "inference", "sampled", "disk"))
    edge_dim = None if way == "disk" else random.choice((None, EDGE_DIM))
    local = way in ("sampled", "disk")
    pool = [name for name, spec in SPECS.items() if spec.in_models and name not in ONE_WIDTH]
    pool = [name for name in pool if name != "gine" or edge_dim is not None]
    pool = [name for name in pool if way != "disk" or name not in ("two_hop", "filter")]
    kinds = draw_kinds(random, pool, False, edge_dim=edge_dim, alike=True, reducible=True)
    k = random.randint(1, len(kinds) if len(kinds) > 1 else EXPERTS)
    router, router_options = draw_router(random, k, False, explicit=False)
    if local and (router in ("expert_choice", "attention_vote") or "choice" in router_options):
        router, router_options = random.choice(("multi_centroid", "random", "uniform", Sigmoids)), {}
        router = "random" if router is Sigmoids and way == "disk" else router
    layers = random.choice((1, 2, 2, 3, 6))
    jk = random.choice((None, None, "last", *(() if way == "disk" else ("cat", "max", "lstm"))))
    options: dict[str, Any] = {
        "num_layers": layers,
        "hidden_channels": random.choice((4, 6)),
        "k": k,
        "router": router,
        "router_kwargs": router_options,
        "router_input": draw_router_input(random),
        "shared_router": flip(random, 0.4),
        "jk": "last" if layers == 1 else jk,
        **some(random, residual=("none", "linear", "identity"), in_proj=(True,), act=("elu",), act_first=(True,)),
        **some(random, shared_expert=(False, True), dense_start=(False,)),
        **({} if way == "disk" else some(random, router_hops=(2,))),
    }
    norms = [{"norm": "batch_norm"}, {"norm": "layer_norm", "norm_kwargs": {"mode": "node"}}]
    norms += [] if local else [{"norm": "graph_norm"}, {"norm": "layer_norm"}]
    options |= random.choice(norms) if flip(random) else {}
    options |= {"every": 2} if (layers > 2 or (layers == 2 and options["jk"])) and flip(random, 0.2) else {}
    taken = {kind.spec.edges for kind in kinds}
    args = [] if way == "disk" else sorted(taken & {"edge_weight", *(["edge_attr"] if edge_dim else [])})
    return Model(
        number,
        kinds,
        options,
        way=way,
        training=way == "forward" and flip(random),
        nodes=random.randint(2, 20),
        edges=random.randint(0, 50),
        edge_args=tuple(name for name in args if name == "edge_attr" or flip(random, 0.7)),
        edge_dim=edge_dim,
        wrapped=flip(random),
        batch=not local and flip(random, 0.3),
        batch_size=random.choice((1, 3, 7, 100)),
    )


def draw(number: int) -> Layer | Model:
    """The configuration of a number."""
    random = Random(number)
    return draw_model(random, number) if flip(random, 0.2) else draw_layer(random, number)


# Building


def shake(model: nn.Module, random: Random) -> None:
    """Let every option matter: gains, counters and noise are not left at zero, and a step is as if it had been."""
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        leaf = name.rpartition(".")[2]
        if leaf == "gain":
            nn.init.constant_(value, random.choice((-1.0, 0.5, 2.0)))
        elif leaf in ("bias_E", "mean_D", "center_D", "threshold_E", "log_scale_E") or name.endswith("noise.weight"):
            nn.init.normal_(value, std=0.2)
        elif leaf == "steps":
            value.fill_(1)
    for part in model.modules():
        if hasattr(part, "next_bias_E"):  # so that a step that changes nothing changes nothing
            part.next_bias_E.copy_(part.bias_E)
            part.next_mean_D.copy_(part.mean_D)
        choosing = isinstance(part, ExpertChoice | MultiCentroid) and part.selection is not None
        if choosing and part.selection.normalize == "experts" and part.selection.inference == "threshold":
            part.selection.threshold_E.sub_(1.0)


def build_layer(c: Layer) -> MoEConv:
    torch.manual_seed(c.number)
    several = len(c.kinds) > 1
    made = [kind.build() if c.partials else kind.name for kind in c.kinds]
    kwargs = {} if c.partials else dict(c.kinds[0].options)
    layer = MoEConv(
        made if several else made[0],
        c.widths[:2] if c.two else c.widths[0],
        c.widths[2],
        num_experts=None if several else EXPERTS,
        router=c.router,
        router_kwargs=c.router_options,
        router_input=c.router_input,
        k=c.k,
        shared_expert=c.shared.build() if isinstance(c.shared, Kind) else c.shared,
        dense_start=c.dense_start,
        shared_transform=c.shared_transform,
        backend=c.backend,
        **kwargs,
    ).double()
    shake(layer, Random(c.number))
    return layer.train(c.training)


class Given(NamedTuple):
    """What a call gets: ``adj`` as the layer takes it, ``plain`` as PyG does, in the same order."""

    x: Any
    adj: Any
    plain: Any
    args: dict[str, Tensor]
    size: tuple[int, int] | None
    batch: Tensor | None
    weight_TE: Tensor | None


def edges_of(c: Layer, seed: int) -> Tensor:
    if c.graph in GRAPHS:
        return GRAPHS[c.graph][1]
    if c.graph == "random":
        return reference.random_graph(*c.sizes, c.edges, seed)
    edges = reference.random_graph(*c.sizes, c.edges, seed).unique(dim=1)
    edges = edges[:, edges[0] != edges[1]] if c.two else edges  # PyG adds to the loops of matrices of two sets
    return edges[:, torch.randperm(edges.size(1), generator=torch.Generator().manual_seed(seed))]


def edge_args(names: tuple[str, ...], num_edges: int, width: int | None, seed: int) -> dict[str, Tensor]:
    found = {"edge_weight": features(num_edges, seed=seed).abs() + 0.1}
    found |= {"edge_attr": features(num_edges, width, seed=seed + 1)} if width is not None else {}
    return {name: found[name] for name in names}


def given_of(c: Layer, layer: MoEConv, seed: int) -> Given:
    """Fresh leaves of a seed; all others follow from the configuration."""
    edges, sizes = edges_of(c, seed), c.sizes
    if c.form in ("coo", "csr"):
        shape = {"ones": (), "some": (), "rows": (c.edge_dim,)}[c.values]
        value = None if c.values == "ones" else features(edges.size(1), *shape, seed=seed).abs() + 0.1
        adj, plain = FORMS[c.form](edges, sizes, value), reference.csr(edges, sizes, value)  # PyG writes to coo
    else:
        adj = edges if c.form == "plain" else FORMS[c.form](edges, sizes)
        plain = (adj.as_tensor() if c.form.startswith("EdgeIndex") else adj).long()
    args = edge_args(c.edge_args, edges.size(1), c.edge_dim, seed)
    args = {name: value.requires_grad_(name in c.learned) for name, value in args.items()}
    of_graph = {name: value for name, value in args.items() if name in c.in_graph}
    adj = Graph(adj, sizes, **of_graph) if c.in_graph else adj
    x_src = features(sizes[0], c.widths[0], seed=seed).requires_grad_("x" in c.learned)
    x_dst = None if c.alone else features(sizes[1], c.widths[1], seed=seed + 2).requires_grad_("x" in c.learned)
    batch = torch.arange(sizes[1]) * 7 % 3 * 2 if c.batch else None  # unsorted, with gaps
    weight_TE = None
    if layer.router is None:
        kind = Random(seed).choice(("all", "some", "some", "none"))
        weight_TE = features(sizes[1], layer.num_experts, seed=3) * (0.0 if kind == "none" else 1.0)
        if kind == "some":
            weight_TE[:, 1], weight_TE[::3] = 0, 0
        weight_TE.requires_grad_()
    return Given((x_src, x_dst) if c.two else x_src, adj, plain, args, sizes if c.alone else None, batch, weight_TE)


# Running


def call(layer: MoEConv, c: Layer, given: Given, again: Graph | None = None) -> tuple[Tensor, Routing]:
    """The layer's output and routing, under the seed of the noise."""
    torch.manual_seed(c.number)
    args = {name: value for name, value in given.args.items() if name not in c.in_graph}
    routing = None if given.weight_TE is None else reference.routing_of(given.weight_TE)
    adj = given.adj if again is None else again
    size = None if c.number % 2 and not isinstance(adj, Tensor) else given.size
    found = layer(given.x, adj, **args, size=size, batch=given.batch, routing=routing, return_routing=True)
    return found[0], found[1]


def go_through(layer: MoEConv, c: Layer, given: Given, before: str) -> MoEConv:
    """What happens to the layer, and to the graph, before the call that counts; the layer after it."""
    counters = {name: value.clone() for name, value in layer.named_buffers()}
    if before == "no_grad":
        with torch.no_grad():
            call(layer, c, given)
    elif before == "inference_mode":
        with torch.inference_mode():
            call(layer, c, given)
    elif before == "step":
        y, routing = call(layer, c, given)
        if y.requires_grad:
            (y.sum() + routing.aux_loss).backward()
    elif before == "NaN token":
        x = tuple(value if value is None else value.detach().clone() for value in parts_of(given.x))
        x[0][0], x[-1 if x[-1] is not None else 0][-1] = torch.nan, torch.nan
        call(layer, c, given._replace(x=x if c.two else x[0]))
        seen = "node" in c.router_input and not c.alone
        for name, value in layer.named_buffers():
            if name.startswith("router") and seen and not torch.equal(value, counters[name]):
                raise AssertionError(f"{name} changed in a step that was not finite")
    elif before == "other graph":
        call(layer, c, given_of(c, layer, c.number + 1))
    elif before == "other edge arguments":
        other = given_of(c, layer, c.number + 2)
        if not isinstance(given.adj, Graph) or c.form not in ("coo", "csr"):
            args = {name: torch.rand_like(value) for name, value in given.args.items()}
            layer(given.x, given.adj, **args, size=given.size, batch=given.batch, routing=_routing(other))
    elif before == "other thread":
        with ThreadPoolExecutor(1) as pool, torch.no_grad():
            pool.submit(call, layer, c, given).result()
    elif before == "x changed in place":
        with torch.no_grad():
            call(layer, c, given)
            for value in parts_of(given.x):
                if value is not None:
                    value.mul_(-1.5)
    else:
        call(layer, c, given)
        layer = copy.deepcopy(layer) if before == "deepcopy" else pickle.loads(pickle.dumps(layer))
    layer.zero_grad()
    for leaf in leaves_of(given).values():
        leaf.grad = None
    return layer


def _routing(given: Given) -> Routing | None:
    return None if given.weight_TE is None else reference.routing_of(given.weight_TE)


def parts_of(x: Any) -> tuple[Any, ...]:
    return x if isinstance(x, tuple) else (x,)


def leaves_of(given: Given) -> dict[str, Tensor]:
    found: dict[str, Any] = {f"x{i}": value for i, value in enumerate(parts_of(given.x)) if value is not None}
    return found | given.args | ({} if given.weight_TE is None else {"weight_TE": given.weight_TE})


def define(layer: MoEConv, x: Any, adj: Any, routing: Routing, args: Mapping[str, Any]) -> tuple[Tensor, list[Any]]:
    """The definition: each expert a PyG conv on the whole graph, masked by the routing; and these convs."""
    convs = [layer.experts.expert(index) for index in range(layer.num_experts)]
    always = [] if layer.shared_expert is None else [layer.shared_expert.expert(0)]
    u: Any = x
    if layer.transform is not None and isinstance(x, Tensor):
        u = layer.transform[-1](x)
    elif layer.transform is not None:
        x_dst = x[0].new_zeros(args["size"][1], layer.in_channels[1]) if x[1] is None else x[1]
        u = layer.transform[0](x[0]), layer.transform[-1](x_dst)
    y = reference.masked(convs, u, adj, routing, **args)
    y = y if layer.gain is None else GAIN_SCALE * layer.gain * y
    if always:
        y = y + reference.masked(always, x, adj, Routing.everyone(y.size(0), y), **args)
    return y, [*convs, *always]


def gradients(layer: MoEConv, convs: list[Any] | None, prefix: str = "") -> dict[str, Tensor]:
    """By the names of the plain convs' parameters: of ``convs``, else of the layer's own stacked ones."""
    parts = [(layer.experts, layer.num_experts)] + ([] if layer.shared_expert is None else [(layer.shared_expert, 1)])
    found = {
        f"{prefix}{name}": gradient(value)
        for name, value in layer.named_parameters()
        if not name.startswith(("experts.", "shared_expert."))
    }
    if convs is None:
        own = [grads for part, number in parts for grads in reference.as_convs(part, number)]
    else:
        own = [{name: value.grad for name, value in conv.named_parameters()} for conv in convs]
    return found | {f"{prefix}{e}.{name}": value for e, of in enumerate(own) for name, value in of.items()}


def compare(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> Outcome:
    """What an option leaves unused has no gradient in the definition; NaN is as far as can be."""
    if ours.keys() != theirs.keys():
        return Outcome("failed", torch.inf, f"names: got {sorted(ours)}, expected {sorted(theirs)}")
    far: dict[str, float] = {}
    for name, expected in theirs.items():
        found = ours[name]
        if expected is None:
            continue
        if found.shape != expected.shape:
            return Outcome("failed", torch.inf, f"{name}: got {tuple(found.shape)}, expected {tuple(expected.shape)}")
        if found.numel():
            difference = float((found - expected).abs().max())
            far[name] = difference if difference == difference else torch.inf
    worst = max(far, key=lambda name: far[name], default="")
    difference = far.get(worst, 0.0)
    return Outcome("equal" if difference <= TOLERANCE else "failed", difference, worst)


def run_layer(c: Layer) -> Outcome:
    layer = build_layer(c)
    twin = copy.deepcopy(layer)
    given, theirs = given_of(c, layer, c.number), given_of(c, layer, c.number)
    with as_on_gpus(c.as_on_gpus):
        for before in c.before:
            layer = go_through(layer, c, given, before)
        twin.load_state_dict(layer.state_dict())
        y, routing = call(layer, c, given)
        v = features(*y.shape, seed=5)
        if y.requires_grad:
            ((y * v).sum() + routing.aux_loss).backward()
    if "x changed in place" in c.before:
        with torch.no_grad():
            for value in parts_of(theirs.x):
                if value is not None:
                    value.mul_(-1.5)
    _, followed = call(twin, c, theirs)
    size = {} if theirs.size is None else {"size": theirs.size}
    expected, convs = define(twin, theirs.x, theirs.plain, followed, {**theirs.args, **size})
    if expected.requires_grad:
        ((expected * v).sum() + followed.aux_loss).backward()
    ours: dict[str, Any] = {"y": y.detach(), "routing": routing.to_dense().detach()}
    wanted: dict[str, Any] = {"y": expected.detach(), "routing": followed.to_dense().detach()}
    ours |= {name: gradient(leaf) for name, leaf in leaves_of(given).items()} | gradients(layer, None)
    wanted |= {name: gradient(leaf) for name, leaf in leaves_of(theirs).items()} | gradients(twin, convs)
    return compare(ours, wanted)


@contextmanager
def as_on_gpus(active: bool) -> Iterator[None]:
    """The sums that GPUs use, a few messages a block."""
    if not active:
        yield
        return
    with mock.patch.multiple(graph_module, SPARSE_DEVICES=(), NUMBERS=20):
        yield


# Models


def build_model(c: Model) -> GNNMoE:
    torch.manual_seed(c.number)
    several = len(c.kinds) > 1
    kinds = [kind.build() for kind in c.kinds]
    options = {"conv": kinds if several else kinds[0], "num_experts": None if several else EXPERTS, **c.options}
    model = GNNMoE(WIDTH, out_channels=3, **options).double()
    shake(model, Random(c.number))
    return model


def by_hand(model: GNNMoE, x: Tensor, graph: Any, plain: Tensor, args: dict[str, Tensor], batch: Any) -> Any:
    """The model layer by layer: its own parts, the experts as PyG's convs; and these convs, by layer."""
    decision = None if model.shared_router is None else model.decide(x, graph, batch)
    losses = [] if decision is None else [decision.aux_loss]
    x = x if model.lin_in is None else model.lin_in(x)
    xs, convs = [], {}
    for layer, conv in enumerate(model.convs):
        if isinstance(conv, MoEConv):
            own = {name: value for name, value in args.items() if name in conv.edge_names}
            _, routing = conv(x, plain, **own, batch=batch, routing=decision, return_routing=True)
            out, convs[layer] = define(conv, x, plain, routing, args)
            losses += [routing.aux_loss] if decision is None else []
        else:
            out = conv(x, plain, **{name: value for name, value in args.items() if name in parameters_of(conv)})
        out = out + model.residuals[layer](x) if layer < len(model.residuals) else out
        if layer < model.num_layers - 1 or model.jk_mode is not None:
            norm = model.norms[layer]
            out = model.act(out) if model.act_first else out
            out = norm(out, batch, None) if "batch" in inspect.signature(norm.forward).parameters else norm(out)
            out = out if model.act_first else model.act(out)
        x = out
        xs.append(x)
    x = model.jk(xs) if hasattr(model, "jk") else x
    return (model.lin(x) if hasattr(model, "lin") else x), sum(losses), convs


def run_model(c: Model) -> Outcome:
    model = build_model(c)
    edges = reference.random_graph(c.nodes, c.nodes, c.edges, c.number)
    args = edge_args(c.edge_args, c.edges, c.edge_dim, c.number)
    x = features(c.nodes, WIDTH, seed=c.number).float().double()
    batch = torch.arange(c.nodes) * 2 // c.nodes if c.batch else None
    with torch.no_grad():  # for counters and statistics of norms
        model.train()(x, edges, **args, batch=batch)
    model.train(c.training)
    graph = Graph(edges, c.nodes, **args) if c.wrapped else edges
    own = {} if c.wrapped else args
    twin, results = copy.deepcopy(model), []
    for one, hand in ((model, False), (twin, True)):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(c.number)
        one.zero_grad()
        if hand:
            y, loss, convs = by_hand(one, leaf, edges, edges, args, batch)
        else:
            y, routings = one(leaf, graph, **own, batch=batch, return_routing=True)
            loss = sum(routing.aux_loss for routing in routings)
        ((y * features(*y.shape, seed=5)).sum() + loss).backward()
        found = {"y": y.detach(), "x": gradient(leaf)}
        for layer, conv in enumerate(one.convs):
            if isinstance(conv, MoEConv):
                found |= gradients(conv, convs[layer] if hand else None, f"convs.{layer}.")
        others = (item for item in one.named_parameters() if not re.match(r"convs\.\d+\.(experts|shared_expert)", item[0]))
        results.append(found | {name: gradient(value) for name, value in others})
    outcome = compare(*results)
    if outcome.kind == "failed" or c.way == "forward":
        return outcome
    return max(outcome, other_way(c, model, x, edges, args, batch, results[1]["y"]), key=lambda found: found.difference)


def other_way(
    c: Model, model: GNNMoE, x: Tensor, edges: Tensor, args: dict[str, Tensor], batch: Any, expected: Tensor
) -> Outcome:
    """Layer-wise inference, all neighbors sampled, or from disk."""
    data = Data(x=x, edge_index=edges, **args, **({} if batch is None else {"batch": batch}))
    if c.way == "inference":
        return compare({"inference": model.inference(data, batch_size=c.batch_size)}, {"inference": expected})
    if c.way == "disk":
        with tempfile.TemporaryDirectory() as folder:
            store(Path(folder) / "graph", data)
            stored = StoredGraph(Path(folder) / "graph")
            found = model.inference(stored, batch_size=c.batch_size, folder=Path(folder) / "out")
            return compare({"disk": found.clone()}, {"disk": expected})
    hops = [-1] * (2 * model.num_layers + 4)  # and the degrees, and what the neighbors of the last hop see
    found = torch.empty_like(expected)
    with torch.no_grad():
        for part in neighbor_loader(data, hops, batch_size=c.batch_size, backend="gmoe"):
            own = {name: part[name] for name in args}
            trim = c.wrapped and len(args) < 2
            sizes = (part.num_sampled_nodes, part.num_sampled_edges) if trim else ()
            y = model(part.x, part.edge_index, **own, **dict(zip(TRIM, sizes, strict=False)))
            found[part.n_id[: part.batch_size]] = y[: part.batch_size]
    return compare({"sampled": found}, {"sampled": expected})


TRIM = ("num_sampled_nodes_per_hop", "num_sampled_edges_per_hop")


# Judging


def refused(error: Exception) -> bool:
    """Whether an error is the library's own."""
    own = isinstance(error, ValueError | RuntimeError | NotImplementedError)
    return own and re.match(r"[\w., ]+: got .*expected|\w+: got a tensor, but|inference: ", str(error), re.S) is not None


def run(number: int) -> Outcome:
    """Build, run and compare a number's configuration."""
    c = draw(number)
    with warnings.catch_warnings(), default_float64():
        warnings.simplefilter("ignore")
        try:
            return run_layer(c) if isinstance(c, Layer) else run_model(c)
        except Exception as error:
            kind = "refused" if refused(error) else "failed"
            return Outcome(kind, torch.inf, f"{type(error).__name__}: {error}")


def show(number: int) -> str:
    """The configuration and its outcome."""
    c, outcome = draw(number), run(number)
    lines = [f"{field.name}: {getattr(c, field.name)}" for field in fields(c)]
    return "\n".join([type(c).__name__, *(f"  {line}" for line in lines), describe(outcome)])


def describe(outcome: Outcome) -> str:
    return f"{outcome.kind}: {outcome.message} ({outcome.difference:.1e})"


def main(first: int, last: int | None = None) -> int:
    """Print one number, or a range's progress and summary; 1 if some number failed."""
    torch.set_num_threads(1)
    if last is None:
        print(show(first))
        return 0
    outcomes, begin, failures, slow = Counter[tuple[str, str]](), time.perf_counter(), [], []
    for number in range(first, last):
        start = time.perf_counter()
        outcome = run(number)
        slow.append((time.perf_counter() - start, number))
        names = {kind.name for kind in draw(number).kinds} | {type(draw(number)).__name__}
        outcomes.update((name, outcome.kind) for name in names)
        if outcome.kind == "failed" and number not in KNOWN:
            failures.append(number)
            print(f"{number} {draw(number).name} {describe(outcome)}"[:300], flush=True)
        if (number + 1 - first) % 500 == 0:
            print(f"{number + 1 - first} of {last - first}", file=sys.stderr, flush=True)
    for name in sorted({name for name, _ in outcomes}):
        print(f"{name:16}", *(f"{kind} {outcomes[name, kind]:5}" for kind in ("equal", "refused", "failed")))
    total = time.perf_counter() - begin
    print(f"{last - first} numbers, {total:.0f} s, {1000 * total / (last - first):.0f} ms each, slowest {max(slow)}")
    print(f"failed: {failures or 'none'}")
    return int(bool(failures))


if __name__ == "__main__":
    raise SystemExit(main(*map(int, sys.argv[1:])))
