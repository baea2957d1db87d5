"""A module that was changed after it was built: experts compute what it does, or refuse it.

Each of many convs and MLPs is changed in one place, an attribute, a parameter, a buffer or a part,
and then replaced by experts.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from timm.layers.mlp import GatedMlp, GluMlp, Mlp, SwiGLU, SwiGLUPacked
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric import nn as pyg

import gmoe
from gmoe.mlps import MLPForm, register
from tests.helpers.changes import Change, changes_of
from tests.helpers.mlps import FORMS, NormBeforeActivation

SCALES = (1.0, 100.0)


class Residual(nn.Module):
    """An MLP that adds its input, by a scale that starts at one."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, 12)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(12, 8)
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.scale * self.fc2(self.act(self.fc1(x)))
        return out


class Clamped(nn.Module):
    """A gated MLP with a limit, as gpt-oss has it: seen only in large numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 24)
        self.down = nn.Linear(12, 8)
        self.limit = 7.0

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, dim=-1)
        gate = gate.clamp(max=self.limit)
        out: Tensor = self.down(F.silu(gate) * value.clamp(-self.limit, self.limit))
        return out


register(Residual, lambda mlp: MLPForm([mlp.fc1], mlp.fc2, mlp.act))
register(Clamped, lambda mlp: MLPForm([mlp.up], mlp.down, F.silu))

MLPS: dict[str, Callable[[], nn.Module]] = {
    **FORMS,
    "timm's Mlp": partial(Mlp, 8, 12),
    "timm's Mlp with dropout": partial(Mlp, 8, 12, drop=0.1),
    "timm's GluMlp": partial(GluMlp, 8, 24),
    "timm's SwiGLU": partial(SwiGLU, 8, 12),
    "timm's SwiGLUPacked, its gate last": partial(SwiGLUPacked, 8, 24, gate_last=True),
    "timm's GatedMlp": partial(GatedMlp, 8, 12),
    "PyG's MLP": lambda: pyg.MLP([8, 12, 8], norm=None),
    "a norm before the activation": NormBeforeActivation,
    "a residual": Residual,
    "a clamp": Clamped,
}

CONVS: dict[str, Callable[[], Any]] = {
    "GCN": partial(pyg.GCNConv, 8, 8),
    "SAGE": partial(pyg.SAGEConv, 8, 8),
    "SAGE, max": partial(pyg.SAGEConv, 8, 8, aggr="max"),
    "GraphConv": partial(pyg.GraphConv, 8, 8),
    "GIN, PyG's MLP": lambda: pyg.GINConv(pyg.MLP([8, 8, 8], norm=None), train_eps=True),
    "GIN, a Sequential": lambda: pyg.GINConv(
        nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    ),
    "GINE": lambda: pyg.GINEConv(pyg.MLP([8, 8, 8], norm=None)),
    "GAT": partial(pyg.GATConv, 8, 4, heads=2),
    "GATv2": partial(pyg.GATv2Conv, 8, 4, heads=2),
    "Transformer": partial(pyg.TransformerConv, 8, 4, heads=2),
    "CG": partial(pyg.CGConv, 8),
    "ClusterGCN": partial(pyg.ClusterGCNConv, 8, 8),
    "FeaSt": partial(pyg.FeaStConv, 8, 8, heads=2),
    # Without an activation of their own, all of a class share one, and have what others changed.
    "FiLM": lambda: pyg.FiLMConv(8, 8, act=nn.ReLU()),
    "LE": partial(pyg.LEConv, 8, 8),
    "MF": partial(pyg.MFConv, 8, 8),
    "ResGatedGraph": lambda: pyg.ResGatedGraphConv(8, 8, act=nn.Sigmoid()),
    "TAG": partial(pyg.TAGConv, 8, 8, K=2),
    "General": partial(pyg.GeneralConv, 8, 8),
}

QUICK = ("timm's Mlp", "a residual", "SAGE")
"""Those that run by default, as copies; all others are slow."""


def cases(modules: dict[str, Any], *converts: Any) -> list[Any]:
    """A parameter for each module, and for each way to convert it."""
    return [
        pytest.param(
            name,
            convert,
            marks=() if name in QUICK and convert is copies else pytest.mark.slow,
            id=f"{name}, {convert.__name__}",
        )
        for name in modules
        for convert in converts
    ]


class Holder(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any) -> Any:
        return self.layer(*args)


def num_trained(module: nn.Module) -> int:
    """The numbers that are trained."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


