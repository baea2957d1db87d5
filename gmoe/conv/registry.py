"""What is known about PyG's convs: names, defaults, and which of them look one hop far."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

from torch_geometric import nn as pyg
from torch_geometric.nn import MessagePassing
from torch_geometric.nn.models.basic_gnn import BasicGNN

from gmoe._checks import check_choice
from gmoe.conv.filter_conv import FilterConv
from gmoe.conv.mlp_conv import MLPConv

ConvFactory: TypeAlias = Callable[..., MessagePassing]
"""Called as ``conv(in_channels, out_channels, **conv_kwargs)``."""

ConvLike: TypeAlias = str | ConvFactory | Sequence[str | ConvFactory]
"""A name such as ``"gcn"``, a conv class, a factory, or a list of those, one an expert."""

CONVS: dict[str, type[MessagePassing]] = {
    name.removesuffix("Conv").lower(): getattr(pyg.conv, name) for name in pyg.conv.classes if name.endswith("Conv")
}
"""PyG's convs by the name without ``Conv``, in lower case: ``"gcn"``, ``"sage"``, ``"gatv2"``, ..."""

OWN: dict[str, ConvFactory] = {
    "mlp": MLPConv,
    "filter": FilterConv,
    "identity": partial(FilterConv, filter="identity"),
    "low_pass": FilterConv,
    "high_pass": partial(FilterConv, filter="high_pass"),
    "two_hop": partial(FilterConv, hops=2),
}
"""Kinds of experts that are not PyG's."""

LOCAL = frozenset(
    {
        pyg.CGConv,
        pyg.ClusterGCNConv,
        pyg.FeaStConv,
        pyg.FiLMConv,
        pyg.GATConv,
        pyg.GATv2Conv,
        pyg.GeneralConv,
        pyg.GINConv,
        pyg.GINEConv,
        pyg.GraphConv,
        pyg.LEConv,
        pyg.MFConv,
        pyg.ResGatedGraphConv,
        pyg.SAGEConv,
        pyg.SimpleConv,
        pyg.TransformerConv,
    }
)
"""Classes whose output at a node follows from its in-edges and their ends alone, under most options; all the same
verified for each layer that is built."""


def _gin(cls: type[MessagePassing], in_channels: int, out_channels: int, **kwargs: Any) -> MessagePassing:
    """GIN(E) around the two-layer perceptron that PyG's ``GIN`` model builds, where no other is asked for."""
    return cls(pyg.MLP([in_channels, out_channels, out_channels], norm=None), **kwargs)


def conv_factory(conv: str | ConvFactory, conv_kwargs: Mapping[str, Any]) -> Callable[[Any, int], MessagePassing]:
    """A factory ``(in_channels, out_channels) -> conv`` from a name, class or factory.

    Raises:
        ValueError: an unknown name.
    """
    if isinstance(conv, str):
        name = conv.lower().replace("_", "").removesuffix("conv")
        known = CONVS | {own.replace("_", ""): factory for own, factory in OWN.items()}
        if name not in known:
            check_choice("conv", conv, sorted([*CONVS, *OWN]))
        conv = known[name]
    if conv is pyg.GINConv or conv is pyg.GINEConv:
        return partial(_gin, conv, **conv_kwargs)
    factory: ConvFactory = conv
    return partial(factory, **conv_kwargs)


def make_conv(factory: Callable[[Any, int], MessagePassing], in_channels: Any, out_channels: int) -> MessagePassing:
    """A fresh conv.

    Raises:
        ValueError: it needs other arguments, or it is none of PyG's MessagePassing layers.
    """
    try:
        conv = factory(in_channels, out_channels)
    except (TypeError, AttributeError) as error:
        raise ValueError(
            f"conv: got one that cannot be built as conv({in_channels}, {out_channels}) ({error}); expected the rest "
            "of its arguments by name, or a factory (in_channels, out_channels) -> conv"
        ) from error
    if not isinstance(conv, MessagePassing):
        raise ValueError(f"conv: got a factory of {type(conv).__name__}, expected one of PyG's MessagePassing layers")
    return conv


class DenseLayers:
    """The convs of a dense GNN, layer by layer, as factories of copies.

    Args:
        model: the dense GNN.
        upcycle: copy the parameters too.
    """

    def __init__(self, model: BasicGNN, upcycle: bool) -> None:
        self.model = model
        self.upcycle = upcycle

    def __getitem__(self, layer: int) -> ConvFactory:
        return _CopyOf(self.model.convs[layer], self.upcycle)


@dataclass(frozen=True)
class _CopyOf:
    """A factory of copies of one conv, whatever sizes it is asked for."""

    conv: MessagePassing
    upcycle: bool

    def __call__(self, in_channels: Any, out_channels: int) -> MessagePassing:
        conv = copy.deepcopy(self.conv)
        if not self.upcycle:
            conv.reset_parameters()
        return conv
