"""The graph of message passing, and the sums along its edges: the one place where an adjacency is sorted or multiplied.

Shapes: N_src sources, N_dst destinations (the tokens), M edges or messages, U senders, R receivers, H heads, C width.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary
from torch_geometric import EdgeIndex
from torch_geometric.nn import MessagePassing
from torch_geometric.typing import Adj, SparseTensor
from torch_geometric.utils import add_self_loops, is_sparse, remove_self_loops, to_edge_index

from gmoe._autograd import first_order, in_transform, untraced

with warnings.catch_warnings():  # torch says once a process that such matrices are in beta; here it has said so
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0], [], [], (0, 0), check_invariants=False)

SPARSE_DEVICES = ("cpu",)
"""Where torch's sparse products beat gathered blocks of messages."""

NARROW = 128 if torch.backends.mkl.is_available() else 0
"""Bytes of a row up to which MKL's sparse product takes about half the time of torch's own, or less."""

NUMBERS = 2**21
"""How many numbers a block of messages holds: few enough for a CPU's caches, and for memory without fresh pages."""

NUMBERS_ON_GPU = 2**26
"""The same there: enough to fill it."""

WEIGHTS_TWICE = "edge_weight: got a tensor beside a sparse matrix, expected None: its values are the weights"
"""Said where PyG would pass over the tensor."""


@dataclass(eq=False)
class Edges:
    """Who sends a message to whom, sorted by receiver: the structure of a CSR matrix.

    Args:
        ptr: (R + 1,) where the messages of each receiver start.
        sender: (M,) in 0..U-1.
        receiver: (M,) in 0..R-1, ascending.
        num_senders: U.
    """

    ptr: Tensor
    sender: Tensor
    receiver: Tensor
    num_senders: int

    @staticmethod
    def sorted(sender: Tensor, receiver: Tensor, num_senders: int, num_receivers: int) -> tuple[Edges, Tensor]:
        """The edges in the order of their receivers, and (M,) which of the given ones each of them is."""
        plain = type(receiver) is Tensor and receiver.device.type == "cpu" and not torch.compiler.is_compiling()
        plain = plain and not in_transform() and not torch._C._len_torch_dispatch_stack()
        bits = receiver.numel().bit_length()
        with torch.inference_mode(False):  # what a graph keeps is for training too
            if plain and int(num_receivers).bit_length() + bits <= 63:
                # receiver and position in one integer: by NumPy in a quarter of the time of torch's stable sort
                both = (receiver << bits) + torch.arange(receiver.numel(), device=receiver.device)
                both.numpy().sort()
                receiver, order = both >> bits, both & ((1 << bits) - 1)
            else:
                receiver, order = receiver.sort(stable=True)
            ptr = torch._convert_indices_from_coo_to_csr(receiver, num_receivers)
            return Edges(ptr, sender.index_select(0, order), receiver, num_senders), order

    @property
    def num_receivers(self) -> int:
        """R."""
        return self.ptr.numel() - 1

    @cached_property
    def degree(self) -> Tensor:
        """(R,) messages of each receiver."""
        return self.ptr.diff()

    @cached_property
    def transpose(self) -> tuple[Edges, Tensor]:
        """The same messages sent the other way, and (M,) which of these each of them is."""
        return Edges.sorted(self.receiver, self.sender, self.num_receivers, self.num_senders)

    def of(self, receivers: Tensor) -> tuple[Tensor, Tensor]:
        """(m,) the messages of some receivers, one after the other, and (m,) the position of each one's receiver."""
        degree = self.degree.index_select(0, receivers)
        position = torch.arange(len(receivers), device=receivers.device).repeat_interleave(degree)
        shift = self.ptr.index_select(0, receivers) - (degree.cumsum(0) - degree)
        return torch.arange(len(position), device=receivers.device) + shift.index_select(0, position), position


