"""moefy on models of Hugging Face's transformers, built from a config: no download."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from gmoe import MoE, moefy, record_routing
from tests.helpers.huggingface import MODELS, build, run


@pytest.mark.parametrize(
    ("name", "targets"), [*((name, None) for name in MODELS), ("SigLIP", "*.mlp")]
)
def test_a_moefied_model_starts_as_the_dense_one_trains_and_loads(
    name: str, targets: str | None, tmp_path: Path
) -> None:
    dense = build(name)
    model = moefy(copy.deepcopy(dense), num_experts=4, targets=targets)
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    # SigLIP's head has one too
    mlps = [name for name, _ in dense.named_modules() if name.endswith(".mlp")]
    assert len(layers) == (2 if targets is None else len(mlps))
    assert torch.equal(run(model), run(dense))

    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2)
    for _ in range(2):
        with record_routing(model) as routings:
            loss = run(model).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert len(routings) == len(layers)
    # The hidden states do not depend on SigLIP's pooling head.
    in_blocks: list[Any] = [
        m for name, m in model.named_modules() if isinstance(m, MoE) and "head" not in name
    ]
    assert all(layer.experts.down.weight.any() for layer in in_blocks)

    torch.save(model.state_dict(), tmp_path / "model.pt")
    again = moefy(build(name), num_experts=4, targets=targets)
    again.load_state_dict(torch.load(tmp_path / "model.pt"))
    assert torch.equal(run(again.eval()), run(model.eval()))
    assert not torch.equal(run(again), run(dense))
