"""Layers and models of one type of nodes: a ``MoEConv`` or a ``GNNMoE`` on a graph.

The definition of a layer: each expert a PyG conv on the whole graph, masked by the routing. That of
a model: layer by layer of its own parts.
"""

from __future__ import annotations

import inspect
import re
import tempfile
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, ClassVar, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch_geometric.data import Data
from torch_geometric.nn import CGConv, LayerNorm, PNAConv

import gmoe
from gmoe import BlockGNN, GNNMoE, Graph, MoEConv, Routing, neighbor_loader
from gmoe import sums as sums_module
from gmoe._checks import parameters_of
from gmoe.conv.base import GAIN_SCALE
from gmoe.conv.kinds import by_name, class_of, kind_of, of_pyg
from gmoe.moe import MoELayer
from tests.compose import drawing, steps
from tests.compose.blocks import (
    define_feed_forward,
    draw_blocks,
)
from tests.compose.calls import Call
from tests.compose.drawing import EXPERTS, SPARSE, Reason, flip, some, without
from tests.compose.frame import Case, Output, Target
from tests.helpers import masked as ref
from tests.helpers.mapped import map_to

# PyG compiles a class for its first instance: of several aggregations, sparse matrices then fail
for name in ("sage", "graph", "gin"):
    by_name()[name](1, 1)

WIDTH = 4
EDGE_DIM = 3
FLAGS = (False, True)
PLAIN = ("plain", "int32", "not contiguous")
LAYER_WISE = ("inference", "mapped")
WAYS = (*("layer",) * 20, "forward", "forward", "inference", "sampled", "mapped")
HEADS = {"heads": (1, 2), "concat": FLAGS, "bias": FLAGS}
GAT = {**HEADS, "add_self_loops": FLAGS, "residual": FLAGS, "negative_slope": (0.7,)}
FIXED: dict[str, dict[str, Any]] = {
    "pna": {
        "aggregators": ["mean", "max", "std"],
        "scalers": ["identity", "amplification"],
        "deg": torch.tensor([1, 3, 2]),
    },
    **{key: {"K": 2} for key in ("cheb", "tag", "sg")},
}
"""Options that a kind needs."""


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
OF_ONE_WIDTH = ("simple", "cg", "gine")
STACKED = ("gcn", "sage", "graph", "gin", "gat", "gatv2", "transformer")
"""Kinds of which a model's layers start as copies by default, if they are given by name."""


class Kind(NamedTuple):
    """A kind of conv with options."""

    name: str
    options: dict[str, Any]

    @property
    def spec(self) -> Spec:
        return KINDS[self.name]

    @property
    def conv(self) -> Any:
        """The class of a plain conv."""
        return class_of(by_name()[self.name])

    @property
    def as_argument(self) -> Any:
        """As a layer takes it."""
        made: Any = {"cg": CGConv, "pna": PNAConv}.get(self.name) or by_name()[self.name]
        return partial(made, **self.options) if self.options else self.name


@dataclass(kw_only=True, repr=False)
class Config(Case):
    """A MoEConv (``way="layer"``), a GNNMoE or a BlockGNN, its input, and what both go through."""

    two: bool = False
    """The edges lead from one set of nodes to another."""
    alone: bool = False
    """The second set has no features."""
    form: str = "plain"
    graph: str = "random"
    sizes: tuple[int, int] = (6, 6)
    edges: int = 20
    edge_dim: int | None = None
    kinds: tuple[Kind, ...] = (Kind("gcn", {}),)
    start: str = "shared"
    """What ``start=None`` of the options should become."""
    partials: bool = False
    """Kinds are given with their options, not as options of the layer."""
    widths: tuple[int, int, int] = (WIDTH, WIDTH, WIDTH)
    """Of sources, destinations and outputs: of a model, of hidden layers."""
    edge_args: tuple[str, ...] = ()
    values: str = ""
    in_graph: tuple[str, ...] = ()
    learned: tuple[str, ...] = ()
    batch: int = 0
    has_blocks: bool = False
    positional: bool = False
    as_on_gpus: bool = False

    @property
    def num_experts(self) -> int:
        return EXPERTS if len(self.kinds) == 1 else len(self.kinds)

    @property
    def flows(self) -> set[str]:
        return {kind.options.get("flow", "source_to_target") for kind in self.kinds}

    @property
    def has_turned_features(self) -> bool:
        return "target_to_source" in self.flows and self.edge_dim is not None

    @property
    def is_sparse(self) -> bool:
        return self.form in SPARSE

    @property
    def by_parts(self) -> bool:
        """A part of the nodes is computed at a time: what looks at all of them is not drawn."""
        return self.way in ("sampled", "mapped")