@torch.no_grad()
def outputs_of(module: nn.Module, x: Tensor, *others: Tensor) -> list[Tensor]:
    """What a module gives, by mode and by scale of its input."""
    outputs = []
    for mode in (False, True):
        for scale in SCALES:
            torch.manual_seed(0)
            outputs.append(module.train(mode)(scale * x, *others))
    return outputs


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest difference, relative to the largest number of an output."""
    worst = 0.0
    for mine, other in zip(ours, theirs, strict=True):
        if mine.shape != other.shape:
            return float("inf")
        scale = other.abs().max().clamp(min=1e-12)
        worst = max(worst, float(((mine - other).abs().max() / scale).nan_to_num(torch.inf)))
    return worst


def is_random(module: nn.Module) -> bool:
    """True if a module drops numbers in training, which experts do with other draws."""
    for part in module.modules():
        rate: Any = part.p if isinstance(part, nn.Dropout) else getattr(part, "dropout", 0.0)
        rates = rate if isinstance(rate, list) else [rate]
        if any(isinstance(rate, float) and rate > 0 for rate in rates):
            return True
    return False


def try_change(
    build: Callable[[], Any], change: Change, convert: Callable[[nn.Module], nn.Module], *x: Tensor
) -> str:
    """Change a module, convert it, and compare: "equal", "refused", or "does not run".

    Raises:
        AssertionError: experts that compute something else, or train something else.
    """
    torch.manual_seed(1)
    module = build().double()
    for parameter in module.parameters():
        with torch.no_grad():
            parameter += 0.3 * torch.randn_like(parameter)
    try:
        change.apply(module)
        before = outputs_of(module, *x)
        assert all(out.shape[:-1] == x[0].shape[:-1] for out in before)
    except Exception:  # the change leaves a module that is none
        return "does not run"
    trained = num_trained(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            converted = convert(module)
            after = outputs_of(converted, *x)
        except ValueError as error:
            if ": got " not in str(error):
                raise
            return "refused"
    if is_random(module):  # evaluation alone is compared
        before, after = before[: len(SCALES)], after[: len(SCALES)]
    assert difference(after, before) < 1e-8, f"{change.label}: {difference(after, before)}"
    is_frozen = trained == 0
    layer: Any = converted.layer
    base = getattr(layer.experts, "base", None)
    # A norm's scale and shift become part of the layer behind it.
    has_norm = any(isinstance(part, nn.LayerNorm) for part in module.modules())
    if base is not None and not is_frozen and not has_norm:
        assert num_trained(base) == trained, f"{change.label}: trains another number"
    return "equal"


UNCHANGED = Change("as it is", lambda _: None)

X_MLP = torch.randn(3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def copies(module: nn.Module) -> nn.Module:
    """Experts that are copies of a layer."""
    return gmoe.moefy(Holder(module), targets="layer", num_experts=2, start="copies")


def beside(module: nn.Module) -> nn.Module:
    """Experts beside a layer."""
    return gmoe.moefy(Holder(module), targets="layer", num_experts=2)


def edges(num_nodes: int) -> Tensor:
    """A ring with a few more edges, and a node without in-edges."""
    generator = torch.Generator().manual_seed(3)
    return torch.randint(num_nodes - 1, (2, 4 * num_nodes), generator=generator)


X_CONV = torch.randn(9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def plain(module: nn.Module) -> nn.Module:
    """A layer of one expert, made by a factory of copies of a conv."""
    copied: Any = module
    layer = gmoe.MoEConv(
        lambda _i, _o: copy.deepcopy(copied),
        8,
        8,
        num_experts=1,
        router="uniform",
        start="plain",
    )
    return Holder(layer.double())


@pytest.mark.parametrize(("name", "convert"), cases(MLPS, copies))
def test_experts_of_an_mlp_that_was_changed(name: str, convert: Any) -> None:
    build = MLPS[name]
    for change in (UNCHANGED, *changes_of(build())):
        try_change(build, change, convert, X_MLP)


@pytest.mark.parametrize(("name", "convert"), cases(CONVS, copies, beside, plain))
def test_experts_of_a_conv_that_was_changed(name: str, convert: Any) -> None:
    build = CONVS[name]
    inputs = [X_CONV, edges(9)]
    if name == "GINE":
        generator = torch.Generator().manual_seed(4)
        inputs.append(torch.randn(36, 8, dtype=torch.float64, generator=generator))
    # A CGConv does not say its widths by the usual names: moefy refuses it and asks for them.
    expected = "refused" if name == "CG" and convert is not plain else "equal"
    assert try_change(build, UNCHANGED, convert, *inputs) == expected
    for change in changes_of(build()):
        try_change(build, change, convert, *inputs)
