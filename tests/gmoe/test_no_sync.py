"""On a GPU the forward of token choice and of equal pools waits for nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from gmoe import MLPExperts, MoE, RoutingStats, build_router

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def no_sync() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["token_choice", "expert_choice", "attention_vote", "multi_centroid", "random"])
def test_forward_of_a_layer_in_bf16(name: str, request: pytest.FixtureRequest) -> None:
    layer = MoE(build_router(name, 64, 4, 1), MLPExperts(64, 128, 64, num_experts=4)).cuda()
    x, stats = torch.randn(3, 17, 64, device="cuda"), RoutingStats(4).cuda()
    request.getfixturevalue("no_sync")  # only now: moving the layer is no forward
    with torch.autocast("cuda", torch.bfloat16):
        _, routing = layer(x, return_routing=True)
    stats.update(routing)
