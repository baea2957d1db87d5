"""Command lines: what is unknown is named in one line, and neither help nor errors wait for torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments import patches, sweep, train
from experiments.__main__ import COMMANDS
from experiments.__main__ import main as list_commands
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


def test_the_commands_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    list_commands([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2].removeprefix("experiments.") for line in lines] == list(COMMANDS)
    with pytest.raises(SystemExit) as stop:
        list_commands(["trian"])
    assert stop.value.code == 2
    assert "did you mean train?" in capsys.readouterr().err


AFTER_A_LINE = ("benchmark conv --nods 3", "benchmark vit --bach 3")
"""A benchmark, whose import takes its time, says first what it is."""


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train cora --epoch 5", "--epoch: unknown option of cora, did you mean --epochs?"),
        ("train digits --balance-coeff=3", "--balance-coeff: unknown option of digits, did you mean --balance-coef?"),
        ("train digit", "preset: got 'digit' (did you mean digits?), expected one of digits, cifar10"),
        ("train digits more", "more: unknown option of digits"),
        ("sweep mosaic --epoch 5", "--epoch: unknown option of mosaic"),
        ("sweep mosaik", "study: got 'mosaik' (did you mean mosaic?), expected one of mosaic, digits"),
        ("sweep grid --preset corra", "preset: got 'corra' (did you mean cora?), expected one of digits"),
        ("benchmark cov", "benchmark: got 'cov' (did you mean conv?), expected one of conv, ffn"),
        ("benchmark conv --nods 3", "--nods: unknown option of conv, did you mean --nodes?"),
        ("benchmark vit --bach 3", "--bach: unknown option of vit, did you mean --batch?"),
        ("report run --ou x", "--ou: unknown option of experiments.report, did you mean --out?"),
        ("patches run --images x --ou y", "--ou: unknown option of experiments.patches, did you mean --out?"),
    ],
)
def test_what_is_unknown_is_named_in_one_line(command: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, *args = command.split()
    with pytest.raises(SystemExit) as stop:
        MAINS[name](args)
    assert stop.value.code == 2
    shown = capsys.readouterr()
    *before, line = (shown.out + shown.err).splitlines()
    assert message in line
    assert len(before) == (command in AFTER_A_LINE)


@pytest.mark.parametrize(
    "command",
    [
        *(f"{name} --help" for name in MAINS),
        "train cora --help",
        "train cora --epoch 5",
        "train cora --router expert-choice",
        "sweep mosaic --preset cora",
        "sweep mosaik",
        "report run --ou x",
        "patches run --images x --ou y",
        "benchmark cov",
    ],
)
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
        ({"epochs": 3.5}, "epochs: got 3.5, input should be a valid integer"),
        ({"epochs": True}, "epochs: got True, input should be a valid integer"),
        ({"epochs": None}, "epochs: got None, input should be a valid integer"),
        ({"seeds": "0"}, "seeds: got '0', input should be a valid"),
        ({"seeds": [0.5]}, "seeds.0: got 0.5, input should be a valid integer"),
        ({"options": []}, "options: got [], input should be an object"),
        ({"options": {"balance": 3}}, "options.balance: got 3, input should be 'none', 'importance_load', 'switch'"),
        ({"options": {"balanc": "bias"}}, "options.balanc: got 'bias', unexpected keyword argument"),
        ({"data_root": 7}, "data_root: got 7"),
        ({"file": 7, "lr": 0}, "lr: got 0.0, expected a number above 0"),
        ({"lr": float("nan")}, "lr: got nan, input should be a finite number"),
        ({"conv": ["gat"]}, "conv: got ['gat'], expected ['gcn']: there is no such option now"),
        ({"epoch": 3}, "epoch: is no option of digits, did you mean epochs?"),
        ({"dataset": "cora"}, "dataset: got 'cora', expected digits, as digits"),
        ([1], "input should be an object"),
    ],
)
def test_a_file_that_is_no_configuration(given: Any, message: str, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "own.json"
    file.write_text(json.dumps(given))
    error = refused(["digits", "--config", str(file)], capsys)
    assert error.startswith(f"error: config: {file}: ")
    assert message in error


@pytest.mark.parametrize("args", ["--lr inf", "--lr nan", "--balance-coef inf"])
def test_numbers_are_finite(args: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, value = args.removeprefix("--").replace("-", "_").split()
    assert f"{name}: got {value}, expected a finite number" in refused(["digits", *args.split()], capsys)
