"""Relational layers. Shapes: T tokens (the nodes of a type), D width, M edges of a relation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric.nn import SimpleConv
from torch_geometric.nn.module_dict import ModuleDict
from torch_geometric.typing import Adj, EdgeType, Metadata, NodeType
from torch_geometric.utils import is_torch_sparse_tensor

from gmoe._checks import check_choice, check_count
from gmoe.conv.graph import Graph, sized

Aggr: TypeAlias = Literal["mean", "sum"]


class Relational(nn.Module):
    """What dense and mixed relational layers share: a row for each node, and the linear maps that rows meet.

    A row is the node beside the aggregate of each relation that ends in its type.

    Args:
        in_channels: width of the nodes, of all types or of each.
        metadata: node types and edge types, ``data.metadata()``.
        make: ``make(in_channels, bias)`` is the linear map of one part of a row; inputs are dim 1 of its ``weight``.
        aggr: ``"mean"`` or ``"sum"`` over the in-edges of a relation.
        out_types: node types to compute; ``None`` is all.
        share_root: one root map for all node types.

    Raises:
        ValueError: metadata or widths that do not fit.
    """

    def __init__(
        self,
        in_channels: int | Mapping[NodeType, int],
        metadata: Metadata,
        make: Callable[[int, bool], nn.Module],
        *,
        aggr: Aggr,
        out_types: Collection[NodeType] | None,
        share_root: bool,
    ) -> None:
        super().__init__()
        node_types, edge_types = self.metadata = checked_metadata(metadata)
        check_choice("aggr", aggr, get_args(Aggr))
        wanted = node_types if out_types is None else out_types
        for name in wanted:
            check_choice("out_types", name, node_types)
        if not wanted:
            raise ValueError("out_types: got none, expected at least one node type")
        self.relations_into: dict[NodeType, list[EdgeType]] = {
            name: [relation for relation in edge_types if relation[-1] == name] for name in node_types if name in wanted
        }
        relations = [relation for into in self.relations_into.values() for relation in into]
        met = {*wanted, *(source for source, *_ in relations)}
        self.in_channels = widths_of(in_channels, [name for name in node_types if name in met])
        self.aggr = aggr
        self.share_root = share_root
        self.root = (
            make(one_width(self.in_channels, wanted, "a shared root weight"), True)
            if share_root
            else ModuleDict({name: make(self.in_channels[name], True) for name in self.relations_into})
        )
        self.relation = ModuleDict({relation: make(self.in_channels[relation[0]], False) for relation in relations})
        self.aggregate = SimpleConv(aggr=aggr)

    def reset_parameters(self) -> None:
        """Draw the parameters anew."""
        roots = [self.root] if self.share_root else self.root.children()
        for part in (*roots, *self.relation.children()):
            part.reset_parameters()

    def widths(self, node_type: NodeType) -> list[int]:
        """The widths of a row's parts: the node, and the aggregate of each relation."""
        return [self.in_channels[name] for name in (node_type, *(r[0] for r in self.relations_into[node_type]))]

    def weights(self, node_type: NodeType) -> tuple[Tensor, Tensor]:
        """The weight that the rows of a type meet, part by part along dim 1, and the bias."""
        root: Any = self.root if self.share_root else self.root[node_type]  # type: ignore[index]
        parts = [root, *(self.relation[relation] for relation in self.relations_into[node_type])]
        return torch.cat([part.weight for part in parts], dim=1), root.bias

    def rows(
        self, x_dict: Mapping[NodeType, Tensor], edge_index_dict: Mapping[EdgeType, Adj]
    ) -> dict[NodeType, Tensor]:
        """(T, sum of the widths) of each type that the layer computes."""
        for relation in edge_index_dict:
            check_choice("edge_index_dict", relation, self.metadata[1])
        for name, width in self.in_channels.items():
            x = x_dict.get(name)
            if x is None or x.dim() != 2 or x.size(1) != width:
                got = None if x is None else f"shape {tuple(x.shape)}"
                raise ValueError(f"x_dict[{name!r}]: got {got}, expected (number of nodes, {width})")
        rows = {}
        for name, relations in self.relations_into.items():
            x_dst = x_dict[name]
            parts = [x_dst]
            for relation in relations:
                x_src = x_dict[relation[0]]
                if relation in edge_index_dict:
                    parts.append(self._aggregate(x_src, x_dst, relation, edge_index_dict[relation]))
                else:  # zeros, so that its weight has a gradient
                    parts.append(x_src.new_zeros(x_dst.size(0), x_src.size(1)))
            rows[name] = torch.cat(parts, dim=-1)
        return rows

    def _aggregate(self, x_src: Tensor, x_dst: Tensor, relation: EdgeType, adj: Adj) -> Tensor:
        size = (x_src.size(0), x_dst.size(0))
        try:
            Graph(adj, *size, {}, bipartite=True)  # checks the edges
            adj = sized(adj, size)
        except ValueError as error:
            raise ValueError(f"edge_index_dict[{relation}]: {error}") from error
        # in half precision the sum over many neighbours, and their number, would round away
        x = x_src.to(torch.promote_types(x_src.dtype, torch.float32))
        # torch refuses a product of two dtypes, and with int32 edges gives wrong gradients (gather, 2.13, on the CPU)
        dtype = x.dtype if is_torch_sparse_tensor(adj) else torch.int64
        if isinstance(adj, Tensor) and adj.dtype != dtype:
            adj = adj.to(dtype)
        with torch.autocast(x.device.type, enabled=False):
            out: Tensor = self.aggregate((x, None), adj, size=size)
        return out.to(x_src.dtype)

    def extra_repr(self) -> str:
        return f"aggr={self.aggr!r}, share_root={self.share_root}"


