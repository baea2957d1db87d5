"""Relational layers and models, on graphs of several types of nodes.

A case is a ``RelationalConv``, a ``HeteroMoEConv`` or a ``HeteroGNNMoE``. The definition: dense
matrices of means, and one expert after another on all nodes.

Shapes: N nodes of a type, M edges of a relation, D and O width, E experts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.data import HeteroData
from torch_geometric.nn import LayerNorm

import gmoe
from gmoe import Graph, HeteroGNNMoE, HeteroMoEConv, RelationalConv, Routing
from gmoe.conv.base import GAIN_SCALE
from tests.compose import drawing, steps
from tests.compose.calls import Call
from tests.compose.drawing import EXPERTS, SPARSE, flip, some
from tests.compose.frame import Case, Output, Target, require_equal
from tests.helpers import masked as ref

EdgeType = tuple[str, str, str]

HIDDEN = 4
"""The width of a model's hidden layers, and of its embeddings."""
NAMES = ("paper", "author", "a.b", "type", "two words", "keys")
"""Types of nodes; some are no attributes of Python, or are already one of a module."""
OF_A_DENSE_MODEL = ("num_layers", "norm", "residual", "act", "router")
"""The options of a model that its dense baseline has, too."""
WAYS = ("dense", *("layer",) * 4, *("forward",) * 2, *("inference",) * 2, "sampled")
FORMS = (*("plain",) * 6, *ref.FORMS, "absent")


class Relation(NamedTuple):
    """Edges of a type, and how they are given."""

    name: EdgeType
    form: str
    num_edges: int
    in_graph: tuple[str, ...]
    """What a ``Graph`` holds: nothing if there is none."""
    learned: bool
    """The values of a sparse matrix need gradients."""


@dataclass(kw_only=True, repr=False)
class Config(Case):
    """A module, its input, and what both go through."""

    counts: dict[str, int] = field(default_factory=dict)
    """How many nodes a call has of each type."""
    widths: dict[str, int] = field(default_factory=dict)
    """Widths of features; a type that a model embeds has none."""
    one_width: bool = False
    """The width is given as one number."""
    relations: tuple[Relation, ...] = ()
    learned: tuple[str, ...] = ()
    """Types whose features need gradients."""
    grouped: tuple[str, ...] = ()
    """Types whose nodes are of several graphs."""
    out_types: tuple[str, ...] | None = None
    target: str | None = None
    is_numbered: bool = False
    """The call has some of the nodes that the model has embeddings for."""

    @property
    def is_model(self) -> bool:
        return self.way not in ("dense", "layer")

    @property
    def metadata(self) -> tuple[list[str], list[EdgeType]]:
        return [*self.counts], [relation.name for relation in self.relations]

    @property
    def as_argument(self) -> Any:
        """The widths as a module takes them."""
        return next(iter(self.widths.values())) if self.one_width else dict(self.widths)

    @property
    def number_of_all(self) -> dict[str, int]:
        """How many nodes of each type there are; a mini-batch has some of them."""
        more = 3 if self.is_numbered else 0
        return {name: count + more for name, count in self.counts.items()}


# Drawing: what would be nonsense is left out


def draw_types(random: Random, c: Config) -> None:
    """The types of nodes, their features, and what is computed."""
    names = random.sample(NAMES, random.randint(1, 4))
    # A sampler starts from a node.
    few = 1 if c.way == "sampled" else 0
    c.counts = {name: max(random.choice((0, 1, 2, 5, 9)), few) for name in names}
    c.one_width = flip(random, 0.3)
    width = random.choice((3, 4, 8))
    c.widths = {name: width if c.one_width else random.choice((2, 3, 4, 8)) for name in names}
    if c.is_model:
        c.target = random.choice((None, *names)) or (names[0] if c.way == "sampled" else None)
        # A model embeds types without features; one number is the width of all.
        embeds = 0.0 if c.one_width else 0.3
        c.widths = {name: size for name, size in c.widths.items() if not flip(random, embeds)}
    elif flip(random, 0.4):
        c.out_types = tuple(random.sample(names, random.randint(1, len(names))))
    c.learned = tuple(name for name in names if flip(random, 0.7))
    c.grouped = tuple(name for name in names if c.way != "sampled" and flip(random, 0.3))


