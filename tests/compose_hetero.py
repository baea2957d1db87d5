"""A random composer of relational layers and models: a number is a graph of several types.

``python -m tests.compose_hetero 4711`` shows a number, ``python -m tests.compose_hetero 0 2000``
runs a range. A number draws types of nodes, relations between them, how the edges are given, and a
``RelationalConv``, a ``HeteroMoEConv`` or a ``HeteroGNNMoE``. A new layer has to start as the dense
one. Then, with new parameters and after what it has been through, its outputs and gradients have to
equal the definition: dense matrices of means, and one expert after another on all nodes. Last, it
has to stay the same through a copy, a save, an unstack. What is refused is refused in the library's
own words, for a reason that the number has.

Shapes: N nodes of a type, M edges of a relation, D and O width, E experts.
"""

from __future__ import annotations

import copy
import pickle
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.data import HeteroData
from torch_geometric.nn import LayerNorm

import gmoe
from gmoe import Graph, HeteroGNNMoE, HeteroMoEConv, RelationalConv, Routing
from tests.compose import ROUTERS, SPARSE, TOLERANCE, some
from tests.composer import Composer, Outcome, compare, flip, judged
from tests.gmoe.conv import masked as ref

EdgeType = tuple[str, str, str]

EXPERTS = 3
HIDDEN = 4
"""The width of a model's hidden layers, and of its embeddings."""
NAMES = ("paper", "author", "a.b", "type", "two words", "keys")
"""Types of nodes; some are no attributes of Python, or are already one of a module."""
OF_A_DENSE_MODEL = ("num_layers", "norm", "residual", "act", "router")
"""The options of a model that its dense baseline has, too."""
WAYS = ("dense", *("layer",) * 4, *("forward",) * 2, *("inference",) * 2, "sampled")
FORMS = (*("plain",) * 6, *ref.FORMS, "absent")
BEFORE = (
    *("no_grad", "inference_mode", "step", "other graph", "other thread"),
    *("deepcopy", "pickle", "x changed in place", "reset_parameters"),
)
"""What a module, its graphs and its features may have been through before the call that counts."""
AFTER = (
    *("nothing", "deepcopy", "pickle", "state dict", "save", "unstack", "restack"),
    *("densify", "prune", "expert"),
)
"""What the module goes through after it."""


class Relation(NamedTuple):
    """Edges of a type, and how they are given."""

    name: EdgeType
    form: str
    num_edges: int
    in_graph: tuple[str, ...]
    """What a ``Graph`` holds: nothing if there is none."""
    learned: bool
    """The values of a sparse matrix need gradients."""


@dataclass(frozen=True)
class Config:
    """What a number draws."""

    number: int
    way: str
    counts: Mapping[str, int]
    """How many nodes a call has of each type."""
    widths: Mapping[str, int]
    """Widths of features; a type that a model embeds has none."""
    one_width: bool
    """The width is given as one number."""
    relations: tuple[Relation, ...]
    learned: frozenset[str]
    """Types whose features need gradients."""
    grouped: frozenset[str]
    """Types whose nodes are of several graphs."""
    out_types: tuple[str, ...] | None
    target: str | None
    options: Mapping[str, Any]
    is_numbered: bool
    """The call has some of the nodes that the model has embeddings for."""
    training: bool
    before: tuple[str, ...]
    after: str
    low: str

    @property
    def metadata(self) -> tuple[list[str], list[EdgeType]]:
        return [*self.counts], [relation.name for relation in self.relations]


# Drawing: what would be nonsense is left out


def draw_relations(random: Random, names: Sequence[str], way: str) -> tuple[Relation, ...]:
    """Up to six edge types; of a mini-batch and of chunks, edges are plain."""
    plain = way in ("sampled", "inference")
    found: dict[EdgeType, Relation] = {}
    for _ in range(random.randint(0, 6)):
        name = (
            random.choice(names),
            random.choice(("to", "cites", "to.from")),
            random.choice(names),
        )
        form = random.choice(("plain", "absent") if way == "inference" else FORMS)
        form = "plain" if way == "sampled" else form
        wraps = form != "absent" and not plain and flip(random, 0.3)
        in_graph = ("Graph", *(["x"] if flip(random) else [])) if wraps else ()
        num_edges = random.choice((0, 1, 5, 20, 30))
        found[name] = Relation(name, form, num_edges, in_graph, form in SPARSE and flip(random))
    return tuple(found.values())


