"""The operators of attention; experts are compared with PyG's convs in ``test_experts.py``."""

from __future__ import annotations

import pytest
import torch

from gmoe.conv import attention  # noqa: F401  # registers them
from tests.gmoe.conv.masked import features

EXPERTS, SOURCES, PAIRS, MESSAGES, WIDTH, HEADS = 3, 7, 5, 20, 4, 2


@pytest.mark.parametrize("with_edges", [False, True])
def test_operators_keep_torchs_rules(with_edges: bool) -> None:
    """Schema, fake kernel, tracing: what ``torch.compile`` needs."""
    expert = torch.arange(MESSAGES) * EXPERTS // MESSAGES  # ascending
    source = torch.randint(SOURCES, (MESSAGES,))
    sizes = EXPERTS, SOURCES
    rows = torch.ops.gmoe.find_rows(expert, source, *sizes)
    edge_features = features(MESSAGES, 3), features(EXPERTS, 3, WIDTH)
    of_edges = edge_features if with_edges else (None, None)
    ends = features(len(rows[0]), WIDTH), features(PAIRS, WIDTH)
    sender, receiver = rows[-1][expert, source], torch.arange(MESSAGES) * PAIRS // MESSAGES
    offsets = expert.bincount(minlength=EXPERTS).cumsum(0).to(torch.int32)
    inputs = features(EXPERTS, WIDTH, HEADS), *ends, *of_edges, 0.2, sender, receiver, offsets
    grad = features(MESSAGES, HEADS)
    torch.library.opcheck(torch.ops.gmoe.find_rows.default, (expert, source, *sizes))
    torch.library.opcheck(torch.ops.gmoe.score_additively.default, inputs)
    torch.library.opcheck(torch.ops.gmoe.score_additively_backward.default, (grad, *inputs))