def draw_relations(random: Random, c: Config) -> None:
    """Up to six edge types; of a mini-batch and of chunks, edges are plain."""
    is_plain = c.way in ("sampled", "inference")
    names = list(c.counts)
    found: dict[EdgeType, Relation] = {}
    for _ in range(random.randint(0, 6)):
        verb = random.choice(("to", "cites", "to.from"))
        name = (random.choice(names), verb, random.choice(names))
        form = random.choice(("plain", "absent") if c.way == "inference" else FORMS)
        form = "plain" if c.way == "sampled" else form
        wraps = form != "absent" and not is_plain and flip(random, 0.3)
        in_graph = ("Graph", *(["x"] if flip(random) else [])) if wraps else ()
        num_edges = random.choice((0, 1, 5, 20, 30))
        found[name] = Relation(name, form, num_edges, in_graph, form in SPARSE and flip(random))
    c.relations = tuple(found.values())


def draw_options(random: Random, c: Config) -> None:
    """The start, the router and its options; in a mini-batch, tokens decide alone."""
    start = random.choice((None, *drawing.STARTS))
    names: tuple[Any, ...] = ("token_choice", "token_choice", *drawing.ROUTERS)
    # Edges do not reach a router of one type.
    left_out: tuple[str, ...] = ("scope",)
    if c.way == "sampled":
        names = ("token_choice", "multi_centroid", "uniform")
        left_out = ("scope", "choice", "capacity_factor")
    c.options = drawing.draw_router(random, names, start, left_out=left_out)
    c.options |= {"num_experts": EXPERTS, "start": start}
    if not c.is_model:
        return
    norms = [None, None, "by node"]
    # Norms over all nodes differ in a mini-batch.
    norms += [] if c.way == "sampled" else ["layer_norm", "graph_norm", "batch_norm"]
    layers = random.choice((2, 2, 3, 4))
    c.options |= {"num_layers": layers, "norm": random.choice(norms)}
    c.options |= some(random, {"residual": ("none", "linear"), "act": ("elu", None)})
    if layers == 4 and flip(random):
        c.options["every"] = 2
    # A dense model of the same class.
    if flip(random, 0.1):
        c.options = {key: c.options[key] for key in OF_A_DENSE_MODEL if key in c.options}
        c.options["router"] = None


# Arguments of a call


class Given(NamedTuple):
    """The arguments of a call, and the same edges as dense matrices."""

    x_dict: dict[str, Tensor]
    edge_index_dict: dict[EdgeType, Any]
    batch_dict: dict[str, Tensor] | None
    n_id_dict: dict[str, Tensor] | None
    values: dict[EdgeType, Tensor]
    """Those of the sparse matrices."""
    ends: dict[EdgeType, Tensor]
    """(2, M) of all relations that are there."""
    counts: Mapping[str, int]

    @property
    def leaves(self) -> dict[str, Tensor]:
        of_x = {f"x of {name}": x for name, x in self.x_dict.items()}
        return of_x | {f"values of {name}": value for name, value in self.values.items()}

    def mean_matrix(self, relation: EdgeType) -> Tensor:
        """(N_dst, N_src): the product with features is their mean, weighed by the values."""
        source, destination = self.ends[relation]
        num_src = self.counts[relation[0]]
        num_dst = self.counts[relation[-1]]
        values = self.values.get(relation, torch.ones(len(source), dtype=torch.float64))
        sums = torch.zeros(num_dst, num_src, dtype=torch.float64)
        sums = sums.index_put((destination, source), values, accumulate=True)
        return sums / destination.bincount(minlength=num_dst).clamp(min=1)[:, None]