def draw_router(random: Random, way: str, start: str | None, k: int) -> dict[str, Any]:
    """The router and its options; in a mini-batch, tokens decide alone."""
    names = [name for name in ROUTERS if name is not None]
    if way == "sampled":
        names = ["token_choice", "multi_centroid", "uniform"]
    if start == "copies" and flip(random, 0.9):  # most others are refused
        names = ["token_choice", "multi_centroid", "random", "uniform"]
    router = random.choice(["token_choice", "token_choice", *names])
    options = some(random, ROUTERS[router])
    if options.get("balance") == "importance_load":
        options["noise"] = True
    if way == "sampled" or flip(random, 0.9):  # edges do not reach a router of one type
        options.pop("scope", None)
    if way == "sampled":
        options = {
            name: value
            for name, value in options.items()
            if name not in ("choice", "capacity_factor")
        }
    if router in ("token_choice", "multi_centroid", "expert_choice") and flip(random):
        options["weight"] = random.choice(("score", "straight_through", "normalized"))
    if start == "copies" and router in ("token_choice", "multi_centroid") and flip(random, 0.9):
        drops = ("capacity_factor", "choice", "normalize", "inference")
        options = {name: value for name, value in options.items() if name not in drops}
        options["weight"] = "normalized" if k > 1 else "straight_through"
    if router == "token_choice" and "capacity_factor" not in options and flip(random, 0.1):
        options |= {"top_p": 0.6}
    return {"router": router, "router_kwargs": options or None}


def draw_model(random: Random, way: str) -> dict[str, Any]:
    """The options of a model beside its layers'."""
    norms: list[str | None] = [None, None, "by node"]
    if way != "sampled":
        norms += ["layer_norm", "graph_norm", "batch_norm"]
    options: dict[str, Any] = {
        "num_layers": random.choice((2, 2, 3, 4)),
        "norm": random.choice(norms),
    }
    options |= some(random, {"residual": ("none", "linear"), "act": ("elu", None)})
    if options["num_layers"] == 4 and flip(random):
        options["every"] = 2
    if flip(random, 0.1):
        options["router"] = None
    return options


def draw(number: int) -> Config:
    """The configuration of a number."""
    random = Random(number)
    way = random.choice(WAYS)
    is_model = way in ("forward", "inference", "sampled")
    names = random.sample(NAMES, random.randint(1, 4))
    counts = {name: random.choice((0, 1, 2, 5, 9)) for name in names}
    if way == "sampled":
        counts = {name: max(count, 1) for name, count in counts.items()}
    relations = draw_relations(random, names, way)

    one_width = flip(random, 0.3)
    width = random.choice((3, 4, 8))
    widths = {name: width if one_width else random.choice((2, 3, 4, 8)) for name in names}
    if is_model and not one_width:
        widths = {name: size for name, size in widths.items() if flip(random, 0.7)}
    target = random.choice((None, *names)) if is_model else None
    target = target or (names[0] if way == "sampled" else None)
    out_types = None
    if not is_model and flip(random, 0.4):
        out_types = tuple(random.sample(names, random.randint(1, len(names))))

    start = random.choice((None, "shared", "copies", "copies", "plain"))
    k = random.randint(1, EXPERTS)
    options: dict[str, Any] = {}
    if way != "dense":
        options = {"num_experts": EXPERTS, "k": k, "start": start}
        options |= draw_router(random, way, start, k)
        options["backend"] = random.choice(("auto", "auto", "grouped", "padded", "loop"))
    if is_model:
        options |= draw_model(random, way)
        if options["router"] is None:
            options = {name: value for name, value in options.items() if name in OF_A_DENSE_MODEL}
    return Config(
        number=number,
        way=way,
        counts=counts,
        widths=widths,
        one_width=one_width,
        relations=relations,
        learned=frozenset(name for name in names if flip(random, 0.7)),
        grouped=frozenset(name for name in names if way != "sampled" and flip(random, 0.3)),
        out_types=out_types,
        target=target,
        options=options,
        is_numbered=way == "forward" and len(widths) < len(names) and flip(random),
        training=way in ("layer", "forward") and flip(random, 0.6),
        before=tuple(random.sample(BEFORE, random.choice((0, 1, 1, 2)))),
        after=random.choice(AFTER),
        low=random.choice(("float32", "bfloat16")) if way == "layer" and flip(random, 0.15) else "",
    )


