"""Widths that are left open: what a layer is before and after its first call."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed import destroy_process_group, init_process_group
from torch.nn.parallel import DistributedDataParallel

from tests.contract import opened
from tests.helpers.conv_cases import KINDS, WIDTH, graph, layer
from tests.helpers.masked import features, random_graph

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*runs on the whole graph"),
    pytest.mark.filterwarnings("ignore:.*this call fills in the width"),
]


@pytest.mark.parametrize(
    ("conv", "start"), [*((kind, "shared") for kind in KINDS), ("gcn", "copies")], ids=str
)
def test_open_widths_are_filled_in_by_the_first_call(conv: Any, start: Any) -> None:
    x, edge_index = graph()
    options: dict[str, Any] = {"router_input": ("node", "neighbors"), "start": start}
    lazy, built = (layer(conv, width, **options).eval() for width in (-1, WIDTH))
    assert lazy.state_dict() == {}
    with torch.inference_mode():
        assert lazy.double()(x.double(), edge_index).dtype == torch.float64
    lazy(x.double(), edge_index).sum().backward()
    assert lazy.in_channels == WIDTH
    built.load_state_dict(opened(lazy.float()).state_dict())
    assert torch.equal(built(x, edge_index), lazy(x, edge_index))


def test_open_widths_of_two_sets_of_nodes() -> None:
    x = (features(9, 3).float(), features(5, 6).float())
    for given in ((-1, -1), (3, -1), (-1, 6), -1):
        lazy = layer("sage", given).eval()
        with torch.no_grad():
            assert lazy(x, random_graph(9, 5, 20)).shape == (5, WIDTH)
        assert lazy.in_channels == (3, 6)
        assert not any(part.training for part in lazy.modules())
    with pytest.raises(ValueError, match=r"x: got .*expected"):
        layer("sage", (4, -1))(x, random_graph(9, 5, 20))


def test_an_open_layer_is_not_frozen_and_keeps_its_type() -> None:
    x, edge_index = graph()
    lazy = layer("gcn", -1)
    with pytest.raises(ValueError, match="uninitialized parameter"):
        lazy.requires_grad_(False)
    # A layer before it may have given bfloat16; the parameters stay what they are.
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        lazy(x.bfloat16(), edge_index)
    assert {value.dtype for value in lazy.parameters()} == {torch.float32}
    with pytest.raises(ValueError, match=r"^x: got torch.float64, expected torch.float32"):
        layer("gcn", -1)(x.double(), edge_index)


def test_processes_refuse_an_open_layer(tmp_path: Path) -> None:
    """They would train parameters that none of them shares."""
    init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(RuntimeError, match="uninitialized parameters"):
            DistributedDataParallel(layer("gcn", -1))
    finally:
        destroy_process_group()


def test_a_first_call_that_records_gradients_warns_of_the_optimizer() -> None:
    lazy = layer("gcn", -1)
    with pytest.warns(UserWarning, match="an optimizer that was made before does not train them"):
        lazy(*graph())
    lazy(*graph())  # once


def test_an_open_layer_is_copied_and_takes_a_state_once_it_is_built() -> None:
    x, edge_index = graph()
    built, lazy = layer("gat", heads=2), nn.ModuleList([layer("gat", -1, heads=2)])
    twin = pickle.loads(pickle.dumps(copy.deepcopy(lazy)))
    twin[0](x, edge_index)
    assert [one.in_channels for one in (*twin, *lazy)] == [WIDTH, -1]
    lazy.load_state_dict(copy.deepcopy(lazy).state_dict())  # an open one's has nothing
    state = nn.ModuleList([built]).state_dict()
    with pytest.raises(RuntimeError, match="in_channels: got -1, expected a call to fill it in"):
        lazy.load_state_dict(state, strict=False)
    lazy[0](x, edge_index)
    lazy.load_state_dict(state)
    assert torch.equal(lazy[0](x, edge_index), built(x, edge_index))


def test_a_call_that_fails_leaves_the_widths_open() -> None:
    x, edge_index = graph()
    lazy = layer("gcn", -1, router_kwargs={"temperatur": 1}, start="shared")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^router_kwargs: got .*temperatur"):
            lazy(x, edge_index)
    assert lazy.state_dict() == {}
    assert lazy.experts is lazy.shared_expert is lazy.gain is None
