"""Each sampled node gets the next free position when it appears first."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gmoe.data.positions import SeparatePositions, SharedPositions


@pytest.mark.parametrize("is_shared", [True, False])
def test_positions_are_given_in_order_of_appearance(is_shared: bool) -> None:
    sizes = {"paper": 10, "author": 10}
    positions: Any = SharedPositions(sizes, torch.int32) if is_shared else SeparatePositions(sizes)
    one_seed = torch.zeros(2, dtype=torch.int64)
    positions.add_seeds("paper", torch.tensor([7, 3]), one_seed)
    source = torch.tensor([5, 3, 5, 1, 7])
    position, new = positions.add("paper", source, torch.zeros_like(source), 2)
    assert position.tolist() == [2, 1, 2, 3, 0]
    assert new.tolist() == [0, 3]
    source = torch.tensor([1, 0])
    position, new = positions.add("paper", source, torch.zeros_like(source), 4)
    assert (position.tolist(), new.tolist()) == ([3, 4], [1])
    position, _ = positions.add("author", source, torch.zeros_like(source), 0)
    assert position.tolist() == [0, 1]  # another type of nodes


def test_separate_subgraphs_have_their_own_positions() -> None:
    positions = SeparatePositions({"paper": 10})
    positions.add_seeds("paper", torch.tensor([7, 7]), torch.tensor([0, 1]))
    position, new = positions.add(
        "paper", torch.tensor([7, 7, 3, 3]), torch.tensor([1, 0, 0, 1]), 2
    )
    assert position.tolist() == [1, 0, 2, 3]
    assert new.tolist() == [2, 3]


def test_a_repeated_seed_has_the_position_of_its_first() -> None:
    positions = SharedPositions({"paper": 10}, torch.int64)
    positions.add_seeds("paper", torch.tensor([4, 7, 4]), None)
    position, new = positions.add("paper", torch.tensor([4, 7]), None, 3)
    assert (position.tolist(), new.tolist()) == ([0, 1], [])


def test_a_cleared_table_has_no_positions() -> None:
    positions = SharedPositions({"paper": 10}, torch.int32)
    positions.add_seeds("paper", torch.tensor([4, 7]), None)
    positions.clear({"paper": torch.tensor([4, 7])})
    position, new = positions.add("paper", torch.tensor([7, 4]), None, 0)
    assert (position.tolist(), new.tolist()) == ([0, 1], [0, 1])