# Building


def widths_of(c: Config) -> Any:
    """As a module takes them."""
    return next(iter(c.widths.values())) if c.one_width else dict(c.widths)


def build(c: Config, dense: bool = False) -> Any:
    """The module with the parameters that it starts with; ``dense``: what it replaces."""
    torch.manual_seed(c.number)
    if c.way == "dense" or (dense and c.way == "layer"):
        return RelationalConv(widths_of(c), 3, c.metadata, out_types=c.out_types)
    options = dict(c.options)
    if c.way == "layer":
        return HeteroMoEConv(widths_of(c), 3, c.metadata, out_types=c.out_types, **options)
    if options["norm"] == "by node":
        options["norm"] = LayerNorm(HIDDEN, mode="node")
    if dense:
        options = {name: value for name, value in options.items() if name in OF_A_DENSE_MODEL}
        options["router"] = None
    return HeteroGNNMoE(
        widths_of(c),
        HIDDEN,
        2,
        c.metadata,
        target=c.target,
        num_nodes_dict=number_of_all(c),
        **options,
    )


def number_of_all(c: Config) -> dict[str, int]:
    """How many nodes of each type there are; a mini-batch has some of them."""
    more = 3 if c.is_numbered else 0
    return {name: count + more for name, count in c.counts.items()}


def redraw(c: Config, module: nn.Module) -> None:
    """New values for all parameters and counters: no option is left without effect."""
    generator = torch.Generator().manual_seed(c.number)
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        leaf = name.rpartition(".")[2]
        if leaf == "steps":
            nn.init.ones_(value)
        elif leaf == "gain":
            nn.init.constant_(value, Random(c.number).choice((-1.0, 0.5, 2.0)))
        elif leaf == "running_var":
            nn.init.uniform_(value, 0.5, 2.0, generator=generator)
        elif value.is_floating_point():
            # Also what the next step starts with: the mean of a single token's step is the token,
            # and its logits are what rounding leaves of zero.
            of_experts = re.search(r"(^|\.)experts\.", name)
            is_parameter = isinstance(value, nn.Parameter)
            std = 0.4 if of_experts else 0.3 if is_parameter else 0.2
            nn.init.normal_(value, -1.0 if leaf.endswith("threshold_E") else 0.0, std, generator)


# What a call gets


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
        """All that may need a gradient."""
        of_x = {f"x of {name}": x for name, x in self.x_dict.items()}
        return of_x | {f"values of {name}": value for name, value in self.values.items()}

    def mean_matrix(self, relation: EdgeType) -> Tensor:
        """(N_dst, N_src): the product with features is their mean, weighed by the values."""
        source, destination = self.ends[relation]
        num_src, num_dst = self.counts[relation[0]], self.counts[relation[-1]]
        values = self.values.get(relation, torch.ones(len(source), dtype=torch.float64))
        place = (destination, source)
        sums = torch.zeros(num_dst, num_src, dtype=torch.float64).index_put(
            place, values, accumulate=True
        )
        return sums / destination.bincount(minlength=num_dst).clamp(min=1)[:, None]


