"""What public MoE layers get wrong (the table in ANCHORS.md, a section a row), through our public classes."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch_geometric.utils import k_hop_subgraph
from torchvision.models import VisionTransformer

from gmoe import (
    ROUTERS,
    ExpertChoice,
    GNNMoE,
    LinearExperts,
    MLPExperts,
    MoE,
    MoEConv,
    TokenChoice,
    aux_loss,
    build_router,
    count_flops,
    moefy,
    record,
)
from tests.gmoe.conv.masked import features, random_graph, routing_of

T, D, E = 12, 8, 4
EDGES = random_graph(T, T, 40)
LEARNED = [name for name in ROUTERS if name not in ("random", "uniform")]
WEIGHTS = ["score", "straight_through"]


def moe(router: str = "token_choice", k: int = 1, **kwargs: Any) -> MoE:
    torch.manual_seed(0)
    return MoE(build_router(router, D, E, k, kwargs), MLPExperts(D, 16, D, E))


def layers(
    router: str = "token_choice", k: int = 1, **kwargs: Any
) -> dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]]:
    """Every public layer with that router, and how to call it on (T, D) tokens."""
    torch.manual_seed(0)
    made: dict[str, nn.Module] = {"MoE": moe(router, k, **kwargs)}
    for conv in ("gcn", "gat", "gin"):
        made[f"MoEConv {conv}"] = MoEConv(conv, D, D, num_experts=E, router=router, k=k, router_kwargs=kwargs)
    for mode in ("layer", "shared"):
        options: Any = {"routing": mode, "router": router, "k": k, "router_kwargs": kwargs}
        made[f"GNNMoE {mode}"] = GNNMoE(D, D, 3, 3, num_experts=E, **options)
    return {name: (layer, layer if name == "MoE" else partial(layer, edge_index=EDGES)) for name, layer in made.items()}


def routers_of(layer: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in layer.named_parameters() if "router" in name}


# top-1 router gets a gradient from the task


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("router", LEARNED)
def test_top_1_router_gets_a_gradient_from_the_task(router: str, weight: str) -> None:
    for name, (layer, call) in layers(router, weight=weight).items():
        (call(features(T, D).float()) - 1.0).square().mean().backward()
        grads = routers_of(layer)
        assert grads, name
        assert all(grad is not None and float(grad.abs().max()) > 1e-8 for grad in grads.values()), name


@pytest.mark.parametrize("router", [*LEARNED, "random"])
def test_normalized_weights_at_k_1_are_refused(router: str) -> None:
    for build in (
        lambda: moe(router, weight="normalized"),
        lambda: MoEConv("gcn", D, D, router=router, router_kwargs={"weight": "normalized"}),
        lambda: GNNMoE(D, D, 3, router=router, router_kwargs={"weight": "normalized"}),
    ):
        with pytest.raises(ValueError, match=r"weight: got 'normalized' with k=1.*no gradient"):
            build()


# evaluation is deterministic


@pytest.mark.parametrize(
    ("router", "kwargs"), [(name, {}) for name in ROUTERS] + [("token_choice", {"noise": True, "capacity_factor": 0.5})]
)
def test_evaluation_is_deterministic(router: str, kwargs: dict[str, Any]) -> None:
    x = features(T, D).float()
    for layer, call in layers(router, 2, **kwargs).values():
        layer.eval()
        torch.manual_seed(1)
        first = call(x)
        torch.manual_seed(2)
        assert torch.equal(call(x), first)


def test_training_noise_is_there_to_be_turned_off() -> None:
    layer, x = moe(noise=True), features(T, D).float()
    assert not torch.equal(layer(x), layer(x))


# evaluation does not depend on the batch


@pytest.mark.parametrize("router", ROUTERS)
def test_evaluation_of_an_image_does_not_depend_on_its_batch(router: str) -> None:
    layer, x = moe(router, 2).eval(), features(5, T, D).float()
    torch.testing.assert_close(layer(x)[2], layer(x[2:3])[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(layer(x)[2], layer(x[2]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("router", ROUTERS)
def test_evaluation_of_a_graph_does_not_depend_on_its_batch(router: str) -> None:
    x, batch = features(2 * T + 3, D), torch.tensor([0] * T + [1] * (T + 3))
    edges = torch.cat([EDGES, EDGES + T], dim=1)
    for name, (layer, call) in layers(router, 2).items():
        layer.double().eval()
        alone = call(x[:T])
        together = layer(x, batch) if name == "MoE" else layer(x, edges, batch=batch)
        torch.testing.assert_close(together[:T], alone, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "make",
    [
        lambda: TokenChoice(D, E, 2, capacity_factor=1.0),
        lambda: ExpertChoice(D, E, 2, inference="threshold"),
        lambda: ExpertChoice(D, E, 2, inference="threshold", normalize="tokens"),
    ],
    ids=["token choice", "threshold", "threshold along tokens"],
)
def test_evaluation_of_a_token_does_not_depend_on_other_tokens(make: Callable[[], Any]) -> None:
    layer, x = MoE(make(), LinearExperts(D, D, E)), features(T, D).float()
    layer(x)  # a training step, which thresholds need
    layer.eval()
    torch.testing.assert_close(layer(torch.cat([x, 10 * x]))[:T], layer(x), rtol=0, atol=1e-6)


# starved experts have gradients


def test_starved_experts_have_zero_gradients() -> None:
    x = features(T, D).float().abs() + 0.1
    for name, (layer, call) in layers(k=1).items():
        for module in layer.modules():
            if isinstance(module, TokenChoice):
                with (
                    torch.no_grad()
                ):  # all tokens of positive features to expert 0; hidden ones too, they are rectified
                    module.gate.weight.fill_(-1.0)[0] = 1.0
        call(x).sum().backward()
        assert all(p.grad is not None for p in layer.parameters()), name
    experts = moe().experts
    assert isinstance(experts, MLPExperts)


@pytest.mark.parametrize("conv", ["gcn", "sage", "gin", "gat", "transformer"])
def test_experts_that_nobody_chose_have_zero_gradients(conv: str) -> None:
    layer = MoEConv(conv, D, D, num_experts=2, router=None)
    weight = torch.zeros(T, 2)
    weight[:, 0] = 1
    layer(features(T, D).float(), EDGES, routing=routing_of(weight)).square().sum().backward()
    alone = layer.expert(1)
    shapes = sum(p.numel() for p in alone.parameters())
    grads = [p.grad for p in layer.parameters()]
    assert all(grad is not None for grad in grads)
    zero = sum(int((grad == 0).sum()) for grad in grads if grad is not None)
    assert zero >= shapes


def test_distributed_training_does_not_wait_for_starved_experts(tmp_path: Path) -> None:
    """DDP without find_unused_parameters raises in the second step where a parameter got no gradient."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        for layer, args in (
            (moe(), ()),
            (MoEConv("gat", D, D, num_experts=20), (EDGES,)),
            (GNNMoE(D, D, 3, 3, conv="gin", num_experts=20), (EDGES,)),
        ):
            three_steps_in_parallel(layer, *args)
            assert all(p.grad is not None for p in layer.parameters())
    finally:
        # a DDP that outlives its group frees it under the GIL, for which the group's own thread may be waiting
        gc.collect()
        dist.destroy_process_group()


