"""One call without gradients, as a server makes it: eager, compiled, and by onnxruntime."""

from __future__ import annotations

import copy
import importlib.util
import math
import statistics
import warnings
from dataclasses import dataclass
from functools import partial
from types import FunctionType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim

from experiments.benchmark.layers import power_law_graph
from experiments.benchmark.measure import Benchmark, Step, check_equal, take_turns
from gmoe import GNNMoE, MoEConv, fold
from gmoe._checks import check_choice
from gmoe.conv.kinds import factory_of

Row = Literal["gcn", "sage", "gcn model", "sage model", "vit"]
Form = Literal["eager", "compiled", "onnx"]


@dataclass(frozen=True, kw_only=True)
class LatencyBenchmark(Benchmark):
    """One call in evaluation: of a layer and of a model of two layers on a small graph, and of a
    small ViT on one image. Dense, experts that start as copies (E = 8, K = 1), and the same
    folded. Ratios are of medians, to the compiled dense layer and to the dense one in the same
    form. CPU only."""

    device: Literal["cpu"] = "cpu"
    """Device."""
    rows: tuple[Row, ...] = ("gcn", "sage", "gcn model", "sage model", "vit")
    """What is called."""
    forms: tuple[Form, ...] = ("eager", "compiled", "onnx")
    """How; `onnx` needs onnxruntime and onnxscript."""
    nodes: int = 200
    """Nodes of the graph."""
    edges: int = 600
    """Edges, before the reverse of each is added."""
    width: int = 64
    """Features of a node, and of an output."""
    threads: int = 1
    """CPU threads."""
    repeats: int = 500
    """Timed calls of each variant."""

    def measured(self) -> dict[str, Any]:
        """By variant ``wall`` and ``cpu``, of each the seconds of the median call, of the one
        that 95 of 100 are no slower than, of the fastest and of the slowest; and ``ratio``, the
        medians over those of the compiled dense one, and of the dense one in the same form."""
        for form in self.forms:
            check_choice("forms", form, Form)
        if "onnx" in self.forms and importlib.util.find_spec("onnxruntime") is None:
            raise ValueError(
                "forms: got 'onnx' without onnxruntime, expected it installed, or "
                "--forms eager compiled"
            )
        found: dict[str, Any] = {}
        for row in self.rows:
            found |= self._measure(row)
        return found

    def _measure(self, row: Row) -> dict[str, Any]:
        """What is found of a row."""
        torch.compiler.reset()  # rows must not share the limit of recompiles
        models, inputs = vit_row() if row == "vit" else self._graph_row(row)
        steps: dict[str, Step] = {}
        for name, model in models.items():
            for form in self.forms:
                steps[f"{row}, {name}, {form}"] = self._step(form, model, inputs)
        found: dict[str, Any] = {}
        times = take_turns(steps, self.repeats, torch.device(self.device), warmup=20)
        for variant, clocks in times.items():
            found[variant] = {clock: percentiles(of["values"]) for clock, of in clocks.items()}
        for variant, figures in found.items():
            own = variant.rpartition(", ")[2]
            dense = {"ratio": f"{row}, dense, compiled", "ratio in form": f"{row}, dense, {own}"}
            for ratio, base in dense.items():
                if base in found:
                    figures[ratio] = {
                        clock: figures[clock]["median"] / found[base][clock]["median"]
                        for clock in ("wall", "cpu")
                    }
        return found

    def _graph_row(self, row: Row) -> tuple[dict[str, nn.Module], tuple[Tensor, Tensor]]:
        """Layers or models that take a graph, and a random one."""
        kind, _, is_model = row.partition(" ")
        if is_model:
            build: Any = partial(GNNMoE, self.width, self.width, self.width, 2, conv=kind)
            models = {"dense": build(router=None), "copies": build(start="copies")}
        else:
            dense = factory_of(kind)(self.width, self.width)
            experts = MoEConv(kind, self.width, self.width, start="copies")
            models = {"dense": dense, "copies": experts}
        edge_index, _ = power_law_graph(self.nodes, self.edges)
        return with_folded(models), (torch.randn(self.nodes, self.width), edge_index)

    def _step(self, form: Form, model: nn.Module, inputs: tuple[Tensor, ...]) -> Step:
        """A call of the model, which gives what the model itself gives."""
        with torch.no_grad():
            expected = model(*inputs)
        if form == "onnx":
            session, feed = onnx_session(model, inputs, self.threads)
            (given,) = session.run(None, feed)
            check_equal("onnx", torch.from_numpy(given), expected)
            return partial(session.run, None, feed)
        call: Any = model if form == "eager" else compiled_call(model)

        def step() -> Tensor:
            with torch.no_grad():
                return call(*inputs)

        check_equal(form, step(), expected)
        return step


def with_folded(models: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The models in evaluation, experts that have become different, and the same folded."""
    experts = models["copies"].eval()
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return {
        "dense": models["dense"].eval(),
        "copies": experts,
        "copies, folded": fold(copy.deepcopy(experts)),
    }


def vit_row() -> tuple[dict[str, nn.Module], tuple[Tensor]]:
    """ViTs, those of experts with a MoE in every second block, and an image."""
    from gmoe.models.vit import ViTMoE  # torchvision, which graphs do without

    experts = ViTMoE(32, router="token_choice", start="copies")
    return with_folded({"dense": ViTMoE(32, router=None), "copies": experts}), (
        torch.randn(1, 3, 32, 32),
    )


def compiled_call(model: nn.Module) -> Any:
    """The compiled model, whose code no other model shares."""

    def call(*inputs: Tensor) -> Tensor:
        return model(*inputs)

    own = FunctionType(call.__code__.replace(), globals(), closure=call.__closure__)
    return torch.compile(own, fullgraph=True)


def onnx_session(
    model: nn.Module, inputs: tuple[Tensor, ...], threads: int
) -> tuple[Any, dict[str, Any]]:
    """The model in onnxruntime, exported for any number of images, nodes and edges; its inputs."""
    import onnxruntime

    any_size = tuple({0 if x.is_floating_point() else 1: Dim.DYNAMIC} for x in inputs)
    if inputs[0].dim() == 4:  # of a batch of one, the exporter would keep the one
        inputs_exported: tuple[Tensor, ...] = (inputs[0].repeat(3, 1, 1, 1),)
    else:
        inputs_exported = inputs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model, inputs_exported, dynamic_shapes=any_size, dynamo=True, verbose=False
        )
    assert program is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    proto = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(proto, options)
    names = [given.name for given in session.get_inputs()]
    return session, {name: x.numpy() for name, x in zip(names, inputs, strict=True)}


def percentiles(values: list[float]) -> dict[str, float]:
    """The median, the value that 95 of 100 do not exceed, and extremes."""
    return {
        "median": statistics.median(values),
        "p95": sorted(values)[math.ceil(0.95 * len(values)) - 1],
        "min": min(values),
        "max": max(values),
    }