def given_of(c: Config, seed: int, dtype: torch.dtype = torch.float64) -> Given:
    """Fresh leaves of a seed."""

    def leaf(*shape: int, of: int) -> Tensor:
        return ref.features(*shape, seed=seed + of).float().to(dtype)

    x_dict = {
        name: leaf(c.counts[name], width, of=i).requires_grad_(name in c.learned)
        for i, (name, width) in enumerate(c.widths.items())
    }
    edge_index_dict, values, ends = {}, {}, {}
    for i, relation in enumerate(c.relations):
        if relation.form == "absent":
            continue
        name = relation.name
        size = (c.counts[name[0]], c.counts[name[-1]])
        edges = ref.random_graph(*size, relation.num_edges if min(size) else 0, seed + i)
        if relation.form in SPARSE:
            edges = edges.unique(dim=1)
            # Sorted as a matrix holds them
            edges = edges[:, (edges[1] * max(size[0], 1) + edges[0]).argsort()]
            value = leaf(edges.size(1), of=50 + i).abs() + 0.1
            values[name] = value.requires_grad_(relation.learned)
            make: Callable[..., Any] = ref.FORMS[relation.form]
            adj = make(edges, size, value)
        else:
            adj = edges if relation.form == "plain" else ref.FORMS[relation.form](edges, size)
        ends[name] = edges
        if relation.in_graph:
            x = x_dict.get(name[0]) if "x" in relation.in_graph else None
            adj = Graph(adj, size, x=x)
        edge_index_dict[name] = adj
    order = Random(seed).sample(sorted(edge_index_dict), len(edge_index_dict))
    numbers = {
        name: torch.randperm(number, generator=torch.Generator().manual_seed(seed))[
            : c.counts[name]
        ]
        for name, number in number_of_all(c).items()
    }
    groups = {name: torch.arange(c.counts[name]) * 7 % 3 * 2 for name in c.grouped}
    return Given(
        x_dict,
        {name: edge_index_dict[name] for name in order},
        groups or None,
        numbers if c.is_numbered else None,
        values,
        ends,
        c.counts,
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
            out = out + mapped(
                conv.relation[relation], given.mean_matrix(relation) @ h[relation[0]]
            )
    return out


def layer_out(
    conv: Any, types: Sequence[str], h: Mapping[str, Tensor], given: Given
) -> tuple[dict[str, Tensor], dict[str, Routing]]:
    """The output of each type, and the routings of a mixture."""
    out, routings = {}, {}
    for name in types:
        if isinstance(conv, RelationalConv):
            out[name] = dense_out(conv, name, h, given, None)
            continue
        batch = (given.batch_dict or {}).get(name)
        routings[name] = conv.routers[name](h[name], batch)
        weight_NE = routings[name].to_dense()
        out[name] = sum(
            weight_NE[:, e, None] * dense_out(conv.experts, name, h, given, e)
            for e in range(conv.num_experts)
        )
        if conv.gain is not None:
            always = dense_out(conv.shared_expert, name, h, given, None)
            out[name] = always + 0.1 * conv.gain * out[name]
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


def model_out(c: Config, model: Any, given: Given) -> tuple[Any, list[Routing]]:
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
                if c.options.get("residual") != "none":
                    y = y + model.residuals[layer][name](h[name])
                batch = (given.batch_dict or {}).get(name)
                groups = (batch,) if takes_graphs and c.counts[name] else ()
                out[name] = model.act(norms[name](y, *groups))
        h = out
    return (h if c.target is None else h[c.target]), found


def define(c: Config, module: Any, given: Given) -> tuple[Any, list[Routing]]:
    """Output and routings by the definition, under the seed of the noise."""
    torch.manual_seed(c.number)
    if isinstance(module, HeteroGNNMoE):
        return model_out(c, module, given)
    types = [name for name in c.counts if name in (c.out_types or c.counts)]
    out, routings = layer_out(module, types, given.x_dict, given)
    return out, [*routings.values()]


# Running


def call(c: Config, module: Any, given: Given) -> tuple[Any, list[Routing]]:
    """Output and routings, under the seed of the noise."""
    torch.manual_seed(c.number)
    if c.way == "dense" or isinstance(module, RelationalConv):
        return module(given.x_dict, given.edge_index_dict), []
    options: dict[str, Any] = {"batch_dict": given.batch_dict, "return_routing": True}
    if isinstance(module, HeteroGNNMoE) and c.is_numbered:
        options["n_id_dict"] = given.n_id_dict
    y, routings = module(given.x_dict, given.edge_index_dict, **options)
    return y, [*(routings.values() if isinstance(routings, dict) else routings)]


def outputs_of(y: Any) -> dict[str, Tensor]:
    return {"y": y} if isinstance(y, Tensor) else {f"y of {name}": out for name, out in y.items()}


def finish(y: Any, routings: list[Routing], given: Given, module: nn.Module) -> dict[str, Tensor]:
    """Outputs, routings and all gradients."""
    outs = outputs_of(y)
    terms = [(out * ref.features(*out.shape, seed=5)).sum() for out in outs.values()]
    loss = torch.stack([*terms, *(routing.aux_loss for routing in routings)]).sum()
    if loss.requires_grad:
        # torch makes a matrix of values that need gradients once, outside of the calls.
        loss.backward(retain_graph=any(value.requires_grad for value in given.values.values()))
    found = {name: out.detach() for name, out in outs.items()}
    found |= {f"routing {i}": one.to_dense().detach() for i, one in enumerate(routings)}
    found |= {name: ref.gradient(leaf) for name, leaf in given.leaves.items()}
    return found | {name: ref.gradient(value) for name, value in module.named_parameters()}


def go_through(c: Config, module: Any, given: Given, before: str) -> Any:
    """What happens to module, graphs and features; the module after it."""
    if before == "other graph":
        call(c, module, given_of(c, c.number + 1))
    elif before == "other thread":
        with ThreadPoolExecutor(1) as pool:
            pool.submit(call, c, module, given).result()
    elif before == "deepcopy":
        module = copy.deepcopy(module)
    elif before == "pickle":
        module = pickle.loads(pickle.dumps(module))
    elif before == "reset_parameters":
        module.reset_parameters()
        redraw(c, module)
    else:
        modes: Mapping[str, Any] = {
            "no_grad": torch.no_grad,
            "inference_mode": torch.inference_mode,
        }
        with modes.get(before, nullcontext)():
            y, routings = call(c, module, given)
        if before == "step":
            finish(y, routings, given, module)
    if before == "x changed in place":
        change(given)
    for leaf in (*given.leaves.values(), *module.parameters()):
        leaf.grad = None
    return module


@torch.no_grad()
def change(given: Given) -> None:
    for x in given.x_dict.values():
        x.mul_(-1.5)


def told_of_the_change(given: Given) -> Given:
    """A graph is frozen: another is made for features that changed, unless they learn."""
    adjs = {
        name: adj.with_x(adj.x) if isinstance(adj, Graph) and not _learns(adj.x) else adj
        for name, adj in given.edge_index_dict.items()
    }
    return given._replace(edge_index_dict=adjs)


def _learns(x: Tensor | None) -> bool:
    return x is not None and x.requires_grad


def go_on(c: Config, module: Any, given: Given) -> Any:
    """What the module goes through at the end; outputs should stay."""
    if c.after == "deepcopy":
        return copy.deepcopy(module)
    if c.after == "pickle":
        return pickle.loads(pickle.dumps(module))
    if c.after == "state dict":
        other = build(c).train(module.training)
        other.load_state_dict(module.state_dict())
        return other
    if c.after == "save":
        with tempfile.TemporaryDirectory() as folder:
            gmoe.save(module, folder)
            return gmoe.load(folder, base=build(c)).train(module.training)
    if c.after in ("unstack", "restack"):
        module = gmoe.unstack(module)
        return gmoe.restack(module) if c.after == "restack" else module
    if c.after == "densify" and has_experts(module):
        return gmoe.densify(module).model
    if c.after == "prune" and has_experts(module):
        require_refusal_of_prune(module, given)
    if c.after == "expert":
        check_experts(c, module, given)
    return module


def require_refusal_of_prune(module: Any, given: Given) -> None:
    """Raise if it is not refused; it should change nothing then."""
    try:
        gmoe.prune(module, (given.x_dict, given.edge_index_dict))
    except ValueError as error:
        if "HeteroMoEConv without one router" not in str(error):
            raise
    else:
        raise AssertionError("gmoe.prune: a type of layer without one router was not refused")


def has_experts(module: nn.Module) -> bool:
    return any(isinstance(part, HeteroMoEConv) for part in module.modules())


def check_experts(c: Config, module: Any, given: Given) -> None:
    """Raise if ``expert()`` is another dense layer than the one in the stack."""
    if not isinstance(module, HeteroMoEConv):
        return
    for e in range(module.num_experts):
        y_dict = module.expert(e)(given.x_dict, given.edge_index_dict)
        factor = 1.0 if module.gain is None else 0.1 * module.gain
        theirs = {
            name: factor * dense_out(module.experts, name, given.x_dict, given, e)
            for name in y_dict
        }
        require_equal(f"expert {e}", y_dict, theirs)


def require_equal(what: str, ours: Any, theirs: Any) -> None:
    found = compare(
        {name: y.detach() for name, y in outputs_of(ours).items()},
        {name: y.detach() for name, y in outputs_of(theirs).items()},
        TOLERANCE,
    )
    if found.kind != "equal":
        raise AssertionError(f"{what}: {found.message} differs by {found.difference:.1e}")


def check_start(c: Config, module: Any) -> None:
    """Raise if a new module is not the dense one that the same seed draws."""
    if c.way == "dense" or c.options.get("start") == "plain" or not has_experts(module):
        return
    given, dense = given_of(c, c.number), build(c, dense=True)
    ours, routings = call(c, module, given)
    dropped = any(routing.dropped_T is not None for routing in routings)
    if c.options.get("start") == "copies" and dropped:
        raise AssertionError("copies that drop tokens were not refused")
    if isinstance(dense, HeteroGNNMoE):
        theirs, _ = call(c, dense, given)
    else:
        theirs = dense(given.x_dict, given.edge_index_dict)
    require_equal("the start", ours, theirs)


def compute(c: Config) -> Outcome:
    """Build, run, and compare with the definition."""
    module = build(c)
    check_start(c, build(c))
    redraw(c, module)
    module.train(c.training)
    given, theirs = given_of(c, c.number), given_of(c, c.number)
    for before in c.before:
        module = go_through(c, module, given, before)
        if before == "x changed in place":
            given = told_of_the_change(given)
    twin = copy.deepcopy(module)
    found = finish(*call(c, module, given), given, module)
    if "x changed in place" in c.before:
        change(theirs)
    y, routings = define(c, twin, theirs)
    outcome = compare(found, finish(y, routings, theirs, twin), TOLERANCE)
    if outcome.kind != "equal":
        return outcome
    if c.low:
        outcome = max(outcome, in_low_precision(c, module, [one.to_dense() for one in routings]))
    module.eval()
    with torch.no_grad():
        last, _ = call(c, module, given)
        if c.way in OTHER_WAYS:
            require_equal(c.way, OTHER_WAYS[c.way](c, module, given), last)
        module = go_on(c, module, given)
        require_equal(f"after {c.after}", call(c, module, given)[0], last)
    return outcome


def in_low_precision(c: Config, module: Any, weights: list[Tensor]) -> Outcome:
    """Run in float32, or under autocast to bfloat16, with the same routing."""
    results = []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)  # :func:`run` sets it back
        layer, given = copy.deepcopy(module).to(dtype), given_of(c, c.number, dtype)
        for router, weight_NE in zip(layer.routers.values(), weights, strict=True):
            routing = ref.routing_of(weight_NE.detach().to(dtype))
            router.register_forward_hook(lambda *_, routing=routing: routing)
        half = c.low == "bfloat16" and dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            y_dict, _ = call(c, layer, given)
        results.append({name: y.detach().double() for name, y in outputs_of(y_dict).items()})
    return compare(results[0], results[1], {"float32": 1e-4, "bfloat16": 0.1}[c.low])


