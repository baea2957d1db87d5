"""What two processes do in ``test_distributed.py``: ``torchrun … -m tests.experiments.ranks DIR [RANK TO KILL]``."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from pathlib import Path

import torch.distributed as dist

from experiments.train import main
from tests.experiments.command import run_until

TINY = ["--patch", "4", "--dim", "8", "--vit-heads", "2", "--hidden", "8", "--layers", "2", "--experts", "4"]
EXACT = ["--epochs", "2", "--seeds", "0", "--no-progress", "--precision", "64-true", "--lr", "1e-3"]
SAMPLED = ["digits-graph", "--sampling", "neighbor", "--conv", "sage", "--hidden", "8", "--router", "token_choice"]
SAME: dict[str, list[str]] = {
    "images": ["images", *EXACT, *TINY, "--batch-size", "2", "--augment", "standard",
               "--router", "expert_choice", "--clip-norm", "0.1"],
    "neighbors": [*SAMPLED, *EXACT, "--fanout", "-1", "-1", "--batch-size", "300", "--weight-decay", "0.1",
                  "--balance", "none"],
    "types": ["ogbn-mag", *EXACT, "--sampling", "neighbor", "--evaluation", "sampled", "--fanout", "-1", "-1",
              "--noise", "False", "--dropout", "0", "--hidden", "8", "--batch-size", "600", "--offline"],
}  # fmt: skip
"""Nothing is drawn but what follows from the epoch, so that one process gives the same. Of 21 and of 3 images the last
batch has one, so that the second process has none. A node that both sample is two tokens, which a bias would count."""
DRAWS = [*SAMPLED, "--epochs", "3", "--seeds", "0", "--no-progress", "--fanout", "4", "3", "--batch-size", "300",
         "--dropout", "0.3", "--noise", "True", "--evaluation", "sampled", "--balance", "bias"]  # fmt: skip


def data_of(name: str, root: Path) -> list[str]:
    """Where the data of one of :data:`SAME` are, if it does not bring its own."""
    return [] if name == "neighbors" else ["--data-root", str(root / "data")]


def all_runs(root: Path) -> None:
    two = ["--devices", "2"]
    for name, args in SAME.items():
        main([*args, *two, *data_of(name, root), "--out", str(root / "two" / name)])
    main([*DRAWS, *two, "--out", str(root / "whole")])
    cut = [*DRAWS, *two, "--resume", "--out", str(root / "cut")]
    run_until(2, cut, rank="1")
    run_until(2, cut, rank="0")
    main(cut)


def say_whether_left(root: Path) -> None:
    (root / f"left-{os.environ['RANK']}").write_text(str(not dist.is_initialized()))


if __name__ == "__main__":
    root, *killed = sys.argv[1:]
    if killed:
        run_until(4, [*DRAWS, "--devices", "2", "--out", f"{root}/run"], rank=killed[0], number=signal.SIGKILL)
    atexit.register(say_whether_left, Path(root))  # the first of them, and so the last to be called
    all_runs(Path(root))
