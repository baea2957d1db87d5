"""The page on routers and convs of one's own: its code runs, and does what it says. Shapes: T tokens, E experts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import gmoe
from gmoe.conv.kinds import STACKS

PAGE = Path(__file__).parents[2] / "docs" / "your-own-router.md"


@pytest.fixture(scope="module")
def page() -> Iterator[dict[str, Any]]:
    """What the page's blocks define, run one after the other."""
    names: dict[str, Any] = {"__name__": "page"}
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert blocks
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    yield names
    STACKS.pop(names["ResGatedGraphConv"])  # other tests are of the conv as gmoe knows it


def test_the_router_is_trained_by_the_task(page: dict[str, Any]) -> None:
    layer = page["layer"]
    assert layer.router.gate.weight.grad.abs().max() > 0
    assert repr(page["routing"]).startswith("Routing(400 tokens, 8 experts, load ")


def test_the_router_equals_the_formula(page: dict[str, Any]) -> None:
    router = page["SigmoidRouter"](5, 4, k=2).eval()
    router.bias_E.copy_(torch.tensor([0.0, 0.3, -0.2, 0.1]))
    x = torch.randn(9, 5)
    gate = (x @ router.gate.weight.T).sigmoid()
    for t, row in enumerate(router(x).to_dense()):
        chosen = sorted(range(4), key=lambda e, t=t: -(gate[t] + router.bias_E)[e].item())[:2]  # type: ignore[misc]
        expected = torch.zeros(4)
        expected[chosen] = gate[t, chosen] / gate[t, chosen].sum()
        torch.testing.assert_close(row, expected)


def test_the_bias_evens_out_the_load(page: dict[str, Any]) -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 6) + 1.0
    router = gmoe.build_router(page["SigmoidRouter"], 6, 4, 2, {"bias_rate": 0.01})
    load = [router(x).load.double() for _ in range(301)]
    assert load[-1].std() < 0.1 * load[0].std()


def test_the_conv_equals_the_masked_convs(page: dict[str, Any]) -> None:
    """Outputs on the page itself; gradients here, and that nothing is run one by one."""
    torch.testing.assert_close(page["out"], page["masked"], atol=1e-12, rtol=0)
    conv, x, edge_index = page["conv"], page["nodes"].clone().requires_grad_(), page["edge_index"]
    assert isinstance(conv.experts, page["ResGatedExperts"])
    routing = conv(x.detach(), edge_index, return_routing=True)[1]
    routing = replace(routing, weight=routing.weight.detach())
    weight_TE = routing.to_dense()
    (grad,) = torch.autograd.grad(conv(x, edge_index, routing=routing).sin().sum(), x)
    masked = sum(weight_TE[:, e : e + 1] * conv.expert(e)(x, edge_index) for e in range(4))
    assert isinstance(masked, torch.Tensor)
    (expected,) = torch.autograd.grad(masked.sin().sum(), x)
    torch.testing.assert_close(grad, expected, atol=1e-12, rtol=0)
