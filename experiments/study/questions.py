"""What do the data want? Cheap questions about the nodes of a graph, before any GNN is trained.

It starts from one linear model on ``[x, Ax, A^2 x]``. Three questions follow:

1. **Inputs.** Is something missing that a dense model can be given? The same model, given one by
   one: the degree, reverse edges, walked features (more hops), positions (a diffusion map), and
   diffused training labels, of which no training node sees its own. The degree is given
   to a wide dense model, too: messages do not carry it, and a rule may be bent in it.
2. **Rules.** Do nodes follow several rules? A mixture of E linear experts, gated by a view of the
   node. It has to beat the one linear model, the same given that view, the same given the best
   input, wide dense models without and with the degree (one bent rule looks like several straight
   ones), and the mixture itself on a shuffled view (a mixture is an ensemble too).
3. **Width.** Is a wider model better? A dense model beside one four times as wide.

Validation selects the input and the view. The test set is read once, at the end, over several
splits. A gain counts where its 95 % interval is above 0 and its mean is worth having.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.data import Data

from experiments.study import views
from experiments.study.probes import (
    MOST,
    Dense,
    Linear,
    Mixture,
    clustered,
    fit,
    gain,
    score,
    told,
)
from experiments.study.views import Array, Walks
from experiments.study.worth import WORTH, Gain
from experiments.train.config import GraphConfig
from experiments.train.data.load import load_tasks
from experiments.train.data.task import Split, Splits

SPLITS = 5
FEWEST = 30
"""Nodes in a part of a split at least."""
MOST_NODES = 300_000
"""Nodes of a graph at most."""
MOST_ROWS = 5_000
"""Nodes that models are fitted to, and those that they are validated on, at most."""
WIDEST = 128
"""Columns of the features at most."""
NARROW = 96
"""Columns that each expert has weights of its own for, at most."""
FIRST = 300
"""Steps of the first linear model at most; others begin as it."""
FAST = 0.03
"""Learning rate of what begins at zero or is gated."""
SLOW = 0.01
"""Learning rate of columns beside fitted ones."""
LONG = 600
"""Steps of a dense model at most: a hidden layer is slower than experts that k-means starts."""
DECAYS = (1e-3, 1e-2)
"""Weight decays, of which validation takes one by split."""
ROUNDS = 8
"""Views of the gate in expectation-maximization."""
INNER = 8
"""Steps on each of them."""
POSITION_SCALE = 3
"""Rows of positions that a gate sees have this length."""

INPUTS = {
    "degree": "its degree",
    "reverse": "reverse edges",
    "walked": "walked features (3 to 8 hops)",
    "positions": "positions (a diffusion map)",
    "labels": "diffused training labels",
}
"""What the linear model may be given, the cheapest first."""
APART = "edge directions, kept apart"
"""``reverse`` where the dense model has the reverse of every edge already."""
VIEWS = {
    "positions": "positions",
    "evidence": "evidence (which expert is right at other training nodes nearby)",
    "node": "the node's own features (--router-input node, the default)",
    "neighbors": "the mean of its neighbors (--router-input neighbors)",
    "degree": "its degree (--router-input degree)",
}
"""What a gate may see."""
CONTROLS = {
    "one": "one linear model",
    "given the view": "the same, given that view",
    "input": "the same, given the best input",
    "wide": "a wide dense model",
    "bent": "one whose hidden layer sees the node alone",
    "degree and wide": "a wide dense model, given the degree",
    "shuffled": "these experts on other nodes' views",
}
"""What a mixture has to beat."""


@dataclass(frozen=True)
class Nodes:
    """A node classification that questions are asked of.

    ``edge_index`` is as it is given; ``undirected`` says whether the dense model gets the reverse
    of every edge too. ``hidden`` is the width of the narrow dense model.
    """

    x: Array
    edge_index: Array
    y: Tensor
    splits: list[Splits]
    classes: int
    undirected: bool = False
    metric: str = "accuracy"
    experts: int = 8
    hidden: int = 16


Kind: TypeAlias = Literal["inputs", "rules", "width", "nothing"]


@dataclass(frozen=True)
class Answer:
    """What the data want, in one line, and the figures behind it.

    ``gains`` are of the test set. ``expert`` is that of each node where rules differ.
    """

    kind: Kind
    choice: str | None  # a key of INPUTS or of VIEWS, or "one way"
    line: str
    figures: list[str]
    gains: dict[str, Gain] = field(repr=False)
    expert: Tensor | None = field(repr=False)


def nodes_of(config: GraphConfig) -> Nodes | str:
    """The nodes of a run's data set; or why no questions are asked of them."""
    # Edges as they are given, and as a list
    load = load_tasks(replace(config, undirected=False, adjacency="edge_index"))
    tasks = [load(seed) for seed in range(SPLITS)]
    data = cast(Data, tasks[0].graph)
    splits = [cast(Splits, task.split) for task in tasks]
    if data.num_nodes is None or data.num_nodes > MOST_NODES:
        return f"the graph has more than {MOST_NODES:,} nodes"
    if data.y.dim() > 1:
        return f"nodes have {data.y.size(1)} labels each; questions are about one class a node"
    fewest = min(len(nodes) for rows in splits for nodes in rows.values())
    if fewest < FEWEST:
        return f"a part of a split has {fewest} nodes; answers take at least {FEWEST} in each"
    return Nodes(
        x=data.x.numpy(),
        edge_index=data.edge_index.numpy(),
        y=data.y,
        splits=redrawn(splits, data.y),
        classes=tasks[0].num_classes,
        undirected=config.undirected,
        metric=tasks[0].metric_name,
        experts=config.experts,
        hidden=min(config.hidden, WIDEST // 2),
    )


def features(x: Array) -> Array:
    """A node's own features: columns of one unit each.

    Of more than :data:`WIDEST`, such as words or an embedding, the principal components, at
    their own scale; there no column counts ten times the median one.
    """
    largest = np.abs(x).max(axis=0)
    x = x - x.mean(axis=0)
    deviation = x.std(axis=0)
    varies = deviation > 1e-6 * largest  # a constant is rounded to less
    x = x[:, varies]
    deviation = deviation[varies]
    if not x.shape[1]:  # nothing tells one node from another
        return np.zeros((len(x), 1), np.float32)
    if x.shape[1] <= WIDEST:
        return np.asarray(x / deviation, np.float32)
    x = x / np.maximum(1, deviation / (10 * np.median(deviation)))
    return beside(views.narrowed(x, WIDEST)).numpy()


def beside(*blocks: Array | Tensor) -> Tensor:
    """Blocks of columns side by side, centered, each at one scale: mean square 1."""
    columns = [torch.as_tensor(np.asarray(block), dtype=torch.float32) for block in blocks]
    columns = [block - block.mean(dim=0) for block in columns if block.numel()]
    return torch.cat([block / block.square().mean().sqrt().clamp_min(1e-6) for block in columns], 1)


def redrawn(splits: Sequence[Splits], y: Tensor) -> list[Splits]:
    """Different splits: in one that comes again, training and validation nodes are drawn anew.

    They are drawn by class, as many as before, and the test nodes stay.
    """
    different: list[Splits] = []
    for number, rows in enumerate(splits):
        if any(torch.equal(rows["train"], other["train"]) for other in different):
            pool = torch.cat([rows["train"], rows["val"]])
            draw = torch.Generator().manual_seed(number)
            pool = pool[torch.randperm(len(pool), generator=draw)]
            pool = pool[y[pool].sort(stable=True).indices]
            # Training nodes are spread evenly over the nodes in the order of their classes
            share = torch.arange(len(pool) + 1) * len(rows["train"]) // len(pool)
            is_train = share.diff() > 0
            rows = {"train": pool[is_train], "val": pool[~is_train], "test": rows["test"]}
        different.append(rows)
    return different


def fewer(rows: Splits) -> Splits:
    """At most ``MOST_ROWS`` nodes to fit, and to validate by."""
    draw = torch.Generator().manual_seed(0)
    draws = {
        part: torch.randperm(len(nodes), generator=draw)[: MOST_ROWS if part != "test" else None]
        for part, nodes in rows.items()
    }
    return {part: rows[part][drawn] for part, drawn in draws.items()}


class Survey:
    """Asks all questions of one graph.

    ``log_p`` holds by name what the models of each split say of all nodes: (N, C) a split.
    """

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes
        self.rows = [fewer(rows) for rows in nodes.splits]
        self.given = self.walks = Walks(nodes.edge_index, len(nodes.x))
        if nodes.undirected and self.given.is_directed:
            both = np.hstack([nodes.edge_index, nodes.edge_index[::-1]])
            self.walks = Walks(np.unique(both, axis=1), len(nodes.x))
        self.x = features(nodes.x)
        self.fixed = self.without_labels()
        self.columns = self.heard(self.walks)
        self.narrow = self.columns
        if self.columns.size(1) > NARROW:
            self.narrow = beside(views.narrowed(self.columns.numpy(), NARROW))
        self.splits = range(len(self.rows))
        self.decay = [0.0] * len(self.rows)
        self.models = [self.first(split) for split in self.splits]
        self.log_p = {"start": [told(model, self.columns) for model in self.models]}
        self.tried = dict[str, float]()

    def heard(self, walks: Walks) -> Tensor:
        """What message passing brings to a node: x, Ax, A^2 x."""
        near = [views.walked(walks.incoming, self.x, (hop,)) for hop in (1, 2)]
        return beside(self.x, *(near if walks.has_edges else []))

    def first(self, split: int) -> Linear:
        """The linear model that others of a split begin as, at the weight decay that is best."""
        tried = dict[float, tuple[float, Linear]]()
        for decay in DECAYS:
            self.decay[split] = decay
            model = Linear(self.columns.size(1), self.nodes.classes)
            tried[decay] = self.fit(split, model, self.columns, steps=FIRST), model
        self.decay[split] = min(tried, key=lambda decay: tried[decay][0])
        return tried[self.decay[split]][1]

    def linear(self, split: int, columns: Tensor) -> Linear:
        """A fitted linear model that begins as the first one of the split."""
        model = Linear(columns.size(1), self.nodes.classes, self.models[split])
        self.fit(split, model, columns, rate=SLOW)
        return model

    def fit(
        self,
        split: int,
        model: nn.Module,
        *inputs: Tensor,
        rate: float = FAST,
        steps: int = MOST,
    ) -> float:
        """Fit a model to a split, and return its validation likelihood."""
        y = self.nodes.y
        rows = self.rows[split]
        decay = self.decay[split]
        return fit(model, inputs, y, rows, steps, rate=rate, decay=decay)

    def mixture(self, split: int, view: Tensor) -> tuple[Mixture, float]:
        """Fitted experts that a view gates, and their validation likelihood."""
        gate = clustered(view, self.nodes.experts)
        model = Mixture(self.models[split], self.narrow.size(1), gate)
        return model, self.fit(split, model, self.columns, self.narrow, view)

    def keep(self, name: str, model: nn.Module, *inputs: Tensor) -> None:
        """Hold what a model says."""
        self.log_p.setdefault(name, []).append(told(model, *inputs))

    def gain(self, ours: str, theirs: str, part: Split) -> Gain:
        """What one kind of model has above another."""
        both = self.log_p[ours], self.log_p[theirs]
        return gain(self.nodes.metric, *both, self.nodes.y, self.nodes.splits, part)

    # -- Inputs

    def without_labels(self) -> dict[str, Array]:
        """The inputs that are the same on all splits."""
        if not self.walks.has_edges:
            return {}
        inputs = {
            "degree": self.degree(),
            "walked": views.walked(self.walks.incoming, self.x, (3, 4, 6, 8)),
            "positions": views.positions(self.walks),
        }
        if self.given.is_directed:
            along = views.walked(self.given.incoming, self.x, (1, 2))
            inputs["reverse"] = np.hstack([along, views.reverse(self.given, self.x)])
        return inputs

    def degree(self) -> Array:
        """(N, 2) logarithms of the number of edges into a node, and of its neighbors."""
        return np.log1p(np.stack([self.walks.in_degree, self.walks.num_neighbors], axis=1))

    def inputs(self, split: int) -> dict[str, Array]:
        """What the linear model of a split may be given, the cheapest first."""
        if not self.walks.has_edges:
            return {}
        y = self.nodes.y.numpy()
        train = self.nodes.splits[split]["train"].numpy()
        labels = views.diffused_labels(self.walks, y, train, self.nodes.classes)
        given = self.fixed | {"labels": labels}
        return {name: given[name] for name in INPUTS if name in given}

    def ask_inputs(self) -> str | None:
        """Return the input that validates best; of several within WORTH of it, the cheapest."""
        for split in self.splits:
            given = {name: beside(self.columns, each) for name, each in self.inputs(split).items()}
            for name, columns in ({"one": self.columns} | given).items():
                self.keep(name, self.linear(split, columns), columns)
            if self.walks is not self.given:
                one_way = self.heard(self.given)
                model = Linear(one_way.size(1), self.nodes.classes)
                self.fit(split, model, one_way, steps=FIRST)
                self.keep("one way", model, one_way)
        gains = {name: self.gain(name, "one", "val") for name in INPUTS if name in self.log_p}
        best = max((each.mean for each in gains.values()), default=0.0)
        chosen = next((name for name in gains if best - gains[name].mean < WORTH), None)
        self.log_p["input"] = self.log_p[chosen or "one"]
        return chosen

    # -- Rules

    def view(self, name: str, split: int) -> Tensor:
        """What the gate of a split sees; without columns where there is nothing to see."""
        walks = self.walks
        if name == "node":
            seen = self.x
        elif not walks.has_edges:
            seen = self.x[:, :0]
        elif name == "positions":
            seen = POSITION_SCALE * self.fixed["positions"]
        elif name == "evidence":
            seen = self.evidence(split)
        else:
            given = walks.incoming @ self.x if name == "neighbors" else self.fixed[name]
            seen = beside(given).numpy()
        return torch.as_tensor(seen, dtype=torch.float32)

    def evidence(self, split: int) -> Array:
        """Smooth EM: how well each expert does at other training nodes nearby.

        It begins with clusters of what a linear model would learn around a node. In turns the
        experts learn, gated by the view, and their log-likelihoods, diffused, are the view.
        """
        y = self.nodes.y
        rows = self.rows[split]
        experts = self.nodes.experts
        train = rows["train"]
        decay = self.decay[split]
        residual = -self.log_p["start"][split].exp()
        residual[train, y[train]] += 1
        near = beside(self.x, self.walks.incoming @ self.x).numpy()
        start = views.rule_by_gradients(self.walks, residual.numpy(), near, train.numpy())
        seen = torch.from_numpy(start)
        view = F.one_hot(clustered(seen, experts)(seen).argmax(1), experts).float()
        model = Mixture(self.models[split], self.narrow.size(1), nn.Linear(experts, experts))
        best = float("inf")
        best_view = start
        for _ in range(ROUNDS):
            with torch.no_grad():
                model.gate.weight.copy_(2 * torch.eye(experts))
                model.gate.bias.zero_()
            inputs = (self.columns, self.narrow, view)
            reached = fit(model, inputs, y, rows, INNER, rate=FAST, decay=decay, is_stopped=False)
            if reached < best:
                best = reached
                best_view = view.numpy()
            view = self.right_nearby(model, train)
        return best_view

    @torch.no_grad()
    def right_nearby(self, model: Mixture, train: Tensor) -> Tensor:
        """(N, E) log-likelihoods at other training nodes, relative to all experts', diffused."""
        log_p_TEC = model.by_expert(self.columns[train], self.narrow[train])
        own = self.nodes.y[train].view(-1, 1, 1).expand(-1, log_p_TEC.size(1), 1)
        right_TE = log_p_TEC.gather(2, own)[..., 0]
        right_TE = (right_TE - right_TE.mean(dim=1, keepdim=True)).clamp(-3, 3)
        nearby = views.diffused(self.walks.both, right_TE.numpy(), train.numpy(), (4,), folds=5)
        return torch.from_numpy(nearby / max(float(nearby.std()), 1e-6))

    def ask_rules(self) -> tuple[str, Tensor]:
        """Fit the mixture of the view that validates best on the first split, and its controls.

        Returns the view, and the expert of each node on that split.
        """
        seen = {name: self.view(name, 0) for name in VIEWS}
        first = {name: self.mixture(0, view) for name, view in seen.items() if view.numel()}
        self.tried = {name: reached for name, (_, reached) in first.items()}
        chosen = min(self.tried, key=self.tried.__getitem__)
        for split in self.splits:
            view = seen[chosen] if split == 0 else self.view(chosen, split)
            model = first[chosen][0] if split == 0 else self.mixture(split, view)[0]
            self.keep("mixture", model, self.columns, self.narrow, view)
            order = torch.randperm(len(view), generator=torch.Generator().manual_seed(split))
            other, _ = self.mixture(split, view[order])
            self.keep("shuffled", other, self.columns, self.narrow, view[order])
            wider = beside(self.columns, view)
            self.keep("given the view", self.linear(split, wider), wider)
        return chosen, told(first[chosen][0].gate, seen[chosen]).argmax(1)

    # -- Width

    def ask_width(self) -> None:
        """Fit dense models of two widths, which begin as the linear one.

        One bent rule of a node's own features looks like several straight ones, and among the
        columns of neighbors a hidden layer that sees all may miss it: one sees no others. The last
        one sees the degree, too.
        """
        hidden = self.nodes.hidden
        own = self.x.shape[1]
        with_degree = self.columns
        if self.walks.has_edges:
            with_degree = beside(self.columns, self.degree())
        for split, base in zip(self.splits, self.models, strict=True):
            for name, columns, width, seen in (
                ("narrow", self.columns, hidden, None),
                ("wide", self.columns, 4 * hidden, None),
                ("bent", self.columns, 4 * hidden, own),
                ("degree and wide", with_degree, 4 * hidden, None),
            ):
                torch.manual_seed(split)
                model = Dense(base, columns.size(1), width, seen)
                self.fit(split, model, columns, rate=SLOW, steps=LONG)
                self.keep(name, model, columns)

    # -- The answer

    def answer(self) -> Answer:
        """Ask all questions, read the test set, and say which gain is the largest."""
        chosen = self.ask_inputs()
        view, expert = self.ask_rules()
        self.ask_width()
        controls = {name: self.gain("mixture", name, "test") for name in CONTROLS}
        gains = {
            "inputs": self.gain("input", "one", "test"),
            "rules": min(controls.values(), key=lambda each: each.low),
            "width": self.gain("wide", "narrow", "test"),
            "bent": self.gain("bent", "wide", "test"),
            "degree": self.gain("degree and wide", "wide", "test"),
            "hidden": self.gain("wide", "one", "test"),
        }
        if "one way" in self.log_p:
            gains["both ways"] = self.gain("one", "one way", "test")
            gains["one way"] = self.gain("one way", "one", "test")
        kind, choice, line = self.largest(chosen, view, gains, controls)
        return Answer(
            kind=kind,
            choice=choice,
            line=line,
            figures=self.figures(chosen, view, controls, gains),
            gains=gains,
            expert=expert if kind == "rules" else None,
        )

    def largest(
        self, chosen: str | None, view: str, gains: dict[str, Gain], controls: dict[str, Gain]
    ) -> tuple[Kind, str | None, str]:
        """The kind, the choice and the line of the largest gain; see :class:`Answer`."""
        # 1. An input, or rules; more than these, the degree or edges of one direction.
        largest: tuple[Kind, str | None, str] | None = None
        if chosen is not None and gains["inputs"].is_worth:
            line = f"give the dense model {self.input_name(chosen)}: {gains['inputs']}"
            largest = "inputs", chosen, line
        if gains["rules"].is_worth:
            line = (
                f"rules differ: route by {VIEWS[view]}: {controls['one']} over a linear model, "
                f"{gains['rules']} over the closest control"
            )
            largest = "rules", view, line
        best = max((gains[of].mean for of in ("inputs", "rules") if gains[of].is_worth), default=0)
        # One rule that is bent in the degree: experts by degree may add a little to it.
        if gains["degree"].is_worth and gains["degree"].mean > best:
            line = f"give the dense model {INPUTS['degree']}: {gains['degree']} over a wide one"
            largest = ("inputs", "degree", line)
            best = gains["degree"].mean
        one_way = gains.get("one way")
        if one_way is not None and one_way.is_worth and one_way.mean > best:
            line = f"keep edges in one direction (--no-undirected): {one_way} over both directions"
            largest = "inputs", "one way", line
        if largest is not None:
            return largest

        # 2. Else width, a hidden layer of its own for the node, or what the preset does already.
        if gains["width"].is_worth:
            line = f"width helps, experts may: try the default: {gains['width']}"
            return "width", None, line
        if gains["bent"].is_worth:
            line = "give the dense model a hidden layer on the node's own features"
            return "width", None, f"{line}: {gains['bent']} over one that sees the neighbors, too"
        if "both ways" in gains and gains["both ways"].is_worth:
            line = f"give the dense model reverse edges, as this preset does: {gains['both ways']}"
            return "inputs", "reverse", line
        beyond = ""
        if gains["hidden"].is_worth:
            beyond = f" beyond a hidden layer ({gains['hidden']} over a linear model)"
        line = f"nothing{beyond}: no input, rules or width are surely worth {WORTH} points"
        return "nothing", None, line

    def input_name(self, name: str) -> str:
        """An input in words."""
        return APART if name == "reverse" and self.walks is not self.given else INPUTS[name]

    def figures(
        self, chosen: str | None, view: str, controls: dict[str, Gain], gains: dict[str, Gain]
    ) -> list[str]:
        """What an answer rests on, a line each."""
        nodes = self.nodes
        hidden = self.nodes.hidden
        scores = [
            score(nodes.metric, log_p[rows["test"]], nodes.y[rows["test"]])[0]
            for log_p, rows in zip(self.log_p["one"], nodes.splits, strict=True)
        ]
        name = "x, Ax, A²x" if self.walks.has_edges else "x (there are no edges)"
        if nodes.x.shape[1] > WIDEST:
            name += f" ({WIDEST} principal components of x)"
        lines = [f"one linear model on {name}: {statistics.fmean(scores):.2f} {nodes.metric}"]
        if "one way" in self.log_p:
            lines.append(f"  over the same without reverse edges: {gains['both ways']}")
        for key in INPUTS:
            if key in self.log_p:
                of_val = self.gain(key, "one", "val")
                of_test = f"; test {gains['inputs']}" if key == chosen else ""
                lines.append(f"  given {self.input_name(key)}: validation {of_val}{of_test}")
        rows = self.rows[0]["val"]
        tried = self.tried | {
            "no gate": float(F.nll_loss(self.log_p["one"][0][rows], nodes.y[rows]))
        }
        nll = ", ".join(f"{key} {value:.3f}" for key, value in tried.items())
        lines.append(
            f"{nodes.experts} linear experts, negative log-likelihood (validation) by gate: {nll}"
        )
        lines += [
            f"  by {view}, over {what}: test {controls[control]}"
            for control, what in CONTROLS.items()
        ]
        lines += [
            f"a dense model {4 * hidden} wide over {hidden} wide: test {gains['width']}",
            f"  over the linear model: test {gains['hidden']}",
            f"  given the degree, over itself: test {gains['degree']}",
        ]
        return lines