def three_steps_in_parallel(layer: nn.Module, *args: Tensor) -> None:
    parallel = DistributedDataParallel(layer)
    for _ in range(3):
        parallel(features(T, D).float(), *args).sum().backward()


# (N, D) input, as graphs have; zero tokens; float64


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("shape", [(T, D), (3, T, D), (2, 3, T, D), (1, D), (0, D), (0, T, D), (3, 0, D)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_leading_shape(router: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layer = moe(router, 2).to(dtype)
    x = features(*shape).to(dtype).requires_grad_()
    y, routing = layer(x, return_routing=True)
    assert (y.shape, y.dtype, routing.scores.dtype) == (shape, dtype, dtype)
    (y.sum() + aux_loss(routing)).backward()
    assert x.grad is not None
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.experts.parameters())


@pytest.mark.parametrize("router", ROUTERS)
def test_no_nodes(router: str) -> None:
    empty = torch.zeros(2, 0, dtype=torch.long)
    for conv in ("gcn", "gat", "gin"):
        layer = MoEConv(conv, D, 5, num_experts=E, router=router, k=2)
        y = layer(torch.zeros(0, D), empty)
        assert y.shape == (0, 5)
        y.sum().backward()
        assert all(p.grad is not None for p in layer.experts.parameters())
    for mode in ("layer", "shared"):
        options: Any = {"router": router, "routing": mode}
        assert GNNMoE(D, D, 3, num_experts=E, **options)(torch.zeros(0, D), empty).shape == (0, 3)


@pytest.mark.parametrize("router", ROUTERS)
def test_float64_is_computed_in_float64(router: str) -> None:
    """Not cast: the result differs from float32's by its rounding, and equals itself to 1e-12 where that is finer."""
    x = features(T, D)
    for name, (layer, call) in layers(router, 2).items():
        coarse = call(x.float())
        layer.double()
        fine = call(x)
        assert fine.dtype == torch.float64, name
        torch.testing.assert_close(fine.float(), coarse, rtol=1e-3, atol=1e-4, msg=name)
        assert not torch.equal(fine, fine.float().double()), name


# counters under activation checkpointing


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    ("router", "kwargs", "counter"),
    [
        ("token_choice", {"balance": "bias", "bias_rate": 0.1}, "bias_E"),
        ("expert_choice", {"inference": "threshold"}, "cut_E"),
        ("expert_choice", {"inference": "threshold", "normalize": "tokens"}, "log_scale_E"),
        ("multi_centroid", {"choice": "experts", "inference": "threshold"}, "cut_E"),
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
    kwargs = {"balance": "switch", "balance_coef": 0.5}
    for name, (layer, call) in layers("token_choice", 1, **kwargs).items():
        with record(layer) as recorded:
            call(features(T, D).float())
        out = layer(features(T, D).float(), *(() if name == "MoE" else (EDGES,)), return_routing=True)
        loss = aux_loss(out[1])
        assert float(loss.detach()) > 0.4, name
        torch.testing.assert_close(aux_loss(recorded), loss)
        loss.backward()
        grads = routers_of(layer)
        assert all(grad is not None and grad.any() for grad in grads.values()), name


def test_the_balance_loss_survives_other_peoples_models() -> None:
    vit = VisionTransformer(8, 4, 4, 2, 16, 24, num_classes=5)
    moefy(vit, num_experts=4, k=1, router_kwargs={"balance": "switch"})
    with record(vit) as routings:
        vit(torch.randn(2, 3, 8, 8))
    assert len(routings) == 2
    aux_loss(routings).backward()
    grads = routers_of(vit)
    assert len(grads) == 2
    assert all(grad is not None and grad.any() for grad in grads.values())


def test_the_balance_loss_of_two_calls_is_two_losses() -> None:
    layer = moe(balance="switch")
    _, first = layer(features(T, D).float(), return_routing=True)
    _, second = layer(features(T, D, seed=1).float(), return_routing=True)
    assert float(aux_loss(first)) != float(aux_loss(second))
    torch.testing.assert_close(aux_loss([first, second]), aux_loss(first) + aux_loss(second))


# k of E experts are run


@pytest.mark.parametrize("router", [name for name in ROUTERS if name != "uniform"])
def test_rows_that_reach_the_experts_follow_k(router: str) -> None:
    for num_experts in (4, 12):
        for k in (1, 2, 4):
            rows: list[int] = []
            experts = LinearExperts(D, D, num_experts)
            experts.register_forward_hook(lambda _, args, __, rows=rows: rows.append(args[0].size(0)))
            MoE(build_router(router, D, num_experts, k), experts)(features(T, D).float())
            assert rows == [k * T]


def flops(conv: str, num_experts: int, k: int, tokens: int = 60) -> int:
    """Of the experts alone: the routing is given, balanced over the experts."""
    edges = random_graph(tokens, tokens, 4 * tokens)
    first = torch.arange(tokens)[:, None] + torch.arange(k)
    weight = torch.zeros(tokens, num_experts).scatter(1, first % num_experts, 1.0)
    layer = MoEConv(conv, 32, 32, num_experts=num_experts, router=None)
    return count_flops(layer, torch.randn(tokens, 32), edges, routing=routing_of(weight))


@pytest.mark.parametrize("conv", ["gcn", "sage", "graph", "gin"])
def test_flops_of_linear_aggregation_grow_with_k_and_are_flat_in_e(conv: str) -> None:
    aggregation = 2 * flops(conv, 4, 1) - flops(conv, 4, 2)
    assert flops(conv, 4, 1) == flops(conv, 16, 1)
    assert flops(conv, 4, 2) == flops(conv, 16, 2)
    assert flops(conv, 4, 4) == aggregation + 4 * (flops(conv, 4, 1) - aggregation)


@pytest.mark.parametrize("conv", ["le", "resgatedgraph"])
def test_messages_of_local_convs_follow_k_not_e(conv: str) -> None:
    def messages(num_experts: int, k: int) -> int:
        seen: list[int] = []
        layer: Any = MoEConv(conv, D, D, num_experts=num_experts, k=k)
        for module in layer.experts.convs:
            module.register_message_forward_hook(lambda _, __, out: seen.append(out.size(0)))
        layer(features(T, D).float(), EDGES)
        return sum(seen)

    assert [messages(8, k) for k in (1, 2, 4)] == [k * EDGES.size(1) for k in (1, 2, 4)]
    assert messages(2, 1) == messages(16, 1) == EDGES.size(1)


def test_flops_of_moe_grow_with_k_and_are_flat_in_e() -> None:
    x = features(T, D).float()

    def experts_flops(num_experts: int, k: int) -> int:
        layer = MoE(build_router("random", D, num_experts, k), MLPExperts(D, 64, D, num_experts))
        return count_flops(layer, x) - count_flops(layer.router, x)

    assert experts_flops(4, 1) == experts_flops(16, 1)
    assert experts_flops(16, 4) == 4 * experts_flops(16, 1)


def test_flops_of_gnn_moe_are_flat_in_e() -> None:
    """But for the routers, 2 T (2 D) E each."""
    x = features(T, D).float()
    costs = [count_flops(GNNMoE(D, D, 3, 3, num_experts=n), x, EDGES) - 2 * 2 * T * 2 * D * n for n in (4, 16)]
    assert costs[0] == costs[1]


# seeds only in loss and metric of a mini-batch


@pytest.mark.parametrize("mode", ["layer", "shared"])
def test_seeds_of_a_mini_batch_have_the_outputs_and_gradients_of_the_full_graph(mode: Any) -> None:
    """With all neighbours of as many hops as the model looks: the seeds' rows are all that a loss needs."""
    num_nodes, seeds = 40, torch.tensor([3, 17])
    edge_index = random_graph(num_nodes, num_nodes, 60, seed=4)
    x = features(num_nodes, D)
    torch.manual_seed(0)
    model = GNNMoE(D, D, 3, 2, conv="sage", num_experts=E, routing=mode, k=2).double()
    nodes, edges, place, _ = k_hop_subgraph(seeds, 3, edge_index, relabel_nodes=True)
    assert len(nodes) < num_nodes
    full, near = model(x, edge_index)[seeds], model(x[nodes], edges)[place]
    torch.testing.assert_close(near, full, rtol=0, atol=1e-10)
    parameters = list(model.parameters())
    ours, theirs = (torch.autograd.grad(out.square().sum(), parameters) for out in (near, full))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_a_neighbour_out_of_reach_does_not_reach_the_loss_of_the_seeds() -> None:
    edge_index = torch.tensor([[1, 2, 3, 4], [0, 1, 2, 3]])  # 4 -> 3 -> 2 -> 1 -> 0
    model = GNNMoE(D, D, 3, 2, conv="sage", num_experts=E, router_input="node")
    x = features(5, D).float().requires_grad_()
    model(x, edge_index)[:1].sum().backward()
    assert x.grad is not None
    assert [bool(row.any()) for row in x.grad] == [True, True, True, False, False]


# the list of bad input, through MoE (MoEConv and GNNMoE: in their own tests)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: build_router("nobody", D, E, 1), "router: got 'nobody', expected one of 'token_choice', .*'uniform'"),
        (lambda: moe(k=5), "k: got 5, expected at most num_experts=4"),
        (lambda: moe(k=0), "k: got 0, expected at least 1"),
        (lambda: MoE(TokenChoice(D, 0), LinearExperts(D, D, E)), "num_experts: got 0, expected at least 1"),
        (lambda: LinearExperts(D, D, 0), "num_experts: got 0, expected at least 1"),
        (lambda: MoE(TokenChoice(D, 3), LinearExperts(D, D, E)), "experts: got num_experts=4.*num_experts=3"),
        (lambda: MoE(TokenChoice(7, E), LinearExperts(D, D, E)), "experts: got .*in_features=8, expected .*dim=7"),
        (lambda: moe(capacity_factor=0.0), "capacity_factor: got 0.0, expected a positive number"),
        (lambda: moe("attention_vote", capacity_factor=-1.0), "capacity_factor: got -1.0, expected a positive number"),
        (lambda: moe(weight="sum"), "weight: got 'sum', expected one of 'score', 'normalized', 'straight_through'"),
        (lambda: moe()(torch.randn(T, 7)), r"x: got shape \(12, 7\) of torch.float32, expected \(..., T, dim=8\)"),
        (lambda: moe()(torch.randn(D)), r"x: got shape \(8,\)"),
        (
            lambda: moe()(torch.randn(T, D), torch.zeros(3, dtype=torch.long)),
            r"pool: got shape \(3,\) of torch.int64, expected one integer a token, shape \(12,\)",
        ),
        (
            lambda: moe("attention_vote", scope="neighbours")(torch.randn(T, D), edge_index=torch.tensor([[0], [T]])),
            r"edge_index: got destination node 12, expected values in 0\.\.11",
        ),
        (
            lambda: moe(check_finite=True)(torch.full((T, D), torch.nan)),
            "x: got 96 values that are NaN or infinite, expected none",
        ),
    ],
)
def test_bad_input(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_a_router_shared_by_two_layers() -> None:
    router = TokenChoice(D, E)
    held = MoE(router, LinearExperts(D, D, E))
    for build in (
        lambda: MoE(router, LinearExperts(D, D, E)),
        lambda: MoEConv("gcn", D, D, num_experts=E, router=router),
        lambda: GNNMoE(D, D, 3, num_experts=E, router=router, router_input="node"),
    ):
        with pytest.raises(ValueError, match="router: got an instance that another layer holds already"):
            build()
    assert held.router is router