# Drawing: each function sets what it draws; what would be nonsense is left out


def draw_graph(random: Random, c: Config) -> None:
    """The edges and their form; two sets of nodes, the second one perhaps without features."""
    c.two = c.way == "layer" and flip(random, 0.2)
    c.form = "plain" if c.by_parts else random.choice(["plain"] * 6 + list(ref.FORMS))
    # Of several loops GCN keeps the last one's weight
    is_simple = c.form not in PLAIN or c.way == "sampled"
    c.sizes = (
        (random.randint(1, 9), random.randint(1, 9)) if c.two else (random.randint(2, 14),) * 2
    )
    if c.is_sparse:  # else PyG fails to make loops of a matrix's values
        c.sizes = (max(c.sizes), min(c.sizes))
    c.graph = "simple" if is_simple else "random"
    # Samplers and matrices of PyG need an edge.
    c.edges = random.choice((5, 20, 30) if is_simple else (0, 5, 20, 30))
    if not c.two and not is_simple and flip(random, 0.35):
        c.graph = random.choice(list(ref.GRAPHS))
        c.sizes = (ref.GRAPHS[c.graph][0],) * 2
        c.edges = ref.GRAPHS[c.graph][1].size(1)
    c.alone = c.two and flip(random, 0.3)


def draw_kind(random: Random, name: str, c: Config, alike: bool) -> Kind:
    """One kind; ``alike``: outputs are as wide as asked for."""
    spec = KINDS[name]
    kind = Kind(name, some(random, spec.options) | FIXED.get(name, {}))
    if name == "gcn" and flip(random, 0.1):
        # PyG adds loops where it normalizes alone.
        kind.options.update(normalize=False, add_self_loops=False)
    # Concatenated heads are wider than asked for.
    if "concat" in spec.options and alike:
        kind.options["concat"] = False
    # Without edge_dim, GINE wants features of the width of the nodes.
    takes_features = spec.edges == "edge_attr" and c.edge_dim is not None
    if takes_features and (name != "gine" or c.edge_dim == EDGE_DIM):
        kind.options[spec.dim] = c.edge_dim
    if spec.options.get("residual") and c.edge_dim is not None:
        numbers = (0.5, 2.0)
        reductions = ("mean", "max", "add", 0.5)
        # Of few sources, PyG fails to reduce
        fills = numbers if c.sizes[0] < c.sizes[1] else reductions
        kind.options["fill_value"] = random.choice(fills)
    # Matrices have one flow, and so do samplers and files.
    may_turn = c.form in PLAIN and not c.two and not c.by_parts and of_pyg(kind.conv)
    if may_turn and flip(random, 0.1):
        kind.options["flow"] = "target_to_source"
    return kind


def fits(name: str, c: Config) -> bool:
    """True if a kind takes what else is drawn."""
    spec = KINDS[name]
    has_features = c.edge_dim is not None
    if c.is_sparse and not (spec.sparse and (not has_features or "heads" in spec.options)):
        return False  # rows of values, which attention takes
    if c.two and not spec.two:
        return False
    if c.alone and kind_of(Kind(name, {}).conv).needs_destinations:
        return False
    if name in ("gine", "cg") and not has_features:
        return False
    return c.way == "layer" or spec.in_models


