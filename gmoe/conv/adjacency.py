"""The edges of a graph, read from each form in which PyG takes them, and checked.

Shapes: N_src sources, N_dst destinations, M edges, F features of an edge.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch_geometric import EdgeIndex
from torch_geometric.typing import Adj, SparseTensor

from gmoe._autograd import lazy, refuse_second_order
from gmoe._checks import INTEGERS, described
from gmoe._torch import row_pointers, rows_of_pointers
from gmoe.edges import Edges, ascends, check_ends
from gmoe.portable import refuse_in_export


@dataclass(eq=False)
class Adjacency:
    """The edges of a graph.

    Args:
        adj: the edges in the form they were given in; integers are int64.
        edge_index: (2, M) sources and destinations, in the order given.
        num_src: N_src.
        num_dst: N_dst.
        values: (M,) or (M, F) the values of a sparse matrix, in the order given.
        ordered: the messages along the edges, where they were sorted by destination when they were
            read; ``None`` where they are sorted once somebody asks.
        is_sparse: ``adj`` is a sparse matrix.
        is_sparse_tensor: it is a ``SparseTensor``; compiled code may not look at ``adj`` to find
            out.
    """

    adj: Adj
    edge_index: Tensor
    num_src: int
    num_dst: int
    values: Tensor | None = None
    ordered: Edges | None = None
    is_sparse: bool = False
    is_sparse_tensor: bool = False

    @lazy
    def edges(self) -> Edges:
        """The messages, sorted by destination."""
        if self.ordered is not None:
            return self.ordered
        sender, receiver = self.edge_index
        if self.edge_index.is_contiguous() and ascends(receiver):
            # Neither sorted nor copied: they may lie in a file.
            return Edges(row_pointers(receiver, self.num_dst), sender, receiver, self.num_src, None)
        return Edges.sorted(sender, receiver, self.num_src, self.num_dst, validate=False)

    @lazy
    def looped(self) -> Adjacency:
        """The messages, then a loop at each node that is source and destination.

        Loops that there were stay, so that the host does not wait for their number.
        """
        node = torch.arange(min(self.num_src, self.num_dst), device=self.sender.device)
        ends = torch.cat([torch.stack([self.sender, self.receiver]), node.expand(2, -1)], dim=1)
        edges = Edges.sorted(ends[0], ends[1], self.num_src, self.num_dst, validate=False)
        return Adjacency(ends, ends, self.num_src, self.num_dst, ordered=edges)

    @property
    def is_sorted(self) -> bool:
        """True if :attr:`edges` costs nothing."""
        return self.ordered is not None or "edges" in vars(self)

    @property
    def sender(self) -> Tensor:
        """(M,) the source of each message, in the order given unless they are :attr:`ordered`."""
        return self.edge_index[0] if self.ordered is None else self.ordered.sender

    @property
    def receiver(self) -> Tensor:
        """(M,) the destination of each message, likewise."""
        return self.edge_index[1] if self.ordered is None else self.ordered.receiver

    def of_messages(self, of_edges: Tensor) -> Tensor:
        """(M, ...) of the messages, in the order of :attr:`sender`, what edges as given have."""
        if self.ordered is None:
            return of_edges
        return of_edges.index_select(0, self.ordered.order)

    def degree(
        self,
        dtype: torch.dtype,
        weight: Tensor | None = None,
        loops: Tensor | float | None = None,
    ) -> Tensor:
        """(N_dst,) the sums of the messages' weights, or of ones, and of further numbers."""
        receiver = self.receiver
        if weight is None:
            weight = torch.ones_like(receiver, dtype=dtype)
        if not isinstance(loops, Tensor):
            loops = weight.new_full((self.num_dst,), loops or 0.0)
        return loops.index_add(0, receiver, weight)

    def to(self, device: torch.device | str) -> Adjacency:
        """Move the edges to a device."""
        return replace(
            self,
            adj=self.adj.to(device),
            edge_index=self.edge_index.to(device),
            values=None if self.values is None else self.values.to(device),
            ordered=self.edges.to(device) if self.is_sorted else None,
        )


def read_edge_index(edge_index: object, num_src: int, num_dst: int, flow: str) -> Adjacency:
    """The edges from two rows of nodes.

    Raises:
        ValueError: something else, nodes out of range (CPU tensors), or an ``EdgeIndex`` of other
            numbers of nodes.
    """
    if not (
        isinstance(edge_index, Tensor)
        and edge_index.dim() == 2
        and edge_index.dtype in INTEGERS
        and len(edge_index) == 2
    ):
        raise ValueError(
            f"edge_index: got {described(edge_index)}, expected integers of shape (2, number "
            "of edges), a sparse matrix or a Graph"
        )
    is_forward = flow == "source_to_target"
    if isinstance(edge_index, EdgeIndex):
        edge_index = _plain(edge_index, (num_src, num_dst) if is_forward else (num_dst, num_src))
    # torch's gather on the CPU misreads expanded int32 indices: gradients would be wrong.
    adj = edge_index.long()
    by_source = adj if is_forward else adj.flip(0)
    if not torch.compiler.is_compiling():
        check_ends(by_source, num_src, num_dst)
        return Adjacency(adj, by_source, num_src, num_dst)
    # The operator that sorts checks them: compiled code would drop a check that gives nothing.
    edges = Edges.sorted(by_source[0], by_source[1], num_src, num_dst)
    return Adjacency(adj, by_source, num_src, num_dst, ordered=edges)


