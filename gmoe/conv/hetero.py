"""Relational layers on heterogeneous graphs: RelationalConv, and HeteroMoEConv, a mixture of them.

Shapes: T tokens (the nodes of a type), D in and O out width, M edges of a relation, E experts, K
experts per token, P (token, expert) pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch_geometric.nn.inits import reset, zeros
from torch_geometric.nn.module_dict import ModuleDict
from torch_geometric.typing import Adj, EdgeType, Metadata, NodeType

from gmoe._autograd import autocasts, refuse_transforms
from gmoe._checks import check_counts, described, says_what_misfits, shown
from gmoe._torch import dtype_of
from gmoe.conv.base import GAIN_SCALE
from gmoe.conv.graph import Graph
from gmoe.experts import LinearExperts
from gmoe.moe import MoELayer
from gmoe.products import Backend, combine, dispatch
from gmoe.routers import ByType, RouterLike, let_check_finite
from gmoe.routing import Routing
from gmoe.stack import become, tensors_of
from gmoe.start import Start, build_layer_router, drawn_apart, resolved_start

NodeTensors: TypeAlias = Mapping[NodeType, Tensor]
RelationEdges: TypeAlias = Mapping[EdgeType, Adj | Graph]
NodeOutputs: TypeAlias = dict[NodeType, Tensor]


class RelationalConv(nn.Module):
    r"""A dense relational layer, as in OGB's ogbn-mag example.

    It is the layer of `R-GCN <https://arxiv.org/abs/1703.06103>`_ (Schlichtkrull et al., 2018):

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
        linear: ``linear(in_channels, out_channels, bias=...)`` makes the map of each part of a node
            type's input (default ``nn.Linear``). The parts are the features, and the mean over each
            relation that ends in the type.

    Raises:
        ValueError: metadata, widths or edges that do not fit.
    """

    @says_what_misfits
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
        self.node_types, self.edge_types = checked_metadata(metadata)
        wanted = self.node_types if out_types is None else out_types
        if not wanted or not set(wanted) <= set(self.node_types):
            raise ValueError(f"out_types: got {out_types}, expected some of {self.node_types}")

        # Which relations end in which type, and which types' features are needed.
        self.relations_into: dict[NodeType, list[EdgeType]] = {
            name: [relation for relation in self.edge_types if relation[-1] == name]
            for name in self.node_types
            if name in wanted
        }
        relations = [relation for into in self.relations_into.values() for relation in into]
        needed = sorted({*wanted, *(source for source, *_ in relations)})
        if isinstance(in_channels, Mapping):
            widths = in_channels
        else:
            widths = dict.fromkeys(needed, in_channels)
        if not widths.keys() >= set(needed):
            raise ValueError(f"in_channels: got {in_channels}, expected the widths of {needed}")
        self.in_channels = {name: widths[name] for name in needed}
        named_widths = {f"in_channels[{name!r}]": self.in_channels[name] for name in needed}
        check_counts(out_channels=out_channels, **named_widths)

        self.root = ModuleDict(
            {name: linear(widths[name], out_channels, bias=True) for name in self.relations_into}
        )
        self.relation = ModuleDict(
            {
                relation: linear(widths[relation[0]], out_channels, bias=False)
                for relation in relations
            }
        )

    def reset_parameters(self) -> None:
        """Draw the parameters anew."""
        reset(self.root)
        reset(self.relation)

    def parts(
        self, x_dict: NodeTensors, edge_index_dict: RelationEdges
    ) -> dict[NodeType, list[Tensor]]:
        """The parts of each type's input: (T, D) its features, and the mean of each relation."""
        if not edge_index_dict.keys() <= set(self.edge_types):
            raise ValueError(
                f"edge_index_dict: got {[*edge_index_dict]}, expected {self.edge_types}"
            )
        dtype = dtype_of(self)
        for name, width in self.in_channels.items():
            check_features(name, x_dict.get(name), width, dtype)
        parts = {name: [x_dict[name]] for name in self.relations_into}
        for name, relations in self.relations_into.items():
            for relation in relations:
                x_src = x_dict[relation[0]]
                none = x_src.new_empty(2, 0, dtype=torch.long)  # an absent relation has no edges
                graph = graph_of(relation, edge_index_dict.get(relation, none), x_dict)
                parts[name].append(graph.mean(x_src, by="values"))
        return parts

    def from_parts(self, node_type: NodeType, parts: Sequence[Tensor], *args: Tensor) -> Tensor:
        """(T, O) the sum of the maps of a node type's parts.

        Args:
            node_type: whose maps are used.
            parts: as :meth:`parts` gives them for this type.
            args: further arguments of each map: experts need the offsets of their rows.
        """
        out = self.root[node_type](parts[0], *args)
        for relation, mean in zip(self.relations_into[node_type], parts[1:], strict=True):
            out = out + self.relation[relation](mean, *args)
        return out

    def forward(
        self, x_dict: NodeTensors, edge_index_dict: RelationEdges
    ) -> dict[NodeType, Tensor]:
        """(T, O) of each node type."""
        return {
            name: self.from_parts(name, parts)
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
    gain g starts at zero, so that with the same seed a new layer equals the ``RelationalConv`` that
    it replaces. A layer with ``start="copies"`` or ``"plain"`` has neither of them.

    Types are routed by the structure itself: node types and relations have weights of their own in
    every expert, and in the dense layer, so that :class:`gmoe.routers.ByType` is refused. Each node
    type has its own router, which sees the type's features, and its own experts: a
    mixture of linear layers on :math:`x_i` and the means. Outputs and gradients equal those of E
    relational layers that run on the whole graph and are masked. Each relation is averaged once,
    and compute scales with K, not E. You may replace parts of ``experts``, as in
    :class:`MLPExperts`, and each of ``routers``.

    A type in which no relation ends keeps its root term. A relation that is absent from a call, or
    has no edge into a node, adds zero. A node without an expert gets zero; the surrounding model
    adds the residual.

    Args:
        in_channels: width of the nodes, of all types or of each.
        out_channels: width of the output.
        metadata: node types and edge types, ``data.metadata()``.
        num_experts: E (default 8).
        router: a name or factory (default ``"token_choice"``) that builds a router for each node
            type; an instance if a single type is computed.
        k: K, experts per node (default 1).
        out_types: node types to compute (default all); there are no parameters for others.
        start: how the experts start; see :class:`MoEConv`. ``"shared"`` (default, ``None``): a
            shared expert runs on every node, and the routed experts are scaled by a tenth of a
            learned gain that starts at zero. ``"copies"``: all experts are copies of one layer.
            ``"plain"``: independent experts.
        router_kwargs: further arguments of the routers.
        backend: see :func:`gmoe.grouped_linear`.
        check_finite: the routers refuse NaN and infinity (default ``False``; costs a host sync). Of
            an instance, set ``router.check_finite``.

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

    @says_what_misfits
    def __init__(
        self,
        in_channels: int | Mapping[NodeType, int],
        out_channels: int,
        metadata: Metadata,
        *,
        num_experts: int = 8,
        router: RouterLike = "token_choice",
        k: int = 1,
        out_types: Collection[NodeType] | None = None,
        start: Start | None = None,
        router_kwargs: Mapping[str, object] | None = None,
        backend: Backend = "auto",
        check_finite: bool = False,
    ) -> None:
        if isinstance(router, ByType):
            raise ValueError(
                "router: got ByType, expected a router that decides inside a node type: node types "
                "and relations have weights of their own already; of data.to_homogeneous(), moefy "
                "routes nodes by 'node_type' and edges by 'edge_type'"
            )
        super().__init__(num_experts=num_experts, k=k)
        self.make_dense = partial(
            RelationalConv, in_channels, out_channels, metadata, out_types=out_types
        )
        self.start = resolved_start(start)

        # 1. The dense layer: the shared expert, or what the copies start as.
        dense = None if self.start == "plain" else self.make_dense()
        self.shared_expert = dense if self.start == "shared" else None
        self.gain = nn.Parameter(torch.zeros(1)) if self.start == "shared" else None

        # 2. The experts: a relational layer whose linear maps are stacked E times.
        self.routers = ModuleDict()
        with drawn_apart(self.start != "plain"):
            stacked_linear = partial(LinearExperts, num_experts=num_experts, backend=backend)
            self.experts = self.make_dense(linear=stacked_linear)

            # 3. A router for each node type.
            for name in self.experts.relations_into:
                dim = self.experts.in_channels[name]
                built = build_layer_router(self.start, router, dim, num_experts, k, router_kwargs)
                if built is router and self.routers:
                    raise ValueError(
                        "router: got an instance for several types, expected a factory"
                    )
                if check_finite:
                    let_check_finite(built, router)
                self.routers[name] = built
                self.k = built.k
                self.experts_per_token = built.experts_per_token
        if self.start == "copies" and dense is not None:
            become(self.experts, dict(dense.named_parameters()))

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        reset(self.shared_expert)
        zeros(self.gain)
        if self.start == "copies":
            dense = self.expert(0)
            reset(dense)
            become(self.experts, dict(dense.named_parameters()))
        with drawn_apart(self.start != "plain"):
            if self.start != "copies":
                reset(self.experts)
            reset(self.routers)

    def routed_parameters(self) -> Iterator[nn.Parameter]:
        return self.experts.parameters()

    @torch.no_grad()
    def expert(self, index: int) -> RelationalConv:
        """A detached copy of expert ``index`` as a dense layer, times the gain if there is one.

        Raises:
            ValueError: an index outside 0..E-1.
        """
        if not 0 <= index < self.num_experts:
            raise ValueError(
                f"index: got {index}, expected 0..num_experts-1={self.num_experts - 1}"
            )
        with torch.device("meta"):  # without values: none are drawn
            dense = self.make_dense()
        first = next(self.experts.parameters())
        dense.to_empty(device=first.device).to(first.dtype)
        factor = 1 if self.gain is None else GAIN_SCALE * self.gain
        for path, value in tensors_of(self.experts, index).items():
            dense.get_parameter(path).copy_(value * factor)
        return dense.train(self.training)

    def forward(
        self,
        x_dict: NodeTensors,
        edge_index_dict: RelationEdges,
        *,
        batch_dict: NodeTensors | None = None,
        return_routing: bool = False,
    ) -> NodeOutputs | tuple[NodeOutputs, dict[NodeType, Routing]]:
        """Route and run; see the class."""
        refuse_transforms()
        check_batches(batch_dict, self.experts.node_types)
        out: NodeOutputs = {}
        routings: dict[NodeType, Routing] = {}
        for name, parts in self.experts.parts(x_dict, edge_index_dict).items():
            batch = (batch_dict or {}).get(name)
            routing = self.routers[name](parts[0], batch)
            routings[name] = routing
            out[name] = self.from_parts(name, parts, routing)
        return (out, routings) if return_routing else out

    def from_parts(self, node_type: NodeType, parts: Sequence[Tensor], routing: Routing) -> Tensor:
        """(T, O) the sum of the experts of each token, and of the shared expert.

        Args:
            node_type: whose experts are used.
            parts: as :meth:`RelationalConv.parts` gives them for this type.
            routing: of the type's T tokens.
        """
        # Gather each part's rows by expert, one grouped product a part, scatter back by weight.
        rows_PD = [dispatch(part, routing) for part in parts]
        y = combine(self.experts.from_parts(node_type, rows_PD, routing.offsets), routing)
        if self.gain is not None:
            y = (GAIN_SCALE * self.gain).to(y.dtype) * y
        if self.shared_expert is not None:
            y = self.shared_expert.from_parts(node_type, parts) + y
        return y


def graph_of(relation: EdgeType, adj: Adj | Graph, x_dict: NodeTensors) -> Graph:
    """The graph of a relation between the nodes of two types.

    Raises:
        ValueError: a graph with other numbers of nodes, or edges that do not fit.
    """
    size = (x_dict[relation[0]].size(0), x_dict[relation[-1]].size(0))
    try:
        if isinstance(adj, Graph):
            return adj.fitting(size, adj.flow)
        return Graph(adj, size)
    except ValueError as error:
        raise ValueError(f"edge_index_dict[{relation}]: {error}") from error


def checked_metadata(metadata: Metadata) -> tuple[list[NodeType], list[EdgeType]]:
    """The node types, and the edge types between them.

    Raises:
        ValueError: no node types; a type that occurs twice; an edge type between unknown types;
            something else.
    """
    if not isinstance(metadata, tuple | list) or len(metadata) != 2:
        raise ValueError(
            f"metadata: got {shown(metadata)}, expected node types and edge types, as "
            "data.metadata() gives them, behind in_channels and out_channels"
        )
    node_types = list(metadata[0])
    edge_types = [tuple(edge_type) for edge_type in metadata[1]]
    is_unique = len({*node_types, *edge_types}) == len(node_types) + len(edge_types)
    is_between = all(
        len(edge_type) == 3 and {edge_type[0], edge_type[-1]} <= set(node_types)
        for edge_type in edge_types
    )
    if not (node_types and is_unique and is_between):
        raise ValueError(
            f"metadata: got {metadata}, expected node types, and edge types (source, relation, "
            "destination) between them, each once"
        )
    return node_types, edge_types


def check_features(
    node_type: NodeType, x: Tensor | None, width: int, dtype: torch.dtype | None
) -> None:
    """Refuse features of a node type that are missing, or of another kind, width or dtype.

    Under autocast they may have any dtype of floats.
    """
    name = f"x_dict[{node_type!r}]"
    is_dense = isinstance(x, Tensor) and x.is_floating_point() and x.layout is torch.strided
    if not isinstance(x, Tensor) or not is_dense or x.dim() != 2 or x.size(1) != width:
        got = None if x is None else described(x)
        raise ValueError(
            f"{name}: got {got}, expected dense floats of shape (number of nodes, {width})"
        )
    if dtype is not None and x.dtype != dtype and not autocasts(x.device):
        raise ValueError(f"{name}: got {x.dtype}, expected {dtype}, the type of the weights")


def check_batches(batch_dict: NodeTensors | None, node_types: Sequence[NodeType]) -> None:
    """Refuse the graphs of an unknown type of nodes: a misspelt type would not be separated."""
    unknown = [name for name in batch_dict or {} if name not in node_types]
    if unknown:
        raise ValueError(f"batch_dict: got {unknown[0]!r}, expected some of {node_types}")
