"""The reference for MoEConv; not a test itself.

It is E separate PyG convs on the whole graph, masked by the routing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch_geometric import EdgeIndex
from torch_geometric.explain.algorithm.utils import clear_masks, set_masks

from gmoe import MoEConv, Routing
from gmoe._checks import parameters_of
from gmoe.conv.base import GAIN_SCALE

Features = Tensor | tuple[Tensor, Tensor]
Size = tuple[int, int]


def _edges(*pairs: tuple[int, int]) -> Tensor:
    return torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T.contiguous()


GRAPHS: dict[str, tuple[int, Tensor]] = {
    # Self-loops at 0 and 1 (twice), and a parallel edge 2 -> 3. Node 4 has no out-edges; 6 and 7
    # are isolated.
    "mixed": (
        8,
        _edges(
            (0, 0),
            (1, 1),
            (1, 1),
            (2, 3),
            (2, 3),
            (3, 2),
            (0, 1),
            (1, 2),
            (5, 0),
            (0, 5),
            (3, 4),
            (2, 4),
            (5, 3),
        ),
    ),
    "no edges": (4, _edges()),
    "one node": (1, _edges()),
    "one node and three loops": (1, _edges((0, 0), (0, 0), (0, 0))),
    "star": (6, _edges(*((i, 0) for i in range(1, 6)))),
}
"""Number of nodes and edges."""


def random_graph(num_src: int, num_dst: int, num_edges: int, seed: int = 0) -> Tensor:
    """Edges with self-loops and parallel ones.

    The last source and the last destination stay isolated.
    """
    generator = torch.Generator().manual_seed(seed)
    ends = [
        torch.randint(max(n - 1, 1), (num_edges,), generator=generator) for n in (num_src, num_dst)
    ]
    return torch.stack(ends)


def simple_graph(num_src: int, num_dst: int, loops: bool = True) -> Tensor:
    """No parallel edges, which a coalesced matrix cannot hold; in no order."""
    edges = random_graph(num_src, num_dst, 30).unique(dim=1)
    edges = edges if loops else edges[:, edges[0] != edges[1]]
    return edges[:, torch.randperm(edges.size(1), generator=torch.Generator().manual_seed(1))]


def coo(edge_index: Tensor, size: Size, value: Tensor | None = None) -> Tensor:
    value = torch.ones(edge_index.size(1), dtype=torch.float64) if value is None else value
    shape = (*size[::-1], *value.shape[1:])
    return torch.sparse_coo_tensor(
        edge_index.flip(0), value, shape, check_invariants=True
    ).coalesce()


def csr(edge_index: Tensor, size: Size, value: Tensor | None = None) -> Tensor:
    given = coo(edge_index, size, value)
    row, column = given.indices()
    ptr = torch._convert_indices_from_coo_to_csr(row, size[1])
    return torch.sparse_csr_tensor(ptr, column, given.values(), given.shape)


def sorted_by(row: int) -> Callable[[Tensor, Size], EdgeIndex]:
    def build(edge_index: Tensor, size: Size) -> EdgeIndex:
        order = edge_index[row].argsort(stable=True)
        return EdgeIndex(edge_index[:, order], sparse_size=size, sort_order="col" if row else "row")

    return build


FORMS: dict[str, Callable[[Tensor, Size], Any]] = {
    "EdgeIndex": lambda edges, size: EdgeIndex(edges, sparse_size=size),
    "EdgeIndex by col": sorted_by(1),
    "EdgeIndex by row": sorted_by(0),
    "EdgeIndex without size": lambda edges, _: EdgeIndex(edges),
    "coo": coo,
    "csr": csr,
    "not contiguous": lambda edges, _: edges.T.contiguous().T,
    "int32": lambda edges, _: edges.int(),
}
"""What edges may come as beside a plain tensor."""


@contextmanager
def default_float64() -> Iterator[None]:
    """PyG's EdgeIndex makes weights of the default type."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def features(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def weights(num_tokens: int, kind: str = "some", num_experts: int = 3) -> Tensor:
    """``"some"``: expert 1 is starved, some tokens have no expert, some have two."""
    weight_TE = features(num_tokens, num_experts, seed=3)
    if kind == "some":
        weight_TE[:, 1] = 0
        weight_TE[::3] = 0
        weight_TE[1::4, 0] = 0
    return torch.zeros_like(weight_TE) if kind == "none" else weight_TE


def routing_of(weight_TE: Tensor) -> Routing:
    """The routing with these weights; 0 is no pair."""
    expert, token = (weight_TE.T != 0).nonzero().T
    ends = (weight_TE != 0).sum(dim=0).cumsum(0).to(torch.int32)
    return Routing(token, ends, weight_TE[token, expert], weight_TE.detach(), weight_TE.size(0))


def mean_of_in_edges(x: Tensor, edge_index: Tensor) -> Tensor:
    adjacency = torch.zeros(len(x), len(x), dtype=x.dtype).index_put(
        (edge_index[1], edge_index[0]),
        torch.ones(edge_index.size(1), dtype=x.dtype),
        accumulate=True,
    )
    return adjacency @ x / adjacency.sum(dim=1, keepdim=True).clamp(min=1)


def masked(
    convs: list[Any], x: Features, adj: Any, routing: Routing, **edge_args: Tensor
) -> Tensor:
    """sum_e w_e * conv_e(x, A), each conv with the edge arguments that it takes."""
    weight_TE = routing.to_dense()
    outs = []
    for e, conv in enumerate(convs):
        args = {name: value for name, value in edge_args.items() if name in parameters_of(conv)}
        outs.append(weight_TE[:, e, None] * conv(x, adj, **args))
    return torch.stack(outs).sum(dim=0)