def draw_kinds(random: Random, c: Config) -> None:
    """A kind for all experts or a list, and how they start.

    Either all kinds that take edge features get them, or none does.
    """
    has_features = flip(random)
    c.edge_dim = random.choice((EDGE_DIM, EDGE_DIM, WIDTH)) if has_features else None
    # Stacked kinds have most of the code; the rest run one by one.
    pool = [name for name in (OFTEN if flip(random, 0.7) else KINDS) if fits(name, c)]
    names = random.choices(pool or ["gat"], k=random.choice((1, 1, 2, 3)))
    several = len(names) > 1
    c.partials = several or flip(random)
    alike = several or (c.way != "layer" and c.partials)
    c.kinds = tuple(draw_kind(random, name, c, alike) for name in names)
    # Different convs are no copies of one.
    c.start = random.choice(("shared", "shared", "plain", *([] if several else ["copies"])))
    width = random.choice((WIDTH, WIDTH, 9))
    # One map for both ends needs one width.
    is_same = any(kind.spec.two == "one" or kind.options.get("share_weights") for kind in c.kinds)
    of_destinations = 6 if c.two and not is_same else width
    if not any(kind.name in OF_ONE_WIDTH for kind in c.kinds):
        c.widths = (width, of_destinations, random.choice((WIDTH, 2, 6)))


def draw_edge_args(random: Random, c: Config) -> None:
    """Which edge arguments there are, where they are given, and which need gradients."""
    takes = {kind.spec.edges for kind in c.kinds}
    takes = set() if c.is_sparse else takes  # a matrix holds its weights
    if "edge_weight" in takes and flip(random, 0.7):
        c.edge_args += ("edge_weight",)
    if "edge_attr" in takes and c.edge_dim is not None:
        c.edge_args += ("edge_attr",)
    if c.is_sparse:
        c.values = random.choice(("ones", "some")) if c.edge_dim is None else "rows"
    if not c.by_parts and flip(random, 0.6):
        c.in_graph = ("Graph", *(name for name in ("x", *c.edge_args) if flip(random, 0.7)))
    c.learned = tuple(name for name in ("x", "edge_weight", "edge_attr") if flip(random, 0.7))


def draw_options(random: Random, c: Config) -> None:
    """The options of the layer or model beside those of its convs.

    Without a router, each call gets weights.
    """
    several = len(c.kinds) > 1
    names = drawing.OF_TOKENS if c.by_parts else ("token_choice", *drawing.ROUTERS)
    names = (*names, None) if c.way == "layer" else names
    # Groups and neighbors are those of one whole set of nodes.
    left_out = ("scope", "choice") if c.two or c.by_parts else ()
    most = len(c.kinds) if several else EXPERTS
    c.options = drawing.draw_router(random, names, c.start, most, left_out, misfits=0.0)
    sees = tuple(part for part in ("node", "neighbors", "degree") if flip(random, 0.4))
    c.options |= {"router_input": sees or ("node",), "start": c.start}
    if c.way != "layer":
        draw_model(random, c)
    # Where a conv looks further, local=True would be a lie.
    if all(kind_of(kind.conv).is_local and of_pyg(kind.conv) for kind in c.kinds):
        both = c.way in ("layer", "forward")
        c.options |= some(random, {"local": FLAGS if both else (True,)})
    leave_to_defaults(random, c)


def draw_model(random: Random, c: Config) -> None:
    """The options of a model beside its experts'."""
    layers = random.choice((1, 2, 2, 3, 6))
    jks = (None, None, "last", *([] if c.way == "mapped" else ["cat", "max", "lstm"]))
    norms: list[dict[str, Any]] = [{}, {}, {"norm": "by node"}]
    if c.sizes[0] > 1:  # one row has no variance
        norms.append({"norm": "batch_norm"})
    if not c.by_parts:
        norms += [{"norm": "graph_norm"}, {"norm": "layer_norm"}]
    choices = {"residual": ("none", "linear"), "act": ("elu",)}
    # Of one or two layers, no second one is left to choose.
    deep = {"every": (2,)} if layers > 2 else {}
    c.options["num_layers"] = layers
    c.options["jk"] = "last" if layers == 1 else random.choice(jks)
    c.options["shared_router"] = flip(random, 0.4)
    c.options |= random.choice(norms) | some(random, {**choices, **deep})


