"""The graph of message passing: its edges, their norms, and the sums along them.

Shapes: N_src sources, N_dst destinations (the tokens), M edges, S sources of a part.
"""

from __future__ import annotations

import copy
import inspect
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

from gmoe._autograd import is_watched
from gmoe._checks import check, check_choice
from gmoe.conv.edges import Edges, weighted_sum
from gmoe.conv.kept import Kept, once, versions_of
from gmoe.routing import INTEGERS, described

FLOWS = ("source_to_target", "target_to_source")


@dataclass(eq=False)
class Matrix:
    """The A of a sum A x over in-edges.

    Args:
        edges: which of its entries are not zero.
        weight: (M,) these entries.
        diagonal: (R,) of loops that are not among the edges; destinations are then the first of the sources.
    """

    edges: Edges
    weight: Tensor
    diagonal: Tensor | None = None
    scale: Tensor | None = None
    """(N,) what rows and columns were multiplied by."""
    product: Kept | None = None
    """A x of the graph's ``x``, if it was computed."""


class Graph:
    """Validate and sort a graph once, for all layers and calls.

    Pass it instead of ``edge_index`` to :class:`gmoe.MoEConv` and :class:`gmoe.GNNMoE`: its order, degrees,
    normalization and transpose are computed once. Sums and norms follow if ``x``, ``edge_weight`` or ``edge_attr`` are
    set anew or written to (not by ``.data``); the edges are fixed, so do not write to ``edge_index``. A plain
    ``edge_index`` is converted at each call of a layer or model.

    Args:
        edge_index: (2, M) integers, PyG's ``EdgeIndex``, or a ``torch.sparse`` matrix or ``SparseTensor`` of shape
            (N_dst, N_src).
        num_nodes: N, or (N_src, N_dst).
        x: (N_src, D) features that each call brings again, as the same tensor; their sums and means over in-edges are
            computed once where they need no gradient (default: none).
        edge_weight: (M,), where convs take it; also a keyword of each call.
        edge_attr: (M, F), likewise.
        flow: PyG's ``flow``, that of the convs: which row of ``edge_index`` holds the destinations (default
            ``"source_to_target"``).

    Attributes:
        adj: the edges as given; integers are int64.
        edge_index: (2, M) sources and destinations in the order given.
        matrix_values: (M,) or (M, F) the values of a sparse matrix in that order.

    Raises:
        ValueError: edges outside the nodes (CPU tensors), an ``EdgeIndex`` or a matrix of other nodes, or an edge
            argument with another number of rows; numbers of nodes that are none, an unknown flow, or another one than
            the default for a matrix.

    Example:
        >>> graph = gmoe.Graph(data.edge_index, data.num_nodes, x=data.x)
        >>> for epoch in range(200):
        ...     logits = model(data.x, graph)
    """

    mask: Tensor | None = None
    """(M,) an explainer's factors on the messages, in the order given."""
    matrix_values: Tensor | None = None
    edges: Edges
    scale_of: Any = None
    """In a part, a function of (improved, loops, dtype) that gives the (N,) scale of its nodes in the whole."""
    destinations: Any = None
    """In a part, the (n,) places of its destinations in the whole."""

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
        if flow not in FLOWS:
            check_choice("flow", flow, FLOWS)
        nodes = num_nodes if isinstance(num_nodes, tuple | list) else (num_nodes, num_nodes)
        if len(nodes) != 2 or not all(isinstance(size, int | Integral | torch.SymInt) for size in nodes):
            raise ValueError(f"num_nodes: got {num_nodes!r}, expected a whole number, or two of them")
        self.num_src, self.num_dst = nodes
        self.num_rows = self.num_dst  # of ``adj``, which in a part may hold more than the destinations
        self.x, self.flow, self.is_sparse = x, flow, is_sparse(edge_index)
        self.edge_weight, self.edge_attr = edge_weight, edge_attr
        self._kept: dict[Any, Any] = {}
        if self.is_sparse:
            self._read_sparse(edge_index)
        else:
            plain = isinstance(edge_index, Tensor) and edge_index.dim() == 2 and edge_index.dtype in INTEGERS
            if not plain or len(edge_index) != 2:
                legal = "integers of shape (2, number of edges), a sparse matrix or a Graph"
                raise ValueError(f"edge_index: got {described(edge_index)}, expected {legal}")
            if isinstance(edge_index, EdgeIndex):
                edge_index = self._plain(edge_index)
            # torch's gather on the CPU misreads expanded int32 indices, so that gradients would be silently wrong
            self.adj = edge_index.long()
            self.edge_index = self.adj if flow == "source_to_target" else self.adj.flip(0)
            self.edges = Edges.sorted(self.edge_index[0], self.edge_index[1], self.num_src, self.num_dst)
        if edge_weight is not None or edge_attr is not None:
            self._check_args()

    def _plain(self, edge_index: EdgeIndex) -> Tensor:
        """The edges as a tensor, of an ``EdgeIndex`` that knows no other size."""
        nodes = (self.num_src, self.num_dst)[:: 1 if self.flow == "source_to_target" else -1]
        sizes = edge_index.sparse_size()
        fits = all(size in (None, number) for size, number in zip(sizes, nodes, strict=True))
        check(fits, "edge_index", f"an EdgeIndex of sparse_size {sizes}", f"{nodes}, as there are nodes")
        return edge_index.as_tensor()

    def _read_sparse(self, matrix: Any) -> None:
        """Edges and values of a matrix; CSR is sorted already."""
        shape, nodes = (matrix.size(0), matrix.size(1)), (self.num_dst, self.num_src)
        if shape != nodes or self.flow != "source_to_target":
            got = f"a sparse matrix of shape {shape} for flow={self.flow!r}"
            raise ValueError(f"edge_index: got {got}, expected (destinations, sources) = {nodes} and the default flow")
        if isinstance(matrix, SparseTensor):
            ptr, src, value = matrix.csr()
        else:
            if matrix.layout != torch.sparse_csr:  # PyG would mark COO in place
                matrix = matrix.to_sparse_coo().coalesce().to_sparse_csr()
            ptr, src, value = matrix.crow_indices().long(), matrix.col_indices().long(), matrix.values()
        self.adj, self.matrix_values = matrix, value
        dst = torch._convert_indices_from_csr_to_coo(ptr, src)[0]
        self.edge_index, every = torch.stack([src, dst]), torch.arange(src.numel(), device=src.device)
        self.edges = Edges(ptr, src, dst, self.num_src, every)

    def _check_args(self) -> None:
        weight, attr, rows = self.edge_weight, self.edge_attr, (self.num_edges,)
        if weight is not None and not (isinstance(weight, Tensor) and weight.shape == rows):
            raise ValueError(f"edge_weight: got {described(weight)}, expected a tensor of shape {rows}")
        if weight is not None and self.is_sparse:  # PyG would pass over the tensor
            raise ValueError("edge_weight: got a tensor, expected None, since a sparse matrix's values are the weights")
        if attr is not None and not (isinstance(attr, Tensor) and attr.shape[:1] == rows):
            raise ValueError(f"edge_attr: got {described(attr)}, expected a row for each of {rows[0]} edges")

    def fitting(
        self, num_nodes: tuple[int, int], flow: str, edge_weight: Tensor | None = None, edge_attr: Tensor | None = None
    ) -> Graph:
        """The graph, if it has so many sources and destinations, and that flow; with these edge arguments, in the
        order of the edges as given, where they are not ``None``.
        """
        if (self.num_src, self.num_rows, self.flow) != (*num_nodes, flow):
            legal = f"{num_nodes[0]} sources, {num_nodes[1]} destinations and flow {flow!r}"
            raise ValueError(f"edge_index: got {self} of flow {self.flow!r}, expected {legal}")
        if edge_weight is None and edge_attr is None:
            return self
        other = self._copy()
        other.edge_weight = self.edge_weight if edge_weight is None else edge_weight
        other.edge_attr = self.edge_attr if edge_attr is None else edge_attr
        other._check_args()
        return other

    def _copy(self, **changes: Any) -> Graph:
        """The same graph with other attributes, and nothing that was computed."""
        other = copy.copy(self)
        vars(other).update(changes, _kept={})
        return other

    def explained(self, conv: MessagePassing) -> Graph:
        """The same graph with the factors that an explainer of this conv puts on its messages.

        Raises:
            ValueError: an explainer that looks at single messages, of which convs that aggregate in one product have
                none.
        """
        mask = conv._edge_mask
        if not isinstance(mask, Tensor) or mask.shape != (self.num_edges,):
            got = getattr(mask, "shape", "an explainer without a mask")
            legal = f"one of the {self.num_edges} edges: GNNExplainer, PGExplainer and CaptumExplainer work"
            raise ValueError(f"explain: got {got}, expected {legal}")
        return self._copy(mask=mask.sigmoid() if conv._apply_sigmoid else mask)

    def to(self, device: torch.device | str) -> Graph:
        """Move the graph to a device; returns itself if it is there already."""
        if self.adj.device == torch.device(device):
            return self
        return self._copy(**{name: value.to(device) for name, value in vars(self).items() if hasattr(value, "to")})

    @property
    def num_edges(self) -> int:
        """M."""
        return self.edge_index.size(1)

    @property
    def attr(self) -> Tensor | None:
        """(M, F) the features of each of ``edges``: ``edge_attr``, or a sparse matrix's values if they are rows."""
        of_matrix = self.matrix_values if self.matrix_values is not None and self.matrix_values.dim() > 1 else None
        given = of_matrix if self.edge_attr is None else self.edge_attr
        return None if given is None else (given if given.dim() > 1 else given[:, None])[self.edges.order]

    def mean(self, x_src: Tensor, by: Literal["values"] | None = None) -> Tensor:
        """(N_dst, D) the mean over in-edges of (N_src, D) features, see :meth:`summing`; zero without any."""
        return self.product(self.summing(by=by, mean=True, dtype=x_src.dtype), x_src)

    def product(self, matrix: Matrix, x_src: Tensor) -> Tensor:
        """(N_dst, D) A x, in the type of ``x_src``; computed once of the ``x`` that the graph was given."""
        weight = matrix.weight if self.mask is None else matrix.weight * self.mask.index_select(0, matrix.edges.order)
        constant = x_src is self.x and not (x_src.requires_grad or weight.requires_grad)
        # Not in compiled code, nor of tensors of inference mode, which both know no versions.
        constant = constant and not (torch.compiler.is_compiling() or is_watched() or x_src.is_inference())
        if not constant and x_src is self.x:
            matrix.product = None  # optimizers may write to what they train without a trace in its version
        kept = matrix.product if constant else None
        if kept is not None and kept.is_fresh((x_src, kept.result)):
            return kept.result
        with torch.inference_mode(False) if constant else nullcontext():  # for training too
            y = weighted_sum(weight[:, None], x_src[:, None], matrix.edges)
            if matrix.diagonal is not None:
                y.addcmul_(matrix.diagonal[:, None, None], x_src[: self.num_dst, None])
            y = y.squeeze(1).to(x_src.dtype)
        if constant:
            matrix.product = Kept((x_src, y), versions_of((x_src, y)), y)
        return y

    @once
    def summing(self, *, by: Literal["weight", "values"] | None, mean: bool, dtype: torch.dtype) -> Matrix:
        """The matrix of a sum over in-edges, or of a mean.

        Args:
            by: what messages are multiplied by: the weights; or only the values of a ``torch.sparse`` matrix, as PyG's
                convs without edge weights do.
            mean: divide by the number of in-edges.
            dtype: of the entries, at least; and these have float32 at least.
        """
        edges, given = self.edges, self.edge_weight if by == "weight" else None
        if given is None and by is not None and (by == "weight" or not isinstance(self.adj, SparseTensor)):
            given = self.matrix_values
        weight = torch.ones_like(edges.sender, dtype=torch.promote_types(dtype, torch.float32))
        if given is not None and given.dim() == 1:
            weight = weight * given.index_select(0, edges.order)
        if mean:
            weight = weight / edges.degree.index_select(0, edges.receiver)
        return Matrix(edges, weight)

    @once
    def normalized(self, *, improved: bool, loops: bool, dtype: torch.dtype) -> Matrix:
        r"""The matrix :math:`D^{-1/2} (A + I) D^{-1/2}`, as PyG's ``GCNConv`` has it, the loops as its diagonal.

        Args:
            improved: see ``GCNConv``.
            loops: the ``+ I``.
            dtype: see :meth:`summing`.
        """
        edges, given = self.edges, self.matrix_values if self.edge_weight is None else self.edge_weight
        weight = torch.ones_like(edges.sender, dtype=torch.promote_types(dtype, torch.float32))
        weight = weight if given is None else weight * given.index_select(0, edges.order)
        fill = 2.0 if improved and (given is not None or self.is_sparse) else 1.0
        added = weight.new_full((self.num_dst,), fill if loops else 0.0)
        if loops and not (self.is_sparse and isinstance(self.adj, Tensor)):  # one, in place of those there are
            is_loop = edges.sender == edges.receiver
            if given is not None and not self.is_sparse:  # which keeps their weight, of several the last one's
                # Other edges write to a row that is cut off: how many loops there are depends on the data.
                row = torch.where(is_loop, edges.receiver, self.num_dst)
                added = torch.cat([added, added[:1]]).scatter(0, row, weight)[:-1]
            weight = torch.where(is_loop, 0.0, weight)
        if self.scale_of is None:
            scale = added.index_add(0, edges.receiver, weight).pow(-0.5).nan_to_num(nan=torch.nan, posinf=0.0)
        else:
            scale = self.scale_of(improved=improved, loops=loops, dtype=dtype).to(weight.device)
        weight = scale.index_select(0, edges.receiver) * weight * scale.index_select(0, edges.sender)
        return Matrix(edges, weight, scale[: self.num_dst].square() * added if loops else None, scale)

    @once
    def with_loops(self, *, fill_value: float | Tensor | str) -> Graph:
        """The graph with one loop at each node that is source and destination, in place of those it had.

        Args:
            fill_value: the loops' edge features, see ``torch_geometric.utils.add_self_loops``.
        """
        loops = min(self.num_src, self.num_dst)
        edges, kept_M = self.edges.with_loops(loops)
        ends = torch.stack([self.edges.sender, self.edges.receiver]).index_select(1, kept_M)
        attr = None if self.attr is None else self.attr.index_select(0, kept_M)
        ends, attr = add_self_loops(ends, attr, fill_value, loops)
        mask = None
        if self.mask is not None:  # added loops have none, see MessagePassing.explain_message
            mask = self.mask[self.edges.order].index_select(0, kept_M)
            mask = torch.cat([mask, mask.new_ones(loops)])
        return self._copy(
            edges=edges,
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

        Args:
            token: (n,) distinct destinations.

        Returns:
            (S,) the nodes that are its sources, and the graph to n destinations: the first of these nodes, where they
            are among the sources. Norms are those of the whole graph. For PyG's convs, ``adj`` is in the form of this
            graph's, square where that one is. Where no edge ends in ``token``, it holds those of one more destination,
            since some convs fail on graphs without edges.
        """
        number = len(token)
        edge, position, _ = self.edges.of(token)
        messages = edge.numel()
        if messages == 0 and self.num_edges:
            token = torch.cat([token, self.edges.receiver[:1]])
            edge, position, _ = self.edges.of(token)
        nodes, source = numbered(token[token < self.num_src], self.edges.sender.index_select(0, edge))
        if self.is_sparse:  # columns ascend, or torch mixes up the gradients of the matrix's values
            order = (position * len(nodes) + source).argsort()
            edge, source = edge[order], source[order]
        given = self.edges.order.index_select(0, edge)
        held = {
            name: rows.index_select(0, given)
            for name in ("matrix_values", "edge_weight", "edge_attr")
            if (rows := getattr(self, name)) is not None
        }
        part = self._copy(**held, num_src=len(nodes), num_dst=number, destinations=token, x=None, mask=None)
        part.num_rows = len(nodes) if self.num_src == self.num_rows else len(token)
        part.edge_index = torch.stack([source, position])
        part.adj = part.edge_index if self.flow == "source_to_target" else part.edge_index.flip(0)
        ptr, size = torch._convert_indices_from_coo_to_csr(position, part.num_rows), (part.num_rows, len(nodes))
        if isinstance(self.adj, SparseTensor):
            part.adj = SparseTensor(row=position, col=source, value=part.matrix_values, sparse_sizes=size)
        elif self.is_sparse:
            value: Any = part.matrix_values
            part.adj = torch.sparse_csr_tensor(ptr, source, value, size=size, check_invariants=False)
        every = torch.arange(messages, device=edge.device)  # they come in that order
        part.edges = Edges(ptr[: number + 1], source[:messages], position[:messages], len(nodes), every)
        part.scale_of = lambda **how: self.normalized(**how).scale.index_select(0, nodes)
        return nodes, part

    def first(self, nodes: int, edges: int) -> Graph:
        """The first nodes and the first edges as given, to which PyG trims sampled batches layer by layer."""
        if self.is_sparse:
            raise ValueError("edge_index: got a sparse matrix, expected (2, number of edges) where layers are trimmed")
        weight, attr = (None if value is None else value[:edges] for value in (self.edge_weight, self.edge_attr))
        return Graph(self.adj[:, :edges], nodes, edge_weight=weight, edge_attr=attr, flow=self.flow)

    def __repr__(self) -> str:
        return f"Graph({self.num_src} sources, {self.num_dst} destinations, {self.num_edges} edges)"


def numbered(first: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """(S,) distinct nodes, those of ``first`` in front, and the places of ``others`` among them."""
    nodes = torch.cat([first, others[~torch.isin(others, first)].unique()])
    known, order = nodes.sort()
    return nodes, order[torch.searchsorted(known, others)]


_parameters: dict[type, tuple[str, ...]] = {}
"""What :func:`parameters_of` gave, which takes as long as a small graph's products. ``torch.compile`` warns of
``functools.cache``."""


def parameters_of(conv: torch.nn.Module) -> tuple[str, ...]:
    """The arguments of the conv's forward, in order."""
    cls = type(conv)
    if cls not in _parameters:
        _parameters[cls] = tuple(inspect.signature(cls.forward).parameters)[1:]
    return _parameters[cls]
