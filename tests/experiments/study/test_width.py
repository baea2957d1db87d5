"""The study of width: each arm has a step size that validation chose on packages."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments.study import variants
from experiments.study.studies import Study
from experiments.study.width import (
    ARMS,
    CHANGED,
    FACTORS,
    GRAPHS,
    RATES,
    VARIANTS,
    WIDTH,
    chosen_factors,
    rate_rows,
    width_rows,
)


def write_cell(folder: Path, row: str, score: float) -> None:
    path = folder / "packages" / f"{row}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"val": {"mean": score}, "test": {"mean": 1 - score}}))


def test_an_arm_is_chosen_by_validation_when_all_its_step_sizes_ran(tmp_path: Path) -> None:
    for factor, score in zip(FACTORS, (0.5, 0.7, 0.6), strict=True):
        write_cell(tmp_path, f"dense-64@{factor}", score)
    write_cell(tmp_path, "experts-64@1.0", 0.9)  # the others are missing
    factors = chosen_factors(tmp_path)
    assert factors == {"dense-64": FACTORS[1]}
    rows = width_rows(factors)
    assert set(rows) == {"dense-64", "dense-64-lr2", "experts-64-lr1", "flops-64"}
    assert rows["dense-64-lr2"].lr_factor == 2 * rows["dense-64"].lr_factor


def test_every_arm_has_a_step_size_or_takes_that_of_one_that_has() -> None:
    own = {name for name, arm in ARMS.items() if arm.rate_of is None}
    assert {arm.rate_of for arm in ARMS.values()} - {None} <= own
    assert set(rate_rows()) == {f"{name}@{factor}" for name in own for factor in FACTORS}
    assert set(width_rows(dict.fromkeys(own, 1.0))) == set(ARMS)


EVERY_ARM = replace(WIDTH, rows=width_rows(dict.fromkeys(ARMS, 1.0)))


@pytest.mark.parametrize("study", [RATES, EVERY_ARM, GRAPHS, VARIANTS], ids=lambda one: one.name)
def test_every_cell_has_a_configuration(study: Study) -> None:
    if study.rows:  # those of variants follow from results
        left_out = {"products/input-again-64"}
        all_cells = {f"{column}/{row}" for column in study.columns for row in study.rows}
        assert set(study.cells()) == all_cells - left_out


def test_variants_of_packages_differ_in_one_thing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenth of 600 training nodes; pairs of classes; 32 columns."""
    monkeypatch.chdir(tmp_path)
    part = np.arange(1_000) % 5
    arrays = {
        "x": np.random.default_rng(0).standard_normal((1_000, 40)).astype(np.float32),
        "y": np.arange(1_000) % 50,
        "edge_index": np.stack([np.arange(1_000), np.arange(1_000)[::-1]]),
        "train_mask": (part < 3)[:, None],
        "val_mask": (part == 3)[:, None],
        "test_mask": (part == 4)[:, None],
    }
    Path("data").mkdir()
    np.savez("data/packages.npz", **arrays)
    made = {name: getattr(variants, name)() for name in CHANGED}
    counts = {name: int(data.train_mask.sum()) for name, data in made.items()}
    assert 40 < counts.pop("a_tenth") < 80
    assert 160 < counts.pop("a_third") < 240
    assert set(counts.values()) == {600}
    classes = {name: int(data.y.max()) + 1 for name, data in made.items()}
    assert (classes["classes_25"], classes["classes_10"], classes["a_tenth"]) == (25, 10, 50)
    assert made["features_32"].x.equal(made["a_tenth"].x[:, :32])
    assert all(data.test_mask.equal(made["a_tenth"].test_mask) for data in made.values())
