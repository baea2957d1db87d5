"""The reference for MoEConv: E separate PyG convs on the whole graph, masked by the routing. Not a test itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch_geometric.nn import MessagePassing

from gmoe import MoEConv, Routing
from gmoe.conv.aggregate import GCNExperts, GINExperts, GraphConvExperts, SAGEExperts
from gmoe.conv.attention import AttentionExperts
from gmoe.conv.aggregate import FilterExperts
from gmoe.conv.graph import parameters_of
from gmoe.conv.base import MixedExperts
from gmoe.conv.aggregate import MLPConvExperts
from gmoe.conv.separate import SeparateExperts

Features = Tensor | tuple[Tensor, Tensor]

LINEARS: dict[type, tuple[str, ...]] = {
    GCNExperts: ("lin",),
    FilterExperts: ("lin",),
    SAGEExperts: ("lin_l", "lin_r"),
    GraphConvExperts: ("lin_rel", "lin_root"),
}


def _edges(*pairs: tuple[int, int]) -> Tensor:
    return torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T.contiguous()


GRAPHS: dict[str, tuple[int, Tensor]] = {
    "mixed": (  # self-loops at 0 and 1 (twice), a parallel edge 2 -> 3, node 4 without out-edges, 6 and 7 isolated
        8,
        _edges((0, 0), (1, 1), (1, 1), (2, 3), (2, 3), (3, 2), (0, 1), (1, 2), (5, 0), (0, 5), (3, 4), (2, 4), (5, 3)),
    ),
    "no edges": (4, _edges()),
    "one node": (1, _edges()),
    "one node and its loop": (1, _edges((0, 0))),
    "star": (6, _edges(*((i, 0) for i in range(1, 6)))),
}
"""Number of nodes and edges."""


def random_graph(num_src: int, num_dst: int, num_edges: int, seed: int = 0) -> Tensor:
    """Edges among all but the last source and destination, which stay isolated; with self-loops and parallel edges."""
    generator = torch.Generator().manual_seed(seed)
    ends = [torch.randint(max(n - 1, 1), (num_edges,), generator=generator) for n in (num_src, num_dst)]
    return torch.stack(ends)


def features(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def routing_of(weight_TE: Tensor) -> Routing:
    """The routing with these weights; 0 is no pair."""
    expert, token = (weight_TE.T != 0).nonzero().T
    ends = (weight_TE != 0).sum(dim=0).cumsum(0).to(torch.int32)
    return Routing(token, ends, weight_TE[token, expert], weight_TE.detach(), weight_TE.size(0))


def masked(convs: list[Any], x: Features, adj: Any, routing: Routing, **edge_args: Tensor) -> Tensor:
    """sum_e w_e * conv_e(x, A), each conv with the edge arguments that it takes."""
    weight_TE = routing.to_dense()
    outs = []
    for e, conv in enumerate(convs):
        args = {name: value for name, value in edge_args.items() if name in parameters_of(conv)}
        outs.append(weight_TE[:, e, None] * conv(x, adj, **args))
    return torch.stack(outs).sum(dim=0)


def separate(conv: MoEConv) -> list[MessagePassing]:
    return [conv.expert(index) for index in range(conv.num_experts)]


def stacked(experts: Any, convs: list[Any], of: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """What ``of`` gives for the parameters of separate convs, under the names and shapes of the layer's own."""
    if isinstance(experts, MixedExperts):
        return {
            f"groups.{g}.{name}": value
            for g, (group, members) in enumerate(zip(experts.groups, experts.members, strict=True))
            for name, value in stacked(group, [convs[e] for e in members], of).items()
        }
    if isinstance(experts, SeparateExperts):
        return {f"convs.{e}.{name}": of(p) for e, c in enumerate(convs) for name, p in c.named_parameters()}
    if isinstance(experts, MLPConvExperts):
        return {
            f"mlp.{part}.{kind}": torch.stack([of(value).T if kind == "weight" else of(value) for value in values])
            for part in ("up", "down")
            for kind in ("weight", "bias")
            if None not in (values := [getattr(getattr(c, part), kind) for c in convs])
        }
    if isinstance(experts, AttentionExperts):
        found = {name: torch.stack([of(getattr(c, name)) for c in convs]) for name in experts._vectors(convs[0])}
        for name, layer in experts._layers(convs[0]).items():
            layers = [getattr(c, name) for c in convs]
            found[f"{name}.weight"] = torch.stack([of(layer.weight).T for layer in layers])
            if layer.bias is not None:
                found[f"{name}.bias"] = torch.stack([of(layer.bias) for layer in layers])
        return found
    if isinstance(experts, GINExperts):
        found = {f"nns.{e}.{name}": of(p) for e, c in enumerate(convs) for name, p in c.nn.named_parameters()}
        if isinstance(convs[0].eps, torch.nn.Parameter):
            found["eps_E"] = torch.cat([of(c.eps) for c in convs])
        return found
    names = [name for name in LINEARS[type(experts)] if hasattr(convs[0], name)]
    weights = [torch.cat([of(getattr(c, name).weight) for name in names], dim=1).T for c in convs]
    found = {"linear.weight": torch.stack(weights)}
    own_bias = isinstance(experts, GCNExperts | FilterExperts)
    biased = [c if own_bias else getattr(c, names[0]) for c in convs]
    if biased[0].bias is not None:
        found["linear.bias"] = torch.stack([of(part.bias) for part in biased])
    return found


