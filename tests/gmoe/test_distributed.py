"""Several gloo processes against one with the whole batch: gradients, steps and counters.

Shapes: T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch_geometric.data import Batch, Data

from gmoe import GNNMoE, MLPExperts, MoE, Router, RoutingStats, attach_aux_loss, aux_loss
from gmoe.distributed import world_size, world_sum
from gmoe.routers import AttentionVote, ExpertChoice, MultiCentroid, TokenChoice
from tests.helpers import sources

D, E, T = 5, 4, 6
STEPS = 8
NO_NOISE = patch("gmoe.routers.balance._drawn_like", torch.zeros_like)
"""Since processes draw their own."""

ROUTERS: dict[str, Callable[[], Router]] = {
    "bias": lambda: TokenChoice(D, num_experts=E, noise=False),
    "bias-k2-z": lambda: TokenChoice(D, num_experts=E, k=2, noise=False, z_coef=0.1),
    "switch": lambda: TokenChoice(D, num_experts=E, k=2, balance="switch", balance_coef=0.5),
    "expert_choice": lambda: ExpertChoice(D, num_experts=E, z_coef=0.1),
    "threshold": lambda: ExpertChoice(D, num_experts=E, inference="threshold", z_coef=0.1),
    "attention_vote": lambda: AttentionVote(D, num_experts=E),
    "multi_centroid": lambda: MultiCentroid(D, num_experts=E),
    "multi_centroid-threshold": lambda: MultiCentroid(
        D, num_experts=E, choice="experts", inference="threshold"
    ),
}


def layer(name: str) -> nn.Module:
    router = ROUTERS[name]()
    return MoE(
        router, MLPExperts(D, 7, D, num_experts=E, zero_init=name == "switch"), nn.Linear(D, D)
    )


class Checkpointed(nn.Module):
    """A layer that is computed again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = MoE(TokenChoice(D, num_experts=E), MLPExperts(D, 7, D, num_experts=E))

    def forward(self, x: Tensor, return_routing: bool) -> Any:
        return checkpoint(self.layer, x, return_routing=return_routing, use_reentrant=False)


def gnn(**kwargs: Any) -> nn.Module:
    quiet = {"noise": False, "z_coef": 0.1}
    return GNNMoE(
        D,
        8,
        3,
        3,
        conv="sage",
        num_experts=E,
        router_kwargs=quiet,
        norm=None,
        dropout=0.0,
        **kwargs,
    )


def images(seed: int) -> list[Tensor]:
    """Eight groups of tokens, of a mean that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(8, T, D, dtype=torch.float64, generator=generator) + 1)


def graphs(seed: int) -> list[Data]:
    """Eight graphs of three to ten nodes."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for size in range(3, 11):
        x = torch.randn(size, D, dtype=torch.float64, generator=generator)
        edges = torch.randint(size, (2, 3 * size), generator=generator)
        found.append(Data(x=x, edge_index=edges))
    return found


def run_tokens(model: Any, part: list[Tensor]) -> tuple[Tensor, Any]:
    x = torch.stack(part) if part else torch.zeros(0, T, D, dtype=torch.float64)
    y, routing = model(x, return_routing=True)
    return y.flatten(0, -2), routing


def run_graphs(model: Any, part: list[Data]) -> tuple[Tensor, Any]:
    batch: Any = Batch.from_data_list(part)
    y, routings = model(batch.x, batch.edge_index, batch=batch.batch, return_routing=True)
    return y, routings