def default_start(c: Config) -> str | None:
    """What ``start=None`` becomes; ``None`` where that is not predicted.

    A layer starts beside a shared expert, and so do those of a model with a router in each. A model
    that routes once starts as copies of one kind, where a node's weights sum to 1.
    """
    if c.way == "layer" or not c.options["shared_router"]:
        return "shared"
    router = c.options["router"]
    kwargs = c.options["router_kwargs"]
    tokens_choose = {
        "token_choice": "capacity_factor" not in kwargs,
        "multi_centroid": kwargs.get("choice") != "experts",
        "random": True,
        "uniform": True,
    }
    to_one = "straight_through" if c.options["k"] == 1 else "normalized"
    if not tokens_choose.get(router) or kwargs.get("weight", to_one) != to_one:
        return "shared"
    if len(c.kinds) > 1:  # a list of one kind may be copies
        return "shared" if len({kind.name for kind in c.kinds}) > 1 else None
    is_named = c.kinds[0].name in STACKED and not c.partials
    return "copies" if is_named else None


def leave_to_defaults(random: Random, c: Config) -> None:
    """Say some options by the default, where that means what was drawn."""
    is_copies = c.start == "copies"
    options = c.options
    says_start = c.start != default_start(c) or flip(random, 0.4)
    if not says_start:
        options["start"] = None
    is_default = options.get("shared_router") == is_copies and c.way != "layer"
    if is_default and (says_start or is_copies) and flip(random, 0.6):
        options["shared_router"] = None
    if is_copies and flip(random):  # by default their weights sum to 1
        options["router_kwargs"] = without(options["router_kwargs"], "weight")


# Arguments of a call


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
        x_src, x_dst = self.x
        ends = {"x": x_src} if x_dst is None or x_dst is x_src else {"x": x_src, "x_dst": x_dst}
        return ends | self.args | ({} if self.weight_TE is None else {"weight_TE": self.weight_TE})


def edges_of(c: Config, seed: int) -> Tensor:
    """The edges of a seed, plain."""
    if c.graph in ref.GRAPHS:
        return ref.GRAPHS[c.graph][1]
    edges = ref.random_graph(*c.sizes, c.edges, seed)
    if c.graph != "simple":
        return edges
    edges = edges.unique(dim=1)
    # PyG adds to a matrix's loops between two sets
    edges = edges[:, edges[0] != edges[1]] if c.two else edges
    # Sorted edges would hide who relies on their order.
    order = torch.randperm(edges.size(1), generator=torch.Generator().manual_seed(seed))
    return edges[:, order]


def given_of(c: Config, seed: int, dtype: torch.dtype = torch.float64) -> Given:
    """Fresh arguments of a seed."""

    def leaf(*shape: int, of: int = seed) -> Tensor:
        return ref.features(*shape, seed=of).float().to(dtype)

    edges = edges_of(c, seed)
    number = edges.size(1)
    width = c.edge_dim or 1
    value = None
    if c.is_sparse:
        value = leaf(number, *((width,) if c.values == "rows" else ())).abs() + 0.1
        value = torch.ones_like(value) if c.values == "ones" else value
    adj = drawing.in_form(c.form, edges, c.sizes, value)
    if c.is_sparse:
        plain = ref.csr(edges, c.sizes, value)  # PyG writes to coo
    else:
        plain = (adj.as_tensor() if c.form.startswith("Edge") else adj).long()
    every = {
        "edge_weight": leaf(number).abs() + 0.1,
        "edge_attr": c.features(leaf(number, width)),
    }
    args = {name: every[name].requires_grad_(name in c.learned) for name in c.edge_args}
    x_src, x_dst = (
        c.features(leaf(*shape)).requires_grad_("x" in c.learned)
        for shape in zip(c.sizes, c.widths[:2], strict=True)
    )
    if c.in_graph:
        held = {name: value for name, value in {"x": x_src, **args}.items() if name in c.in_graph}
        # Of several flows, all are refused
        adj = Graph(adj, c.sizes, flow=min(c.flows), **held)
    takes_batch = c.batch and c.way in ("layer", "forward", "inference")
    weight_TE = None
    if c.options["router"] is None:
        # All tokens have all experts, some have some, or none has any
        least = Random(seed).choice((0.0, 0.7, 0.7, 9.0))
        shape = (c.sizes[1], c.num_experts)
        weight_TE = leaf(*shape, of=3) * (leaf(*shape, of=4).abs() < least)
    return Given(
        x=(x_src, None if c.alone else x_dst if c.two else x_src),
        adj=adj,
        plain=plain,
        args=args,
        batch=drawing.groups_of(c.sizes[1]) if takes_batch else None,
        weight_TE=None if weight_TE is None else weight_TE.requires_grad_(),
    )


