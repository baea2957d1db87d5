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
from experiments.report.__main__ import main as report_main

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


AFTER_A_LINE = ("benchmark conv --nods 3", "benchmark vit --size.image-sise 3")
"""A benchmark, whose import takes its time, says first what it is."""


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train cora --epoch 5", "--epoch: unknown option of cora, did you mean --epochs?"),
        ("train digits --balance-coeff=3", "--balance-coeff: unknown option of digits, did you mean --balance-coef?"),
        ("train digit", "preset: got 'digit' (did you mean digits?), expected one of digits, cifar10"),
        ("train digits more", "more: unknown option of digits"),
        ("sweep mosaic --epoch 5", "--epoch: unknown option of experiments.sweep, did you mean --epochs?"),
        ("sweep mosaik", "study: got 'mosaik' (did you mean mosaic?), expected one of mosaic, digits"),
        ("sweep grid --preset corra", "preset: got 'corra' (did you mean cora?), expected one of digits"),
        ("benchmark cov", "benchmark: got 'cov' (did you mean conv?), expected one of conv, ffn"),
        ("benchmark conv --nods 3", "--nods: unknown option of conv, did you mean --nodes?"),
        ("benchmark vit --size.image-sise 3", "unknown option of vit, did you mean --size.image-size?"),
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
        "sweep mosaic --epochs 5",
        "sweep mosaik",
        "report run --ou x",
        "patches run --images x --ou y",
        "benchmark cov",
    ],
)
def test_help_and_errors_do_without_torch(command: str) -> None:
    name, *args = command.split()
    module = f"experiments.{name}" + ".__main__" * (name in ("benchmark", "report"))
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
    ("option", "value", "message"),
    [
        ("epochs", "32", "a valid integer"),
        ("epochs", 3.5, "a valid integer"),
        ("epochs", True, "a valid integer"),
        ("epochs", None, "a valid integer"),
        ("epochs", [], "a valid integer"),
        ("seeds", 0, "a valid array"),
        ("seeds", "0", "a valid array"),
        ("seeds", {}, "a valid array"),
        ("seeds", [0.5], "a valid integer"),
        ("seeds", [[0]], "a valid integer"),
        ("options", [], "an object of options"),
        ("balance", {"balance": 3}, "'none', 'importance_load', 'switch' or 'bias'"),
        ("options", {"balanc": "bias"}, "no option of routers, did you mean balance?"),
        ("conv", "gcn", "a valid array"),
        ("router", 5, "a valid string"),
        ("data_root", 7, "a valid string"),
        ("out", 7, "a valid string"),
        ("file", 7, "a valid string"),
        ("optimizer", "sgd", "'adam' or 'adamw'"),
        ("router_input", ["nod"], "'node', 'neighbors' or 'degree'"),
        ("residual", None, "'none', 'identity' or 'linear'"),
        ("lr", "0.1", "a valid number"),
        ("lr", float("nan"), "a finite number"),
        ("lr", float("inf"), "a finite number"),
    ],
)
def test_a_file_with_a_wrong_type(
    option: str, value: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "own.json"
    file.write_text(json.dumps({"options" if option == "balance" else option: value}))
    with pytest.raises(SystemExit) as stop:
        train.main(["digits-graph", "--config", str(file)])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {option}: got ")
    assert message in line


def test_a_file_with_lists_whole_numbers_and_null(tmp_path: Path) -> None:
    file = tmp_path / "own.json"
    values = {"lr": 1, "seeds": [3, 4], "shared_expert": None, "dense_start": None, "router_input": None, "out": "a"}
    file.write_text(json.dumps(values | {"options": {"balance_coef": 1, "noise": None}, "data_root": "b"}))
    config = train.read_config_file(file, "digits-graph")
    assert (config.lr, config.seeds, config.out, config.data_root) == (1.0, (3, 4), Path("a"), Path("b"))
    assert config.layer_options() == {}
    assert config.options.given() == {"balance_coef": 1.0}


def test_a_file_with_options_of_other_data_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "own.json"
    for name in ("conv", "epoch"):
        file.write_text(json.dumps({name: ["gcn"]}))
        with pytest.raises(ValueError, match=f"config: got {name}, which is no option of digits"):
            train.read_config_file(file, "digits")


@pytest.mark.parametrize("args", ["--lr inf", "--lr nan", "--balance-coef inf"])
def test_numbers_are_finite(args: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        train.main(["digits", *args.split()])
    assert stop.value.code == 2
    name, value = args.removeprefix("--").replace("-", "_").split()
    assert f"{name}: got {value}, expected a finite number" in capsys.readouterr().err
