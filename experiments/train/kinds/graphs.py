"""Nodes of a graph, of one node type or of several: GNNs."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch_geometric.data import HeteroData

import gmoe
from experiments.train.config import GraphConfig, NodeConfig, TypedConfig
from experiments.train.data import made
from experiments.train.data.graphs import directed, graph_task
from experiments.train.data.named import load_graph
from experiments.train.data.own_graph import graph_of, own_graph
from experiments.train.data.task import GraphData, Task
from experiments.train.files import read_npy
from experiments.train.input_again import InputAgain
from experiments.train.kinds.base import GNNKind
from experiments.train.typed_gnn import TypedGNN
from experiments.train.user_code import load_conv, load_object
from gmoe._checks import check

Config = TypeVar("Config", bound=NodeConfig)
OF_ROUTERS = ("router", "router_kwargs", "num_experts", "k", "every", "start", "router_input")
"""What a dense model does not take."""


class Nodes(GNNKind[Config]):
    """Nodes of a graph: what both kinds of graphs share."""

    def tasks(self) -> Callable[[int], Task]:
        whole = directed(self.named(), self.config.undirected)
        return partial(graph_task, whole, self.config)

    def named(self) -> GraphData:
        """The graph that the data set's name means, its edges as they are given."""
        config = self.config
        return load_graph(config.dataset, config.data_root, offline=config.offline)


class Graphs(Nodes[GraphConfig]):
    """Nodes of a graph of one node type, in a ``GNNMoE``."""

    def named(self) -> GraphData:
        name, code = self.config.dataset, self.config.data
        if code is not None:
            return graph_of(load_object("data", code)(), code, code, self.config.metric)
        if name == "graph":
            return own_graph(self.config.data_root, self.config.metric)
        if name in made.GRAPHS:
            return made.GRAPHS[name]()
        return super().named()

    def note_data(self, digest: Any) -> dict[str, Any]:
        root = self.config.data_root
        if self.config.routing is not None:
            digest.update(Path(self.config.routing).read_bytes())
        if self.config.dataset != "graph":
            return super().note_data(digest)
        files = [root]
        if root.is_dir():
            files = sorted(root.glob("*.csv"))
        for file in files:
            digest.update(file.read_bytes() if file.exists() else b"")
        return {"file": root.name}

    def model(self, task: Task) -> nn.Module:
        config = self.config
        check_width(config, task)
        options = self.model_options(task)
        is_whole = config.sampling == config.evaluation == "full"
        if is_whole and config.conv == ("gcn",) and not config.input_again:
            # There is one graph only: for the dense model, whose convs are PyG's
            options["cached"] = True
        names = self.conv_of_experts()
        sizes = (task.in_channels, config.hidden, task.num_classes, config.layers)
        options |= {
            "conv": load_conv(names) if isinstance(names, str) else list(map(load_conv, names)),
            "input_dropout": config.input_dropout,
            "act": config.act,
            "norm": config.norm,
            "residual": config.residual,
        }
        if config.input_again:
            plain = {name: value for name, value in options.items() if name not in OF_ROUTERS}
            return InputAgain(*sizes, jk=config.jk, **plain)
        options["shared_router"] = config.shared_router
        if config.routing is not None:  # an instance, which starts as the library's routers do
            told = options["router"](task.in_channels, num_experts=config.experts)
            options |= {"router": told, "shared_router": True}
        model: Any = gmoe.GNNMoE
        if config.ffn is None:
            options["jk"] = config.jk
        else:
            model = gmoe.BlockGNN
            residual = options.pop("residual")
            check(residual == "identity", "residual", f"{residual!r} with ffn", "'identity'")
            check(config.jk in (None, "last"), "jk", f"{config.jk!r} with ffn", "None or 'last'")
        built: nn.Module = model(*sizes, **options)
        return built

    def oracle(self, task: Task) -> Callable[..., gmoe.Router]:
        """The router that knows the right expert of each token, or replays those of a file."""
        if self.config.routing is None:
            return super().oracle(task)
        expert = read_npy(Path(self.config.routing))
        nodes = 0 if task.graph is None else task.graph.num_nodes
        is_one_each = expert.shape == (nodes,) and expert.dtype.kind in "iu"
        is_known = is_one_each and expert.min() >= 0 and expert.max() < self.config.experts
        got = f"{expert.dtype} of shape {expert.shape}"
        got += f" from {expert.min()} to {expert.max()}" if is_one_each else ""
        legal = f"an expert for each of {nodes} nodes, whole numbers from 0 to E - 1 = "
        check(is_known, self.config.routing, got, f"{legal}{self.config.experts - 1}")
        return partial(gmoe.OracleRouter, assignment=torch.from_numpy(expert.astype("int64")))

    def check_evaluation(self, model: nn.Module, task: Task) -> None:
        if self.config.evaluates_by_layer():
            why = fails_by_layer(model, task.graph)
            check(not why, "evaluation", f"'layerwise' ({why})", "'full'")


class TypedGraphs(Nodes[TypedConfig]):
    """Nodes of one type in a typed graph, in a ``TypedGNN``."""

    def sizes(self, task: Task) -> list[Any]:
        assert task.graph is not None
        return [*super().sizes(task), task.graph.metadata()]

    def model(self, task: Task) -> nn.Module:
        assert isinstance(task.graph, HeteroData)
        assert task.target is not None
        return TypedGNN(
            task.graph,
            task.target,
            self.config.hidden,
            task.num_classes,
            self.config.layers,
            **self.model_options(task),
        )


def check_width(config: GraphConfig, task: Task) -> None:
    """Refuse a width that memory cannot hold, before a weight is drawn.

    Counted is what training holds at least: of all nodes the output of each layer, two more of
    the backward pass, and weights with their gradients and two moments.
    """
    if config.layers == 1:  # from the input to the classes
        return
    has_experts = config.router != "dense" and config.every == 1 and config.ffn is None
    columns = task.in_channels + (config.layers - 2) * config.hidden + task.num_classes
    weights = (config.experts if has_experts else 1) * columns * config.hidden
    rows = task.graph.num_nodes if config.trains_whole() and task.graph is not None else 1
    needed = 4 * (rows * (config.layers + 1) * config.hidden + 4 * weights)
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if torch.cuda.is_available() and config.device in ("auto", "cuda"):
        there = torch.cuda.get_device_properties(0).total_memory
    got = f"{config.hidden}, with which training holds at least {needed / 2**30:,.0f} GiB"
    check(needed <= there, "hidden", got, f"a width that {there / 2**30:,.0f} GiB can hold")


def fails_by_layer(model: Any, graph: Any) -> str:
    """Why a model has no layer-wise inference of a graph, tried on a node of it.

    Empty if it has.
    """
    try:
        model.eval().inference(graph.subgraph(torch.tensor([0])), batch_size=1, return_routing=True)
    except (AttributeError, RuntimeError, TypeError) as error:
        return str(error)
    finally:
        model.train()
    return ""
