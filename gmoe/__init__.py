"""Mixture-of-Experts for graphs and images over one shared router core.

Read the main files in this order. Core: ``routing`` (which expert handles which token),
``products`` (where tokens move), ``experts``, ``mixed``, ``moe`` (the layer),
``routers.base``, ``routers.token_choice``; ``portable`` (what an exported model has in place of
kernels). Graphs: ``edges``, ``sums`` and ``conv.graph`` (edges, sorted once, and sums along them),
``conv.call`` and ``conv.base`` (what experts get and promise), ``conv.aggregate``, ``conv.kinds``
and ``conv.build`` (which class runs which conv), ``conv.router_input``, ``conv.moe_conv`` (the
layer), ``models.gnn``. Images: ``mlps``, ``convert``, ``models.vit``. After training: ``stack``,
``pruning``, ``unstacked``, ``merging``, ``recorded``, ``saved``. Sampling: ``data``. At any time:
``losses``, ``metrics``, ``callbacks``, ``flops``, ``distributed``, ``plot``.

Importing gmoe takes torch alone. Names that need torch_geometric, torchvision, torchmetrics,
matplotlib, transformers or lightning are imported on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from gmoe.convert import moefy
from gmoe.experts import Experts, LinearExperts, MLPExperts
from gmoe.flops import active_parameters, count_flops
from gmoe.losses import attach_aux_loss
from gmoe.merging import merge
from gmoe.moe import MoE, SoftMoE
from gmoe.products import combine, dispatch, grouped_linear
from gmoe.pruning import prune
from gmoe.recording import record_routing
from gmoe.routers import (
    ROUTERS,
    AttentionVote,
    ExpertChoice,
    MultiCentroid,
    OracleRouter,
    RandomRouter,
    Router,
    SoftSlots,
    TokenChoice,
    UniformRouter,
)
from gmoe.routing import AuxLoss, Routing, aux_loss
from gmoe.saved import load, save
from gmoe.unstacked import unstack

if TYPE_CHECKING:
    import gmoe.plot as plot
    from gmoe.callbacks.lightning import LightningHealth
    from gmoe.callbacks.trainer import TrainerHealth, TrainerSave
    from gmoe.conv.graph import Graph
    from gmoe.conv.moe_conv import MoEConv
    from gmoe.data import neighbor_loader
    from gmoe.metrics import RoutingStats, expert_health
    from gmoe.models.blocks import BlockGNN
    from gmoe.models.gnn import GNNMoE
    from gmoe.models.vit import ViTMoE

__version__ = "0.1.0"

__all__ = [
    "ROUTERS",
    "AttentionVote",
    "AuxLoss",
    "BlockGNN",
    "ExpertChoice",
    "Experts",
    "GNNMoE",
    "Graph",
    "LightningHealth",
    "LinearExperts",
    "MLPExperts",
    "MoE",
    "MoEConv",
    "MultiCentroid",
    "OracleRouter",
    "RandomRouter",
    "Router",
    "Routing",
    "RoutingStats",
    "SoftMoE",
    "SoftSlots",
    "TokenChoice",
    "TrainerHealth",
    "TrainerSave",
    "UniformRouter",
    "ViTMoE",
    "__version__",
    "active_parameters",
    "attach_aux_loss",
    "aux_loss",
    "combine",
    "count_flops",
    "dispatch",
    "expert_health",
    "grouped_linear",
    "load",
    "merge",
    "moefy",
    "neighbor_loader",
    "plot",
    "prune",
    "record_routing",
    "save",
    "unstack",
]

_LAZY = {
    "Graph": "gmoe.conv.graph",
    "MoEConv": "gmoe.conv.moe_conv",
    "neighbor_loader": "gmoe.data",
    "RoutingStats": "gmoe.metrics",
    "expert_health": "gmoe.metrics",
    "LightningHealth": "gmoe.callbacks.lightning",
    "TrainerHealth": "gmoe.callbacks.trainer",
    "TrainerSave": "gmoe.callbacks.trainer",
    "BlockGNN": "gmoe.models.blocks",
    "GNNMoE": "gmoe.models.gnn",
    "ViTMoE": "gmoe.models.vit",
}
"""The names that are imported on first use (PEP 562), and their modules."""


def __getattr__(name: str) -> Any:
    from gmoe._checks import naming_extras

    if name == "plot":
        return importlib.import_module("gmoe.plot")
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with naming_extras():
        value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value  # from now on without a call of this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