def call(c: Config, module: Any, given: Given) -> Output:
    """Output and routings."""
    options: dict[str, Any] = without(given.args, *c.in_graph)
    if c.alone:
        options["size"] = c.sizes
    if given.weight_TE is not None:
        options["routing"] = ref.routing_of(given.weight_TE)
    x = given.x if c.two else given.x[0]
    # PyG's convs take their edge argument by position, too.
    first = [options.pop(name, None) for name in given.args] if c.positional else []
    y, found = module(x, given.adj, *first, **options, batch=given.batch, return_routing=True)
    return Output({"y": y}, [found] if isinstance(found, Routing) else found)


# The definition


def define_layer(
    layer: MoEConv, c: Config, x: Any, given: Given, routing: Routing
) -> tuple[Tensor, list[Any]]:
    """Each expert a PyG conv on the whole graph, masked by the routing; and these convs."""
    adj = given.plain
    convs = [layer.experts.expert(index) for index in range(layer.num_experts)]
    always = [] if layer.shared_expert is None else [layer.shared_expert.expert(0)]
    args: Any = {**given.args, **({"size": c.sizes} if c.alone else {})}
    y = ref.masked(convs, x, adj, routing, **args)
    y = y if layer.gain is None else GAIN_SCALE * layer.gain * y
    if always:
        y = y + ref.masked(always, x, adj, ref.routing_of(torch.ones_like(y[:, :1])), **args)
    return y, [*convs, *always]


def define_model(model: GNNMoE, c: Config, given: Given) -> Output:
    """Layer by layer of its own parts."""
    x = given.x[0]
    convs = {}
    decision = decision_of(model, given)
    routings = [] if decision is None else [decision]
    xs = []
    for layer, conv in enumerate(model.convs):
        if isinstance(conv, MoEConv):
            own: Any = {key: value for key, value in given.args.items() if key in conv.edge_names}
            routing = decision
            if routing is None:
                how = {"batch": given.batch, "return_routing": True}
                routing = conv(x, given.plain, **own, **how)[1]
            out, convs[f"convs.{layer}"] = define_layer(conv, c, x, given, routing)
            routings += [routing] if decision is None else []
        else:
            out = plain_conv(conv, x, given)
        if layer < model.num_layers - 1 or model.jk_mode is not None:
            residual = c.options.get("residual", "identity")
            if residual == "linear":
                out = out + model.residuals[str(layer)](x)
            elif residual == "identity" and x.shape == out.shape:
                out = out + x
            norm = model.norms[layer]
            takes_groups = "batch" in inspect.signature(norm.forward).parameters
            out = model.act(norm(out, *((given.batch, None) if takes_groups else ())))
        x = out
        xs.append(x)
    x = model.jk(xs) if hasattr(model, "jk") else x
    return Output({"y": model.lin(x) if hasattr(model, "lin") else x}, routings, convs)


def define_blocks(model: BlockGNN, given: Given) -> Output:
    """Block by block of its own parts."""
    decision = decision_of(model, given)
    routings = [] if decision is None else [decision]
    x = model.act(model.input(given.x[0]))
    edge_index = Graph(given.plain, x.size(0), flow=model.flow).edge_index
    for layer, conv in enumerate(model.convs):
        rows = plain_conv(conv, model.norms[layer](x), given)
        part = model.ffns[layer]
        y, own = define_feed_forward(model, part, rows, decision, given.batch, edge_index)
        routings += [] if own is None else [own]
        x = x + y
    return Output({"y": model.lin(model.norms[-1](x))}, routings, {})


