"""The contract of all public layers: a registry of cases, and a function for each clause.

``test_contract.py`` runs every clause on every case, on the CPU and, if there is one, on a GPU.
:func:`graph_breaks` gives the table of the docs.

Shapes: T tokens, D width, O out features, E experts, K experts a token.
"""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint
from torch_geometric.nn import HeteroConv
from torchvision.models import VisionTransformer

from gmoe import (
    BlockGNN,
    GNNMoE,
    LinearExperts,
    MLPExperts,
    MoE,
    MoEConv,
    Router,
    Routing,
    RoutingStats,
    SoftMoE,
    SoftSlots,
    ViTMoE,
    moefy,
    record_routing,
)
from gmoe.conv.base import ConvExperts, MixedExperts
from gmoe.routers import build_router
from tests.helpers.vits import SMALL_VIT

D, E, K = 8, 8, 2
FINE = torch.float64
SIZES = (7, 3, 5)
"""Nodes or tokens of each group.

The second has fewer pairs than there are experts: some experts starve.
"""
GROUPS = range(len(SIZES))
METADATA = (
    ["paper", "author"],
    [("paper", "cites", "paper"), ("author", "writes", "paper"), ("paper", "by", "author")],
)

# Inputs


@dataclass(frozen=True)
class Call:
    """The arguments of a forward, and (rows,) the group that each row of the output belongs to."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    group: Tensor

    def to(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Call:
        """Elsewhere, or in another precision."""

        def moved(value: Tensor) -> Tensor:
            return value.to(device, dtype if value.is_floating_point() else None)

        args, kwargs, group = tree_map_only(Tensor, moved, (self.args, self.kwargs, self.group))
        return Call(args, kwargs, group)


def drawn(group: int, *shape: int) -> Tensor:
    """Numbers that a group keeps, whoever is called with it."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(group))


def nodes(groups: Sequence[int], fewer: int = 0) -> tuple[Tensor, Tensor]:
    """(T, D) features of the groups' nodes, and (T,) their group, numbered anew."""
    sizes = torch.tensor([SIZES[group] - fewer for group in groups], dtype=torch.long)
    x = [drawn(group, SIZES[group] - fewer, D) for group in groups]
    return torch.cat([torch.zeros(0, D), *x]), torch.arange(len(groups)).repeat_interleave(sizes)


def edges(groups: Sequence[int], fewer_src: int = 0, fewer_dst: int = 0) -> Tensor:
    """(2, M) edges inside the groups; the last node of each has none."""
    found, first_src, first_dst = [torch.zeros(2, 0, dtype=torch.long)], 0, 0
    for group in groups:
        src, dst = SIZES[group] - fewer_src, SIZES[group] - fewer_dst
        ends = torch.randint(1 << 20, (2, 3 * dst), generator=torch.Generator().manual_seed(group))
        found.append(
            torch.stack(
                [first_src + ends[0] % max(src - 1, 1), first_dst + ends[1] % max(dst - 1, 1)]
            )
        )
        first_src, first_dst = first_src + src, first_dst + dst
    return torch.cat(found, dim=1)


def tokens(groups: Sequence[int]) -> Call:
    x, batch = nodes(groups)
    return Call((x,), {"batch": batch}, batch)


def graphs(groups: Sequence[int]) -> Call:
    x, batch = nodes(groups)
    return Call((x, edges(groups)), {"batch": batch}, batch)


def weighted_graphs(groups: Sequence[int]) -> Call:
    plain = graphs(groups)
    weight = torch.cat(
        [torch.zeros(0), *(drawn(group, 3 * SIZES[group]).abs() for group in groups)]
    )
    return Call(plain.args, {**plain.kwargs, "edge_weight": weight}, plain.group)


