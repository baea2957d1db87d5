"""What public MoE layers get wrong, a section a trap, through our public classes. See also ``tests/contract.py``."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch_geometric.utils import k_hop_subgraph
from torchvision.models import VisionTransformer

from gmoe import (
    ROUTERS,
    GNNMoE,
    MLPExperts,
    MoE,
    MoEConv,
    aux_loss,
    build_router,
    count_flops,
    moefy,
    record_routing,
)
from tests.gmoe.conv.masked import features, random_graph, routing_of

T, D, E = 12, 8, 4
EDGES = random_graph(T, T, 40)
LEARNED = [name for name in ROUTERS if name not in ("random", "uniform")]


def moe(router: str = "token_choice", k: int = 1, **kwargs: Any) -> MoE:
    torch.manual_seed(0)
    return MoE(build_router(router, D, E, k, kwargs), MLPExperts(D, 16, D, E))


def layers(router: str = "token_choice", k: int = 1, **kwargs: Any) -> dict[str, tuple[nn.Module, Callable[..., Any]]]:
    """A layer of each kind with that router, and how to call it on (T, D) tokens."""
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "num_experts": E,
        "router": router,
        "k": k,
        "router_kwargs": kwargs,
        "shared_expert": False,
    }
    made: dict[str, nn.Module] = {
        "MoE": moe(router, k, **kwargs),
        "MoEConv": MoEConv("gcn", D, D, **options),
        "GNNMoE": GNNMoE(D, D, 3, 3, **options),
        "GNNMoE shared router": GNNMoE(D, D, 3, 3, shared_router=True, **options),
    }
    return {name: (layer, layer if name == "MoE" else partial(layer, edge_index=EDGES)) for name, layer in made.items()}


def router_gradients(layer: nn.Module) -> list[Tensor | None]:
    return [p.grad for name, p in layer.named_parameters() if "router" in name]


# the router of top-1 gets a gradient from the task


# several processes


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    yield
    # a DDP that outlives its group frees it under the GIL, for which the group's own thread may be waiting
    gc.collect()
    dist.destroy_process_group()


def two_steps(layer: nn.Module, call: Callable[..., Any]) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        call(features(T, D).float()).square().sum().backward()
        assert all(p.grad is not None for p in layer.parameters())
        optimizer.step()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    ("build", "args"),
    [
        (moe, ()),
        (lambda: MoEConv("gat", D, D, num_experts=20, shared_expert=False), (EDGES,)),
        (lambda: GNNMoE(D, D, 3, 3, conv="gin", num_experts=20), (EDGES,)),
    ],
    ids=["MoE", "MoEConv", "GNNMoE"],
)
def test_ddp_does_not_wait_for_starved_experts(build: Callable[[], nn.Module], args: tuple[Tensor, ...]) -> None:
    """DDP without ``find_unused_parameters`` raises in the second step where a parameter got no gradient."""
    layer = build()
    parallel = DistributedDataParallel(layer)
    two_steps(layer, lambda x: parallel(x, *args))


@pytest.mark.usefixtures("one_process")
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("router", LEARNED)
def test_fsdp2_shards_every_parameter(router: str) -> None:
    """It refuses scalars."""
    for layer, call in layers(router).values():
        fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
        two_steps(layer, call)


# counters under activation checkpointing


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    ("router", "kwargs", "counter"),
    [
        ("token_choice", {"noise": False}, "bias_E"),
        ("expert_choice", {"inference": "threshold"}, "threshold_E"),
        ("expert_choice", {"inference": "threshold", "normalize": "tokens"}, "log_scale_E"),
        ("multi_centroid", {"choice": "experts", "inference": "threshold"}, "threshold_E"),
    ],
)
def test_counters_advance_once_under_checkpointing(
    router: str, kwargs: dict[str, Any], counter: str, reentrant: bool
) -> None:
    for name, (layer, call) in layers(router, 1, **kwargs).items():
        twin = copy.deepcopy(layer)
        for step in range(2):
            x = features(T, D, seed=step).float().requires_grad_()
            call(x).sum().backward()
            args = (x,) if name == "MoE" else (x, EDGES)
            checkpoint(twin, *args, use_reentrant=reentrant).sum().backward()
        buffers = dict(twin.named_buffers())
        assert any(counter in key and bool(value.any()) for key, value in buffers.items()), name
        assert all(torch.equal(value, buffers[key]) for key, value in layer.named_buffers()), name


# the balance loss reaches the user


def test_the_balance_loss_is_a_return_value() -> None:
    for name, (layer, call) in layers(balance="switch", balance_coef=0.5).items():
        with record_routing(layer) as recorded:
            _, returned = call(features(T, D).float(), return_routing=True)
        loss = aux_loss(returned)
        assert float(loss.detach()) > 0.4, name
        torch.testing.assert_close(aux_loss(recorded), loss)
        loss.backward()
        assert all(grad is not None and grad.any() for grad in router_gradients(layer)), name


def test_the_balance_loss_survives_other_peoples_models() -> None:
    vit = VisionTransformer(8, 4, 4, 2, 16, 24, num_classes=5)
    moefy(vit, num_experts=4, k=1, router_kwargs={"balance": "switch"})
    with record_routing(vit) as routings:
        vit(torch.randn(2, 3, 8, 8))
    aux_loss(routings).backward()
    grads = router_gradients(vit)
    assert len(routings) == len(grads) == 2
    assert all(grad is not None and grad.any() for grad in grads)


# K of E experts are run


def flops(conv: str, num_experts: int, k: int, tokens: int = 60) -> int:
    """Of the experts alone: the routing is given, balanced over the experts."""
    edges = random_graph(tokens, tokens, 4 * tokens)
    first = torch.arange(tokens)[:, None] + torch.arange(k)
    weight = torch.zeros(tokens, num_experts).scatter(1, first % num_experts, 1.0)
    layer = MoEConv(conv, 32, 32, num_experts=num_experts, router=None, shared_expert=False)
    return count_flops(layer, torch.randn(tokens, 32), edges, routing=routing_of(weight))


@pytest.mark.parametrize("conv", ["gcn", "sage", "graph", "gin"])
def test_flops_of_shared_aggregation_grow_with_k_and_are_flat_in_e(conv: str) -> None:
    aggregation = 2 * flops(conv, 4, 1) - flops(conv, 4, 2)
    assert flops(conv, 4, 1) == flops(conv, 16, 1)
    assert flops(conv, 4, 2) == flops(conv, 16, 2)
    assert flops(conv, 4, 4) == aggregation + 4 * (flops(conv, 4, 1) - aggregation)


@pytest.mark.parametrize("conv", ["le", "resgatedgraph"])
def test_messages_of_local_convs_follow_k_not_e(conv: str) -> None:
    edges = torch.cat([EDGES, torch.stack([torch.arange(T).roll(1), torch.arange(T)])], dim=1)  # each node hears one

    def messages(num_experts: int, k: int) -> int:
        seen: list[int] = []
        layer: Any = MoEConv(conv, D, D, num_experts=num_experts, k=k, shared_expert=False)
        for module in layer.experts.convs():
            module.register_message_forward_hook(lambda _, __, out: seen.append(out.size(0)))
        layer(features(T, D).float(), edges)
        return sum(seen)

    assert [messages(8, k) for k in (1, 2, 4)] == [k * edges.size(1) for k in (1, 2, 4)]
    assert messages(2, 1) == messages(16, 1) == edges.size(1)


# seeds only in loss and metric of a mini-batch


@pytest.mark.parametrize("shared_router", [False, True])
def test_seeds_of_a_mini_batch_have_the_outputs_and_gradients_of_the_full_graph(shared_router: bool) -> None:
    """With all neighbors of as many hops as the model looks: the seeds' rows are all that a loss needs."""
    num_nodes, seeds = 40, torch.tensor([3, 17])
    edge_index = random_graph(num_nodes, num_nodes, 60, seed=4)
    x = features(num_nodes, D)
    torch.manual_seed(0)
    options: dict[str, Any] = {"num_experts": E, "k": 2, "router_input": ("node", "neighbors")}
    model = GNNMoE(D, D, 3, 2, conv="sage", shared_router=shared_router, **options).double().eval()
    nodes, edges, place, _ = k_hop_subgraph(seeds, 3, edge_index, relabel_nodes=True)
    assert len(nodes) < num_nodes
    full, near = model(x, edge_index)[seeds], model(x[nodes], edges)[place]
    torch.testing.assert_close(near, full, rtol=0, atol=1e-10)
    parameters = list(model.parameters())
    ours, theirs = (torch.autograd.grad(out.square().sum(), parameters) for out in (near, full))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