def decision_of(model: Any, given: Given) -> Any:
    """What a common router says; ``None`` without one."""
    if model.shared_router is None:
        return None
    x = given.x[0]
    graph = Graph(given.plain, x.size(0), flow=model.flow)
    return model.shared_router(model.shared_router_input(x, graph), given.batch, graph.edge_index)


def plain_conv(conv: Any, x: Tensor, given: Given) -> Tensor:
    """A conv without experts, with the edge arguments that it takes."""
    takes = parameters_of(conv)
    own = {key: value for key, value in given.args.items() if key in takes}
    out: Tensor = conv(x, given.plain, **own)
    return out


def gradients(module: nn.Module, convs: Mapping[str, list[Any]] | None) -> dict[str, Any]:
    """Gradients by the names of plain convs' parameters.

    Those of ``convs``, by layer; else those of the stacked experts of the module.
    """
    found: dict[str, Any] = {}
    for key, value in module.named_parameters():
        if not re.match(r"(convs\.\d+\.)?(experts|shared_expert)\.", key):
            found[key] = ref.gradient(value)
    for place, layer in module.named_modules():
        if not isinstance(layer, MoEConv):
            continue
        if convs is None:
            own = ref.as_convs(layer.experts, layer.num_experts)
            own += [] if layer.shared_expert is None else ref.as_convs(layer.shared_expert, 1)
        else:
            own = [{key: p.grad for key, p in conv.named_parameters()} for conv in convs[place]]
        for index, part in enumerate(own):
            found |= {f"{place}.{index}.{key}": value for key, value in part.items()}
    return found


# Steps and ways of graphs alone


def nan_token(c: Config, module: Any, given: Given) -> None:
    """Raise if a NaN token, the last one, changed another token's decision.

    Or if it changed what the router had planned.
    """
    before = {key: value.clone() for key, value in module.named_buffers()}
    x = given.x[0].detach().clone()
    # The last node, which has no out-edges in a random graph.
    x[-1] = torch.nan
    x_dst = x if given.x[1] is given.x[0] else given.x[1]
    torch.manual_seed(c.seed)
    routing = call(c, module, given._replace(x=(x, x_dst))).routings[0]
    options = c.options["router_kwargs"]
    seen = c.options["router_input"]
    if c.way != "layer" or c.two or "node" not in seen:
        return
    for key, value in module.named_buffers():
        planned = key.replace("router.", "router.next_")
        kept = before[planned if c.training and planned in before else key]
        if key.startswith("router.") and not torch.equal(value, kept):
            raise AssertionError(f"{key} changed in a step that was not finite")
    decides_alone = c.options["router"] == "token_choice" and "capacity_factor" not in options
    weight_TE = routing.to_dense()
    if decides_alone and seen == ("node",) and not weight_TE[:-1].isfinite().all():
        raise AssertionError("a token's weights are not finite because of another one")


def other_edge_arguments(c: Config, module: Any, given: Given) -> None:
    """Call with the same graph that has other weights or features."""
    if not given.args or not c.in_graph:
        return
    args = {key: value.detach() * 1.5 for key, value in given.args.items()}
    weight = args.get("edge_weight")
    attr = args.get("edge_attr")
    sizes = given.adj.num_src, given.adj.num_rows
    graph = given.adj.fitting(sizes, given.adj.flow, weight, attr)
    torch.manual_seed(c.seed)
    call(c, module, given._replace(adj=graph, args={}))


def prune(c: Config, module: Any, given: Given) -> Any:
    """The module without the experts that nobody chose."""
    routings = call(c, module.eval(), given).routings
    gmoe.prune(module, routings)
    return module


def inference(c: Config, model: Any, given: Given) -> dict[str, Tensor]:
    """Layer by layer in chunks."""
    args = without(given.args, *c.in_graph)
    args |= {} if given.batch is None else {"batch": given.batch}
    data = Data(x=given.x[0], edge_index=given.adj, **args)
    return {"y": model.inference(data, batch_size=c.batch)}


