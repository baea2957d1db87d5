"""The code of the page on your own routers and convs runs, and does what it says.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch_geometric.nn import ResGatedGraphConv

from gmoe.conv.kinds import KINDS
from tests.helpers.masked import assert_equals_masked

PAGE = Path(__file__).parents[2] / "docs" / "your-own-router.md"


@pytest.fixture(scope="module")
def page() -> Iterator[dict[str, Any]]:
    """What the page's blocks define, run one after the other."""
    names: dict[str, Any] = {"__name__": "page"}
    known = dict(KINDS)
    # PyG's default is one module for all such convs, which another one's ``eval`` reaches.
    ResGatedGraphConv(1, 1).eval()
    blocks = re.findall(
        r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
    assert blocks
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    yield names
    KINDS.update(known)  # other tests are of the conv as gmoe knows it


def test_the_router_is_trained_by_the_task(page: dict[str, Any]) -> None:
    assert page["layer"].router.gate.weight.grad.abs().max() > 0


def test_the_router_equals_the_formula(page: dict[str, Any]) -> None:
    router = page["SigmoidRouter"](5, num_experts=4, k=2).eval()
    router.bias_E.copy_(torch.tensor([0.0, 0.3, -0.2, 0.1]))
    x = torch.randn(9, 5)
    gate = (x @ router.gate.weight.T).sigmoid()
    for t, row in enumerate(router(x).to_dense()):
        chosen = sorted(range(4), key=lambda e, t=t: -(gate[t] + router.bias_E)[e].item())[:2]  # type: ignore[misc]
        expected = torch.zeros(4)
        expected[chosen] = gate[t, chosen] / gate[t, chosen].sum()
        torch.testing.assert_close(row, expected)


def test_the_conv_equals_the_masked_convs_and_runs_none_one_by_one(page: dict[str, Any]) -> None:
    assert isinstance(page["conv"].experts, page["ResGatedExperts"])
    assert_equals_masked(page["conv"], page["nodes"], page["edge_index"])
