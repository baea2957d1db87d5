"""What is recorded of a constructor's arguments, and what is not."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch_geometric.nn import GCNConv

import gmoe
from gmoe.recorded import Recorded, given_to
from gmoe.routers import TokenChoice

GNN = partial(gmoe.GNNMoE, 16, 8, 3)
X, EDGES = torch.randn(40, 16, dtype=torch.float64), torch.randint(40, (2, 160))


class MyRouter(TokenChoice):
    """Somebody's own."""


class Narrow(gmoe.GNNMoE):
    """A subclass that records its own arguments."""

    def __init__(self, in_channels: int, conv: Any = "gcn") -> None:
        super().__init__(in_channels, 8, 3, conv=conv)
        self.recorded = Recorded.of(given_to(Narrow, locals()), {})


def test_values_are_what_json_gives_back() -> None:
    given = {
        "number": np.int64(3),
        "share": np.float32(0.5),
        "pair": ("node", {"in": (1, 2)}),
        "router": TokenChoice,
        "nothing": None,
    }
    recorded = Recorded.of(given, {"token_choice": TokenChoice})
    assert recorded.values == {
        "number": 3,
        "share": 0.5,
        "pair": ["node", {"in": [1, 2]}],
        "router": "token_choice",
        "nothing": None,
    }
    assert type(recorded.values["number"]) is int
    assert recorded.unsavable == {}


@pytest.mark.parametrize(
    ("value", "got"),
    [
        (MyRouter, "MyRouter"),
        ([1, MyRouter], "MyRouter"),
        (nn.ReLU(), "an instance of ReLU"),
        (partial(TokenChoice, k=2), "an instance of partial"),
        ({(1, 2): 3}, "keys must be str"),
        (float("nan"), "Out of range float"),
    ],
    ids=str,
)
def test_a_value_without_a_form_in_json_is_a_reason_and_no_value(value: Any, got: str) -> None:
    """By the argument's name; the others are recorded."""
    recorded = Recorded.of({"odd": value, "even": 2}, {"token_choice": TokenChoice})
    assert recorded.values == {"even": 2}
    assert recorded.unsavable.keys() == {"odd"}
    assert recorded.unsavable["odd"].startswith(f"odd: got {got}")


def test_arguments_are_picked_out_of_all_local_names() -> None:
    """At any place of a function, whatever else it has; a default may be resolved by then."""

    def call(width: int, *, start: str | None = None, **others: Any) -> dict[str, object]:
        doubled = 2 * width
        start = start or "shared"
        given = given_to(call, locals())
        assert doubled not in given.values()
        return given

    assert call(3, k=2) == {"width": 3, "start": "shared", "k": 2}


def test_what_is_recorded_is_copied_and_pickled_with_the_model() -> None:
    model = GNN(router=TokenChoice, k=2, act=nn.Tanh())
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert again.recorded == model.recorded
        assert again.config == model.config
    assert model.recorded.unsavable.keys() == {"act"}


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("router", MyRouter),
        ("router", TokenChoice(16, num_experts=8)),
        ("conv", ["gcn", lambda a, b: GCNConv(a, b)]),
        ("conv", partial(GCNConv, improved=True)),
        ("act", nn.ReLU()),
        ("improved", float("inf")),
    ],
)
def test_an_argument_without_a_name_is_refused(argument: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{argument}: got"):
        GNN(**{argument: value}).save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_subclass_records_its_own_arguments(tmp_path: Path) -> None:
    model = Narrow(16, conv="sage").double().eval()
    model.save_pretrained(tmp_path)
    loaded: Any = Narrow.from_pretrained(tmp_path)
    assert torch.equal(loaded(X, EDGES), model(X, EDGES))
    assert loaded.config == model.config == {"in_channels": 16, "conv": "sage"}
    with pytest.raises(ValueError, match=r"config\.json"):
        gmoe.GNNMoE.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^base: got None, expected a Narrow"):
        gmoe.load(tmp_path)
    assert torch.equal(
        gmoe.load(tmp_path, Narrow(16, conv="sage").double())(X, EDGES), model(X, EDGES)
    )


def test_a_subclass_that_does_not_record_its_arguments_is_refused(tmp_path: Path) -> None:
    class Silent(gmoe.GNNMoE):
        def __init__(self, width: int) -> None:
            super().__init__(width, 8, 3)

    with pytest.raises(ValueError, match=r"^model: got a Silent .*records its own arguments"):
        Silent(16).save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
