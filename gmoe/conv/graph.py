"""The graph of message passing: a graph that is checked and sorted once, or a part of one.

:mod:`gmoe.conv.adjacency` reads its edges, :mod:`gmoe.conv.matrix` has the norms and sums, and
:mod:`gmoe.edges` the kernels.

Shapes: N_src sources, N_dst destinations (the tokens), N both where they are one set of nodes, M
edges, D width, F edge features; of a part: n destinations, S sources.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from functools import partial
from numbers import Integral
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor
from torch_geometric.nn import MessagePassing
from torch_geometric.typing import Adj
from torch_geometric.utils import add_self_loops, is_sparse

from gmoe._checks import check_choice, parameters_of
from gmoe._torch import is_watched, row_pointers
from gmoe.conv.adjacency import (
    Adjacency,
    adjacency_like,
    check_edge_args,
    read_edge_index,
    read_sparse,
)
from gmoe.conv.explain import mask_of
from gmoe.conv.matrix import Matrix, looped_matrix, sum_matrix
from gmoe.edges import Edges, renumber

ScaleOf: TypeAlias = Callable[..., Tensor]
"""Gives GCN's factors of the nodes of a part, by their degrees in the whole graph; called with the
options of :meth:`Graph.normalized`."""

FLOWS = ("source_to_target", "target_to_source")

Result = TypeVar("Result")


class Graph:
    """Validate and sort a graph once, for all layers and calls.

    Pass it instead of ``edge_index`` to :class:`gmoe.MoEConv` and :class:`gmoe.GNNMoE`: its order,
    degrees, normalization and transpose are computed once. A plain ``edge_index`` is converted at
    each call of a layer or model.

    A graph is frozen, and so are the tensors that it was made with: do not write to them.
    :meth:`with_x` and :meth:`with_weights` give the same graph with other features or edge
    arguments, and sort nothing. What follows from a tensor that needs a gradient is computed at
    each call.

    Args:
        edge_index: (2, M) integers, PyG's ``EdgeIndex``, or a ``torch.sparse`` matrix or
            ``SparseTensor`` of shape (N_dst, N_src).
        num_nodes: N, or (N_src, N_dst).
        x: (N_src, D) features that each call brings again, as the same tensor; their sums and means
            over in-edges are computed once if they need no gradient (default: none).
        edge_weight: (M,), for convs that take it; also a keyword of each call.
        edge_attr: (M, F), likewise.
        flow: PyG's ``flow``, that of the convs: which row of ``edge_index`` holds the destinations
            (default ``"source_to_target"``).

    Raises:
        ValueError: edges outside the nodes (CPU tensors), an ``EdgeIndex`` or a matrix of other
            nodes, or an edge argument with another number of rows; numbers of nodes that are not
            whole numbers, an unknown flow, or another flow than the default for a matrix.
        AttributeError: an attribute of a graph is set.

    Example:
        >>> graph = gmoe.Graph(data.edge_index, data.num_nodes, x=data.x)
        >>> for epoch in range(200):
        ...     logits = model(data.x, graph)
    """

    adjacency: Adjacency
    """The edges, as given and sorted."""
    flow: str
    """PyG's ``flow``, which ``adj`` has."""
    num_src: int
    """N_src."""
    num_dst: int
    """N_dst."""
    x: Tensor | None
    """(N_src, D) the features whose sums are kept."""
    edge_weight: Tensor | None
    """(M,) in the order given."""
    edge_attr: Tensor | None
    """(M, F) in the order given."""
    mask: Tensor | None
    """(M,) an explainer's factors on the messages, in the order given."""
    is_replaced: Tensor | None
    """(M,) whether an added loop replaces the edge of ``edges``, which then has no message."""
    kept: dict[Hashable, Any]
    """What follows from all this, once it was computed."""

    def __init__(
        self,
        edge_index: Adj,
        num_nodes: int | tuple[int, int],
        x: Tensor | None = None,
        *,
        edge_weight: Tensor | None = None,
        edge_attr: Tensor | None = None,
        flow: str = "source_to_target",
    ) -> None:
        vars(self).update(_read(edge_index, num_nodes, x, edge_weight, edge_attr, flow))
        _ = self.edges  # sorted now, not by a call

    @staticmethod
    def of_call(
        edge_index: Adj | Graph,
        num_nodes: int | tuple[int, int],
        edge_weight: Tensor | None = None,
        edge_attr: Tensor | None = None,
        *,
        flow: str,
    ) -> Graph:
        """The graph of a call: the one given, if it fits; else one whose edges are sorted if
        somebody asks for their order.
        """
        if isinstance(edge_index, Graph):
            sizes = num_nodes if isinstance(num_nodes, tuple) else (num_nodes, num_nodes)
            return edge_index.fitting(sizes, flow, edge_weight, edge_attr)
        return _made(Graph, _read(edge_index, num_nodes, None, edge_weight, edge_attr, flow))

    # No frozen dataclass: fully_shard takes those apart, and casts the tensors in them.
    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(
            f"{name}: got an assignment, expected none, since a Graph is frozen: with_x and "
            "with_weights give another one"
        )

    def _with(self, **changes: Any) -> Graph:
        """The same graph with other fields; it shares what the sorted edges keep."""
        return _made(type(self), vars(self) | changes)

    @property
    def adj(self) -> Adj:
        """The edges as given; integers are int64."""
        return self.adjacency.adj

    @property
    def edge_index(self) -> Tensor:
        """(2, M) sources and destinations in the order given."""
        return self.adjacency.edge_index

    @property
    def edges(self) -> Edges:
        """The same, sorted by destination."""
        return self.adjacency.edges

    @property
    def is_sparse(self) -> bool:
        """Whether ``adj`` is a sparse matrix."""
        return self.adjacency.is_sparse

    @property
    def num_rows(self) -> int:
        """The rows of ``adj``."""
        return self.num_dst

    def with_weights(
        self, edge_weight: Tensor | None = None, edge_attr: Tensor | None = None
    ) -> Graph:
        """The same graph with other edge arguments, in the order of the edges as given.

        Args:
            edge_weight: (M,); ``None`` (default) leaves the graph's own.
            edge_attr: (M, F), likewise.

        Raises:
            ValueError: an argument with another number of rows than M.
        """
        edge_weight = self.edge_weight if edge_weight is None else edge_weight
        edge_attr = self.edge_attr if edge_attr is None else edge_attr
        check_edge_args(edge_weight, edge_attr, self.num_edges, self.is_sparse)
        return self._with(edge_weight=edge_weight, edge_attr=edge_attr)

    def with_x(self, x: Tensor | None) -> Graph:
        """The same graph for other features, whose sums are kept in turn.

        Args:
            x: (N_src, D); ``None`` to keep no sums.
        """
        return self._with(x=x)

    def fitting(
        self,
        num_nodes: tuple[int, int],
        flow: str,
        edge_weight: Tensor | None = None,
        edge_attr: Tensor | None = None,
    ) -> Graph:
        """The graph with a call's edge arguments, in the order of the edges as given.

        An argument that is ``None`` leaves the graph's own.

        Raises:
            ValueError: a graph of another flow, or of other numbers of sources and destinations.
        """
        if (self.num_src, self.num_rows, self.flow) != (*num_nodes, flow):
            raise ValueError(
                f"edge_index: got {self} of flow {self.flow!r}, expected {num_nodes[0]} sources, "
                f"{num_nodes[1]} destinations and flow {flow!r}"
            )
        if edge_weight is None and edge_attr is None:
            return self
        return self.with_weights(edge_weight, edge_attr)

    def explained(self, conv: MessagePassing) -> Graph:
        """The same graph with an explainer's factors on its messages."""
        return self._with(mask=mask_of(conv, self.num_edges))

    def to(self, device: torch.device | str) -> Graph:
        """Move the graph to a device; returns itself if it is there already."""
        if self.edge_index.to(device) is self.edge_index:  # "cuda" may be cuda:0
            return self
        moved = {
            name: value.to(device)
            for name, value in vars(self).items()
            if isinstance(value, Tensor | Adjacency)
        }
        return self._with(**moved)

    @property
    def num_edges(self) -> int:
        """M."""
        return self.edge_index.size(1)

    @property
    def attr(self) -> Tensor | None:
        """(M, F) the features of each edge, in the order given.

        They are ``edge_attr`` or, if a sparse matrix's values are rows, these values.
        """
        attr = self.edge_attr
        values = self.adjacency.values
        if attr is None and values is not None and values.dim() > 1:
            attr = values
        if attr is None:
            return None
        return attr if attr.dim() > 1 else attr[:, None]

    def mean(self, x_src: Tensor) -> Tensor:
        """(N_dst, D) the mean over in-edges of (N_src, D) features; zero without in-edges."""
        return self.product(self.summing(by=None, mean=True, dtype=x_src.dtype), x_src)

    def product(self, matrix: Matrix, x_src: Tensor) -> Tensor:
        """(N_dst, D) A x, in the type of ``x_src``; do not write to it.

        The product with the graph's own ``x`` is computed once, unless it can learn.
        """
        if self.mask is not None:
            return matrix.masked(self.mask).times(x_src)
        if x_src is self.x and not matrix.learns:
            return self._once(matrix, partial(matrix.times, x_src), x_src)
        return matrix.times(x_src)

    def _once(
        self, what: Hashable, compute: Callable[[], Result], *sources: Tensor | None
    ) -> Result:
        """The result of a function that is called once for this graph.

        Args:
            what: names the result.
            compute: gives it.
            sources: what it follows from, beside the edges. If one of them needs a gradient, the
                result is computed at each call, and an earlier one is forgotten.
        """
        # Fake tensors have no values, counters want to see each operator, and compiled code would
        # be compiled again once there is a result.
        if torch.compiler.is_compiling() or is_watched():
            return compute()
        if any(source is not None and source.requires_grad for source in sources):
            self.kept.pop(what, None)
            return compute()
        result: Result | None = self.kept.get(what)
        if result is None:
            with torch.inference_mode(False):  # for training too, whatever the first call's mode
                result = compute()
            self.kept[what] = result
        return result

    def summing(
        self, *, by: Literal["weight", "values"] | None, mean: bool, dtype: torch.dtype
    ) -> Matrix:
        """The matrix of a sum over in-edges, or of a mean.

        Args:
            by: the factors of messages: ``"weight"``, the weights; or ``"values"``, as in PyG's
                convs without edge weights: the values of a ``torch.sparse`` matrix, else ones.
            mean: divide by the number of in-edges.
            dtype: least dtype of the entries; they have at least float32.
        """
        factor = self.edge_weight if by == "weight" else None
        # In convs without edge weights, PyG reads the values of torch.sparse, not of SparseTensor.
        has_values = by == "values" and not self.adjacency.is_sparse_tensor
        if factor is None and (by == "weight" or has_values):
            factor = self.adjacency.values
        make = partial(sum_matrix, self.adjacency, factor, mean=mean, dtype=dtype)
        return self._once(("sum", by, mean, dtype), make, factor)

    def normalized(self, *, improved: bool, loops: bool, dtype: torch.dtype) -> Matrix:
        r"""The matrix :math:`D^{-1/2} (A + I) D^{-1/2}` of PyG's ``GCNConv``.

        Args:
            improved: see ``GCNConv``.
            loops: add the I.
            dtype: see :meth:`summing`.
        """
        factor, options = self._norm(improved, loops, dtype)
        scale = self._scale(improved=improved, loops=loops, dtype=dtype)

        def make() -> Matrix:
            plain = looped_matrix(self.adjacency, factor, **options)
            if scale is None:
                return plain.scaled(plain.inverse_root(dtype))
            return plain.scaled(scale.to(self.edge_index.device))

        return self._once(("norm", options["loop_weight"], dtype), make, factor, scale)

    def scale(self, *, improved: bool, loops: bool, dtype: torch.dtype) -> Tensor:
        """(N_dst,) the scale of the destinations by their own in-edges; see :meth:`normalized`."""
        factor, options = self._norm(improved, loops, dtype)
        return looped_matrix(self.adjacency, factor, **options).inverse_root(dtype)

    def _norm(
        self, improved: bool, loops: bool, dtype: torch.dtype
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """The factors of the messages, and the options of :func:`looped_matrix`."""
        factor = self.adjacency.values if self.edge_weight is None else self.edge_weight
        # As in PyG: without edge weights, the loops of an edge list have the weight 1, improved or
        # not. A torch.sparse matrix keeps its own loops and gets another one at each node;
        # elsewhere one loop replaces those of a node, and in an edge list it keeps their weight.
        fill = 2.0 if improved and (factor is not None or self.is_sparse) else 1.0
        is_torch_sparse = self.is_sparse and not self.adjacency.is_sparse_tensor
        return factor, {
            "loop_weight": fill if loops else None,
            "replace_loops": not is_torch_sparse,
            "keep_loop_weights": not self.is_sparse,
            "dtype": dtype,
        }

    def _scale(self, *, improved: bool, loops: bool, dtype: torch.dtype) -> Tensor | None:
        """(N,) the scale of the nodes in a larger graph; ``None`` if it follows from this one."""
        return None

    def with_loops(self, *, fill_value: float | Tensor | str) -> Graph:
        """The graph with one loop at each node that is source and destination.

        It replaces the loops that the node had.

        Args:
            fill_value: the loops' edge features, see ``torch_geometric.utils.add_self_loops``.
        """
        fill = fill_value if isinstance(fill_value, Tensor) else None
        sources = (self.edge_attr, self.adjacency.values, self.mask, fill)
        return self._once(("loops", fill_value), partial(self._with_loops, fill_value), *sources)

    def _with_loops(self, fill_value: float | Tensor | str) -> Graph:
        """See :meth:`with_loops`."""
        looped = self.adjacency.looped
        sender, receiver = self.adjacency.sender, self.adjacency.receiver
        num_messages = sender.size(0)  # of a part without any, one edge less than there are
        num_loops = looped.edge_index.size(1) - num_messages
        is_replaced = (looped.sender == looped.receiver) & (looped.edges.order < num_messages)
        attr = self.attr
        if attr is not None:
            # Loops that are replaced do not count in the features of new ones. How many there are
            # depends on the data: they end in one node more, whose loop is cut off.
            is_loop = sender == receiver
            receiver = torch.where(is_loop, self.num_dst, receiver)
            counted = torch.stack([sender, receiver])
            attr = self.adjacency.of_messages(attr)
            _, attr = add_self_loops(counted, attr, fill_value, self.num_dst + 1)
            attr = attr[: num_messages + num_loops]
            # Nothing runs along a replaced loop, but its features are multiplied by gradients of
            # zero: they must be numbers, which 0/0 on a loop is not.
            is_used = torch.cat([~is_loop, is_loop.new_ones(num_loops)])
            attr = torch.where(is_used.view(-1, *[1] * (attr.dim() - 1)), attr, 0)
        mask = None
        if self.mask is not None:  # no explainer masks added loops: see MessagePassing
            mask = self.adjacency.of_messages(self.mask)
            mask = torch.cat([mask, mask.new_ones(num_loops)])
        changes = {
            "adjacency": looped,
            "flow": FLOWS[0],
            "x": None,
            "edge_weight": None,
            "edge_attr": attr,
            "mask": mask,
            "is_replaced": is_replaced,
        }
        return _made(Graph, vars(self) | changes)

    def args_for(self, conv: MessagePassing) -> dict[str, Tensor]:
        """The edge arguments that this conv takes, in the order of the edges as given."""
        names = {"edge_weight", "edge_attr"}.intersection(parameters_of(conv))
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def part(self, token: Tensor) -> tuple[Tensor, Part]:
        """The in-edges of some destinations, as a graph of its own.

        Its norms are those of the whole graph. For PyG's convs, its ``adj`` has the form of this
        graph's, and is square if that one is. If no edge ends in ``token``, ``adj`` holds the edges
        of one more destination, since some convs fail on graphs without edges.

        Args:
            token: (n,) distinct destinations.

        Returns:
            (S,) the nodes that are its sources, and the graph. Its n destinations are the first of
            these nodes, if they are among the sources.
        """
        num_dst = token.size(0)  # without the extra destination that may follow
        # 1. The edges that end in a token, with a position of the token each.
        found = self.edges.of(token)
        num_messages = found.order.numel()
        if num_messages == 0 and self.num_edges:
            token = torch.cat([token, self.edges.receiver[:1]])
            found = self.edges.of(token)
        edge, position = found.order, found.receiver

        # 2. The nodes, renumbered: the tokens first, then all others that send to them.
        nodes, source = renumber(token[token < self.num_src], found.sender)
        if self.is_sparse:
            # Columns must ascend, or torch mixes up the gradients of the matrix's values.
            order = (position * len(nodes) + source).argsort()
            edge = edge[order]
            source = source[order]

        # 3. The part: edge arguments and edges, in this order.
        place = self.edges.as_given(edge)
        given = (self.adjacency.values, self.edge_weight, self.edge_attr)
        values, edge_weight, edge_attr = (
            None if rows is None else rows.index_select(0, place) for rows in given
        )
        is_square = self.num_src == self.num_rows
        num_rows = len(nodes) if is_square else token.size(0)
        ptr = row_pointers(position, num_rows)
        edge_index = torch.stack([source, position])
        edges = Edges(
            ptr[: num_dst + 1],
            source[:num_messages],
            position[:num_messages],
            len(nodes),
            torch.arange(num_messages, device=edge.device),
        )

        def scale_of(*, improved: bool, loops: bool, dtype: torch.dtype) -> Tensor:
            whole = self.normalized(improved=improved, loops=loops, dtype=dtype)
            assert whole.right is not None
            return whole.right.index_select(0, nodes)

        adj = adjacency_like(self.adj, self.flow, edge_index, ptr, values, len(nodes))
        adjacency = replace(
            self.adjacency,
            adj=adj,
            edge_index=edge_index,
            num_src=len(nodes),
            num_dst=num_dst,
            values=values,
            ordered=edges,
        )
        changes = {
            "adjacency": adjacency,
            "num_src": len(nodes),
            "num_dst": num_dst,
            "x": None,
            "edge_weight": edge_weight,
            "edge_attr": edge_attr,
            "mask": None,
            "scale_of": scale_of,
            "destinations": token,
            "adj_rows": num_rows,
        }
        return nodes, _made(Part, vars(self) | changes)

    def first(self, nodes: int, edges: int) -> Graph:
        """The first nodes and the first edges as given.

        PyG trims sampled batches to these, layer by layer.
        """
        if self.is_sparse:
            raise ValueError(
                "edge_index: got a sparse matrix, expected (2, number of edges) where layers are "
                "trimmed"
            )
        return Graph.of_call(
            self.adj[:, :edges],
            nodes,
            edge_weight=None if self.edge_weight is None else self.edge_weight[:edges],
            edge_attr=None if self.edge_attr is None else self.edge_attr[:edges],
            flow=self.flow,
        )

    def __repr__(self) -> str:
        return f"Graph({self.num_src} sources, {self.num_dst} destinations, {self.num_edges} edges)"


class Part(Graph):
    """A part of a graph, made by :meth:`Graph.part`.

    Its norms are those of the whole graph.
    """

    scale_of: ScaleOf
    """Gives the (N,) scale of its nodes in the whole graph."""
    destinations: Tensor
    """The places of its n destinations in the whole graph, and of the extra one if no edge ends in
    them."""
    adj_rows: int
    """The rows of ``adj``: n, one more if there is an extra destination, or all nodes of the part
    if ``adj`` is square."""

    @property
    def num_rows(self) -> int:
        return self.adj_rows

    def scaled_by(self, scale_of: ScaleOf) -> Part:
        """The same part with the scale of its nodes from elsewhere."""
        return _made(Part, vars(self) | {"scale_of": scale_of})

    def _scale(self, *, improved: bool, loops: bool, dtype: torch.dtype) -> Tensor | None:
        return self.scale_of(improved=improved, loops=loops, dtype=dtype)


def _read(
    edge_index: Adj,
    num_nodes: int | tuple[int, int],
    x: Tensor | None,
    edge_weight: Tensor | None,
    edge_attr: Tensor | None,
    flow: str,
) -> dict[str, Any]:
    """The fields of a graph, from its checked arguments."""
    check_choice("flow", flow, FLOWS)
    sizes = num_nodes if isinstance(num_nodes, tuple | list) else (num_nodes, num_nodes)
    are_whole = all(isinstance(size, int | Integral | torch.SymInt) for size in sizes)
    if len(sizes) != 2 or not are_whole:
        raise ValueError(f"num_nodes: got {num_nodes!r}, expected a whole number, or two of them")
    num_src, num_dst = sizes
    read = read_sparse if is_sparse(edge_index) else read_edge_index
    adjacency = read(edge_index, num_src, num_dst, flow)
    num_edges = adjacency.edge_index.size(1)
    check_edge_args(edge_weight, edge_attr, num_edges, adjacency.is_sparse)
    return {
        "adjacency": adjacency,
        "flow": flow,
        "num_src": num_src,
        "num_dst": num_dst,
        "x": x,
        "edge_weight": edge_weight,
        "edge_attr": edge_attr,
        "mask": None,
        "is_replaced": None,
        "kept": {},
    }


Made = TypeVar("Made", bound=Graph)


def _made(cls: type[Made], values: Mapping[str, Any]) -> Made:
    """A graph of these fields, of which nothing is known yet; others of ``values`` are left out."""
    graph = object.__new__(cls)
    names = Graph.__annotations__ | cls.__annotations__
    vars(graph).update({name: values[name] for name in names}, kept={})
    return graph