def given_of(c: Config, seed: int, dtype: torch.dtype = torch.float64) -> Given:
    """Fresh leaves of a seed."""

    def leaf(*shape: int, of: int) -> Tensor:
        return ref.features(*shape, seed=seed + of).float().to(dtype)

    x_dict = {
        name: leaf(c.counts[name], width, of=i).requires_grad_(name in c.learned)
        for i, (name, width) in enumerate(c.widths.items())
    }
    edge_index_dict = {}
    values = {}
    ends = {}
    for i, (name, form, num_edges, in_graph, learned) in enumerate(c.relations):
        if form == "absent":
            continue
        size = (c.counts[name[0]], c.counts[name[-1]])
        edges = ref.random_graph(*size, num_edges if min(size) else 0, seed + i)
        value = None
        if form in SPARSE:
            edges = edges.unique(dim=1)
            # Sorted as a matrix holds them
            edges = edges[:, (edges[1] * max(size[0], 1) + edges[0]).argsort()]
            value = (leaf(edges.size(1), of=50 + i).abs() + 0.1).requires_grad_(learned)
            values[name] = value
        adj = drawing.in_form(form, edges, size, value)
        ends[name] = edges
        if in_graph:
            adj = Graph(adj, size, x=x_dict.get(name[0]) if "x" in in_graph else None)
        edge_index_dict[name] = adj
    # The order of a dictionary means nothing.
    order = Random(seed).sample(sorted(edge_index_dict), len(edge_index_dict))
    numbers = {
        name: torch.randperm(number, generator=torch.Generator().manual_seed(seed))
        for name, number in c.number_of_all.items()
    }
    return Given(
        x_dict=x_dict,
        edge_index_dict={name: edge_index_dict[name] for name in order},
        batch_dict={name: drawing.groups_of(c.counts[name]) for name in c.grouped} or None,
        n_id_dict={name: numbers[name][: c.counts[name]] for name in numbers}
        if c.is_numbered
        else None,
        values=values,
        ends=ends,
        counts=c.counts,
    )


# The definition


def needed(c: Config, num_layers: int) -> list[list[str]]:
    """The types that a model needs as input, and after each layer."""
    types = [{c.target} if c.target is not None else set(c.counts)]
    for _ in range(num_layers):
        sources = {r.name[0] for r in c.relations if r.name[-1] in types[0]}
        types.insert(0, types[0] | sources)
    return [[name for name in c.counts if name in some_types] for some_types in types]


def dense_out(conv: Any, name: str, h: Mapping[str, Tensor], given: Given, expert: Any) -> Tensor:
    """(N, O) of one relational layer: a plain one (``expert=None``), or one expert of a stack."""

    def mapped(linear: Any, x: Tensor) -> Tensor:
        if expert is None:
            return F.linear(x, linear.weight, linear.bias)
        bias = 0.0 if linear.bias is None else linear.bias[expert]
        return x @ linear.weight[expert].T + bias

    out = mapped(conv.root[name], h[name])
    for relation in conv.edge_types:
        if relation[-1] == name and relation in given.ends:
            mean = given.mean_matrix(relation) @ h[relation[0]]
            out = out + mapped(conv.relation[relation], mean)
    return out


def layer_out(
    conv: Any, types: Sequence[str], h: Mapping[str, Tensor], given: Given
) -> tuple[dict[str, Tensor], dict[str, Routing]]:
    """The output of each type, and the routings of a mixture."""
    if isinstance(conv, RelationalConv):
        return {name: dense_out(conv, name, h, given, None) for name in types}, {}
    out = {}
    routings = {}
    for name in types:
        batch = (given.batch_dict or {}).get(name)
        routings[name] = conv.routers[name](h[name], batch)
        weight_NE = routings[name].to_dense()
        out[name] = sum(
            weight_NE[:, e, None] * dense_out(conv.experts, name, h, given, e)
            for e in range(conv.num_experts)
        )
        if conv.gain is not None:
            always = dense_out(conv.shared_expert, name, h, given, None)
            out[name] = always + GAIN_SCALE * conv.gain * out[name]
    return out, routings


