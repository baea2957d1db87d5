"""Command lines and configuration files.

What is unknown is named, and neither help nor errors wait for torch.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments import advise, patches, report, sweep
from experiments.benchmark import __main__ as benchmark
from experiments.convert import __main__ as convert
from experiments.train import command as train
from tests.helpers import own_parts
from tests.helpers.command import QUICK, refused

ROOT = Path(__file__).parents[2]
COMMANDS: dict[str, Any] = {
    "advise": advise,
    "benchmark": benchmark,
    "convert": convert,
    "patches": patches,
    "report": report,
    "sweep": sweep,
    "train": train,
}
MAINS = {name: command.main for name, command in COMMANDS.items()}


@pytest.fixture(autouse=True)
def forget_unknown_options() -> None:
    """tyro before 1.0 repeats those of earlier calls in the same process."""
    formatter: Any = sys.modules.get("tyro._argparse_formatter")
    if hasattr(formatter, "global_unrecognized_arg_and_prog"):
        formatter.global_unrecognized_arg_and_prog = []


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train cora --epoch 5", "--epochs INT"),
        ("train digits --balanc=3", "--balance {None,none,switch,bias}"),
        ("train digit", "preset: got 'digit', expected one of digits, cifar10"),
        ("train digit", "did you mean 'digits'?"),
        ("train digits more", " more "),
        ("train cora --router dense --compare", "compare: got router='dense'"),
        ("train digits --lr nan", "lr: got nan, expected a finite number"),
        (
            "sweep router",
            "study: got 'router', expected one of routers, width, forces, FILE.py:NAME",
        ),
        ("sweep router", "did you mean 'routers'?"),
        ("sweep --budget 2 routers", "study: got '--budget', expected the study first"),
        ("benchmark steps", "benchmark: got 'steps', expected one of step, gpu"),
        ("benchmark steps", "did you mean 'step'?"),
        ("convert molecule", "command: got 'molecule', expected one of molecules, packages"),
        ("sweep routers --columns cora", "columns: got cora, expected some of"),
        ("sweep routers --rows router", "rows: got router, expected some of"),
        ("sweep width --columns arxi", "columns: got arxi, expected some of packages, synsets"),
        (
            "sweep routers --columns mosaic --rows oracle",
            "rows: got oracle, expected some that mosaic has",
        ),
        ("advise corra --out out", "preset: got 'corra', expected one of"),
        ("advise corra --out out", "did you mean 'cora'?"),
        ("advise ogbn-mag --out out", "preset: got 'ogbn-mag'"),
        ("advise ogbn-products --out out", "sampling: got 'neighbor' of ogbn-products, expected"),
        ("advise cora --metric roc_auc --out out", "metric: got 'roc_auc' for cora"),
        ("advise cora --budget 0 --out out", "budget: got 0.0, expected minutes above 0"),
        ("advise graph --data-root nowhere.npz --out out", "nowhere.npz"),
        ("report run --ou x", "--out PATH"),
        ("report nowhere", "nowhere/summary.json: is missing, expected the folder of a finished"),
        ("report nowhere other", "nowhere/summary.json, other/summary.json: is missing"),
        ("report", "runs: got none, expected at least one folder"),
        ("patches run --images x --ou y", "--out PATH"),
        ("train digits-graph --lr 1e30 --clip-norm 1 --router dense", "loss: got nan in epoch"),
        ("train digits-graph --lr -1", "lr: got -1.0, expected at least 0"),
        ("train digits-graph --dropout 1", "dropout: got 1.0, expected less than 1"),
        ("train digits-graph --epochs 0", "epochs: got 0, expected at least 1"),
        (
            "train digits-graph --seeds 0 0",
            "seeds: got (0, 0), expected one number or more from 0 to 2**32 - 1, each",
        ),
        ("train digits-graph --seeds -1", "seeds: got (-1,), expected one number or more"),
        ("train digits-graph --conv cheb", "conv: got ChebConv, which cannot be built as conv("),
        ("train digits-graph --fanout 3 3", "fanout: got (3, 3) with sampling='full'"),
        (
            "train digits-graph --device nowhere",
            "device: got 'nowhere', expected one that is there",
        ),
        ("train digits-graph --router oracle", "router: got 'oracle' for digits-graph"),
        ("train mosaic --router oracle --experts 4", "experts: got 4, expected the 8 planted ones"),
        (
            "train digits-graph --router random --balance switch",
            "balance: got 'switch', expected none",
        ),
        ("train digits-graph --router dense --weight score", "options: got"),
        ("train digits-graph --k 9", "k: got 9, expected at most num_experts=8"),
        ("train digits-graph --equal flops", "equal: got flops, expected none, or router='dense'"),
        (
            "train digits-graph --equal flops --model OWN:sage",
            "equal: got flops, expected none, or",
        ),
        ("train mosaic --router uniform --k 3", "k: got 3 with router='uniform', expected 1"),
        ("train mosaic --router oracle --k 3", "k: got 3 with router='oracle', expected 1"),
        ("train mosaic --router uniform --equal-to token_choice", "equal_to: got 'token_choice'"),
        ("train mosaic --router dense --equal_to=random", "'dense' and no --equal, expected"),
        ("train mosaic --router uniform --equal flops --equal-to random", "equal: got flops"),
        ("train mosaic --equal flops --equal-to uniform --k 3 --router dense", "k: got 3 with"),
        ("train mosaic --router dense --equal flops --equal-to dense", "equal_to: got 'dense'"),
        ("train mosaic --router dense --equal flops --equal-to tokens", "equal_to: got 'tokens'"),
        (
            "train digits-graph --conv OWN:Nothing",
            "conv: got 'tests.helpers.own_parts:Nothing'",
        ),
        ("train digits --router dense --equal flops --equal-to oracle", "with equal_to='oracle')"),
        ("train digits-graph --trust", "trust: got True, expected it with --config FILE only"),
        ("train digits-graph --kmeans-init", "kmeans_init: got True"),
        ("train digits --patch 3", "image_size: got 8, expected a multiple of patch_size=3"),
        (
            "train digits --image-size 24",
            "image_size: got 24, expected patch, dim and vit_heads with it",
        ),
        ("train cora --dataset digits", "--dataset"),
        ("train digits --router soft_slots --k 2", "router: got 'soft_slots' with another k"),
        (
            "train digits --router attention_vote --scope neighbors",
            "scope: got 'neighbors', expected 'group'",
        ),
        ("train digits-graph --workers -1", "workers: got -1, expected at least 0"),
        (
            "train digits --router soft_slots --start plain",
            "router: got 'soft_slots' with another k or start",
        ),
        ("train graph --data-root none.npz", "No such file or directory: 'none.npz'"),
        (
            "train ogbn-mag --data OWN:sage",
            "own_parts:sage', expected none for ogbn-mag",
        ),
        # your own
        (
            "train digits-graph --router nobodys:Router",
            "router: got 'nobodys:Router', which cannot be imported",
        ),
        ("train digits-graph --router OWN:Nothing", "own_parts:Nothing', which cannot be imported"),
        ("train digits-graph --router OWN:sage", "expected a subclass of gmoe.Router"),
        (
            "train digits-graph --router token-choice",
            "router: got 'token-choice', expected dense, token_choice",
        ),
        ("train digits-graph --router expert-choice", "did you mean 'expert_choice'?"),
        (
            "train digits-graph --router OWN:FirstBits --balance bias",
            "balance: got 'bias', expected none",
        ),
        ("train digits-graph --model OWN:nothing", "returns a int, expected an nn.Module"),
        ("train digits-graph --model sage", "model: got 'sage', expected package.module:name"),
        (
            "train digits-graph --logger wandb",
            "logger: got 'wandb', expected its package installed: pip install wandb",
        ),
        # several processes
        ("train digits --devices 2", "expected torchrun --nproc-per-node 2 -m experiments.train"),
        ("train digits --devices 2 --batch-size 33", "batch_size: got 33"),
        ("train digits --devices 0", "devices: got 0, expected at least 1"),
        ("train cora --devices 2", "a whole graph is one batch, which cannot be split"),
        ("train ogbn-mag --devices 2", "for ogbn-mag with full batches, expected one"),
    ],
)
@pytest.mark.filterwarnings("ignore:ChebConv")
def test_what_is_refused_is_named_in_one_line(
    command: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("experiments.train.checks.importlib.util.find_spec", lambda _: None)
    monkeypatch.chdir(tmp_path)
    name, *args = command.replace("OWN", own_parts.__name__).split()
    args[1:1] = QUICK if name == "train" else []
    assert message in refused(args, capsys, MAINS[name])
    assert "epoch" in message or not [*tmp_path.rglob("config.json"), *tmp_path.rglob("*.html")]


@pytest.mark.parametrize(
    ("command", "prefix"),
    [
        ("train cora --epoch 5", "train cora"),
        ("train cora --k x", "train cora"),
        ("train --config own.json --epoch 5", "train --config own.json"),
        ("train digits --config own.json --epoch 5", "train digits --config own.json"),
        ("sweep routers --budge 3", "sweep routers"),
        ("benchmark step --repeat 3", "benchmark step"),
        ("convert molecules --nothing x", "convert molecules"),
        *(
            (f"{name} --nothing x", name)
            for name in sorted(set(MAINS) - {"train", "sweep", "benchmark", "convert"})
        ),
    ],
)
def test_an_error_leads_to_the_help_that_has_the_options(
    command: str, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.json").write_text('{"dataset": "digits"}')
    name, *args = command.split()
    assert f"python -m experiments.{prefix} --help" in refused(args, capsys, MAINS[name])


def test_the_preset_comes_first(capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(["--seeds", "0", "digits"], capsys)
    assert "preset: got '--seeds', expected the preset first, then its options" in error


AT_ONCE = [f"{name} --help" for name in MAINS]
AT_ONCE += ["train cora --help", "train cora --k 0"]
AT_ONCE += ["report nowhere other", "patches nowhere --images x.png"]


def test_help_and_errors_do_without_torch() -> None:
    """One process for all: the first command that loads torch is named."""
    calls = {
        command: (COMMANDS[command.split()[0]].__name__, command.split()[1:]) for command in AT_ONCE
    }
    code = f"""