def sampled(c: Config, model: Any, given: Given) -> dict[str, Tensor]:
    """With all neighbors of so many hops that the degrees of all that count are whole."""
    data = Data(x=given.x[0], edge_index=given.adj, **given.args)
    found = []
    hops = [-1] * (3 * model.num_layers + 3)
    for part in neighbor_loader(data, hops, batch_size=c.batch):
        own: Any = {key: part[key] for key in given.args}
        # PyG's trimming of layers, which takes one edge argument at most.
        if c.seed % 2 and len(own) < 2:
            own["num_sampled_nodes_per_hop"] = part.num_sampled_nodes
            own["num_sampled_edges_per_hop"] = part.num_sampled_edges
        found.append(model(part.x, part.edge_index, **own)[: part.batch_size])
    return {"y": torch.cat(found)}


def mapped(c: Config, model: Any, given: Given) -> dict[str, Tensor]:
    """Layer by layer, the graph and the hidden features in files."""
    args = {name: value.detach() for name, value in given.args.items()}
    data = Data(x=given.x[0].detach(), edge_index=given.adj, **args)
    out = data.x.new_empty(data.x.size(0), model.out_channels)
    with tempfile.TemporaryDirectory() as folder:
        y: Tensor = model.inference(map_to(Path(folder), data), batch_size=c.batch, out=out)
    return {"y": y}


def check_defaults(c: Config, module: nn.Module) -> None:
    """Raise where what was left to the defaults became something else than what was drawn."""
    found = {part.start for part in module.modules() if isinstance(part, MoELayer)}
    if found - {c.start}:
        raise AssertionError(f"start={c.options['start']} became {found}, not {c.start!r}")
    if isinstance(module, GNNMoE | BlockGNN) and c.options["shared_router"] is None:
        is_one = module.shared_router is not None
        if is_one != (c.start == "copies"):
            raise AssertionError(f"shared_router=None became {is_one} with start={c.start!r}")