def gradient(value: Tensor) -> Tensor:
    return torch.zeros_like(value) if value.grad is None else value.grad


def assert_equals_masked(
    conv: MoEConv,
    x: Features,
    adj: Any,
    *,
    batch: Tensor | None = None,
    weight_TE: Tensor | None = None,
    reference_adj: Any = None,
    **edge_args: Tensor,
) -> None:
    """Outputs and gradients of inputs, edge arguments, router and experts equal those of the masked reference.

    ``weight_TE``: weights to follow in place of the router's. ``reference_adj``: edges for the reference if others.
    """
    convs = separate(conv)
    always = None if conv.shared is None else conv.shared.expert(0)
    xs = [x] if isinstance(x, Tensor) else list(x)
    adj_reference = adj if reference_adj is None else reference_adj

    def run(reference: bool) -> dict[str, Tensor]:
        conv.zero_grad(set_to_none=True)
        leaves = [value.detach().clone().requires_grad_() for value in xs]
        args = {name: value.detach().clone().requires_grad_() for name, value in edge_args.items()}
        given = None if weight_TE is None else weight_TE.detach().clone().requires_grad_()
        inputs: Features = leaves[0] if isinstance(x, Tensor) else (leaves[0], leaves[1])
        follow = None if given is None else routing_of(given)
        y, routing = conv(inputs, adj, **args, batch=batch, routing=follow, return_routing=True)
        if reference:
            y = masked(convs, inputs, adj_reference, routing, **args)
            if conv.shared is not None:
                y = y + masked([always], inputs, adj_reference, Routing.everyone(y.size(0), y), **args)
        y.backward(features(*y.shape, seed=5))
        found = {"y": y.detach(), **{f"x{i}": gradient(leaf) for i, leaf in enumerate(leaves)}}
        found |= {name: gradient(value) for name, value in args.items()}
        if given is not None:
            found["weight_TE"] = gradient(given) * (given != 0)
        if conv.router is not None:
            found |= {f"router.{name}": gradient(p) for name, p in conv.router.named_parameters()}
        own = {name: gradient(p) for name, p in conv.experts.named_parameters()}
        if conv.shared is not None:
            mine = {name: gradient(p) for name, p in conv.shared.named_parameters()}
            theirs = stacked(conv.shared, [always], gradient) if reference else mine
            found |= {f"shared.{name}": value for name, value in theirs.items()}
        return found | (stacked(conv.experts, convs, gradient) if reference else own)

    ours, theirs = run(reference=False), run(reference=True)
    assert ours.keys() == theirs.keys()
    far = {name: float((value - theirs[name]).abs().max()) for name, value in ours.items() if value.numel()}
    assert all(value.shape == theirs[name].shape for name, value in ours.items())
    assert all(difference <= 1e-10 for difference in far.values()), f"largest differences: {far}"