def inputs_of(c: Config, model: Any, given: Given, types: Sequence[str]) -> dict[str, Tensor]:
    """(N, D) of each type: features, mapped to one width if there are several, or embeddings."""
    h = {}
    has_one_width = len({c.widths.get(name, HIDDEN) for name in types}) == 1
    for name in types:
        if name in c.widths:
            x = given.x_dict[name]
            h[name] = x if has_one_width else model.lin_in[name](x)
        else:
            weight = model.embeddings[name].weight
            h[name] = weight if given.n_id_dict is None else weight[given.n_id_dict[name]]
    return h


def model_out(c: Config, model: Any, given: Given) -> Output:
    """Output and routings of a model, layer by layer of its own parts."""
    inputs, *types_after = needed(c, len(model.convs))
    h = inputs_of(c, model, given, inputs)
    # PyG's norms by this name take the graphs, and count them by the last node of all.
    takes_graphs = c.options["norm"] in ("layer_norm", "graph_norm", "by node")
    found: list[Routing] = []
    for layer, conv in enumerate(model.convs):
        out, routings = layer_out(conv, types_after[layer], h, given)
        found += routings.values()
        if layer < len(model.convs) - 1:
            norms = model.norms[layer]
            assert len({*norms.values()}) == len(norms), "types share a norm"
            for name, y in out.items():
                residual = c.options.get("residual", "identity")
                if residual == "linear":
                    y = y + model.residuals[layer][name](h[name])
                elif residual == "identity" and h[name].shape == y.shape:
                    y = y + h[name]
                batch = (given.batch_dict or {}).get(name)
                groups = (batch,) if takes_graphs and c.counts[name] else ()
                out[name] = model.act(norms[name](y, *groups))
        h = out
    return Output(outputs_of(h if c.target is None else h[c.target]), found)


def outputs_of(y: Any) -> dict[str, Tensor]:
    return {"y": y} if isinstance(y, Tensor) else {f"y of {name}": out for name, out in y.items()}


# Steps and ways of heterogeneous graphs alone


def has_experts(module: nn.Module) -> bool:
    return any(isinstance(part, HeteroMoEConv) for part in module.modules())


def densify(c: Config, module: Any, given: Given) -> Any:
    return gmoe.densify(module).model if has_experts(module) else module


def check_experts(c: Config, module: Any, given: Given) -> Any:
    """Raise if ``expert()`` is another dense layer than the one in the stack."""
    if not isinstance(module, HeteroMoEConv):
        return module
    # A shared expert is added once, not by each.
    factor = 1.0 if module.gain is None else GAIN_SCALE * module.gain
    for e in range(module.num_experts):
        y_dict = module.expert(e)(given.x_dict, given.edge_index_dict)
        theirs = {
            name: factor * dense_out(module.experts, name, given.x_dict, given, e)
            for name in y_dict
        }
        require_equal(f"expert {e}", y_dict, theirs, Hetero.tolerance)
    return module


def reset(c: Config, module: Any, given: Given) -> None:
    """Take the parameters of the start, and then others."""
    module.reset_parameters()
    Hetero().redraw(c, module)


def data_of(c: Config, given: Given) -> HeteroData:
    """The graph; types without features have their number of nodes alone."""
    data = HeteroData()
    for name, count in c.counts.items():
        data[name].num_nodes = count
        data[name].n_id = torch.arange(count)
        if name in given.x_dict:
            data[name].x = given.x_dict[name]
        if given.batch_dict and name in given.batch_dict:
            data[name].batch = given.batch_dict[name]
    for relation, edges in given.edge_index_dict.items():
        data[relation].edge_index = edges
    return data


def inference(c: Config, model: HeteroGNNMoE, given: Given) -> dict[str, Tensor]:
    """Layer by layer in chunks."""
    batch_size = Random(c.seed).choice((1, 2, 3, 100))
    return outputs_of(model.inference(data_of(c, given), batch_size=batch_size))


def sampled(c: Config, model: HeteroGNNMoE, given: Given) -> dict[str, Tensor]:
    """With all neighbors of so many hops that the degrees of all that count are whole."""
    data = data_of(c, given)
    found = []
    # One more than there are layers: all degrees are whole.
    hops = [-1] * (len(model.convs) + 1)
    for part in gmoe.neighbor_loader(data, hops, c.target, batch_size=3, backend="gmoe"):
        x_dict = part.collect("x", True)
        edge_index_dict = part.collect("edge_index", True)
        y = model(x_dict, edge_index_dict, part.collect("n_id"))
        found.append(y[: part[c.target].batch_size])
    return {"y": torch.cat(found)}


