"""moefy, which from here on knows PyG's GNNs too."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch_geometric.nn.models.basic_gnn import BasicGNN

from gmoe.conv.registry import DenseLayers
from gmoe.convert import _moefy, moefy
from gmoe.dispatch import Backend
from gmoe.models import GNNMoE
from gmoe.routers import RouterLike

__all__ = ["moefy"]


@_moefy.register(BasicGNN)
def _moefy_gnn(
    model: BasicGNN,
    *,
    every: int,
    k: int,
    router: RouterLike,
    num_experts: int,
    upcycle: bool,
    blocks: tuple[int, ...] | None,
    router_kwargs: Mapping[str, Any] | None,
    backend: Backend,
) -> GNNMoE:
    """A GNNMoE with the options and, with ``upcycle``, the parameters of a dense PyG GNN; without residuals, as it."""
    if blocks is not None:
        raise ValueError(f"blocks: got {blocks} for a GNN, expected None and `every`")
    if not isinstance(model.in_channels, int) or any(p.numel() == 0 for p in model.parameters()):
        raise ValueError("model: got a GNN with bipartite or lazy layers, expected one with known in_channels")
    moe = GNNMoE(
        model.in_channels,
        model.hidden_channels,
        model.out_channels,
        model.num_layers,
        conv=DenseLayers(model, upcycle),
        router=router,
        num_experts=num_experts,
        k=k,
        every=every,
        route_on="input",
        dropout=model.dropout.p,
        act=copy.deepcopy(model.act),
        act_first=model.act_first,
        norm=copy.deepcopy(model.norms[0]),
        jk=model.jk_mode,
        residual="none",
        router_kwargs=router_kwargs,
        backend=backend,
    )
    moe.norms = copy.deepcopy(model.norms)
    for name in ("jk", "lin"):
        if hasattr(model, name):
            setattr(moe, name, copy.deepcopy(getattr(model, name)))
    if not upcycle:
        moe.reset_parameters()
    first = next(model.parameters())
    return moe.to(device=first.device, dtype=first.dtype).train(model.training)