@dataclass(eq=False)
class Matrix:
    """The A of a sum A x over in-edges, and its products with features that stay as they are.

    Args:
        edges: which of its entries are not zero.
        weight: (M,) these entries.
    """

    edges: Edges
    weight: Tensor
    _kept: WeakIdKeyDictionary = field(default_factory=WeakIdKeyDictionary)

    @untraced
    def kept(self, x_src: Tensor) -> Tensor:
        """(R, D) A x. Where no gradient is needed, and ``x_src`` is the tensor that it was in an earlier call, what
        that call gave: it is held as long as the two live. Not noticed: a change of ``x_src`` in place that torch does
        not count, through ``.data`` or NumPy."""
        plain = type(x_src) is Tensor and not torch._C._len_torch_dispatch_stack()  # neither fake nor counted
        constant = not (x_src.requires_grad or self.weight.requires_grad)
        if not plain or not constant or x_src.is_inference() or self.weight.is_inference():
            return self.times(x_src)
        if not self.knows(x_src):
            version = x_src._version
            with torch.inference_mode(False), torch.no_grad():  # for training too
                product = self.times(x_src)
            self._kept[x_src] = product, version, product._version
        found: Tensor = self._kept[x_src][0]
        return found

    @untraced
    def knows(self, x_src: Tensor) -> bool:
        """Whether :meth:`kept` has A x already."""
        known = self._kept.get(x_src)  # by the object, which is held weakly
        return known is not None and known[1:] == (x_src._version, known[0]._version)

    def times(self, x_src: Tensor) -> Tensor:
        """(R, D) A x"""
        return weighted_sum(self.weight[:, None], x_src[:, None], self.edges).squeeze(1)

    def __reduce__(self) -> tuple[Any, ...]:  # weak references cannot be pickled
        return Matrix, (self.edges, self.weight)