# Other ways to a model's output


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


def inference(c: Config, model: HeteroGNNMoE, given: Given) -> Any:
    """Layer by layer in chunks."""
    return model.inference(data_of(c, given), batch_size=Random(c.number).choice((1, 2, 3, 100)))


def sampled(c: Config, model: HeteroGNNMoE, given: Given) -> Any:
    """With all neighbors of so many hops that the degrees of all that count are whole."""
    data, found = data_of(c, given), []
    hops = [-1] * (len(model.convs) + 1)
    for part in gmoe.neighbor_loader(data, hops, c.target, batch_size=3, backend="gmoe"):
        x_dict, edge_index_dict = part.collect("x", True), part.collect("edge_index", True)
        y = model(x_dict, edge_index_dict, part.collect("n_id"))
        found.append(y[: part[c.target].batch_size])
    return torch.cat(found)


OTHER_WAYS = {"inference": inference, "sampled": sampled}


# Judging


def may_refuse(c: Config, message: str) -> bool:
    """True if a refusal is one that this number can get."""
    options, router = c.options, dict(c.options.get("router_kwargs") or {})
    if message.startswith("start: got 'copies'"):
        return options["start"] == "copies"
    if message.startswith(("capacity_factor: got", "inference: got")):
        return "beside choice='tokens'" in message and router.get("choice") != "experts"
    if message.startswith(("weight: got", "normalize: got", "top_p: got", "choice: got")):
        return bool(router)
    if message.startswith("edge_index: got None"):
        return router.get("scope") == "neighbors"
    return False


def run(number: int) -> Outcome:
    """A number's outcome."""
    return judged(draw, compute, may_refuse, number)


def traits(c: Config) -> set[str]:
    return {c.way, *c.before, c.after, *(relation.form for relation in c.relations)}


COMPOSER = Composer("compose_hetero", draw, run, traits)

if __name__ == "__main__":
    raise SystemExit(COMPOSER.main(*map(int, sys.argv[1:])))
