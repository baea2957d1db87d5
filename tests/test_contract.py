"""Every public layer keeps the contract, clause by clause; see ``contract.py``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gmoe import MLPExperts, MoE, RoutingStats, build_router
from tests.contract import CASES, CLAUSES, Case, assert_alike, graph_breaks, host_syncs, run, train

cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=cuda)])
PAIRS = [(clause, case) for clause in CLAUSES for case in CASES if clause.__name__ not in case.exempt]
FUSED = [case for case in CASES if case.name.startswith("MoE ") and case.name != "MoE token_choice noisy"]


def label(value: Any) -> str:
    return value.name if isinstance(value, Case) else getattr(value, "__name__", str(value))


@pytest.mark.filterwarnings("ignore:.*aux_loss")
@each_device
@pytest.mark.parametrize(("clause", "case"), PAIRS, ids=label)
def test_contract(clause: Callable[[Case, str], None], case: Case, device: str) -> None:
    clause(case, device)


def test_exemptions_name_a_clause() -> None:
    assert {name for case in CASES for name in case.exempt} <= {clause.__name__ for clause in CLAUSES}
