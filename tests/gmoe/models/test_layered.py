"""A model that says what is around its convs has the calls, the replay and the inference of others.

``tests/compose`` compares those of the library with their definitions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gmoe import MoEConv, TokenChoice
from gmoe.models.layered import LayeredGNN
from tests.helpers.equal import assert_same
from tests.helpers.masked import GRAPHS, features, redrawn

NODES, EDGES = GRAPHS["mixed"]
IN, HIDDEN, OUT, LAYERS = 4, 6, 3, 3


class Highway(LayeredGNN):
    """Convs with experts behind an input layer, and the sum of all their outputs."""

    has_input_layer = True
    joins_layers = True

    def __init__(self, shared_router: bool) -> None:
        super().__init__(IN, HIDDEN, OUT, LAYERS, 0.1, 0.1, "tanh")
        self.router_input = ("node", "degree")
        self.input = nn.Linear(IN, HIDDEN)
        options: dict[str, Any] = {"num_experts": 3, "start": "shared"}
        options |= {"router": None} if shared_router else {}
        convs = [MoEConv("sage", HIDDEN, HIDDEN, **options) for _ in range(LAYERS)]
        self.convs = nn.ModuleList(convs)
        self.lin = nn.Linear(HIDDEN, OUT)
        self.shared_router = TokenChoice(IN + 1, num_experts=3) if shared_router else None

    def has_experts(self, layer: int) -> bool:
        return True

    def enter(self, x: Tensor) -> Tensor:
        y: Tensor = self.input(x)
        return y

    def finish(self, layer: int, x: Tensor, out: Tensor, *_: Any, **__: Any) -> Any:
        return self.dropout(self.act(out)), None

    def leave(self, outputs: Sequence[Tensor]) -> Tensor:
        size = len(outputs[-1])
        y: Tensor = self.lin(torch.stack([output[:size] for output in outputs]).sum(dim=0))
        return y


@pytest.fixture(params=[False, True], ids=["own routers", "shared router"])
def model(request: pytest.FixtureRequest) -> Highway:
    torch.manual_seed(0)
    built: Highway = redrawn(Highway(request.param))
    return built


def test_its_call_runs_one_step_after_the_other(model: Highway) -> None:
    x = features(NODES, IN)
    logits, routings = model(x, EDGES, return_routing=True)
    h = model.input(x)
    total = torch.zeros(NODES, HIDDEN, dtype=torch.float64)
    for layer, conv in enumerate(model.convs):
        h = conv(h, EDGES, routing=routings[0 if model.shared_router else layer]).tanh()
        total = total + h
    assert_same(logits, model.lin(total))
    assert_same(model(x, EDGES, routings=routings), logits)
