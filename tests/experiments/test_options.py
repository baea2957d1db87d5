"""Command lines and configuration files: what is unknown is named, and neither help nor errors wait for torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments import patches, sweep, train
from experiments.benchmark.__main__ import main as benchmark_main
from experiments.report import main as report_main
from tests.experiments.command import refused

ROOT = Path(__file__).parents[2]
MAINS: dict[str, Any] = {
    "benchmark": benchmark_main,
    "patches": patches.main,
    "report": report_main,
    "sweep": sweep.main,
    "train": train.main,
}


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train cora --epoch 5", "--epochs INT"),
        ("train digits --balance-coeff=3", "--balance-coef {None}|FLOAT"),
        ("train digit", "digits, cifar10"),
        ("train digits more", "Unrecognized options: more"),
        ("train digits --lr nan", "lr: got nan, expected a finite number"),
        ("train digits --balance-coef inf", "balance_coef: got inf, expected a finite number"),
        ("sweep mosaik", "mosaic"),
        ("sweep grid --preset corra", "preset: got 'corra', expected one of digits"),
        ("benchmark cov", "benchmark: got 'cov', expected one of conv, ffn"),
        ("report run --ou x", "--out PATH"),
        ("patches run --images x --ou y", "--out PATH"),
    ],
)
def test_what_is_unknown_is_named(command: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, *args = command.split()
    assert message in refused(args, capsys, MAINS[name])


@pytest.mark.parametrize("command", [*(f"{name} --help" for name in MAINS), "train cora --help", "train cora --k 0"])
def test_help_and_errors_do_without_torch(command: str) -> None:
    name, *args = command.split()
    module = f"experiments.{name}" + ".__main__" * (name == "benchmark")
    code = f"""
import sys
from {module} import main
try:
    main({args})
except SystemExit:
    sys.exit("torch" in sys.modules)
raise AssertionError("it went on")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epochs": "32"}, "epochs: got '32', input should be a valid integer"),
        ({"epochs": True}, "epochs: got True, input should be a valid integer"),
        ({"seeds": [0.5]}, "seeds.0: got 0.5, input should be a valid integer"),
        ({"options": {"balance": 3}}, "options.balance: got 3, input should be 'none', 'importance_load', 'switch'"),
        ({"options": {"balanc": "bias"}}, "options.balanc: got 'bias', unexpected keyword argument"),
        ({"lr": float("nan")}, "lr: got nan, input should be a finite number"),
        ({"file": 7, "k": 0}, "k: got 0, expected at least 1"),
        ({"conv": ["gat"]}, "conv: got ['gat'], expected ['gcn']: there is no such option now"),
        ({"epoch": 3}, "epoch: got 3, unexpected keyword argument"),
        ({"dataset": "cora"}, "dataset: got 'cora', expected digits, that of the preset"),
        ([1], "input should be an object"),
    ],
)
def test_a_file_that_is_no_configuration(given: Any, message: str, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "own.json"
    file.write_text(json.dumps(given))
    error = refused(["digits", "--config", str(file)], capsys)
    assert error.startswith(f"error: {file}: ")
    assert message in error