class Hetero(Target):
    """Random relational layers and models."""

    name = "hetero"
    given_of: ClassVar[Any] = staticmethod(given_of)
    other_ways: ClassVar = {"inference": inference, "sampled": sampled}
    own_before: ClassVar = {"reset_parameters": reset}
    own_after: ClassVar = {"densify": densify, "expert": check_experts}

    def draw(self, random: Random) -> Config:
        c = Config(seed=random.getrandbits(30), way=random.choice(WAYS))
        draw_types(random, c)
        draw_relations(random, c)
        if c.way != "dense":
            draw_options(random, c)
        c.is_numbered = c.way == "forward" and len(c.widths) < len(c.counts) and flip(random)
        c.training = c.way in ("layer", "forward") and flip(random, 0.6)
        # Without one router of their own, layers are not pruned.
        self.draw_steps(random, c, ("prune",))
        if c.way == "layer" and flip(random, 0.15):
            c.low = random.choice(("float32", "bfloat16"))
        return c

    def traits(self, case: Config) -> Collection[str]:
        forms = (relation.form for relation in case.relations)
        return {case.way, *case.before, case.after, *forms}

    def module_of(self, case: Config, dense: bool = False) -> Call:
        """The module, or the dense one that it replaces."""
        widths = case.as_argument
        metadata = case.metadata
        options = dict(case.options)
        if case.way == "dense" or (dense and case.way == "layer"):
            return Call(RelationalConv, widths, 3, metadata, out_types=case.out_types)
        if case.way == "layer":
            return Call(HeteroMoEConv, widths, 3, metadata, out_types=case.out_types, **options)
        if options["norm"] == "by node":
            options["norm"] = Call(LayerNorm, HIDDEN, mode="node")
        if dense:
            options = {name: options[name] for name in OF_A_DENSE_MODEL if name in options}
            options["router"] = None
        options |= {"target": case.target, "num_nodes_dict": case.number_of_all}
        return Call(HeteroGNNMoE, widths, HIDDEN, 2, metadata, **options)

    def dense(self, case: Config) -> Any:
        is_dense = case.way == "dense" or case.options["router"] is None
        return None if is_dense else self.module_of(case, dense=True).made()

    def call(self, case: Config, module: Any, given: Given) -> Output:
        if isinstance(module, RelationalConv):
            return Output(outputs_of(module(given.x_dict, given.edge_index_dict)), [])
        options: dict[str, Any] = {"batch_dict": given.batch_dict, "return_routing": True}
        if isinstance(module, HeteroGNNMoE) and case.is_numbered:
            options["n_id_dict"] = given.n_id_dict
        y, found = module(given.x_dict, given.edge_index_dict, **options)
        return Output(outputs_of(y), [*(found.values() if isinstance(found, dict) else found)])

    def define(self, case: Config, module: Any, given: Given) -> Output:
        if isinstance(module, HeteroGNNMoE):
            return model_out(case, module, given)
        types = [name for name in case.counts if name in (case.out_types or case.counts)]
        out, routings = layer_out(module, types, given.x_dict, given)
        return Output(outputs_of(out), [*routings.values()])

    def has_shared_graph(self, given: Given) -> bool:
        """A matrix of values that need gradients is made once, outside of the calls."""
        return any(value.requires_grad for value in given.values.values())

    def change(self, given: Given) -> Given:
        steps.change_in_place(given.x_dict.values())
        adjs = given.edge_index_dict.items()
        told = {name: steps.told_of_the_change(adj) for name, adj in adjs}
        return given._replace(edge_index_dict=told)

    def with_routings(self, module: Any, given: Given, weights: list[Tensor]) -> Given:
        for router, weight_NE in zip(module.routers.values(), weights, strict=True):
            routing = ref.routing_of(weight_NE)
            router.register_forward_hook(lambda *_, routing=routing: routing)
        return given