import sys
from importlib import import_module
for command, (module, args) in {calls}.items():
    try:
        import_module(module).main(args)
        sys.exit(command + ": it went on")
    except SystemExit as stop:
        if stop.code not in (None, 0, 2) or "torch" in sys.modules:
            sys.exit(f"{{command}}: code {{stop.code}}, torch: {{'torch' in sys.modules}}")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epochs": "32"}, "epochs: got '32', input should be a valid integer"),
        ({"seeds": [0.5]}, "seeds.0: got 0.5, input should be a valid integer"),
        (
            {"options": {"balance": 3}},
            "options.balance: got 3, input should be 'none', 'switch' or 'bias'",
        ),
        (
            {"options": {"balanc": "bias"}},
            "options.balanc: got 'bias', unexpected keyword argument",
        ),
        ({"file": 7, "k": 0}, "k: got 0, expected at least 1"),
        ({"conv": ["gat"]}, "conv: got ['gat'], unexpected keyword argument"),
        ({"epoch": 3}, "epoch: got 3, unexpected keyword argument"),
        ({"dataset": "cora"}, "dataset: got 'cora', expected digits, that of the preset"),
    ],
)
def test_a_file_that_is_no_configuration(
    given: Any, message: str, tmp_path: Path, capsys: Any
) -> None:
    file = tmp_path / "own.json"
    file.write_text(json.dumps(given))
    error = refused(["digits", "--config", str(file)], capsys)
    assert error.startswith(f"error: {file}: ")
    assert message in error