def molecules(seed: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The atoms of eight molecules, and the source and vector of each."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for size in range(3, 11):
        x = torch.randn(size, 4, dtype=torch.float64, generator=generator)
        source = torch.tensor(sources.SOURCES)[size % 3]
        found.append((x, source, torch.randn(sources.DIM, dtype=x.dtype, generator=generator)))
    return found


def run_molecules(
    model: Any, part: list[tuple[Tensor, Tensor, Tensor]]
) -> tuple[Tensor, list[Any]]:
    x, source, system = zip(*part, strict=True)
    batch = torch.arange(len(x)).repeat_interleave(torch.tensor([*map(len, x)]))
    y = model(torch.cat(x), batch, torch.stack(source), system=torch.stack(system))
    return y, []


CASES: dict[
    str,
    tuple[Callable[[], nn.Module], Callable[[int], list[Any]], Callable[..., tuple[Tensor, Any]]],
] = {
    **{name: (lambda name=name: layer(name), images, run_tokens) for name in ROUTERS},  # type: ignore[misc]
    "checkpointed": (Checkpointed, images, run_tokens),
    "by source": (lambda: sources.net(sources.BY_SOURCE), molecules, run_molecules),
    "by vector": (lambda: sources.net(sources.BY_VECTOR), molecules, run_molecules),
    "gnn": (lambda: gnn(start="shared"), graphs, run_graphs),
    "gnn-shared-router": (lambda: gnn(start="shared", shared_router=True), graphs, run_graphs),
    "gnn-copies": (gnn, graphs, run_graphs),
    "gnn-votes": (
        lambda: GNNMoE(D, 8, 3, 2, conv="gcn", num_experts=E, router="attention_vote"),
        graphs,
        run_graphs,
    ),
}


ATTACHED = ("switch", "bias-k2-z", "multi_centroid", "gnn-shared-router")
"""The cases whose losses are also trained without a line in the loop."""


def split(items: list[Any], rank: int, size: int, step: int) -> list[Any]:
    """A rank's part: the first rank has one item more than its share.

    In every fourth step it has two more.
    """
    first = len(items) // size + 1 + (step % 4 == 3 and size == 2)
    if rank == 0:
        return items[:first]
    rest = items[first:]
    return rest[rank - 1 :: size - 1]


def trained(
    case: str,
    rank: int,
    size: int,
    *,
    empty: bool = False,
    sharded: bool = False,
    attached: bool = False,
) -> dict[str, Any]:
    """The gradients of the first step, and the state after eight of SGD.

    ``empty``: the first process has all items. ``sharded``: by FSDP2 instead of DDP. ``attached``:
    the losses of the routers flow by themselves.
    """
    build, data, run = CASES[case]
    torch.manual_seed(0)
    model: Any = build().double()
    for gain in (p for name, p in model.named_parameters() if name.endswith("gain")):
        nn.init.constant_(gain, 0.5)  # so that all gradients are there from the first step on
    for difference in (p for name, p in model.named_parameters() if name.endswith("_difference")):
        nn.init.normal_(difference, std=0.3)
    if attached:
        attach_aux_loss(model)
    wrapped = (
        fully_shard(model) if sharded else DistributedDataParallel(model) if size > 1 else model
    )
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05)
    first: dict[str, Tensor] = {}
    calls = 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return all_reduce(*args, **kwargs)

    all_reduce = dist.all_reduce
    routers = sum(isinstance(module, Router) for module in model.modules())
    for step in range(STEPS):
        items = data(step)
        mine = ([] if rank else items) if empty else split(items, rank, size, step)
        optimizer.zero_grad()
        with patch("torch.distributed.all_reduce", counted):
            y, routings = run(wrapped, mine)
        loss = y.square().sum() * (
            size / world_sum(torch.tensor(float(len(y)), dtype=torch.float64))
        )
        routings = routings if isinstance(routings, list) else [routings]
        (loss + (aux_loss(routings) if routings and not attached else 0)).backward()
        if step == 0:
            first = {
                name: whole(p.grad).clone()
                for name, p in model.named_parameters()
                if p.grad is not None
            }
        optimizer.step()
    each = routers + sum(getattr(module, "z_coef", 0) > 0 for module in model.modules())
    assert size == 1 or calls <= STEPS * each, (
        f"{calls} collectives of {routers} routers in {STEPS} steps"
    )
    before = calls
    state = {name: whole(value).clone() for name, value in model.state_dict().items()}
    with patch("torch.distributed.all_reduce", counted), torch.no_grad():
        run(model.eval(), data(0)[: rank + 1])  # ranks may evaluate unequal parts
        run(model.train(), data(0)[: rank + 1])  # and run in training mode without gradients
    assert calls == before
    return {"first": first, "state": state}


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def work(rank: int, size: int, names: list[str], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    with NO_NOISE:
        found = {name: trained(name, rank, size) for name in names}
        found["empty"] = trained("bias-k2-z", rank, size, empty=True)
        found["sharded"] = trained("bias-k2-z", rank, size, sharded=True)
        for name in ATTACHED:
            found[f"{name}, attached"] = trained(name, rank, size, attached=True)
        found["attached and sharded"] = trained("switch", rank, size, sharded=True, attached=True)
        found["alone"] = alone(rank)
        found["stats"] = counted(rank, size)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def alone(rank: int) -> dict[str, Any]:
    """A router whose group is its own process."""
    groups = [dist.new_group([other]) for other in range(dist.get_world_size())]
    router, x = (
        TokenChoice(D, num_experts=E, noise=False),
        torch.full((rank + 1, D), float(rank + 1)),
    )
    router.process_group = groups[rank]
    router(x)
    return {
        "first": {},
        "state": {"mean": router.next_mean_D - (rank + 1), "size": torch.tensor(world_size())},
    }


def counted(rank: int, size: int) -> dict[str, Any]:
    """Statistics of a part of the tokens."""
    torch.manual_seed(0)
    router, stats = TokenChoice(D, num_experts=E).double().eval(), RoutingStats(num_experts=E)
    stats.update(router(torch.randn(11, D, dtype=torch.float64).tensor_split(size)[rank]))
    return {
        "first": {},
        "state": {
            name: value.double().round(decimals=5) for name, value in stats.compute()[0].items()
        },
    }


def compare(size: int, folder: Path) -> None:
    names = list(CASES)
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # one import for all processes
    mp.start_processes(  # type: ignore[attr-defined]
        work, (size, names, str(folder)), nprocs=size, start_method="forkserver"
    )
    ranks = [torch.load(folder / f"{rank}.pt") for rank in range(size)]
    with NO_NOISE:
        expected = {name: trained(name, 0, 1) for name in names}
        expected["empty"] = expected["sharded"] = expected["bias-k2-z"]
    expected |= {f"{name}, attached": expected[name] for name in ATTACHED}
    expected["attached and sharded"] = expected["switch"]
    expected["stats"] = counted(0, 1)
    expected["alone"] = {"first": {}, "state": {"mean": torch.zeros(D), "size": torch.tensor(size)}}
    for name, wanted in expected.items():
        assert wanted["state"]
        for rank, found in enumerate(ranks):
            for what in ("first", "state"):
                assert found[name][what].keys() == wanted[what].keys()
                for key, value in wanted[what].items():
                    off = float((found[name][what][key] - value).abs().max())
                    assert off <= 1e-10, (
                        f"{name}, rank {rank} of {size}, {what} {key} differs by {off}"
                    )


def test_two_processes_equal_one(tmp_path: Path) -> None:
    compare(2, tmp_path)


@pytest.mark.slow
def test_four_processes_equal_one(tmp_path: Path) -> None:
    compare(4, tmp_path)