def _plain(edge_index: EdgeIndex, nodes: tuple[int, int]) -> Tensor:
    """The edges of an ``EdgeIndex`` as a tensor.

    Raises:
        ValueError: it knows other numbers of nodes.
    """
    sizes = edge_index.sparse_size()
    for size, number in zip(sizes, nodes, strict=True):
        if size not in (None, number):
            raise ValueError(
                f"edge_index: got an EdgeIndex of sparse_size {sizes}, expected {nodes}, as "
                "there are nodes"
            )
    return edge_index.as_tensor()


def read_sparse(matrix: Tensor | SparseTensor, num_src: int, num_dst: int, flow: str) -> Adjacency:
    """The edges from a matrix, whose rows are the destinations.

    Raises:
        ValueError: a matrix of another shape, or another flow than PyG's default; a matrix in an
            exported model, which torch does not trace.
    """
    refuse_in_export("a sparse matrix", "edge_index of shape (2, number of edges)")
    shape = (matrix.size(0), matrix.size(1))
    nodes = (num_dst, num_src)
    if shape != nodes or flow != "source_to_target":
        raise ValueError(
            f"edge_index: got a sparse matrix of shape {shape} for flow={flow!r}, "
            f"expected (destinations, sources) = {nodes} and the default flow"
        )
    if isinstance(matrix, SparseTensor):
        ptr, src, values = matrix.csr()
    else:
        if matrix.layout != torch.sparse_csr:
            # A copy: PyG would mark a COO matrix as coalesced in place.
            matrix = matrix.to_sparse_coo().coalesce().to_sparse_csr()
        # Detached, since compiled code takes no views of a sparse matrix.
        ptr = matrix.crow_indices().detach().long()
        src = matrix.col_indices().detach().long()
        values = matrix.values()
        values = values.clone() if values.requires_grad else values.detach()
        if values.requires_grad:  # not the copy in inference mode
            values.register_hook(refuse_second_order)
    dst = rows_of_pointers(ptr, src)[0]
    # CSR is sorted by row already.
    order = torch.arange(src.numel(), device=src.device)
    edges = Edges(ptr, src, dst, num_src, order)
    is_sparse_tensor = isinstance(matrix, SparseTensor)
    edge_index = torch.stack([src, dst])
    return Adjacency(matrix, edge_index, num_src, num_dst, values, edges, True, is_sparse_tensor)


def adjacency_like(
    adj: Adj, flow: str, edge_index: Tensor, ptr: Tensor, values: Tensor | None, num_src: int
) -> Adj:
    """Other edges in the form of ``adj``, for PyG's convs.

    Args:
        adj: the edges of a graph, as it was given them.
        flow: of that graph.
        edge_index: (2, M) the other edges, sorted by destination.
        ptr: (N_dst + 1,) where those of each destination start.
        values: (M,) or (M, F) the values, if ``adj`` is a sparse matrix.
        num_src: N_src.
    """
    source, destination = edge_index
    size = (ptr.numel() - 1, num_src)
    if isinstance(adj, SparseTensor):
        return SparseTensor(row=destination, col=source, value=values, sparse_sizes=size)
    if adj.layout != torch.strided:
        assert values is not None
        return torch.sparse_csr_tensor(ptr, source, values, size=size, check_invariants=False)
    return edge_index if flow == "source_to_target" else edge_index.flip(0)


def check_edge_args(
    edge_weight: Tensor | None, edge_attr: Tensor | None, num_edges: int, is_sparse: bool
) -> None:
    """Refuse edge weights or features that do not fit the edges.

    Raises:
        ValueError: something else than a row for each edge; weights beside a sparse matrix.
    """
    rows = (num_edges,)
    if edge_weight is not None:
        if not isinstance(edge_weight, Tensor) or edge_weight.shape != rows:
            raise ValueError(
                f"edge_weight: got {described(edge_weight)}, expected a tensor of shape {rows}"
            )
        if is_sparse:
            # PyG would ignore the tensor.
            raise ValueError(
                "edge_weight: got a tensor, expected None, since a sparse matrix's values are the "
                "weights"
            )
    if edge_attr is None:
        return
    if not isinstance(edge_attr, Tensor) or edge_attr.shape[:1] != rows:
        raise ValueError(
            f"edge_attr: got {described(edge_attr)}, expected a row for each of {num_edges} edges"
        )