class Graph:
    """Validate and sort a graph once, for all layers and calls.

    Pass it instead of ``edge_index`` to :class:`gmoe.MoEConv` and :class:`gmoe.GNNMoE`: its order, degrees,
    normalization and transpose are computed once, so do not change its tensors in place. A plain ``edge_index`` is
    converted at each call of a layer or model.

    Sums and means of features that need no gradient and are the same tensor in each call are computed once too, and
    kept as long as graph and features live.

    Args:
        edge_index: (2, M) integers, PyG's ``EdgeIndex``, or a ``torch.sparse`` matrix or ``SparseTensor`` of shape
            (N_dst, N_src).
        num_nodes: N, or (N_src, N_dst).
        edge_weight: (M,), where convs take it; also a keyword of each call.
        edge_attr: (M, F), likewise.
        flow: PyG's ``flow``: which row of ``edge_index`` holds the destinations (default ``"source_to_target"``).

    Attributes:
        adj: the edges as given; integers are int64.
        edge_index: (2, M) sources and destinations in the order given.
        matrix_values: (M,) or (M, F) the values of a sparse matrix in that order.
        constant: whether later calls bring the same features again, see :meth:`seeing`.

    Raises:
        ValueError: edges outside the nodes (CPU tensors), or an edge argument with another number of rows;
            numbers of nodes that are none, an unknown flow.

    Example:
        >>> graph = gmoe.Graph(data.edge_index, data.num_nodes)
        >>> for epoch in range(200):
        ...     logits = model(data.x, graph)
    """

    def __init__(
        self,
        edge_index: Adj,
        num_nodes: int | tuple[int, int],
        *,
        edge_weight: Tensor | None = None,
        edge_attr: Tensor | None = None,
        flow: str = "source_to_target",
    ) -> None:
        if flow not in ("source_to_target", "target_to_source"):
            raise ValueError(f"flow: got {flow!r}, expected 'source_to_target' or 'target_to_source'")
        nodes = num_nodes if isinstance(num_nodes, tuple | list) else (num_nodes, num_nodes)
        whole = int | Integral | torch.SymInt  # NumPy's too
        if len(nodes) != 2 or not isinstance(nodes[0], whole) or not isinstance(nodes[1], whole):
            raise ValueError(f"num_nodes: got {num_nodes!r}, expected a whole number, or two of them")
        self.num_src, self.num_dst = nodes
        self.edge_weight = edge_weight
        self.edge_attr = edge_attr
        self.flow = flow
        self.constant: bool | None = None
        self.mask: Tensor | None = None  # (M,) an explainer's factors on the messages, in the order given
        self._parent: Any = None  # the graph that this is a part of, and what :meth:`part` found out
        self.matrix_values: Tensor | None = None
        self._origin: Tensor | None = None  # of looped edges, in a graph without loops
        self._shared: dict[Any, Any] = {}  # what follows from the edges alone
        self._matrices: dict[Any, Matrix] = {}  # what follows from their weights too
        self._graphs: dict[Any, Graph] = {}  # and from their features: in another flow, with loops
        if not isinstance(edge_index, Tensor | SparseTensor):
            raise ValueError(f"edge_index: got {type(edge_index).__name__}, expected (2, number of edges) or a Graph")
        self.is_sparse = is_sparse(edge_index)
        if self.is_sparse:
            self._read_sparse(edge_index)
            return
        if edge_index.dim() != 2 or edge_index.size(0) != 2:
            raise ValueError(f"edge_index: got shape {tuple(edge_index.shape)}, expected (2, number of edges)")
        if edge_index.is_floating_point() or edge_index.is_complex() or edge_index.dtype == torch.bool:
            raise ValueError(f"edge_index: got {edge_index.dtype}, expected integers")
        # torch's gather on the CPU misreads expanded int32 indices, so that gradients would be silently wrong
        plain = edge_index.as_tensor() if isinstance(edge_index, EdgeIndex) else edge_index
        self.adj = edge_index if edge_index.dtype == torch.long else plain.long()
        plain = plain.long()
        self.edge_index = plain if flow == "source_to_target" else plain.flip(0)
        sizes = (self.num_src, self.num_dst) if flow == "source_to_target" else (self.num_dst, self.num_src)
        if isinstance(edge_index, EdgeIndex):
            for name, size, legal in zip(("first", "second"), edge_index.sparse_size(), sizes, strict=True):
                if size is not None and size != legal:
                    raise ValueError(f"edge_index: got an EdgeIndex of {size} {name} nodes, expected {legal}")
        if plain.device.type == "cpu" and plain.numel():  # elsewhere it would cost a host sync
            for row, size in zip(plain, sizes, strict=True):
                low, high = row.aminmax()
                if low < 0 or high >= size:
                    bad = int(low) if low < 0 else int(high)
                    raise ValueError(f"edge_index: got node {bad}, expected values in 0..{size - 1}")
        if edge_weight is not None or edge_attr is not None:
            self._check_rows(edge_weight, edge_attr)

    def _check_rows(self, edge_weight: Any, edge_attr: Any) -> None:
        for name, value in (("edge_weight", edge_weight), ("edge_attr", edge_attr)):
            if value is not None and not isinstance(value, Tensor):
                raise ValueError(f"{name}: got {type(value).__name__}, expected a tensor of a row for each edge")
            if value is not None and (value.dim() == 0 or value.size(0) != self.num_edges):
                rows = f"a row for each of {self.num_edges} edges"
                raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected {rows}")
        if edge_weight is not None and edge_weight.dim() != 1:
            raise ValueError(f"edge_weight: got shape {tuple(edge_weight.shape)}, expected ({self.num_edges},)")

    def _read_sparse(self, matrix: Any) -> None:
        """Edges and values of a matrix; CSR is sorted already."""
        shape, nodes = (matrix.size(0), matrix.size(1)), (self.num_dst, self.num_src)
        if shape != nodes:
            legal = f"(destinations, sources) = {nodes}"
            raise ValueError(f"edge_index: got a sparse matrix of shape {shape}, expected {legal}")
        if isinstance(matrix, Tensor) and matrix.layout == torch.sparse_coo:  # which PyG would mark in place
            matrix = matrix.coalesce().to_sparse_csr()
        self.adj = matrix
        if isinstance(matrix, SparseTensor):
            dst, src, value = matrix.coo()
        else:
            (dst, src), value = to_edge_index(matrix)
        self.edge_index, self.matrix_values = torch.stack([src, dst]), value
        if not isinstance(matrix, SparseTensor) and matrix.layout == torch.sparse_csr:
            every = torch.arange(src.numel(), device=src.device)
            self._shared["edges"] = Edges(matrix.crow_indices().long(), src.long(), dst.long(), self.num_src), every

    def with_args(self, edge_weight: Tensor | None, edge_attr: Tensor | None) -> Graph:
        """The same graph with these edge arguments, in the order of the edges as given; ``None`` keeps what it has."""
        if edge_weight is None and edge_attr is None:
            return self
        other = copy.copy(self)
        other._matrices, other._graphs = {}, {}
        other.edge_weight = self.edge_weight if edge_weight is None else edge_weight
        other.edge_attr = self.edge_attr if edge_attr is None else edge_attr
        self._check_rows(edge_weight, edge_attr)
        return other

    def masked(self, mask: Tensor | None) -> Graph:
        """The same graph with an explainer's factors (M,) on its messages, in the order of the edges as given."""
        if mask is None:
            return self
        other = copy.copy(self)
        other.mask = mask
        return other

    def seeing(self, constant: bool) -> Graph:
        """The same graph for features that later calls bring again (``True``), so that their sums cost nothing, or
        that are new in each call (``False``), so that these are not worth keeping; by default neither is known."""
        other = copy.copy(self)
        other.constant = constant and self.constant is not False
        return other

    def in_flow(self, flow: str) -> Graph:
        """The same graph as convs of that ``flow`` read it.

        Raises:
            ValueError: another flow than its own on a sparse matrix, of which a row is always a destination.
        """
        if flow == self.flow:
            return self
        if self.is_sparse or self._parent is not None:
            got = f"{type(self.adj).__name__} for a conv of flow={flow!r}"
            legal = "plain edges (2, number of edges), or the transposed matrix and the default flow"
            raise ValueError(f"edge_index: got {got}, expected {legal}")
        if self.num_src != self.num_dst:  # the ends would be out of range
            raise ValueError(
                f"flow: got {flow!r} for {self}, expected as many sources as destinations, or flow= of Graph"
            )
        if flow not in self._graphs:
            weight, attr = self.edge_weight, self.edge_attr
            with torch.inference_mode(False):  # what a graph keeps is for training too
                self._graphs[flow] = Graph(self.adj, self.num_src, edge_weight=weight, edge_attr=attr, flow=flow)
        other = self._graphs[flow].masked(self.mask)
        return other if self.constant is None else other.seeing(self.constant)

    def to(self, device: torch.device | str) -> Graph:
        """Move the graph to a device; returns itself if it is there already."""
        if self.adj.device == torch.device(device):
            return self
        weight, attr = (None if v is None else v.to(device) for v in (self.edge_weight, self.edge_attr))
        nodes = (self.num_src, self.num_dst)
        moved = Graph(self.adj.to(device), nodes, edge_weight=weight, edge_attr=attr, flow=self.flow)
        moved._parent = self._parent
        return moved

    @property
    def num_edges(self) -> int:
        """M."""
        return int(self.edge_index.size(1))

    @property
    def _sorted(self) -> tuple[Edges, Tensor]:
        if "edges" not in self._shared:
            self._shared["edges"] = Edges.sorted(self.edge_index[0], self.edge_index[1], self.num_src, self.num_dst)
        return self._shared["edges"]

    @property
    def edges(self) -> Edges:
        """The edges by destination; the order in which :attr:`weight` and :attr:`attr` come."""
        return self._sorted[0]

    @property
    def order(self) -> Tensor:
        """(M,) which of the edges as given each of :attr:`edges` is; -1 for a loop that was added."""
        order = self._sorted[1]
        return order if self._origin is None else self._origin.index_select(0, order)

    @property
    def weight(self) -> Tensor | None:
        """(M,) the weight of each of :attr:`edges`: ``edge_weight``, or the values of a sparse matrix.

        Raises:
            ValueError: both are given; PyG would ignore the tensor.
        """
        if self.is_sparse and self.edge_weight is not None:
            raise ValueError(WEIGHTS_TWICE)
        own = self.matrix_values if self.matrix_values is not None and self.matrix_values.dim() == 1 else None
        given = own if self.edge_weight is None else self.edge_weight
        return None if given is None else given.index_select(0, self._sorted[1])

    @property
    def attr(self) -> Tensor | None:
        """(M, F) the features of each of :attr:`edges`: ``edge_attr``, or a sparse matrix's values if they are rows."""
        own = self.matrix_values if self.matrix_values is not None and self.matrix_values.dim() > 1 else None
        given = own if self.edge_attr is None else self.edge_attr
        if given is None:
            return None
        return (given if given.dim() > 1 else given[:, None]).index_select(0, self._sorted[1])

    @property
    def values(self) -> Tensor | None:
        """(M,) those of a ``torch.sparse`` matrix, by which PyG's convs without edge weights multiply messages too."""
        value = None if isinstance(self.adj, SparseTensor) else self.matrix_values
        return None if value is None or value.dim() > 1 else value.index_select(0, self._sorted[1])

    @property
    def in_degree(self) -> Tensor:
        """(N_dst,) edges into each destination."""
        return self.edges.degree

    def mean(self, x_src: Tensor, keep: bool | None = None) -> Tensor:
        """(N_dst, D) the mean over in-edges of ``x_src``; zero without any.

        Args:
            x_src: (N_src, D) features.
            keep: whether another sum of this ``x_src`` may follow; by default unless :attr:`constant` is ``False``.
        """
        matrix = self.weighted(None, True, torch.promote_types(x_src.dtype, torch.float32))
        keep = self.constant is not False if keep is None else keep
        return (matrix.kept if keep else matrix.times)(x_src).to(x_src.dtype)

    def weighted(self, by: Literal["weight", "values"] | None, mean: bool, dtype: torch.dtype) -> Matrix:
        """The matrix of a sum over in-edges, or of a mean.

        Args:
            by: :attr:`weight` or :attr:`values`, by which messages are multiplied, where the graph has these.
            mean: divide by the number of in-edges.
            dtype: of the entries, at least.
        """
        given = self.edge_weight if by == "weight" and self.edge_weight is not None else self.matrix_values
        by = None if given is None else by
        known = self._matrices if by == "weight" else self._shared
        learned = by is not None and given is not None and given.requires_grad  # so that nothing of it is kept
        if (by, mean, dtype) in known and not learned:
            return known[by, mean, dtype]
        weight = None if by is None else getattr(self, by)
        if weight is None:
            weight = torch.ones_like(self.edges.sender, dtype=dtype)
        if mean:
            degree = self.in_degree.to(torch.promote_types(weight.dtype, dtype))
            weight = weight / degree.index_select(0, self.edges.receiver)
        matrix = Matrix(self.edges, weight)
        if not learned and not weight.is_inference():
            known[by, mean, dtype] = matrix
        return matrix

    def normalized(self, improved: bool, loops: bool, dtype: torch.dtype) -> Matrix:
        r"""The matrix :math:`D^{-1/2} (A + I) D^{-1/2}`, as PyG's ``GCNConv`` has them.

        Args:
            improved: see ``GCNConv``.
            loops: the ``+ I``.
            dtype: of the entries.
        """
        key = improved, loops, dtype
        value = self.matrix_values if self.is_sparse else self.edge_weight
        learned = value is not None and value.requires_grad  # so that nothing of it is kept
        if key in self._matrices and not learned:
            return self._matrices[key]
        if self._parent is not None:
            matrix = self._part_of_normalized(improved, loops, dtype)
            return matrix if learned else self._matrices.setdefault(key, matrix)
        if self.is_sparse and self.edge_weight is not None:
            raise ValueError(WEIGHTS_TWICE)
        if "edges" not in self._shared:
            self._shared["edges"] = Edges.sorted(self.edge_index[0], self.edge_index[1], self.num_src, self.num_dst)
        edges, order = self._shared["edges"]
        weight = torch.ones_like(edges.sender, dtype=dtype) if value is None else value.index_select(0, order)
        fill = 2.0 if improved and (value is not None or self.is_sparse) else 1.0
        added = weight.new_full((self.num_dst,), fill if loops else 0.0)
        if loops and not (self.is_sparse and isinstance(self.adj, Tensor)):  # one, in place of those there are
            is_loop = edges.sender == edges.receiver
            if value is not None and not self.is_sparse:  # which keeps their weight
                added = added.index_put((edges.receiver[is_loop],), weight[is_loop])
            weight = torch.where(is_loop, 0.0, weight)
        scale = (weight.new_zeros(self.num_dst).index_add(0, edges.receiver, weight) + added).pow(-0.5)
        scale = scale.masked_fill(scale == torch.inf, 0.0)
        weight = scale.index_select(0, edges.receiver) * weight * scale.index_select(0, edges.sender)
        if loops:  # a row's loop behind its edges
            node = torch.arange(self.num_dst, device=edges.ptr.device)
            place = torch.arange(edges.sender.numel(), device=edges.ptr.device) + edges.receiver
            last, total = edges.ptr[1:] + node, edges.sender.numel() + self.num_dst
            ptr = torch.cat([edges.ptr[:1], last + 1])
            sender = node.new_empty(total).index_copy_(0, place, edges.sender).index_copy_(0, last, node)
            receiver = node.new_empty(total).index_copy_(0, place, edges.receiver).index_copy_(0, last, node)
            edges = Edges(ptr, sender, receiver, self.num_src)
            weight = weight.new_zeros(total).index_copy(0, place, weight).index_copy(0, last, scale * added * scale)
        matrix = Matrix(edges, weight)
        if not learned and not weight.is_inference():
            self._matrices[key] = matrix
        return matrix

    def _part_of_normalized(self, improved: bool, loops: bool, dtype: torch.dtype) -> Matrix:
        """Of the normalized whole, the in-edges of the destinations that this part is of."""
        whole = self._parent[0].normalized(improved, loops, dtype)
        edge, sender, receiver = self._rows_of(whole.edges)
        ptr = torch._convert_indices_from_coo_to_csr(receiver, self.num_dst)
        weight = whole.weight.index_select(0, edge).to(sender.device)
        return Matrix(Edges(ptr, sender, receiver, self.num_src), weight)

    def _rows_of(self, edges: Edges) -> tuple[Tensor, Tensor, Tensor]:
        """Of edges of the whole that this is a part of: which end in it, and their ends by the numbers of the part."""
        _, token, known, place = self._parent
        edge, receiver = edges.of(token)
        sender = place[torch.searchsorted(known, edges.sender.index_select(0, edge))]
        return edge, sender.to(self.adj.device), receiver.to(self.adj.device)

    @property
    def destinations(self) -> Tensor:
        """Of a part, the destinations of the whole that it is of."""
        found: Tensor = self._parent[1]
        return found

    def with_loops(self, fill_value: float | Tensor | str) -> Graph:
        """The graph with one loop at each node that is source and destination, in place of those it had.

        Args:
            fill_value: the loops' edge features, see ``torch_geometric.utils.add_self_loops``.
        """
        given = self.matrix_values if self.edge_attr is None else self.edge_attr
        kept = isinstance(fill_value, float | str) and (given is None or not given.requires_grad)
        key = "loops", fill_value
        if kept and key in self._graphs:
            return self._graphs[key]
        nodes = (self.num_src, self.num_dst)
        if self._parent is not None:  # loops' features may follow from edges that a part does not hold
            whole = self._parent[0].with_loops(fill_value)
            edge, sender, receiver = self._rows_of(whole.edges)
            attr = None if whole.attr is None else whole.attr.index_select(0, edge).to(sender.device)
            return Graph(torch.stack([sender, receiver]), nodes, edge_attr=attr)
        ends = torch.stack([self.edges.sender, self.edges.receiver])
        turned = self.flow == "target_to_source"  # PyG reduces over the second row of edge_index, whatever the flow
        ends = ends.flip(0) if turned else ends
        ends, kept_M = remove_self_loops(ends, torch.arange(ends.size(1), device=ends.device))
        attr = None if self.attr is None else self.attr.index_select(0, kept_M)
        ends, attr = add_self_loops(ends, attr, fill_value, min(nodes))
        looped = Graph(ends.flip(0) if turned else ends, nodes, edge_attr=attr)
        origin = self.order.index_select(0, kept_M)
        looped._origin = torch.cat([origin, origin.new_full((min(nodes),), -1)])
        if kept and not ends.is_inference():
            self._graphs[key] = looped
        return looped

    def args_for(self, conv: MessagePassing) -> dict[str, Tensor]:
        """What this conv takes of the edge arguments, in the order of the edges as given."""
        given = {"edge_weight": self.edge_weight, "edge_attr": self.edge_attr}
        return {name: v for name, v in given.items() if v is not None and name in parameters_of(conv)}

    def part(self, token: Tensor) -> tuple[Tensor, Graph]:
        """The in-edges of some destinations, as a graph of its own.

        Args:
            token: (n,) distinct destinations.

        Returns:
            (S,) the nodes, the destinations first, and their graph, in the form and flow of this one: of S nodes where
            this one's sources are its destinations, else of S sources and n destinations. A destination that is no
            source (N_dst > N_src) is left out of the nodes. Where no edge ends in ``token``, one more destination is
            there behind them, since some convs fail on graphs without edges; ``destinations`` are all of them.
        """
        edge, position = self.edges.of(token)
        if edge.numel() == 0 and self.num_edges:  # some convs fail without any: one more destination, that has some
            token = torch.cat([token, self.edges.receiver[:1]])
            edge, position = self.edges.of(token)
        among = token[token < self.num_src]
        known, inverse = torch.unique(torch.cat([among, self.edges.sender.index_select(0, edge)]), return_inverse=True)
        place = torch.full_like(known, -1)
        place[inverse[: len(among)]] = torch.arange(len(among), device=token.device)
        others = place < 0
        place[others] = torch.arange(len(among), len(known), device=token.device)
        nodes = torch.empty_like(known)
        nodes[place] = known
        source = place[inverse[len(among) :]]
        size = (len(nodes), len(nodes) if self.num_src == self.num_dst else len(token))
        given = self.order.index_select(0, edge)
        weight, attr = (None if v is None else v.index_select(0, given) for v in (self.edge_weight, self.edge_attr))
        adj: Any = torch.stack([source, position] if self.flow == "source_to_target" else [position, source])
        ptr = torch._convert_indices_from_coo_to_csr(position, size[1])
        if self.is_sparse:
            value: Any = None if self.matrix_values is None else self.matrix_values.index_select(0, given)
            if isinstance(self.adj, SparseTensor):
                adj = SparseTensor(row=position, col=source, value=value, sparse_sizes=size[::-1])
            else:
                adj = torch.sparse_csr_tensor(ptr, source, value, size=size[::-1], check_invariants=False)
        part = Graph(adj, size, edge_weight=weight, edge_attr=attr, flow=self.flow)
        part._parent, part.constant = (self, token, known, place), False
        every = torch.arange(len(position), device=position.device)
        part._shared["edges"] = Edges(ptr, source, position, size[0]), every  # they come in that order
        return nodes, part

    def __repr__(self) -> str:
        return f"Graph({self.num_src} sources, {self.num_dst} destinations, {self.num_edges} edges)"


