"""The graph of message passing: its edges, their norms, and the sums along them.

Shapes: N_src sources, N_dst destinations (the tokens), N both where they are one set of nodes, M
edges, D width, F edge features; of a part: n destinations, S sources.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor
from torch_geometric import EdgeIndex
from torch_geometric.nn import MessagePassing
from torch_geometric.typing import Adj, SparseTensor
from torch_geometric.utils import add_self_loops, is_sparse

from gmoe._checks import INTEGERS, check_choice, described, parameters_of
from gmoe._torch import is_watched, row_pointers, rows_of_pointers
from gmoe.conv.edges import Edges, renumber, weighted_sum
from gmoe.conv.kept import Kept, once, versions_of

FLOWS = ("source_to_target", "target_to_source")


@dataclass(eq=False)
class Matrix:
    """The A of a sum A x over in-edges.

    Args:
        edges: which of its entries are not zero.
        weight: (M,) these entries.
        diagonal: (N_dst,) further entries, for loops that are not among the edges; the destinations
            are then the first of the sources.
        scale: (N,) the factors of rows and columns that normalized it, if it is normalized.
    """

    edges: Edges
    weight: Tensor
    diagonal: Tensor | None = None
    scale: Tensor | None = None
    product: Kept | None = None
    """A x of the graph's ``x``, if it was computed; see :meth:`Graph.product`."""


