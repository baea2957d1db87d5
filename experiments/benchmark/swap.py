"""Does a swap hurt? Dense layers against gmoe's defaults in their place: accuracy over seeds, and time of a step."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch_geometric import seed_everything
from tqdm import tqdm

import gmoe
from experiments.benchmark.measure import Benchmark, Step, take_turns, told
from experiments.benchmark.swap_models import ROWS, Arm, Problem, Where, evaluated
from experiments.build import num_parameters
from experiments.run_folder import environment, write_json
from gmoe import LinearExperts, MoELayer

LIVE = 0.01
"""An expert lives that takes more than this share of the tokens in evaluation."""

QUICK_ROWS = ("cora-gcn", "cora-gat", "minesweeper", "mosaic")


@dataclass(frozen=True, kw_only=True)
class SwapBenchmark(Benchmark):
    """The class swapped and nothing else: PyG's examples, presets, a ViT. Resumes from the file of `--json`."""

    rows: tuple[str, ...] = ()
    """Names of rows; by default all (with `quick` four)."""
    arms: tuple[Arm, ...] = ()
    """What is trained beside `dense` and `moe`; by default all that a row has. `moe-off` is read off `moe`."""
    seeds: int | None = None
    """Seeds, from `seed` on; by default 10, of images 3."""
    epochs: int | None = None
    """Epochs in place of the rows' own."""
    threads: int = 1
    """CPU threads; 0 leaves torch's default."""
    repeats: int = 15
    """Timed steps of each arm, after three that are not; 0 takes no times."""
    data_root: Path = Path("data")
    """Folder that holds planetoid, heterophilous, facebook.npz and cifar10."""
    offline: bool = False
    """Never download."""
    quick: bool = False
    """Three epochs, one seed, three repeats: to see that all runs."""

    def run(self) -> dict[str, Any]:
        """Train what the file lacks, seed by seed, and measure steps where it has too few times.

        The file is written after each run; beside it is a folder for what is not finished.

        Returns:
            By row: ``runs``, by arm the results of its seeds, and ``time``, see :func:`step_times`.

        Raises:
            ValueError: an unknown row, or a number below 1.
            FileNotFoundError: data are missing.
        """
        unknown = sorted(set(self.rows) - set(ROWS))
        if unknown:
            raise ValueError(f"rows: got {', '.join(unknown)}, expected some of {', '.join(ROWS)}")
        for name, value in (("seeds", self.seeds), ("epochs", self.epochs)):
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        root, device, epochs = (
            self.data_root.expanduser(),
            self.torch_device(),
            self.epochs or (3 if self.quick else None),
        )
        where = Where(data_root=root, offline=self.offline, device=device, epochs=epochs)
        load = lru_cache(maxsize=1)(lambda name: ROWS[name].load(where))  # one row's data at a time
        with tempfile.TemporaryDirectory() as nowhere:
            path = self.json or Path(nowhere) / "swap.json"
            for name, arm, seed in told(self._missing(path, where), "run"):
                problem = load(name)(seed)
                if arm in ("dense-flops", "times") and not read_file(path).get(name, {}).get("matched"):
                    self._add(path, name, matched=match(problem, where))
                if arm == "times":
                    hidden = read_file(path)[name]["matched"]["hidden"]
                    self._add(path, name, time=step_times(problem, ROWS[name].arms, hidden, self._repeats, where, seed))
                    continue
                width = read_file(path)[name]["matched"]["hidden"] if arm == "dense-flops" else problem.width
                part = path.with_suffix("") / f"{name}-{arm}-{seed}-{problem.epochs}"
                result = train_arm(problem, arm, width, seed, part, where)
                self._add(path, name, arm, result)
                shutil.rmtree(part, ignore_errors=True)
                off = "" if "off" not in result else f", {100 * result['off']:.2f} with the experts off"
                test = f"test {100 * result['test']:.2f}{off}, epoch {result['best_epoch']}, {result['seconds']:.0f} s"
                tqdm.write(f"{name} {arm} seed {seed}: {test}", file=sys.stderr)
            return read_file(path)

    @property
    def _repeats(self) -> int:
        return min(self.repeats, 3) if self.quick else self.repeats

    def _missing(self, path: Path, where: Where) -> Iterator[tuple[str, Any, int]]:
        """Row, arm and seed of what the file lacks; the arm ``"times"`` stands for those."""
        for name in self.rows or (QUICK_ROWS if self.quick else ROWS):
            row, found = ROWS[name], read_file(path).get(name, {"runs": {}, "time": None})
            count = self.seeds or (1 if self.quick else row.seeds)
            for seed in range(self.seed, self.seed + count):
                for arm in ("dense", "moe", *(arm for arm in row.arms if not self.arms or arm in self.arms)):
                    if not any(run["seed"] == seed and _same(run, where) for run in found["runs"].get(arm, [])):
                        yield name, arm, seed
            if self._repeats and (not found["time"] or len(found["time"]["moe"]["wall"]["values"]) < self._repeats):
                yield name, "times", self.seed

    def _add(self, path: Path, name: str, arm: str = "", run: Mapping[str, Any] | None = None, **values: Any) -> None:
        """Add to a row of the file, which other processes may write to as well."""
        with locked(path.parent):
            variants = read_file(path)
            row: dict[str, Any] = variants.setdefault(name, {"about": ROWS[name].about, "runs": {}, "time": None})
            row |= values
            if run is not None:
                others = [other for other in row["runs"].get(arm, []) if other["seed"] != run["seed"]]
                row["runs"][arm] = sorted([*others, run], key=lambda other: other["seed"])
            write_json(path, self.content({known: variants[known] for known in ROWS if known in variants}))


