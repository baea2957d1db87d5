"""Two processes train what one does, stop and go on together; what cannot be split is refused.

What they do: ``torchrun … -m tests.experiments.train.test_distributed DIR [RANK TO KILL]``.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from experiments.train.command import main
from tests.helpers.command import refused, rows, run_until
from tests.helpers.made_graph import make_config, make_task
from tests.helpers.made_images import write_images
from tests.helpers.run_folders import assert_same

ROOT = Path(__file__).parents[3]
TINY = "--patch 4 --dim 8 --vit-heads 2 --hidden 8 --layers 2 --experts 4"
EXACT = "--epochs 2 --seeds 0 --no-progress --precision 64-true --lr 1e-3"
SAMPLED = "digits-graph --sampling neighbor --conv sage --hidden 8 --router token_choice"
SAME: dict[str, str] = {
    "images": f"images {EXACT} {TINY} --batch-size 2 --scale None --augment standard "
    "--router expert_choice --clip-norm 0.1",
    "recipe": f"images {EXACT} {TINY} --batch-size 2 --grad-accum-steps 3 --model-ema-decay 0.8 "
    "--scale 0.5 1 --reprob 0.5 --router expert_choice --clip-norm 0.1",
    "neighbors": f"{SAMPLED} {EXACT} --fanout -1 -1 --batch-size 300 --weight-decay 0.1 "
    "--balance none",
}
"""Nothing is drawn but what follows from the epoch, so that one process gives the same. Of 21 and
of 3 images the last batch has one, so that the second process has none. A node that both sample
is two tokens, which a bias would count."""
DRAWS = (
    f"{SAMPLED} --epochs 3 --seeds 0 --no-progress --fanout 4 3 --batch-size 300 --dropout 0.3 "
    "--balance bias"
).split()

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]


def data_of(name: str, root: Path) -> list[str]:
    """Where the data of one of :data:`SAME` are, if it does not bring its own."""
    return [] if name == "neighbors" else ["--data-root", str(root / "data")]


def all_runs(root: Path) -> None:
    two = ["--devices", "2"]
    for name, args in SAME.items():
        main([*args.split(), *two, *data_of(name, root), "--out", str(root / "two" / name)])
    main([*DRAWS, *two, "--out", str(root / "whole")])
    cut = [*DRAWS, *two, "--resume", "--out", str(root / "cut")]
    run_until(2, cut, rank="1")
    run_until(2, cut, rank="0")
    main(cut)


def say_whether_left(root: Path) -> None:
    (root / f"left-{os.environ['RANK']}").write_text(str(not dist.is_initialized()))


def start(*args: str, **how: Any) -> subprocess.Popen[bytes]:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*TORCHRUN, *args], cwd=ROOT, env=env, stderr=subprocess.PIPE, **how)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of :func:`all_runs`."""
    root = tmp_path_factory.mktemp("ranks")
    write_images(root / "data")
    process = start("-m", __name__, str(root))
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error.decode()
    (root / "errors").write_bytes(error)
    return root


@pytest.mark.parametrize("name", SAME)
def test_two_processes_train_what_one_does(name: str, folder: Path) -> None:
    main([*SAME[name].split(), *data_of(name, folder), "--out", str(folder / "one" / name)])
    one, two = (folder / count / name for count in ("one", "two"))
    summaries = [json.loads((run / "summary.json").read_text()) for run in (one, two)]
    for figure in ("val", "test", "steps", "flops", "parameters"):
        assert summaries[0][figure] == summaries[1][figure], figure
    for mine, other in zip(rows(one), rows(two), strict=True):
        # Of logits in float32
        assert float(mine["loss"]) == pytest.approx(float(other["loss"]), rel=1e-6)
    weights = [load_file(run / "seed-0" / "checkpoint" / "best.safetensors") for run in (one, two)]
    for key, value in weights[0].items():
        torch.testing.assert_close(value, weights[1][key], rtol=1e-9, atol=1e-12)
    assert "devices" not in summaries[0]["config"]
    assert summaries[1]["config"]["devices"] == 2


def test_processes_leave_their_group_and_do_not_warn_of_strides(folder: Path) -> None:
    """One that is in its group as it exits is aborted, at times."""
    assert [(folder / f"left-{rank}").read_text() for rank in (0, 1)] == ["True", "True"]
    assert "Grad strides" not in (folder / "errors").read_text()


def test_two_processes_that_are_stopped_go_on_exactly(folder: Path) -> None:
    assert_same(folder / "whole", folder / "cut")


def test_slices_of_a_graph_are_those_of_one_process() -> None:
    task = make_task(make_config(sampling="neighbor"))
    slices = [list(task.loader("train", 7, 3, (rank, 8))) for rank in range(8)]
    for number, whole in enumerate(task.loader("train", 7, 3)):
        assert torch.cat([one[number].target for one in slices]).tolist() == whole.target.tolist()
    assert {len(one) for one in slices} == {number + 1}


def test_processes_that_were_not_asked_for(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "devices: got 1 in 2 processes, expected python -m experiments" in refused(
        ["digits"], capsys
    )


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_ends_the_other_and_the_run_goes_on(
    rank: int, tmp_path: Path
) -> None:
    process, began = start("-m", __name__, str(tmp_path), str(rank)), time.monotonic()
    _, error = process.communicate(timeout=120)
    assert time.monotonic() - began < 100  # not for the two hours that one may wait
    assert process.returncode != 0
    assert b"Signal 9 (SIGKILL)" in error
    if rank == 1:
        assert (
            b"since another process has ended; continue with: torchrun --nproc-per-node 2" in error
        )
    more = ["--devices", "2", "--resume", "--out", str(tmp_path / "run")]
    again = start("-m", "experiments.train", *DRAWS, *more)
    _, error = again.communicate(timeout=300)
    assert again.returncode == 0, error.decode()
    assert len(rows(tmp_path / "run")) == 3


if __name__ == "__main__":
    root, *killed = sys.argv[1:]
    if killed:
        args = [*DRAWS, "--devices", "2", "--out", f"{root}/run"]
        run_until(4, args, rank=killed[0], number=signal.SIGKILL)
    atexit.register(say_whether_left, Path(root))  # the first of them, and so the last to be called
    all_runs(Path(root))