def parameters_of(conv: MessagePassing) -> tuple[str, ...]:
    """What the conv's forward takes, in order."""
    return tuple(inspect.signature(conv.forward).parameters)


def check_batch(batch: Tensor | None, num_nodes: int) -> None:
    """Refuse a ``batch`` vector that does not say for each node which graph it belongs to."""
    fits = isinstance(batch, Tensor) and batch.shape == (num_nodes,) and not batch.is_floating_point()
    if batch is not None and not fits:
        got = f"shape {tuple(batch.shape)} of {batch.dtype}" if isinstance(batch, Tensor) else type(batch).__name__
        raise ValueError(f"batch: got {got}, expected one integer for each of {num_nodes} nodes")


def blocks(start: int, end: int, width: int, device: torch.device) -> Iterator[slice]:
    """Slices of the messages ``start:end``, to be worked on one after the other with a row of that width for each."""
    step = max((NUMBERS if device.type == "cpu" else NUMBERS_ON_GPU) // max(width, 1), 1)
    for first in range(start, end, step):
        yield slice(first, min(first + step, end))


class _WeightedSum(torch.autograd.Function):
    """In float32 at least, as sparse products, one a head: no row for each message."""

    @staticmethod
    def forward(ctx: Any, weight_MH: Tensor, value_UGC: Tensor, edges: Edges) -> Tensor:
        ctx.save_for_backward(weight_MH, value_UGC)
        ctx.edges = edges
        dtype = torch.promote_types(weight_MH.dtype, value_UGC.dtype)
        exact = torch.promote_types(dtype, torch.float32)
        heads, groups = weight_MH.size(1), value_UGC.size(1)
        rows = value_UGC.flatten(0, 1).to(exact)
        by_mkl = 0 < rows.size(1) * rows.element_size() <= NARROW and weight_MH.size(0) < 2**31  # its integers
        outs = []
        for head, weight_M in enumerate(weight_MH.to(exact).T.contiguous()):
            column = edges.sender if groups == 1 else edges.sender * groups + head
            if rows.device.type in SPARSE_DEVICES and weight_M.numel():
                size = (edges.ptr.numel() - 1, rows.size(0))
                matrix = torch.sparse_csr_tensor(edges.ptr, column, weight_M, size, check_invariants=False)
                if by_mkl:  # with out=, since autocast leaves that alone
                    outs.append(torch.mm(matrix, rows, out=rows.new_empty(size[0], rows.size(1))))
                else:
                    outs.append(torch.sparse.mm(matrix, rows, "sum"))
                continue
            out = rows.new_zeros(edges.num_receivers, rows.size(1))
            for block in blocks(0, weight_M.numel(), rows.size(1), rows.device):
                row_BC = rows.index_select(0, column[block]) * weight_M[block, None]
                out.index_add_(0, edges.receiver[block], row_BC)
            outs.append(out)
        return (outs[0][:, None] if heads == 1 else torch.stack(outs, dim=1)).to(dtype)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_RHC: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        weight_MH, value_UGC = ctx.saved_tensors
        grad_weight = grad_value = None
        if ctx.needs_input_grad[0]:
            grad_weight = _products(grad_RHC, value_UGC, ctx.edges)
        if ctx.needs_input_grad[1]:
            reverse, order = ctx.edges.transpose
            same = weight_MH.stride(0) == 0  # in any order
            # rows of one are slow
            by_head = [w_M if same else w_M.index_select(0, order) for w_M in weight_MH.unbind(1)]
            weight_MH = by_head[0][:, None] if len(by_head) == 1 else torch.stack(by_head, dim=1)
            if value_UGC.size(1) == weight_MH.size(1):
                grad_value = weighted_sum(weight_MH, grad_RHC.contiguous(), reverse)
            else:  # all heads hear the same
                for weight_M1, grad_R1C in zip(weight_MH.split(1, dim=1), grad_RHC.split(1, dim=1), strict=True):
                    part = weighted_sum(weight_M1, grad_R1C.contiguous(), reverse)
                    grad_value = part if grad_value is None else grad_value.add_(part)
        return grad_weight, grad_value, None


class _Dot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query_RHC: Tensor, key_UGC: Tensor, edges: Edges) -> Tensor:
        ctx.save_for_backward(query_RHC, key_UGC)
        ctx.edges = edges
        return _products(query_RHC, key_UGC, edges)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_MH: Tensor) -> tuple[Tensor, Tensor, None]:
        query_RHC, key_UGC = ctx.saved_tensors
        reverse, order = ctx.edges.transpose
        grad_query = weighted_sum(grad_MH, key_UGC, ctx.edges)
        grad_key = weighted_sum(grad_MH.index_select(0, order), query_RHC, reverse)
        return grad_query, grad_key.sum_to_size(key_UGC.shape), None


