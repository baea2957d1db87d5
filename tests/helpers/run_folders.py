"""Results of runs, made by hand and compared."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.helpers.command import rows


def variant(name: str, values: list[float], flops: int = 1, layers: Any = ()) -> dict[str, Any]:
    std = statistics.stdev(values) if len(values) > 1 else None
    test = {"mean": statistics.fmean(values), "std": std, "n": len(values), "values": values}
    return {
        "variant": name,
        "label": name,
        "metric": "accuracy",
        "test": test,
        "flops": flops,
        "parameters": 1234,
        "routing": layers,
        "config": {"seeds": list(range(len(values)))},
    }


def assert_same(whole: Path, resumed: Path, exact: bool = True) -> None:
    """Curves, logs, results and weights of two run folders.

    Between processes the last bits of weights may differ.
    """
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (whole, resumed)]
    for name in ("val", "test", "best_epoch", "curve", "routing", "config"):
        assert summaries[0][name] == summaries[1][name], name
    for seed in (path.name for path in whole.glob("seed-*")):
        weights = [
            load_file(folder / seed / "checkpoint" / "best.safetensors")
            for folder in (whole, resumed)
        ]
        torch.testing.assert_close(*weights, rtol=0 if exact else 1.3e-6, atol=0 if exact else 1e-5)
        # A dense model has no routing.csv
        logs = [
            {path.name for path in (folder / seed).glob("*.csv")} for folder in (whole, resumed)
        ]
        assert logs[0] == logs[1] >= {"metrics.csv"}
        for name in logs[0] if exact else ():
            number = int(seed.removeprefix("seed-"))
            assert rows(whole, name, number) == rows(resumed, name, number)
