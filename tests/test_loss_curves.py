"""What twenty steps of training compute is what it was; see :mod:`tests.loss_curves`."""

from __future__ import annotations

import json

import pytest

from tests.loss_curves import CURVES, FILE, STEPS, losses
from tests.torch_versions import ROUNDS_ALIKE

KNOWN: dict[str, list[float]] = json.loads(FILE.read_text())


def test_the_file_has_a_curve_of_each_name() -> None:
    assert list(KNOWN) == list(CURVES)
    assert {len(curve) for curve in KNOWN.values()} == {STEPS}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=ROUNDS_ALIKE if name.startswith("images") else ())
        for name in CURVES
    ],
)
def test_a_loss_curve_is_what_it_was(name: str) -> None:
    assert losses(name) == pytest.approx(KNOWN[name], rel=1e-9)
