"""Does a swap hurt? Dense layers against gmoe's defaults in their place: accuracy over seeds, and time of a step."""

from __future__ import annotations

import itertools
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, get_args

import torch
from filelock import FileLock
from torch import nn
from tqdm import tqdm

import gmoe
from experiments.benchmark.measure import Benchmark, Step, take_turns
from experiments.benchmark.swap_models import ROWS, Arm, Config, Problem, evaluated
from experiments.files import read_json
from experiments.run_folder import environment, write_json
from gmoe import LinearExperts, MoELayer


@dataclass(frozen=True, kw_only=True)
class SwapBenchmark(Benchmark):
    """The class swapped and nothing else: PyG's examples, presets, a ViT. Resumes from the file of `--json`."""

    rows: tuple[str, ...] = tuple(ROWS)
    """Names of rows."""
    arms: tuple[Arm, ...] = get_args(Arm)
    """What is trained beside `dense` and `moe`, where a row has it. `moe-off` is read off `moe`."""
    seeds: int | None = None
    """Seeds; by default 10, of images 3."""
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

    SMALL: ClassVar = {"rows": ("cora-gcn", "cora-gat", "minesweeper", "mosaic"), "seeds": 1, "epochs": 3, "repeats": 3}

    def run(self) -> dict[str, Any]:
        """Train what the file lacks, seed by seed, and measure steps where it has no times.

        The file is written after each run; beside it is a folder for what is not finished.

        Returns:
            By row: ``runs``, by arm those of its seeds; ``time``; ``matched``, the ``hidden`` width of ``dense-flops``.
        """
        if unknown := sorted(set(self.rows) - set(ROWS)):
            raise ValueError(f"rows: got {', '.join(unknown)}, expected some of {', '.join(ROWS)}")
        self.check_counts("seeds", "epochs")
        with tempfile.TemporaryDirectory() as scratch:
            path = self.json or Path(scratch) / "swap.json"
            for name, arm, seed in tqdm(list(self._missing(path)), desc="runs"):
                problem = ROWS[name].problem(self._config(name), seed)
                width = problem.config.hidden
                if arm in ("dense-flops", "times"):
                    with self._row(path, name) as row:
                        row["matched"] = row.get("matched") or {"hidden": matched_width(problem)}
                        width = row["matched"]["hidden"]
                if arm == "times":
                    found = step_times(problem, width, self.repeats, "shared-transform" in ROWS[name].arms)
                    with self._row(path, name) as row:
                        row["time"] = found
                    continue
                part = path.with_suffix("") / f"{name}-{arm}-{seed}-{problem.config.epochs}"
                result = train_arm(problem, arm, width, part)
                with self._row(path, name) as row:
                    others = [run for run in row["runs"].get(arm, []) if run["seed"] != seed]
                    row["runs"][arm] = sorted([*others, result], key=lambda run: run["seed"])
                shutil.rmtree(part, ignore_errors=True)
                off = f", {100 * result['off']:.2f} with the experts off" if "off" in result else ""
                tqdm.write(f"{name} {arm} seed {seed}: test {100 * result['test']:.2f}{off}", file=sys.stderr)
            return read_rows(path)

    def _config(self, name: str) -> Config:
        config, device = ROWS[name].config, self.torch_device().type
        root, epochs = self.data_root.expanduser() / config.data_root, self.epochs or config.epochs
        return replace(config, data_root=root, epochs=epochs, offline=self.offline, device=device)

    def _missing(self, path: Path) -> Iterator[tuple[str, Any, int]]:
        """Row, arm and seed of what the file lacks; the arm ``"times"`` stands for those."""
        for name in self.rows:
            config, row = self._config(name), read_rows(path).get(name, {"runs": {}, "time": None})
            arms = ["dense", "moe", *(arm for arm in ROWS[name].arms if arm in self.arms)]
            done = {(arm, run["seed"], run["epochs"]) for arm, runs in row["runs"].items() for run in runs}
            for seed, arm in itertools.product(range(self.seeds or len(config.seeds)), arms):
                if (arm, seed, config.epochs) not in done:
                    yield name, arm, seed
            if self.repeats and not row["time"]:
                yield name, "times", 0

    @contextmanager
    def _row(self, path: Path, name: str) -> Iterator[dict[str, Any]]:
        """A row of the file, to change; other processes, which may write there as well, wait."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            rows = read_rows(path)
            yield rows.setdefault(name, {"runs": {}, "time": None})
            write_json(path, self.content({known: rows[known] for known in ROWS if known in rows}))


def read_rows(path: Path) -> dict[str, Any]:
    """The rows of a file of results; none where there is no file."""
    found: dict[str, Any] = read_json(path, dict[str, Any])["variants"] if path.exists() else {}
    return found


def train_arm(problem: Problem, arm: Arm, width: int, folder: Path) -> dict[str, Any]:
    """Train one arm, and test it at the epoch that validation selects.

    Returns:
        As JSON: ``test``, ``val``, ``best_epoch`` (from 1), and of a model with experts ``off``, the test score with
        the routed experts switched off, and by layer ``share`` and ``live``, see :func:`routed_part`.
    """
    started = time.perf_counter()
    model = problem.drawn(arm, width)
    val, best_epoch = problem.train(model, folder)
    result = {
        "seed": problem.seed,
        "test": evaluated(problem.score, model, "test"),
        "val": val if math.isfinite(val) else None,
        "best_epoch": best_epoch,
        "epochs": problem.config.epochs,
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
            last = [part for part in layer.modules() if isinstance(part, LinearExperts) and part.zero_init]
            found[layer] = [parameter for part in last for parameter in part.parameters()]
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
    share: dict[Any, float] = {}

    def compare(layer: Any, args: Any, kwargs: Any, output: Any) -> None:
        with switched_off(layer):
            off = layer.forward(*args, **kwargs)
        y, without = (out[0] if isinstance(out, tuple) else out for out in (output, off))
        share[layer] = float((y - without).double().norm() / y.double().norm())

    with gmoe.record_routing(model) as routings:
        evaluated(forward, model)
    hooks = [layer.register_forward_hook(compare, with_kwargs=True) for layer in switches(model)]
    evaluated(forward, model)
    for hook in hooks:
        hook.remove()
    live = [float((routing.load > 0.01 * routing.num_tokens).sum()) for routing in routings]
    return {"share": list(share.values()), "live": live}


def matched_width(problem: Problem) -> int:
    """The hidden width at which the dense model has the active FLOPs of the one with experts."""

    def cost(arm: Arm, width: int) -> int:
        return gmoe.count_flops(partial(evaluated, problem.forward), problem.drawn(arm, width))

    width = problem.config.hidden
    return gmoe.match_width(partial(cost, "dense"), cost("moe", width), start=width, tolerance=0.5)


def step_times(problem: Problem, hidden: int, repeats: int, narrowed: bool) -> dict[str, Any]:
    """Seconds of a training step in turns, see :func:`take_turns`: of dense, MoE, the dense model of width ``hidden``,
    and with ``narrowed`` the shared transform. ``layers`` is how many layers have experts."""
    width = problem.config.hidden
    widths: dict[Arm, int] = {"dense": width, "moe": width, "dense-flops": hidden}
    if narrowed:
        widths["shared-transform"] = width
    models = {arm: problem.drawn(arm, of) for arm, of in widths.items()}
    steps: dict[str, Step] = {
        arm: partial(problem.step, model, problem.optimizer(model)) for arm, model in models.items()
    }
    times = take_turns(steps, repeats, problem.fabric.device, warmup=3)
    return {**times, "layers": len(switches(models["moe"])), "threads": torch.get_num_threads()}
