"""Routers: which expert handles which token. Imports torch only."""

from gmoe.routing.attention_vote import AttentionVote
from gmoe.routing.build import ROUTERS, RouterLike, build_router
from gmoe.routing.expert_choice import ExpertChoice
from gmoe.routing.losses import cv_squared, importance_loss, load_loss, separation_loss, switch_loss, z_loss
from gmoe.routing.multi_centroid import MultiCentroid
from gmoe.routing.oracle_router import OracleRouter
from gmoe.routing.random_router import RandomRouter
from gmoe.routing.router import Router
from gmoe.routing.routing import AuxLoss, Routing, aux_loss
from gmoe.routing.token_choice import TokenChoice
from gmoe.routing.uniform_router import UniformRouter

__all__ = [
    "ROUTERS",
    "AttentionVote",
    "AuxLoss",
    "ExpertChoice",
    "MultiCentroid",
    "OracleRouter",
    "RandomRouter",
    "Router",
    "RouterLike",
    "Routing",
    "TokenChoice",
    "UniformRouter",
    "aux_loss",
    "build_router",
    "cv_squared",
    "importance_loss",
    "load_loss",
    "separation_loss",
    "switch_loss",
    "z_loss",
]