def read_file(path: Path) -> dict[str, Any]:
    """The variants of a file of results; none where there is no file."""
    found: dict[str, Any] = json.loads(path.read_text())["variants"] if path.exists() else {}
    return found


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Other processes that ask for the same folder wait."""
    folder.mkdir(parents=True, exist_ok=True)
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


def _same(run: Mapping[str, Any], where: Where) -> bool:
    """Whether a finished run had the epochs that are asked for."""
    return run["epochs"] == where.epochs if where.epochs is not None else not run["shortened"]


# one run --------------------------------------------------------------------------------------------------------------


def drawn(problem: Problem, arm: Arm, width: int, seed: int, where: Where) -> nn.Module:
    """The model of a seed: an arm with experts has the dense layers of the dense arm."""
    seed_everything(seed)
    return problem.build(arm, width).to(where.device)


def train_arm(problem: Problem, arm: Arm, width: int, seed: int, folder: Path, where: Where) -> dict[str, Any]:
    """Train one arm with one seed, and test it at the epoch that validation selects.

    Returns:
        As JSON: ``test``, ``val``, ``best_epoch`` (from 1), and of a model with experts ``off``, the test score with
        the routed experts switched off, and by layer ``share`` and ``live``, see :func:`routed_part`.
    """
    started = time.perf_counter()
    model = drawn(problem, arm, width, seed, where)
    val, best_epoch = problem.train(model, arm, folder)
    result = {
        "seed": seed,
        "metric": problem.metric,
        "test": evaluated(problem.score, model, "test"),
        "val": val if math.isfinite(val) else None,
        "best_epoch": best_epoch,
        "epochs": problem.epochs,
        "shortened": where.epochs is not None,
        "hidden": width,
        "parameters": num_parameters(model),
    }
    if switches(model):
        result |= routed_part(model, problem.forward)
        with switched_off(model):
            result["off"] = evaluated(problem.score, model, "test")
    return result | {"seconds": round(time.perf_counter() - started, 2), "commit": environment()["commit"]}


def switches(model: nn.Module) -> dict[MoELayer, list[nn.Parameter]]:
    """The layers that start dense, and what starts at zero in them: of a conv the gain, of MLPs their last layers."""
    found: dict[MoELayer, list[nn.Parameter]] = {}
    for layer in model.modules():
        if isinstance(layer, gmoe.MoEConv) and layer.gain is not None:
            found[layer] = [layer.gain]
        if isinstance(layer, gmoe.MoE):
            linears = [part for part in layer.modules() if isinstance(part, LinearExperts)]
            found[layer] = [parameter for part in linears if part.zero_init for parameter in part.parameters()]
    return {layer: parts for layer, parts in found.items() if parts}


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """The routed experts give zero, as they did at the start."""
    kept = [(part, part.detach().clone()) for parts in switches(model).values() for part in parts]
    with torch.no_grad():
        for part, _ in kept:
            part.zero_()
        yield
        for part, value in kept:
            part.copy_(value)


def routed_part(model: nn.Module, forward: Callable[[Any], Any]) -> dict[str, list[float]]:
    """What the routed experts do in evaluation, by layer.

    Returns:
        ``share``, the norm of what they add over the norm of the layer's output; ``live``, how many of them take more
        than 1 % of the tokens, by decision of a router.
    """
    found = {layer: [0.0, 0.0] for layer in switches(model)}

    def compare(layer: Any, args: Any, kwargs: Any, output: Any) -> None:
        with switched_off(layer):
            off = layer.forward(*args, **kwargs)
        y, without = (out[0] if isinstance(out, tuple) else out for out in (output, off))
        found[layer][0] += float((y - without).double().square().sum())
        found[layer][1] += float(y.double().square().sum())

    with gmoe.record_routing(model) as routings:
        evaluated(forward, model)
    live = [float((routing.load > LIVE * routing.num_tokens).sum()) for routing in routings]
    hooks = [layer.register_forward_hook(compare, with_kwargs=True) for layer in found]
    evaluated(forward, model)
    for hook in hooks:
        hook.remove()
    return {
        "share": [(part / whole) ** 0.5 if whole else 0.0 for part, whole in found.values()],
        "live": live,
    }


# cost -----------------------------------------------------------------------------------------------------------------


def match(problem: Problem, where: Where) -> dict[str, Any]:
    """The hidden width at which the dense model has the active FLOPs of the one with experts: ``hidden``, and
    ``flops`` of the forward pass by arm."""

    def cost(arm: Arm, width: int) -> int:
        return gmoe.count_flops(partial(evaluated, problem.forward), drawn(problem, arm, width, 0, where))

    target = cost("moe", problem.width)
    hidden = gmoe.match_width(partial(cost, "dense"), target, start=problem.width, tolerance=0.5)
    flops = {"dense": cost("dense", problem.width), "moe": target, "dense-flops": cost("dense", hidden)}
    return {"hidden": hidden, "flops": flops}


def step_times(
    problem: Problem, arms: tuple[Arm, ...], hidden: int, repeats: int, where: Where, seed: int
) -> dict[str, Any]:
    """Seconds of a training step in turns, see :func:`take_turns`: of dense, MoE, the dense model of width ``hidden``,
    and the shared transform where it is among the arms. ``layers`` is how many layers have experts."""
    widths: dict[Arm, int] = {"dense": problem.width, "moe": problem.width, "dense-flops": hidden}
    widths |= {arm: problem.width for arm in arms if arm == "shared-transform"}
    models = {arm: drawn(problem, arm, width, seed, where) for arm, width in widths.items()}
    steps: dict[str, Step] = {
        arm: partial(problem.step, model, problem.optimizer(model)) for arm, model in models.items()
    }
    times = take_turns(steps, repeats, where.device, warmup=3, tell=partial(told, unit="round of steps"))
    return {**times, "layers": len(switches(models["moe"])), "threads": torch.get_num_threads()}
