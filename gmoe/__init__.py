"""Mixture-of-Experts for graphs and images over one shared router core."""

from gmoe.conv import FilterConv, HeteroMoEConv, MLPConv, MoEConv, RelationalConv
from gmoe.convert_gnn import moefy
from gmoe.counting import active_parameters, count_flops, match_width
from gmoe.dispatch import dispatch, grouped_linear
from gmoe.experts import Experts, LinearExperts, MLPExperts
from gmoe.hetero import HeteroGNNMoE
from gmoe.loader import neighbor_loader
from gmoe.losses import cv_squared, importance_loss, load_loss, separation_loss, switch_loss, z_loss
from gmoe.models import GNNMoE
from gmoe.moe import MoE, MoELayer
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
    build_router,
)
from gmoe.routing import AuxLoss, Routing, aux_loss, record_routing
from gmoe.sampler import NeighborSampler
from gmoe.stats import RoutingStats

__version__ = "0.1.0"

__all__ = [
    "ROUTERS",
    "AttentionVote",
    "AuxLoss",
    "ExpertChoice",
    "Experts",
    "FilterConv",
    "GNNMoE",
    "HeteroGNNMoE",
    "HeteroMoEConv",
    "LinearExperts",
    "MLPConv",
    "MLPExperts",
    "MoE",
    "MoEConv",
    "MoELayer",
    "MultiCentroid",
    "NeighborSampler",
    "OracleRouter",
    "RandomRouter",
    "RelationalConv",
    "Router",
    "Routing",
    "RoutingStats",
    "SoftSlots",
    "TokenChoice",
    "UniformRouter",
    "__version__",
    "active_parameters",
    "aux_loss",
    "build_router",
    "count_flops",
    "cv_squared",
    "dispatch",
    "grouped_linear",
    "importance_loss",
    "load_loss",
    "match_width",
    "moefy",
    "neighbor_loader",
    "record_routing",
    "separation_loss",
    "switch_loss",
    "z_loss",
]