def gradient(value: Tensor) -> Tensor:
    return torch.zeros_like(value) if value.grad is None else value.grad


def as_convs(experts: Any, num_experts: int) -> list[dict[str, Tensor]]:
    """The gradients of the experts, by the names of the plain conv's parameters; NaN for none.

    If experts share a base, they are those of the differences, and the base's must be their sum.
    """
    twin = copy.deepcopy(experts)
    with torch.no_grad():
        for mine, own in zip(twin.parameters(), experts.parameters(), strict=True):
            mine.copy_(torch.full_like(own, torch.nan) if own.grad is None else own.grad)
        of = dict(twin.named_parameters())
        for name, value in of.items():
            if name.endswith("_base"):
                summed = of[name.removesuffix("_base") + "_difference"].sum(dim=0)
                torch.testing.assert_close(value, summed, rtol=1e-9, atol=1e-9, equal_nan=True)
                value.zero_()
    return [dict(twin.expert(index).named_parameters()) for index in range(num_experts)]


def assert_equals_masked(
    conv: MoEConv,
    x: Features,
    adj: Any,
    *,
    batch: Tensor | None = None,
    weight_TE: Tensor | None = None,
    reference_adj: Any = None,
    mask: Tensor | None = None,
    **edge_args: Tensor,
) -> None:
    """Outputs and all gradients equal those of the masked reference.

    The gradients are those of inputs, edge arguments, router and experts.

    Args:
        weight_TE: weights in place of the router's.
        reference_adj: edges for the reference, if it gets others.
        mask: an explainer's mask of the (plain) edges.
    """
    convs = [conv.experts.expert(index) for index in range(conv.num_experts)]
    always = [] if conv.shared_expert is None else [conv.shared_expert.expert(0)]
    state = copy.deepcopy(conv.state_dict())  # with the router's counters
    xs = [x] if isinstance(x, Tensor) else list(x)
    adj_reference = adj if reference_adj is None else reference_adj

    def run(reference: bool) -> tuple[dict[str, Tensor], Mapping[str, Tensor]]:
        conv.zero_grad(set_to_none=True)
        leaves = [value.detach().clone().requires_grad_() for value in xs]
        args = {
            name: value.detach().clone().requires_grad_(value.is_floating_point())
            for name, value in edge_args.items()
        }
        given = None if weight_TE is None else weight_TE.detach().clone().requires_grad_()
        inputs: Features = leaves[0] if isinstance(x, Tensor) else (leaves[0], leaves[1])
        follow = None if given is None else routing_of(given)
        shown = None if mask is None else mask.detach().clone().requires_grad_()
        if shown is not None:
            for part in (conv, *convs, *always):
                set_masks(part, shown, adj_reference)
        conv.load_state_dict(state)
        torch.manual_seed(0)  # the router's noise
        y, routing = conv(inputs, adj, **args, batch=batch, routing=follow, return_routing=True)
        if reference:
            y = masked(convs, inputs, adj_reference, routing, **args)
            y = y if conv.gain is None else GAIN_SCALE * conv.gain * y
            if always:
                y = y + masked(
                    always, inputs, adj_reference, routing_of(torch.ones_like(y[:, :1])), **args
                )
        y.backward(features(*y.shape, seed=5))
        for part in (conv, *convs, *always):
            clear_masks(part)
        found = {"y": y.detach(), **{f"x{i}": gradient(leaf) for i, leaf in enumerate(leaves)}}
        found |= {name: gradient(value) for name, value in args.items() if value.requires_grad}
        if given is not None:
            found["weight_TE"] = gradient(given) * (given != 0)
        if shown is not None:
            found["mask"] = gradient(shown)
        if conv.gain is not None:
            found["gain"] = gradient(conv.gain)
        if conv.router is not None:
            found |= {f"router.{name}": gradient(p) for name, p in conv.router.named_parameters()}
        if reference:
            theirs = [dict(plain.named_parameters()) for plain in (*convs, *always)]
            # what an option leaves unused has no gradient at all
            return found, {
                f"{e}.{n}": p.grad
                for e, own in enumerate(theirs)
                for n, p in own.items()
                if p.grad is not None
            }
        ours = as_convs(conv.experts, conv.num_experts)
        if always:
            ours += as_convs(conv.shared_expert, 1)
        return found, {f"{e}.{n}": p for e, own in enumerate(ours) for n, p in own.items()}

    (ours, own), (theirs, plain) = run(reference=False), run(reference=True)
    assert ours.keys() == theirs.keys()
    assert plain.keys() <= own.keys()
    ours |= {name: own[name] for name in plain}
    theirs |= plain
    assert all(value.shape == theirs[name].shape for name, value in ours.items())
    far = {
        name: float((value - theirs[name]).abs().max())
        for name, value in ours.items()
        if value.numel()
    }
    assert all(difference <= 1e-10 for difference in far.values()), f"largest differences: {far}"


def weighted(layer: Any, x: Tensor, edge_index: Tensor, weight_TE: Tensor) -> Tensor:
    """All experts on the whole batch, each times the weights of its nodes."""
    out = sum(
        weight_TE[:, e : e + 1] * layer.expert(e)(x, edge_index) for e in range(layer.num_experts)
    )
    assert isinstance(out, Tensor)
    if layer.shared_expert is not None:
        out = out + layer.shared_expert.expert(0)(x, edge_index)
    return out


def redrawn(model: Any) -> Any:
    """The model with random weights, in which no expert is a copy and no gain is zero."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return model.double().eval()
