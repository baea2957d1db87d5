"""What router and experts read of one call of a layer."""

from __future__ import annotations

import torch
from torch.utils._pytree import tree_leaves

from gmoe import Graph
from gmoe.conv.call import Call

EDGES = torch.tensor([[0, 1, 2], [1, 1, 0]])


def test_torch_finds_the_tensors_of_a_call() -> None:
    """Wrappers of modules look for them, such as those that cast what a module is called with."""
    x = torch.eye(3)
    call = Call(Graph(EDGES, 3), x, x[:2], x[:2])
    found = [leaf for leaf in tree_leaves(call) if isinstance(leaf, torch.Tensor)]
    assert len(found) == 3
    assert found[0] is call.x_src
    assert found[1] is call.x_dst
    assert found[2] is call.aggregate