class Graph:
    """Validate and sort a graph once, for all layers and calls.

    Pass it instead of ``edge_index`` to :class:`gmoe.MoEConv` and :class:`gmoe.GNNMoE`: its order,
    degrees, normalization and transpose are computed once. If you set ``x``, ``edge_weight`` or
    ``edge_attr`` anew or write to them (not by ``.data``), sums and norms follow. The edges are
    fixed: do not write to ``edge_index``. A plain ``edge_index`` is converted at each call of a
    layer or model.

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

    Attributes:
        adj: the edges as given; integers are int64.
        edge_index: (2, M) sources and destinations in the order given.
        matrix_values: (M,) or (M, F) the values of a sparse matrix in that order.

    Raises:
        ValueError: edges outside the nodes (CPU tensors), an ``EdgeIndex`` or a matrix of other
            nodes, or an edge argument with another number of rows; numbers of nodes that are not
            whole numbers, an unknown flow, or another flow than the default for a matrix.

    Example:
        >>> graph = gmoe.Graph(data.edge_index, data.num_nodes, x=data.x)
        >>> for epoch in range(200):
        ...     logits = model(data.x, graph)
    """

    mask: Tensor | None = None
    """(M,) an explainer's factors on the messages, in the order given."""
    matrix_values: Tensor | None = None
    is_replaced: Tensor | None = None
    """(M,) with added loops: those of ``edges`` that one of them replaces. They have no message."""
    edges: Edges
    num_rows: int
    """Rows of ``adj``: N_dst, but a part may hold more rows than destinations."""
    scale_of: Any = None
    """In a part, a function of (improved, loops, dtype) that gives the (N,) scale of its nodes in
    the whole graph."""
    destinations: Any = None
    """In a part, the (n,) places of its destinations in the whole graph."""

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
        if flow not in FLOWS:  # asked here, too, to save a call for each layer
            check_choice("flow", flow, FLOWS)
        sizes = num_nodes if isinstance(num_nodes, tuple | list) else (num_nodes, num_nodes)
        are_whole = all(isinstance(size, int | Integral | torch.SymInt) for size in sizes)
        if len(sizes) != 2 or not are_whole:
            raise ValueError(
                f"num_nodes: got {num_nodes!r}, expected a whole number, or two of them"
            )
        self.num_src, self.num_dst = sizes
        self.num_rows = self.num_dst
        self.x = x
        self.flow = flow
        self.is_sparse = is_sparse(edge_index)
        self.edge_weight = edge_weight
        self.edge_attr = edge_attr
        self._kept: dict[Any, Any] = {}
        if self.is_sparse:
            self._read_sparse(edge_index)
        else:
            self._read_edge_index(edge_index)
        if edge_weight is not None or edge_attr is not None:
            self._check_args()

    def _read_edge_index(self, edge_index: Any) -> None:
        """Set the edges from two rows of nodes."""
        is_index = isinstance(edge_index, Tensor) and edge_index.dim() == 2
        if not is_index or edge_index.dtype not in INTEGERS or len(edge_index) != 2:
            raise ValueError(
                f"edge_index: got {described(edge_index)}, expected integers of shape (2, number "
                "of edges), a sparse matrix or a Graph"
            )
        if isinstance(edge_index, EdgeIndex):
            edge_index = self._plain(edge_index)
        # torch's gather on the CPU misreads expanded int32 indices: gradients would be wrong.
        self.adj = edge_index.long()
        self.edge_index = self.adj if self.flow == "source_to_target" else self.adj.flip(0)
        self.edges = Edges.sorted(
            self.edge_index[0], self.edge_index[1], self.num_src, self.num_dst
        )

    def _plain(self, edge_index: EdgeIndex) -> Tensor:
        """The edges of an ``EdgeIndex`` as a tensor.

        Raises:
            ValueError: it knows other numbers of nodes.
        """
        nodes = (self.num_src, self.num_dst)
        if self.flow == "target_to_source":
            nodes = (self.num_dst, self.num_src)
        sizes = edge_index.sparse_size()
        for size, number in zip(sizes, nodes, strict=True):
            if size not in (None, number):
                raise ValueError(
                    f"edge_index: got an EdgeIndex of sparse_size {sizes}, expected {nodes}, as "
                    "there are nodes"
                )
        return edge_index.as_tensor()

    def _read_sparse(self, matrix: Any) -> None:
        """Set the edges and values from a matrix; its rows are the destinations."""
        shape = (matrix.size(0), matrix.size(1))
        nodes = (self.num_dst, self.num_src)
        if shape != nodes or self.flow != "source_to_target":
            raise ValueError(
                f"edge_index: got a sparse matrix of shape {shape} for flow={self.flow!r}, "
                f"expected (destinations, sources) = {nodes} and the default flow"
            )
        if isinstance(matrix, SparseTensor):
            ptr, src, value = matrix.csr()
        else:
            if matrix.layout != torch.sparse_csr:
                # A copy: PyG would mark a COO matrix as coalesced in place.
                matrix = matrix.to_sparse_coo().coalesce().to_sparse_csr()
            ptr = matrix.crow_indices().long()
            src = matrix.col_indices().long()
            value = matrix.values()
        self.adj = matrix
        self.matrix_values = value
        dst = rows_of_pointers(ptr, src)[0]
        self.edge_index = torch.stack([src, dst])
        # CSR is sorted by row already.
        order = torch.arange(src.numel(), device=src.device)
        self.edges = Edges(ptr, src, dst, self.num_src, order)

    def _check_args(self) -> None:
        """Refuse edge weights or features that do not fit the edges."""
        weight = self.edge_weight
        attr = self.edge_attr
        rows = (self.num_edges,)
        if weight is not None and not (isinstance(weight, Tensor) and weight.shape == rows):
            raise ValueError(
                f"edge_weight: got {described(weight)}, expected a tensor of shape {rows}"
            )
        if weight is not None and self.is_sparse:
            # PyG would ignore the tensor.
            raise ValueError(
                "edge_weight: got a tensor, expected None, since a sparse matrix's values are the "
                "weights"
            )
        if attr is not None and not (isinstance(attr, Tensor) and attr.shape[:1] == rows):
            raise ValueError(
                f"edge_attr: got {described(attr)}, expected a row for each of {rows[0]} edges"
            )

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
        other = self._copy(
            edge_weight=self.edge_weight if edge_weight is None else edge_weight,
            edge_attr=self.edge_attr if edge_attr is None else edge_attr,
        )
        other._check_args()
        return other

    def _copy(self, **changes: Any) -> Graph:
        """The same graph with other attributes, without anything that was computed."""
        other = copy.copy(self)
        vars(other).update(changes, _kept={})
        return other

    def explained(self, conv: MessagePassing) -> Graph:
        """The same graph with the factors that an explainer of this conv puts on its messages.

        Raises:
            ValueError: an explainer that looks at single messages: convs that aggregate in one
                product do not have them.
        """
        mask = conv._edge_mask
        if not isinstance(mask, Tensor) or mask.shape != (self.num_edges,):
            got = getattr(mask, "shape", "an explainer without a mask")
            raise ValueError(
                f"explain: got {got}, expected one of the {self.num_edges} edges: GNNExplainer, "
                "PGExplainer and CaptumExplainer work"
            )
        return self._copy(mask=mask.sigmoid() if conv._apply_sigmoid else mask)

    def to(self, device: torch.device | str) -> Graph:
        """Move the graph to a device; returns itself if it is there already."""
        if self.adj.device == torch.device(device):
            return self
        moved = {
            name: value.to(device) for name, value in vars(self).items() if hasattr(value, "to")
        }
        return self._copy(**moved)

    @property
    def num_edges(self) -> int:
        """M."""
        return self.edge_index.size(1)

    @property
    def attr(self) -> Tensor | None:
        """(M, F) the features of each of ``edges``.

        They are ``edge_attr`` or, if a sparse matrix's values are rows, these values.
        """
        attr = self.edge_attr
        if attr is None and self.matrix_values is not None and self.matrix_values.dim() > 1:
            attr = self.matrix_values
        if attr is None:
            return None
        rows = attr if attr.dim() > 1 else attr[:, None]
        return rows[self.edges.order]

    def mean(self, x_src: Tensor, by: Literal["values"] | None = None) -> Tensor:
        """(N_dst, D) the mean over in-edges of (N_src, D) features; zero without in-edges.

        Args:
            x_src: the features.
            by: see :meth:`summing`.
        """
        return self.product(self.summing(by=by, mean=True, dtype=x_src.dtype), x_src)

    def product(self, matrix: Matrix, x_src: Tensor) -> Tensor:
        """(N_dst, D) A x, in the type of ``x_src``.

        The product with the graph's own ``x`` is computed once, as long as neither changes.
        """
        weight = matrix.weight
        if self.mask is not None:
            weight = weight * self.mask.index_select(0, matrix.edges.order)
        can_keep = (
            x_src is self.x
            and not (x_src.requires_grad or weight.requires_grad)
            # Compiled code and tensors of inference mode have no versions, by which a change shows.
            and not (torch.compiler.is_compiling() or x_src.is_inference())
            # Fake tensors have no values, and counters want to see the product.
            and not is_watched()
        )
        if can_keep:
            kept = matrix.product
            if kept is not None and kept.is_fresh((x_src, kept.result)):
                return kept.result
        elif x_src is self.x:
            # Optimizers may write to what they train without a trace in its version.
            matrix.product = None
        # What is kept is for training too, whatever the mode of the first call.
        with torch.inference_mode(False) if can_keep else nullcontext():
            y = weighted_sum(weight[:, None], x_src[:, None], matrix.edges)
            if matrix.diagonal is not None:
                y.addcmul_(matrix.diagonal[:, None, None], x_src[: self.num_dst, None])
            y = y.squeeze(1).to(x_src.dtype)
        if can_keep:
            # The result is a source, too: a caller may have written to it.
            matrix.product = Kept((x_src, y), versions_of((x_src, y)), y)
        return y

    @once
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
        edges = self.edges
        factor = self.edge_weight if by == "weight" else None
        # Without edge weights, PyG reads the values of torch.sparse, but not of SparseTensor.
        reads_values = by == "weight"
        reads_values = reads_values or (by == "values" and not isinstance(self.adj, SparseTensor))
        if factor is None and reads_values:
            factor = self.matrix_values
        exact = torch.promote_types(dtype, torch.float32)
        if mean:
            share_R = edges.degree.to(exact).reciprocal()
            weight = share_R.index_select(0, edges.receiver)
        else:
            weight = torch.ones_like(edges.sender, dtype=exact)
        if factor is not None and factor.dim() == 1:
            weight = weight * factor.index_select(0, edges.order)
        return Matrix(edges, weight)

    @once
    def normalized(self, *, improved: bool, loops: bool, dtype: torch.dtype) -> Matrix:
        r"""The matrix :math:`D^{-1/2} (A + I) D^{-1/2}` of PyG's ``GCNConv``.

        The loops of the graph are not among its edges, but in its diagonal.

        Args:
            improved: see ``GCNConv``.
            loops: add the I.
            dtype: see :meth:`summing`.
        """
        edges = self.edges
        factor = self.matrix_values if self.edge_weight is None else self.edge_weight
        # 1. A: the weights of the edges.
        weight = torch.ones_like(edges.sender, dtype=torch.promote_types(dtype, torch.float32))
        if factor is not None:
            weight = weight * factor.index_select(0, edges.order)

        # 2. I: the weights of the loops. As in PyG, a torch.sparse matrix keeps its own loops and
        # gets another one at each node; elsewhere one loop replaces those of a node. Without edge
        # weights, the loops of an edge list have the weight 1, improved or not.
        fill = 2.0 if improved and (factor is not None or self.is_sparse) else 1.0
        diagonal = weight.new_full((self.num_dst,), fill if loops else 0.0)
        if loops and not (self.is_sparse and isinstance(self.adj, Tensor)):
            is_loop = edges.sender == edges.receiver
            if factor is not None and not self.is_sparse:
                # A loop that is replaced keeps its weight, the last one's of several. How many
                # loops there are depends on the data: all other edges write to a row that is cut
                # off.
                row = torch.where(is_loop, edges.receiver, self.num_dst)
                padded = torch.cat([diagonal, diagonal[:1]])
                diagonal = padded.scatter(0, row, weight)[:-1]
            weight = torch.where(is_loop, 0.0, weight)

        # 3. D^-1/2, of the whole graph where this one is a part.
        if self.scale_of is None:
            degree = diagonal.index_add(0, edges.receiver, weight)
            scale = degree.pow(-0.5).nan_to_num(nan=torch.nan, posinf=0.0)
        else:
            scale = self.scale_of(improved=improved, loops=loops, dtype=dtype).to(weight.device)
        weight = scale.index_select(0, edges.receiver) * weight
        weight = weight * scale.index_select(0, edges.sender)
        scaled = scale[: self.num_dst].square() * diagonal if loops else None
        return Matrix(edges, weight, scaled, scale)

    @once
    def with_loops(self, *, fill_value: float | Tensor | str) -> Graph:
        """The graph with one loop at each node that is source and destination.

        It replaces the loops that the node had.

        Args:
            fill_value: the loops' edge features, see ``torch_geometric.utils.add_self_loops``.
        """
        num_loops = min(self.num_src, self.num_dst)
        edges, is_replaced = self.edges.with_loops(num_loops)
        sender, receiver = self.edges.sender, self.edges.receiver
        node = torch.arange(num_loops, device=sender.device)
        ends = torch.stack([torch.cat([sender, node]), torch.cat([receiver, node])])
        attr = self.attr
        if attr is not None:
            # Loops that are replaced do not count in the features of new ones. How many there are
            # depends on the data: they end in one node more, whose loop is cut off.
            receiver = torch.where(sender == receiver, self.num_dst, receiver)
            counted = torch.stack([sender, receiver])
            _, attr = add_self_loops(counted, attr, fill_value, self.num_dst + 1)
            attr = attr[: ends.size(1)]
        mask = None
        if self.mask is not None:  # no explainer masks added loops: see MessagePassing
            mask = self.mask[self.edges.order]
            mask = torch.cat([mask, mask.new_ones(num_loops)])
        return self._copy(
            edges=edges,
            is_replaced=is_replaced,
            edge_index=ends,
            adj=ends,
            edge_attr=attr,
            mask=mask,
            x=None,
            edge_weight=None,
            matrix_values=None,
            is_sparse=False,
            flow="source_to_target",
            scale_of=None,
            destinations=None,
            num_rows=self.num_dst,
        )

    def args_for(self, conv: MessagePassing) -> dict[str, Tensor]:
        """The edge arguments that this conv takes, in the order of the edges as given."""
        names = {"edge_weight", "edge_attr"}.intersection(parameters_of(conv))
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def part(self, token: Tensor) -> tuple[Tensor, Graph]:
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
        number = len(token)
        # 1. The edges that end in a token, with a position of the token each.
        edge, position, _ = self.edges.of(token)
        num_messages = edge.numel()
        if num_messages == 0 and self.num_edges:
            token = torch.cat([token, self.edges.receiver[:1]])
            edge, position, _ = self.edges.of(token)

        # 2. The nodes, renumbered: the tokens first, then all others that send to them.
        sender = self.edges.sender.index_select(0, edge)
        nodes, source = renumber(token[token < self.num_src], sender)
        if self.is_sparse:
            # Columns must ascend, or torch mixes up the gradients of the matrix's values.
            order = (position * len(nodes) + source).argsort()
            edge = edge[order]
            source = source[order]

        # 3. The part: edge arguments and edges, in this order.
        place = self.edges.order.index_select(0, edge)  # among the edges as given
        edge_args = {
            name: rows.index_select(0, place)
            for name in ("matrix_values", "edge_weight", "edge_attr")
            if (rows := getattr(self, name)) is not None
        }
        is_square = self.num_src == self.num_rows
        num_rows = len(nodes) if is_square else len(token)
        ptr = row_pointers(position, num_rows)
        edges = Edges(
            ptr[: number + 1],
            source[:num_messages],
            position[:num_messages],
            len(nodes),
            torch.arange(num_messages, device=edge.device),
        )
        part = self._copy(
            **edge_args,
            num_src=len(nodes),
            num_dst=number,
            num_rows=num_rows,
            destinations=token,
            edges=edges,
            edge_index=torch.stack([source, position]),
            scale_of=lambda **how: self.normalized(**how).scale.index_select(0, nodes),
            x=None,
            mask=None,
        )
        part.adj = self._adj_of_part(part, ptr)
        return nodes, part

    def _adj_of_part(self, part: Graph, ptr: Tensor) -> Any:
        """The edges of a part for PyG's convs, in the form of this graph's ``adj``."""
        source, position = part.edge_index
        value: Any = part.matrix_values
        size = (part.num_rows, part.num_src)
        if isinstance(self.adj, SparseTensor):
            return SparseTensor(row=position, col=source, value=value, sparse_sizes=size)
        if self.is_sparse:
            return torch.sparse_csr_tensor(ptr, source, value, size=size, check_invariants=False)
        if self.flow == "source_to_target":
            return part.edge_index
        return part.edge_index.flip(0)

    def first(self, nodes: int, edges: int) -> Graph:
        """The first nodes and the first edges as given.

        PyG trims sampled batches to these, layer by layer.
        """
        if self.is_sparse:
            raise ValueError(
                "edge_index: got a sparse matrix, expected (2, number of edges) where layers are "
                "trimmed"
            )
        return Graph(
            self.adj[:, :edges],
            nodes,
            edge_weight=None if self.edge_weight is None else self.edge_weight[:edges],
            edge_attr=None if self.edge_attr is None else self.edge_attr[:edges],
            flow=self.flow,
        )

    def __repr__(self) -> str:
        return f"Graph({self.num_src} sources, {self.num_dst} destinations, {self.num_edges} edges)"
