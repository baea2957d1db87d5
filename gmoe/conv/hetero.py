"""Relational layers on heterogeneous graphs: RelationalConv, and HeteroMoEConv, a mixture of them.

Shapes: T tokens (the nodes of a type), D and O widths, M edges of a relation, E experts, K experts
per token.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch_geometric.nn.inits import reset, zeros
from torch_geometric.nn.module_dict import ModuleDict
from torch_geometric.typing import Adj, EdgeType, Metadata, NodeType

from gmoe._autograd import refuse_transforms
from gmoe._checks import check, check_counts
from gmoe.conv.graph import Graph
from gmoe.dispatch import Backend, combine, dispatch
from gmoe.experts import LinearExperts
from gmoe.moe import MoELayer, Start, check_copies, check_start, drawn_apart, refuse_unknown
from gmoe.routers import RouterLike, build_router
from gmoe.routing import GAIN_SCALE, Routing

NodeTensors: TypeAlias = Mapping[NodeType, Tensor]
RelationEdges: TypeAlias = Mapping[EdgeType, Adj | Graph]


class RelationalConv(nn.Module):
    r"""A dense relational layer: `R-GCN <https://arxiv.org/abs/1703.06103>`_ (Schlichtkrull et al.,
    2018), as in OGB's ogbn-mag example.

    .. math::
        x_i' = W_{\tau(i)} x_i + \sum_r W_r \, \mathrm{mean}_{j \in N_r(i)} x_j + b_{\tau(i)}

    where :math:`\tau(i)` is the type of the node and r runs over the relations that end in it. It
    equals PyG's ``HeteroConv`` of ``SAGEConv``\ s with one root weight per node type instead of one
    per relation. It is the dense baseline of :class:`HeteroMoEConv`; see there for shapes and for
    absent types and relations.

    Args:
        in_channels: width of the nodes, of all types or of each.
        out_channels: width of the output.
        metadata: node types and edge types, ``data.metadata()``.
        out_types: node types to compute (default all); there are no parameters for others.
        linear: ``linear(in_channels, out_channels, bias=...)`` makes the map of one part of a node
            type's input: its features, and the mean over each relation that ends in it (default
            ``nn.Linear``).

    Raises:
        ValueError: metadata, widths or edges that do not fit.
    """

    def __init__(
        self,
        in_channels: int | Mapping[NodeType, int],
        out_channels: int,
        metadata: Metadata,
        *,
        out_types: Collection[NodeType] | None = None,
        linear: Callable[..., nn.Module] = nn.Linear,
    ) -> None:
        super().__init__()
        node_types, self.edge_types = checked_metadata(metadata)
        wanted = node_types if out_types is None else out_types
        check(
            wanted and set(wanted) <= set(node_types),
            "out_types",
            out_types,
            f"some of {node_types}",
        )
        self.relations_into = {
            t: [r for r in self.edge_types if r[-1] == t] for t in node_types if t in wanted
        }
        relations = [r for into in self.relations_into.values() for r in into]
        needed = sorted({*wanted, *(source for source, *_ in relations)})
        given = (
            in_channels if isinstance(in_channels, Mapping) else dict.fromkeys(needed, in_channels)
        )
        check(given.keys() >= set(needed), "in_channels", in_channels, f"the widths of {needed}")
        self.in_channels = {name: given[name] for name in needed}
        check_counts(
            out_channels=out_channels,
            **{f"in_channels[{t!r}]": size for t, size in self.in_channels.items()},
        )
        self.root = ModuleDict(
            {t: linear(given[t], out_channels, bias=True) for t in self.relations_into}
        )
        self.relation = ModuleDict(
            {r: linear(given[r[0]], out_channels, bias=False) for r in relations}
        )

    def reset_parameters(self) -> None:
        """Draw the parameters anew."""
        reset(self.root)
        reset(self.relation)

    def parts(
        self, x_dict: NodeTensors, edge_index_dict: RelationEdges
    ) -> dict[NodeType, list[Tensor]]:
        """(T, its width) each part of the input of each node type."""
        check(
            edge_index_dict.keys() <= set(self.edge_types),
            "edge_index_dict",
            [*edge_index_dict],
            self.edge_types,
        )
        for name, width in self.in_channels.items():
            check_features(name, x_dict.get(name), width)
        found = {name: [x_dict[name]] for name in self.relations_into}
        for name, relations in self.relations_into.items():
            for relation in relations:
                x_src = x_dict[relation[0]]
                edges = edge_index_dict.get(relation, x_src.new_empty(2, 0, dtype=torch.long))
                found[name].append(graph_of(relation, edges, x_dict).mean(x_src, by="values"))
        return found

    def mix(self, node_type: NodeType, parts: Sequence[Tensor], *args: Any) -> Tensor:
        """(T, O) the sum of the maps of a node type's parts; ``args`` go to each map."""
        out = self.root[node_type](parts[0], *args)
        for relation, mean in zip(self.relations_into[node_type], parts[1:], strict=True):
            out = out + self.relation[relation](mean, *args)
        return out

    def forward(
        self, x_dict: NodeTensors, edge_index_dict: RelationEdges
    ) -> dict[NodeType, Tensor]:
        """(T, O) of each node type."""
        return {
            name: self.mix(name, parts)
            for name, parts in self.parts(x_dict, edge_index_dict).items()
        }