class RelationalConv(Relational):
    r"""A dense relational layer: R-GCN (Schlichtkrull et al., 2018), as in OGB's example for ogbn-mag.

    .. math::
        x_i' = W_{\tau(i)} x_i + \sum_r W_r \, \mathrm{mean}_{j \in N_r(i)} x_j + b_{\tau(i)}

    where :math:`\tau(i)` is the type of the node and r runs over the relations that end in it. It is PyG's
    ``HeteroConv`` of ``SAGEConv``\ s, but for one root weight a node type in place of one a relation. The dense
    control of :class:`HeteroMoEConv`, which see for shapes and for what absent types and relations do.

    Args:
        in_channels: width of the nodes, of all types or of each.
        out_channels: width of the output.
        metadata: node types and edge types, ``data.metadata()``.
        aggr: ``"mean"`` (default) or ``"sum"`` over the in-edges of a relation.
        share_root: one root weight and bias for all node types, as in the paper (default ``False``).
        out_types: node types to compute (default all); there are no parameters for others.

    Raises:
        ValueError: metadata, widths or edges that do not fit.
    """

    def __init__(
        self,
        in_channels: int | Mapping[NodeType, int],
        out_channels: int,
        metadata: Metadata,
        *,
        aggr: Aggr = "mean",
        share_root: bool = False,
        out_types: Collection[NodeType] | None = None,
    ) -> None:
        check_count("out_channels", out_channels)
        super().__init__(
            in_channels,
            metadata,
            lambda width, bias: nn.Linear(width, out_channels, bias=bias),
            aggr=aggr,
            out_types=out_types,
            share_root=share_root,
        )

    def forward(
        self, x_dict: Mapping[NodeType, Tensor], edge_index_dict: Mapping[EdgeType, Adj]
    ) -> dict[NodeType, Tensor]:
        """(T, out) of each node type."""
        rows = self.rows(x_dict, edge_index_dict)
        return {name: F.linear(value, *self.weights(name)) for name, value in rows.items()}


def checked_metadata(metadata: Metadata) -> Metadata:
    """The node types, and the edge types between them.

    Raises:
        ValueError: there are none; one occurs twice; an edge type starts or ends elsewhere.
    """
    node_types, edge_types = list(metadata[0]), [tuple(edge_type) for edge_type in metadata[1]]
    if not node_types:
        raise ValueError("metadata: got no node types, expected at least one")
    for kind, names in (("node", node_types), ("edge", edge_types)):
        if len(set(names)) < len(names):
            raise ValueError(f"metadata: got {kind} types {names}, expected each of them once")
    for edge_type in edge_types:
        if len(edge_type) != 3 or not {edge_type[0], edge_type[-1]} <= set(node_types):
            raise ValueError(
                f"metadata: got edge type {edge_type}, expected (source, relation, destination) between the node types "
                f"{node_types}"
            )
    return node_types, edge_types


def widths_of(in_channels: int | Mapping[NodeType, int], node_types: Sequence[NodeType]) -> dict[NodeType, int]:
    """The width of each of these node types.

    Raises:
        ValueError: one is missing, or no whole number of at least 1.
    """
    if isinstance(in_channels, Mapping):
        missing = [name for name in node_types if name not in in_channels]
        if missing:
            raise ValueError(f"in_channels: got {dict(in_channels)}, expected widths of {missing} too")
        widths = {name: in_channels[name] for name in node_types}
    else:
        widths = dict.fromkeys(node_types, in_channels)
    for width in widths.values():
        check_count("in_channels", width)
    return widths


def one_width(widths: Mapping[NodeType, int], node_types: Collection[NodeType], reason: str) -> int:
    """The width that all of these node types have.

    Raises:
        ValueError: they differ.
    """
    found = {name: widths[name] for name in widths if name in node_types}
    if len(set(found.values())) > 1:
        raise ValueError(f"in_channels: got {found} with {reason}, expected one width for all node types")
    return next(iter(found.values()))