class Graphs(Target):
    """Random layers and models."""

    name = "graphs"
    share = 0.6
    given_of: ClassVar[Any] = staticmethod(given_of)
    call: ClassVar[Any] = staticmethod(call)
    gradients: ClassVar[Any] = staticmethod(gradients)
    other_ways: ClassVar = {"inference": inference, "sampled": sampled, "mapped": mapped}
    own_before: ClassVar = {"NaN token": nan_token, "other edge arguments": other_edge_arguments}
    own_after: ClassVar = {"prune": prune}
    reasons = (
        Reason("conv: got experts of flows", lambda c: len(c.flows) > 1),
        Reason("conv: got FeaStConv, which cannot be built", lambda c: c.two),
        Reason("inference: .* looks further than one hop", lambda c: c.way in LAYER_WISE),
        Reason(r"model: got \w+, of which no expert", lambda c: c.after == "prune"),
        Reason("routings: got some in which no expert", lambda c: c.after == "prune"),
        # PyG averages the features of loops over the wrong row then
        Reason("local: got True", lambda c: c.has_turned_features),
        # Of a model, it is another option than of GAT
        Reason("residual: got", lambda c: c.way != "layer" and not c.partials),
        # Which options keep convs from being stacked is not predicted
    )

    def draw(self, random: Random) -> Config:
        c = Config(seed=random.getrandbits(30), way=random.choice(WAYS))
        for draw in (draw_graph, draw_kinds, draw_edge_args, draw_options):
            draw(random, c)
        c.alone &= not any(kind_of(kind.conv).needs_destinations for kind in c.kinds)
        if c.way in ("sampled", "mapped", "inference") or flip(random, 0.3):
            c.batch = random.choice((1, 3, 7, 100))
        c.training = c.way in ("layer", "forward") and flip(random, 0.6)
        takes_first = len(c.kinds) == 1 and c.edge_args == (c.kinds[0].spec.edges,)
        c.positional = c.way == "layer" and takes_first and flip(random, 0.3)
        c.as_on_gpus = flip(random, 0.25)
        fails = {"inference_mode"} if c.form.startswith("Edge") else set()  # of PyG
        fails |= {"prune"} if c.options["router"] is None else set()
        self.draw_steps(random, c, fails)
        c.after = c.after if flip(random, 0.3) else "nothing"
        # The statistics of batch norm keep the NaN, and give it in evaluation
        if "NaN token" in c.before and c.training and c.options.get("norm") == "batch_norm":
            c.after = "nothing"
        # "mf" fails under autocast
        lowers = c.form in PLAIN and all(kind.name != "mf" for kind in c.kinds)
        if lowers and c.way == "layer" and flip(random, 0.15):
            c.low = random.choice(("float32", "bfloat16"))
        draw_blocks(random, c)
        return c

    def traits(self, case: Config) -> Collection[str]:
        blocks = "blocks" if case.has_blocks else "layers"
        return {case.way, *(kind.name for kind in case.kinds), *case.before, case.after, blocks}

    def has_layers(self, case: Config) -> bool:
        return case.way != "layer"

    def may_be_flat(self, case: Config) -> bool:
        # PyG normalizes rows of zeros with gradients of 1e12, whose own are NaN. gmoe's are those
        # of a norm of 1: tests/gmoe/routers/test_flat_points.py
        normalizes = {"sage": "normalize", "general": "l2_normalize"}
        if any(kind.options.get(normalizes.get(kind.name, "")) for kind in case.kinds):
            return False
        # So is PyG's deviation of a graph that is zeros alone.
        return case.options.get("norm") != "layer_norm"

    def module_of(self, case: Config) -> Call:
        made = [kind.as_argument if case.partials else kind.name for kind in case.kinds]
        several = len(made) > 1
        own = {} if case.partials else case.kinds[0].options
        options = {"conv": made if several else made[0], **case.options, **own}
        options["num_experts"] = None if several else EXPERTS
        if case.way == "layer":
            widths: Any = case.widths[:2] if case.two else case.widths[0]
            return Call(MoEConv, in_channels=widths, out_channels=case.widths[2], **options)
        hidden = 2 * (case.widths[2] // 2)
        if options.get("norm") == "by node":
            options["norm"] = Call(LayerNorm, hidden, mode="node")
        widths = {"in_channels": case.widths[0], "hidden_channels": hidden, "out_channels": 3}
        return Call(BlockGNN if case.has_blocks else GNNMoE, **widths, **options)

    def build(self, case: Config) -> Any:
        module = super().build(case)
        check_defaults(case, module)
        return module

    def redraw(self, case: Config, module: Any) -> None:
        """Reset all parameters first."""
        # What a reset leaves out stays NaN, and is seen.
        for parameter in module.double().parameters():
            nn.init.constant_(parameter, torch.nan)
        module.reset_parameters()
        if any(value.isnan().any() for value in module.parameters()):
            raise AssertionError("reset_parameters left a parameter as it was")
        super().redraw(case, module)

    def define(self, case: Config, module: Any, given: Given) -> Output:
        if isinstance(module, BlockGNN):
            return define_blocks(module, given)
        if isinstance(module, GNNMoE):
            return define_model(module, case, given)
        routing = call(case, module, given).routings[0]
        x = given.x if case.two else given.x[0]
        y, convs = define_layer(module, case, x, given, routing)
        return Output({"y": y}, [routing], {"": convs})

    def change(self, given: Given) -> Given:
        steps.change_in_place(x for key, x in given.leaves.items() if key.startswith("x"))
        return given._replace(adj=steps.told_of_the_change(given.adj))

    def with_routings(self, module: nn.Module, given: Given, weights: list[Tensor]) -> Given:
        return given._replace(weight_TE=weights[0])

    def environment(self, case: Config) -> AbstractContextManager[Any]:
        if not case.as_on_gpus:
            return nullcontext()
        # Small blocks, no products
        return mock.patch.multiple(sums_module, SPARSE_DEVICES=(), NUMBERS=20)