class HeteroMoEConv(MoELayer):
    r"""Run K of E relational layers per node, on PyG's ``HeteroData``.

    .. math::
        x_i' = \mathrm{conv}_{\mathrm{shared}}(x)_i
            + 0.1 \, g \sum_{e \in \mathrm{experts}(i)} w_{ie} \Big( W_{e,\tau(i)} x_i
            + \sum_r W_{e,r} \, \mathrm{mean}_{j \in N_r(i)} x_j + b_{e,\tau(i)} \Big)

    where :math:`\tau(i)` is the type of the node and r runs over the relations that end in it: an
    expert is an R-GCN layer (:class:`RelationalConv`). The shared expert runs on every node and the
    gain g starts at zero, so that with the same seed a new layer equals the ``RelationalConv`` it
    replaces. With ``start="copies"`` or ``"plain"`` there is neither of them.

    Each node type has its router, which sees its features, and its experts: a mixture of linear
    layers on :math:`x_i` and the means. It equals, in outputs and gradients, running E relational
    layers on the whole graph and masking. Each relation is averaged once, and compute scales with
    K, not E. Parts of ``experts`` may be replaced, as those of :class:`MLPExperts` may, and so may
    each of ``routers``.

    A type in which no relation ends keeps its root term. A relation that is absent from a call, or
    has no edge into a node, adds zero. A node without an expert gets zero; the surrounding model
    adds the residual.

    Args:
        in_channels: width of the nodes, of all types or of each.
        out_channels: width of the output.
        metadata: node types and edge types, ``data.metadata()``.
        num_experts: E (default 8).
        router: a name or factory (default ``"token_choice"``), of which each node type gets a
            router; an instance for a single type.
        k: K, experts per node (default 1).
        out_types: node types to compute (default all); there are no parameters for others.
        start: ``"shared"`` (default, ``None``): beside one more layer that runs on every node,
            scaled by a tenth of a learned gain that starts at zero; ``"copies"``: as copies of one
            layer; ``"plain"``: each by itself. See :class:`MoEConv`.
        router_kwargs: further arguments of the routers.
        backend: see :func:`gmoe.grouped_linear`.
        check_finite: the routers refuse NaN and infinity (default ``False``; costs a host sync).

    Shapes:
        - ``x_dict``: (T, D) of each node type that is computed, or that a relation into those
          starts in; T may be 0.
        - ``edge_index_dict``: of each edge type (2, M), PyG's ``EdgeIndex``, a ``torch.sparse``
          matrix or ``SparseTensor`` (T_dst, T_src), or a :class:`gmoe.Graph`, which is sorted once
          for all calls. A matrix's values weigh its edges, a ``Graph``'s weights do not. No (M, D)
          messages are stored.
        - ``batch_dict``: (T,) the graph of each node; the graphs of a PyG ``Batch`` are separate
          groups.
        - returns (T, O) of each node type, and with ``return_routing=True`` the :class:`Routing` of
          each.

    Raises:
        ValueError: K > E; metadata, widths or edges that do not fit; a router instance for several
            types.

    Example:
        >>> conv = HeteroMoEConv(128, 64, data.metadata(), num_experts=8, router="expert_choice")
        >>> h_dict, routings = conv(data.x_dict, data.edge_index_dict, return_routing=True)
        >>> loss = task_loss(h_dict) + gmoe.aux_loss(routings.values())
    """

    def __init__(
        self,
        in_channels: int | Mapping[NodeType, int],
        out_channels: int,
        metadata: Metadata,
        num_experts: int = 8,
        router: RouterLike = "token_choice",
        k: int = 1,
        *,
        out_types: Collection[NodeType] | None = None,
        start: Start | None = None,
        router_kwargs: Mapping[str, Any] | None = None,
        backend: Backend = "auto",
        check_finite: bool = False,
        **unknown: Any,
    ) -> None:
        refuse_unknown("HeteroMoEConv", unknown)
        super().__init__(num_experts, k)
        self.make_dense = partial(
            RelationalConv, in_channels, out_channels, metadata, out_types=out_types
        )
        self.start = check_start(start)
        dense = None if self.start == "plain" else self.make_dense()
        self.shared_expert = dense if self.start == "shared" else None
        self.gain = nn.Parameter(torch.zeros(1)) if self.start == "shared" else None
        self.routers = ModuleDict()
        with drawn_apart(self.start != "plain"):
            self.experts = self.make_dense(
                linear=partial(LinearExperts, num_experts=num_experts, backend=backend)
            )
            for name in self.experts.relations_into:
                built = build_router(
                    router, self.experts.in_channels[name], num_experts, k, router_kwargs
                )
                check(
                    built is not router or not self.routers,
                    "router",
                    "an instance for several types",
                    "a factory",
                )
                check_copies(self.start, built)
                built.check_finite |= check_finite
                self.k, self.experts_per_token, self.routers[name] = (
                    built.k,
                    built.experts_per_token,
                    built,
                )
        if self.start == "copies" and dense is not None:
            self._become(dense)

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        reset(self.shared_expert)
        zeros(self.gain)
        if self.start == "copies":
            dense = self.expert(0)
            reset(dense)
            self._become(dense)
        with drawn_apart(self.start != "plain"):
            if self.start != "copies":
                reset(self.experts)
            reset(self.routers)

    @torch.no_grad()
    def _become(self, dense: RelationalConv) -> None:
        """Make every expert a copy of a dense layer."""
        for name, parameter in dense.named_parameters():
            self.experts.get_parameter(name).copy_(
                parameter.T if parameter.dim() == 2 else parameter
            )

    def routed_parameters(self) -> Iterator[nn.Parameter]:
        return self.experts.parameters()

    @torch.no_grad()
    def expert(self, index: int) -> RelationalConv:
        """A detached copy of expert ``index`` as a dense layer, times the gain where there is one.

        Raises:
            ValueError: an index outside 0..E-1.
        """
        check(
            0 <= index < self.num_experts,
            "index",
            index,
            f"0..num_experts-1={self.num_experts - 1}",
        )
        with torch.device("meta"):  # nothing is drawn
            dense = self.make_dense()
        first = next(self.experts.parameters())
        dense.to_empty(device=first.device).to(first.dtype)
        for name, parameter in dense.named_parameters():
            stacked = self.experts.get_parameter(name)[index] * (
                1 if self.gain is None else GAIN_SCALE * self.gain
            )
            parameter.copy_(stacked.T if stacked.dim() == 2 else stacked)
        return dense.train(self.training)

    def forward(
        self,
        x_dict: NodeTensors,
        edge_index_dict: RelationEdges,
        *,
        batch_dict: NodeTensors | None = None,
        return_routing: bool = False,
    ) -> Any:
        """Route and run; see the class."""
        refuse_transforms()
        out, routings = dict[NodeType, Tensor](), dict[NodeType, Routing]()
        for name, parts in self.experts.parts(x_dict, edge_index_dict).items():
            routing = routings[name] = self.routers[name](parts[0], (batch_dict or {}).get(name))
            rows = [dispatch(x, routing) for x in parts]
            y = combine(self.experts.mix(name, rows, routing.offsets), routing)
            if self.gain is not None:
                y = (GAIN_SCALE * self.gain).to(y.dtype) * y
            out[name] = y if self.shared_expert is None else self.shared_expert.mix(name, parts) + y
        return (out, routings) if return_routing else out