def relations(groups: Sequence[int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    (papers, of_papers), (authors, of_authors) = nodes(groups), nodes(groups, fewer=1)
    edge_index_dict = {
        ("paper", "cites", "paper"): edges(groups),
        ("author", "writes", "paper"): edges(groups, fewer_src=1),
        ("paper", "by", "author"): edges(groups, fewer_dst=1),
    }
    batch_dict = {"paper": of_papers, "author": of_authors}
    return ({"paper": papers, "author": authors}, edge_index_dict), {"batch_dict": batch_dict}


def by_relation(groups: Sequence[int]) -> Call:
    """Of PyG's HeteroConv, which gives a type's rows by relation."""
    args, kwargs = relations(groups)
    of_nodes = kwargs["batch_dict"]
    batch_dict = {relation: of_nodes[relation[-1]] for relation in METADATA[1]}
    return Call(args, {"batch_dict": batch_dict}, torch.cat(list(of_nodes.values())))


def images(groups: Sequence[int]) -> Call:
    pixels = torch.cat([torch.zeros(0, 3, 8, 8), *(drawn(group, 1, 3, 8, 8) for group in groups)])
    return Call((pixels,), {}, torch.arange(len(groups)))


# Cases


@dataclass(frozen=True)
class Case:
    """A public layer, what it is called with, and the clauses that cannot hold for it.

    Each of those has its reason.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[Sequence[int]], Call] = tokens
    exempt: Mapping[str, str] = field(default_factory=dict, compare=False)

    def make(
        self, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> nn.Module:
        """A copy of the layer of :func:`make_anew`, which takes longer to build than to copy."""
        return copy.deepcopy(made_once(self, device, dtype, seed))

    def call(
        self,
        groups: Sequence[int] = GROUPS,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Call:
        return self.inputs(groups).to(device, dtype)


def make_anew(
    case: Case, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0
) -> nn.Module:
    """The layer in training mode, after one forward, which running thresholds need."""
    torch.manual_seed(seed)
    layer = case.build().to(device, dtype)
    with torch.no_grad():
        run(layer, case.call(device=device, dtype=dtype))
    return layer


made_once = cache(make_anew)


def mlps(router: str, **kwargs: Any) -> MoE:
    return MoE(
        build_router(router, D, num_experts=E, k=K, kwargs=kwargs),
        MLPExperts(D, 12, 6, num_experts=E),
    )


def with_head(vit: VisionTransformer) -> VisionTransformer:
    """torchvision's head starts at zero, and hides what goes on before it."""
    for parameter in vit.heads.parameters():
        nn.init.normal_(parameter)
    return vit


def dense_vit() -> VisionTransformer:
    return with_head(VisionTransformer(8, 4, 2, 2, 16, 24, num_classes=5))


def moefied() -> nn.Module:
    return opened(moefy(dense_vit(), every=1, num_experts=E))


def opened(model: nn.Module) -> Any:
    """With experts that give more than zero, as they do at the start, and copies that differ."""
    for name, parameter in model.named_parameters():
        if name.endswith("_difference"):
            nn.init.normal_(parameter, std=0.3)
    for layer in model.modules():
        if isinstance(layer, MoEConv) and layer.gain is not None:
            nn.init.constant_(layer.gain, 0.5)
        if isinstance(layer, MLPExperts):
            nn.init.normal_(layer.down.weight)
    return model


def soft() -> SoftMoE:
    return SoftMoE(SoftSlots(D, num_experts=E, slots=2), MLPExperts(D, 12, 6, num_experts=E))


NO_RESET = {
    "starts_on_the_meta_device": "torchvision's models are built with values; see reset_parameters"
}
OF_PYG = {"returns_what_is_recorded": "PyG's forward returns features"}

DETACHED = {
    "is_differentiated_twice": "weights are over a detached mean, which differences do not hold"
}
REPEATED_LOOPS = {
    "is_differentiated_twice": "as in PyG, each of a node's loops gets the gradient of the last"
}

ROUTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "token_choice": ("token_choice", {}),
    "token_choice switch": ("token_choice", {"balance": "switch", "capacity_factor": 1.0}),
    "token_choice bias": ("token_choice", {"balance": "bias", "bias_rate": 0.1}),
    "expert_choice": ("expert_choice", {}),
    "expert_choice threshold": ("expert_choice", {"inference": "threshold"}),
    "attention_vote": ("attention_vote", {"head_dim": 4}),
    "multi_centroid": ("multi_centroid", {}),
    "multi_centroid experts": ("multi_centroid", {"choice": "experts"}),
    "random": ("random", {}),
    "uniform": ("uniform", {}),
}
"""All but the oracle, whose tokens are numbered once and for all."""

CONVS: dict[str, Any] = {
    **{
        name: name
        for name in ("gcn", "sage", "graph", "gin", "gat", "gatv2", "transformer", "film")
    },
    "mixed": ["gcn", "sage", "gat", "film"] * 2,
}

COPIES = ("gcn", "gin", "gat", "film")
"""Kinds whose layers start as copies too: stacked, with buffers, with attention, one by one."""


def conv(kind: Any, **kwargs: Any) -> MoEConv:
    return opened(MoEConv(kind, D, 6, num_experts=E, k=K, **kwargs))


def gnn(**kwargs: Any) -> GNNMoE:
    return opened(GNNMoE(D, D, 5, 3, num_experts=E, k=K, **kwargs))


def hetero_conv() -> HeteroConv:
    """PyG's: a layer for each relation."""
    return HeteroConv({tuple(relation): conv("sage") for relation in METADATA[1]})


CASES = [
    *(
        Case(
            f"MoE {name}",
            partial(mlps, router, **options),
            exempt=DETACHED if name == "attention_vote" else {},
        )
        for name, (router, options) in ROUTERS.items()
    ),
    Case(
        "MoE linear",
        lambda: MoE(
            build_router("token_choice", D, num_experts=E, k=K), LinearExperts(D, 6, num_experts=E)
        ),
    ),
    Case(
        "MoE shared",
        lambda: MoE(
            build_router("token_choice", D, num_experts=E, k=K),
            LinearExperts(D, 6, num_experts=E),
            nn.Linear(D, 6),
        ),
    ),
    Case("SoftMoE", soft),
    *(
        Case(f"MoEConv {name}", partial(conv, kind, start="shared"), graphs)
        for name, kind in CONVS.items()
    ),
    *(
        # Balanced, so that no conv of those that run one by one is left without a node.
        Case(
            f"MoEConv {name} copies",
            partial(conv, CONVS[name], start="copies", router_kwargs={"balance": "bias"}),
            graphs,
        )
        for name in COPIES
    ),
    Case(
        "MoEConv gcn full",
        partial(conv, "gcn", router_input=("node", "neighbors", "degree"), start="shared"),
        weighted_graphs,
        REPEATED_LOOPS,
    ),
    Case(
        "MoEConv sage narrow",
        lambda: opened(MoEConv("sage", D, 2, num_experts=3, k=K, start="shared")),
        graphs,
    ),
    Case("MoEConv sage expert_choice", partial(conv, "sage", router="expert_choice"), graphs),
    Case("HeteroConv", hetero_conv, by_relation, OF_PYG),
    Case("GNNMoE", partial(gnn, dropout=0.5, norm="batch_norm", jk="cat", start="shared"), graphs),
    Case(
        "GNNMoE shared router",
        partial(gnn, shared_router=True, router_input=("node", "neighbors"), start="shared"),
        graphs,
    ),
    Case("BlockGNN", lambda: opened(BlockGNN(D, D, 5, 2, num_experts=E, k=K)), graphs),
    Case("GNNMoE copies", partial(gnn, router_input=("node", "neighbors")), graphs),
    Case(
        "GNNMoE copies, a router a layer",
        partial(gnn, dropout=0.5, norm="batch_norm", jk="cat", shared_router=False),
        graphs,
    ),
    Case("ViTMoE", lambda: opened(with_head(ViTMoE(SMALL_VIT, num_experts=E))), images, NO_RESET),
    Case(
        "moefied ViT",
        moefied,
        images,
        {**NO_RESET, "returns_what_is_recorded": "torchvision's forward returns logits"},
    ),
]


# What clauses are made of


def run(layer: Callable[..., Any], call: Call) -> Tensor:
    """(rows, O) the output; of several node types, one behind the other."""
    return rows(layer(*call.args, **call.kwargs))


def rows(y: Any) -> Tensor:
    return torch.cat(list(y.values())) if isinstance(y, dict) else y


def train(
    layer: nn.Module, call: Call, forward: Callable[..., Any] | None = None
) -> dict[str, Tensor | None]:
    """Output, and the gradients of inputs and parameters, of one step."""
    leaves: list[Tensor] = []

    def leaf(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        leaves.append(value.detach().clone().requires_grad_())
        return leaves[-1]

    args, kwargs = tree_map_only(Tensor, leaf, (call.args, call.kwargs))
    torch.manual_seed(3)
    y = run(layer if forward is None else forward, Call(args, kwargs, call.group))
    y.float().square().sum().backward()
    inputs = {f"input {i}": value.grad for i, value in enumerate(leaves)}
    return {
        "output": y.detach(),
        **inputs,
        **{name: p.grad for name, p in layer.named_parameters()},
    }


def assert_alike(found: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=partial("{}: {}".format, name))


def assert_compiles(
    case: Case, calls: Sequence[Sequence[int]] = (GROUPS, [0, 2]), **options: Any
) -> None:
    """Outputs and gradients, of two calls of other sizes, equal those without."""
    torch.compiler.reset()
    layer = case.make()
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, **options)
    for groups in calls:
        assert_alike(train(twin, case.call(groups), compiled), train(layer, case.call(groups)))


def of_expert(experts: nn.Module, expert: int, num_experts: int) -> Iterator[Tensor | None]:
    """The gradients of one expert's parameters, stacked with the others' or on their own."""
    if isinstance(experts, MixedExperts):
        for part, members in zip(experts.groups, experts.members, strict=True):
            if expert in members:
                yield from of_expert(part, members.index(expert), len(members))
        return
    for module in experts.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.size(0) == num_experts and parameter.dim() > 1:
                yield None if parameter.grad is None else parameter.grad[expert]
        if isinstance(module, nn.ModuleList) and len(module) == num_experts:
            yield from (parameter.grad for parameter in module[expert].parameters())


def attributes(layer: nn.Module) -> dict[str, Any]:
    """Everything that the modules hold, by name."""
    found: dict[str, Any] = {}
    for name, module in layer.named_modules():
        for key, value in vars(module).items():
            listed = value if isinstance(value, list) else [value]
            items = value.items() if isinstance(value, dict) else enumerate(listed)
            found |= {f"{name}.{key}.{index}": item for index, item in items}
    return found


def routings_of(returned: Any) -> list[Routing]:
    """What ``return_routing=True`` gave, as a list."""
    if isinstance(returned, Routing):
        return [returned]
    return list(returned.values()) if isinstance(returned, dict) else returned


# Clauses


def trains_under_autocast(case: Case, device: str) -> None:
    """Finite values in bfloat16, and a finite gradient for every parameter."""
    layer = case.make(device)
    with torch.autocast(device, torch.bfloat16):
        found = train(layer, case.call(device=device))
    for name, value in found.items():
        assert value is not None, f"{name} has no gradient"
        assert bool(value.isfinite().all()), f"{name} is not finite"
        assert value.dtype == torch.float32 or name == "output"


def trains_every_parameter(case: Case, device: str) -> None:
    for name, value in train(case.make(device), case.call(device=device)).items():
        assert value is not None, f"{name} has no gradient"
        assert bool(value.any()) or "bias" in name, f"{name} has a gradient of zeros"


def is_copied(case: Case, device: str) -> None:
    layer, call = make_anew(case, device).eval(), case.call(device=device)
    torch.testing.assert_close(run(copy.deepcopy(layer), call), run(layer, call), rtol=0, atol=0)


def is_pickled(case: Case, device: str) -> None:
    layer, call = make_anew(case, device).eval(), case.call(device=device)
    torch.testing.assert_close(
        run(pickle.loads(pickle.dumps(layer)), call), run(layer, call), rtol=0, atol=0
    )


def is_restored_from_its_state_dict(case: Case, device: str) -> None:
    layer, other, call = (
        case.make(device).eval(),
        case.make(device, seed=5).eval(),
        case.call(device=device),
    )
    assert not torch.equal(run(other, call), run(layer, call))
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(run(other, call), run(layer, call), rtol=0, atol=0)


def takes_no_tokens(case: Case, device: str) -> None:
    """No nodes and no edges, or no images: an empty output, and gradients of zero."""
    layer, call = case.make(device), case.call((), device)
    for name, value in train(layer, call).items():
        assert value is not None, f"{name} has no gradient"
        assert not value.any(), name
    assert run(layer, call).shape == (0, *run(layer, case.call(device=device)).shape[1:])


def does_not_see_batch_mates(case: Case, device: str) -> None:
    """In evaluation, each graph or image of a batch has the output that it has alone."""
    layer = case.make(device, torch.float64).eval()
    together = case.call(device=device, dtype=torch.float64)
    y = run(layer, together)
    for group in GROUPS:
        alone = run(layer, case.call([group], device, torch.float64))
        torch.testing.assert_close(y[together.group == group], alone, rtol=0, atol=1e-10)


def gives_starved_experts_zero_gradients(case: Case, device: str) -> None:
    """Not ``None``, which distributed training would wait for."""
    layer = case.make(device)
    with record_routing(layer) as routings:
        found = train(layer, case.call([1], device))
    assert all(value is not None for value in found.values())
    if not isinstance(layer, MoE | MoEConv) or routings[0].load.min() > 0:
        return
    for expert, load in enumerate(routings[0].load.tolist()):
        gradients = list(of_expert(layer.experts, expert, layer.num_experts))
        assert gradients
        assert any(bool(value.any()) for value in gradients if value is not None) == (load > 0), (
            f"expert {expert}"
        )


def computes_in_float64(case: Case, device: str) -> None:
    """Float32 up to its rounding, and finer than that."""
    layer = case.make(device).eval()
    coarse = run(layer, case.call(device=device))
    fine = run(layer.double(), case.call(device=device, dtype=torch.float64))
    assert (coarse.dtype, fine.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(fine.float(), coarse, rtol=1e-3, atol=1e-4)
    assert not torch.equal(fine, fine.float().double())


def is_checkpointed(case: Case, device: str) -> None:
    """Recomputing in the backward pass changes no gradient, and counters move once."""
    layer, call = case.make(device), case.call(device=device)
    twin = copy.deepcopy(layer)
    for _ in range(2):
        found, expected = (
            train(twin, call, partial(checkpoint, twin, use_reentrant=False)),
            train(layer, call),
        )
        assert_alike(found, expected)
    for one, other in zip(twin.modules(), layer.modules(), strict=True):
        if isinstance(one, Router):  # batch norm's statistics move with every forward
            assert_alike(dict(one.named_buffers()), dict(other.named_buffers()))


def is_differentiated_twice(case: Case, device: str) -> None:
    """The gradient's own gradient, along a direction, is what its differences say."""
    layer, call = case.make(device, FINE).eval(), case.call(device=device, dtype=FINE)
    leaves: list[Tensor] = []

    def leaf(value: Tensor) -> Tensor:
        if value.is_floating_point():
            leaves.append(value.requires_grad_())
        return value

    tree_map_only(Tensor, leaf, (call.args, call.kwargs))
    leaves += layer.parameters()
    torch.manual_seed(4)
    with torch.no_grad():  # away from experts that are equal, or give zero
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    probe = [torch.randn_like(value) for value in leaves]
    step = [torch.randn_like(value) for value in leaves]

    def slope(create_graph: bool) -> Tensor:
        """The gradient of the output's squares, along the probe."""
        with sdpa_kernel(SDPBackend.MATH):  # torch's other kernels have no second gradients
            y = run(layer, call)
        gradients = torch.autograd.grad(
            y.square().sum(), leaves, create_graph=create_graph, materialize_grads=True
        )
        return torch.stack([(a * b).sum() for a, b in zip(gradients, probe, strict=True)]).sum()

    second = torch.autograd.grad(slope(True), leaves, materialize_grads=True)
    found = torch.stack([(a * b).sum() for a, b in zip(second, step, strict=True)]).sum()
    size = 1e-6
    sides: list[Tensor] = []
    for moved in (size, -2 * size):
        with torch.no_grad():
            torch._foreach_add_(leaves, step, alpha=moved)
        sides.append(slope(False))
    assert bool(found.abs() > 1e-3)
    expected = (sides[0] - sides[1]) / (2 * size)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def runs_without_gradients(case: Case, device: str) -> None:
    layer, call = case.make(device).eval(), case.call(device=device)
    expected = run(layer, call)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():  # in which torch's attention has a kernel of its own
            torch.testing.assert_close(run(layer, call), expected)
    # Nothing of that mode was kept
    torch.testing.assert_close(run(layer, call), expected, rtol=0, atol=0)


def starts_on_the_meta_device(case: Case, device: str) -> None:
    """Built without values, moved without values, drawn by ``reset_parameters``."""
    with torch.device("meta"):
        layer: Any = case.build()
    layer.to_empty(device=device)
    for value in (*layer.parameters(), *layer.buffers()):
        nn.init.constant_(value, torch.nan if value.is_floating_point() else 0)
    layer.reset_parameters()
    assert_all_finite(layer)
    assert bool(run(layer, case.call(device=device)).isfinite().all())


def assert_all_finite(layer: nn.Module) -> None:
    for name, value in (*layer.named_parameters(), *layer.named_buffers()):
        assert bool(value.isfinite().all()), f"{name} was not drawn"


def is_deterministic(case: Case, device: str) -> None:
    """In evaluation whatever the seed, in training under one seed."""
    layer, call = case.make(device), case.call(device=device)
    assert_alike(train(copy.deepcopy(layer), call), train(copy.deepcopy(layer), call))
    layer.eval()
    torch.manual_seed(1)
    first = run(layer, call)
    torch.manual_seed(2)
    torch.testing.assert_close(run(layer, call), first)


def serves_two_threads(case: Case, device: str) -> None:
    layer = case.make(device).eval()
    calls = [case.call([group], device) for group in GROUPS] * 2
    expected = [run(layer, call) for call in calls]
    with ThreadPoolExecutor(2) as pool:
        for found, wanted in zip(pool.map(partial(run, layer), calls), expected, strict=True):
            # But for rounding: a product depends on where its rows lie
            torch.testing.assert_close(found, wanted)


def returns_what_is_recorded(case: Case, device: str) -> None:
    layer, call = case.make(device).eval(), case.call(device=device)
    with record_routing(layer) as recorded:
        _, returned = layer(*call.args, **call.kwargs, return_routing=True)
    for one, other in zip(routings_of(returned), recorded, strict=True):
        assert torch.equal(one.to_dense(), other.to_dense())


def is_counted_by_routing_stats(case: Case, device: str) -> None:
    """Every layer's loads, of every update."""
    layer = case.make(device).eval()
    stats, call = RoutingStats.of(layer).to(device), case.call(device=device)
    for _ in range(2):
        with record_routing(layer) as recorded:
            run(layer, call)
        stats.update(recorded)
    assert (
        len(stats.compute())
        == len(recorded)
        == sum(isinstance(module, Router) for module in layer.modules())
    )
    for counted, routing in zip(stats.load, recorded, strict=True):
        assert torch.equal(counted, 2 * routing.load)


def runs_what_users_put_in(case: Case, device: str) -> None:
    """The parts whose hooks have to run.

    They are a graph's experts, the linear layers of experts and routers, and what replaces those.
    """
    layer, call, called = case.make(device).eval(), case.call(device=device), set[str]()
    linear, own = ("gate", "query", "key"), (LinearExperts, ConvExperts)
    hooked = {
        name: part
        for name, part in layer.named_modules()
        if isinstance(part, own) or name.endswith(linear)
    }
    # The base of copies is added to their differences, which are called.
    is_base = re.compile(r"(^|\.)experts\.base(\.|$)").search
    hooked = {name: part for name, part in hooked.items() if not is_base(name)}
    for name, module in hooked.items():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    plain = run(layer, call)
    assert called == set(hooked)
    for name in (name for name in called if not isinstance(hooked[name], ConvExperts)):
        parent, _, leaf = name.rpartition(".")
        twin = copy.deepcopy(layer)
        twin.get_submodule(parent).register_module(leaf, Halved(twin.get_submodule(name)))
        assert not torch.equal(run(twin, call), plain), name


class Halved(nn.Module):
    """As a library for fine-tuning would wrap a layer, which still shows what it wraps."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, *args: Any) -> Any:
        return self.base(*args) / 2


def leaves_itself_alone(case: Case, device: str) -> None:
    """No attribute, parameter or buffer of any module changes in evaluation.

    In training, the values of counters change, and nothing else.
    """
    layer, call = case.make(device).eval(), case.call(device=device)
    before, values = attributes(layer), copy.deepcopy(layer.state_dict())
    for training in (False, True):
        run(layer, call)
        changed = [
            name
            for name, value in attributes(layer).items()
            if before.get(name, before) is not value
        ]
        assert changed == [], f"training={training}"
        if not training:
            assert_alike(layer.state_dict(), values)
        layer.train()
        before = attributes(layer)


CLAUSES: list[Callable[[Case, str], None]] = [
    trains_under_autocast,
    trains_every_parameter,
    is_copied,
    is_pickled,
    is_restored_from_its_state_dict,
    takes_no_tokens,
    does_not_see_batch_mates,
    gives_starved_experts_zero_gradients,
    computes_in_float64,
    is_checkpointed,
    is_differentiated_twice,
    runs_without_gradients,
    starts_on_the_meta_device,
    is_deterministic,
    serves_two_threads,
    returns_what_is_recorded,
    is_counted_by_routing_stats,
    runs_what_users_put_in,
    leaves_itself_alone,
]


# Tables


TRANSFORMS: dict[str, Callable[[nn.Module, Call], Any]] = {
    "torch.jit.trace": lambda layer, call: torch.jit.trace(layer, call.args, check_trace=False)(
        *call.args
    ),
    "torch.export": lambda layer, call: torch.export.export(layer, call.args).module()(*call.args),
    "torch.func.grad": lambda layer, call: torch.func.grad(
        lambda x: rows(layer(x, *call.args[1:])).sum()
    )(call.args[0]),
}
"""What a layer may be put into, and called."""


def outcome(case: Case, name: str) -> str:
    """``"works"``, or the error."""
    layer, call = case.make().eval(), case.call()
    call = Call(call.args, {}, call.group)
    try:
        found = TRANSFORMS[name](layer, call)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return (
        "works"
        if name == "torch.func.grad" or torch.allclose(found, run(layer, call), atol=1e-5)
        else "differs"
    )


def graph_breaks(cases: Sequence[Case] = CASES) -> dict[str, int]:
    """How often ``torch.compile`` leaves the graph in a forward in training, by layer."""
    found = {}
    for case in cases:
        torch.compiler.reset()
        layer, call = case.make(), case.call()
        found[case.name] = torch._dynamo.explain(layer)(*call.args, **call.kwargs).graph_break_count
    return found


def host_syncs(cases: Sequence[Case] = CASES) -> dict[str, int]:
    """How often a forward in bfloat16 waits for the GPU, by layer."""
    found = {}
    for case in cases:
        layer, call = case.make("cuda"), case.call(device="cuda")
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught, torch.autocast("cuda", torch.bfloat16):
            warnings.simplefilter("always")
            run(layer, call)
        torch.cuda.set_sync_debug_mode("default")
        found[case.name] = sum("synchroniz" in str(warning.message) for warning in caught)
    return found