def _products(query_RHC: Tensor, key_UGC: Tensor, edges: Edges) -> Tensor:
    """(M, H) the product of the two ends of each message."""
    dtype = torch.promote_types(query_RHC.dtype, key_UGC.dtype)
    exact = torch.promote_types(dtype, torch.float32)
    heads, groups = query_RHC.size(1), key_UGC.size(1)
    messages = edges.sender.numel()
    out_MH = query_RHC.new_zeros(messages, heads, dtype=exact)
    query_RHC, key_UGC = query_RHC.to(exact), key_UGC.to(exact)
    # torch cuts a matrix down to as many entries as it has cells
    entries = edges.num_receivers * edges.num_senders * groups
    if query_RHC.device.type in SPARSE_DEVICES and 0 < messages <= entries:
        rows = key_UGC.flatten(0, 1)
        size = (edges.num_receivers, rows.size(0))
        for head in range(heads):
            column = edges.sender if groups == 1 else edges.sender * groups + head
            zero_M = out_MH[:, head].contiguous()
            matrix = torch.sparse_csr_tensor(edges.ptr, column, zero_M, size, check_invariants=False)
            torch.sparse.sampled_addmm(matrix, query_RHC[:, head].contiguous(), rows.T, out=matrix)
            out_MH[:, head] = matrix.values()
        return out_MH.to(dtype)
    query_RHC = query_RHC.contiguous()
    for block in blocks(0, messages, heads * query_RHC.size(2), query_RHC.device):
        query_BHC = query_RHC.index_select(0, edges.receiver[block])
        torch.sum(query_BHC * key_UGC.index_select(0, edges.sender[block]), dim=-1, out=out_MH[block])
    return out_MH.to(dtype)


weighted_sum: Callable[[Tensor, Tensor, Edges], Tensor] = untraced(partial(_WeightedSum.apply))
r"""(R, H, C) what each receiver hears, :math:`y_{rh} = \sum_{m \to r} w_{mh} v_{u(m) h}`, of weights (M, H) and values
(U, H, C), or (U, 1, C) where all heads hear the same. Can be differentiated once."""

dot: Callable[[Tensor, Tensor, Edges], Tensor] = untraced(partial(_Dot.apply))
r"""(M, H) the products of the two ends, :math:`s_{mh} = q_{r(m) h} \cdot k_{u(m) h}`, of queries (R, H, C) and keys
(U, H, C), or (U, 1, C) where all heads share them. Can be differentiated once."""