def graph_of(relation: EdgeType, adj: Adj | Graph, x_dict: NodeTensors) -> Graph:
    """The graph of a relation between the nodes of two types.

    Raises:
        ValueError: its nodes are of other numbers, or its edges do not fit.
    """
    size = (len(x_dict[relation[0]]), len(x_dict[relation[-1]]))
    try:
        return adj.fitting(size, adj.flow) if isinstance(adj, Graph) else Graph(adj, size)
    except ValueError as error:
        raise ValueError(f"edge_index_dict[{relation}]: {error}") from error


def checked_metadata(metadata: Metadata) -> tuple[list[NodeType], list[EdgeType]]:
    """The node types, and the edge types between them.

    Raises:
        ValueError: there are none; one occurs twice; an edge type starts or ends elsewhere.
    """
    node_types, edge_types = list(metadata[0]), [tuple(edge_type) for edge_type in metadata[1]]
    once = len({*node_types, *edge_types}) == len(node_types) + len(edge_types)
    between = all(len(edge) == 3 and {edge[0], edge[-1]} <= set(node_types) for edge in edge_types)
    legal = "node types, and edge types (source, relation, destination) between them, each once"
    check(node_types and once and between, "metadata", metadata, legal)
    return node_types, edge_types


def check_features(node_type: NodeType, x: Tensor | None, width: int) -> None:
    """Refuse features of a node type that are missing, or of another width."""
    if x is None or x.dim() != 2 or x.size(1) != width:
        got = None if x is None else f"shape {tuple(x.shape)}"
        raise ValueError(f"x_dict[{node_type!r}]: got {got}, expected (number of nodes, {width})")
