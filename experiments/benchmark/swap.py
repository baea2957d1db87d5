"""Does a swap hurt? Dense layers against gmoe's defaults in their place: accuracy over seeds, and time of a step."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.table import Table
from torch import Tensor, nn
from torch_geometric import seed_everything

import gmoe
from experiments.benchmark.options import Benchmark
from experiments.benchmark.swap_models import ROWS, Arm, Problem, Progress, Row, Say, Where, evaluated
from experiments.benchmark.swap_table import swap_table
from experiments.build import num_parameters
from experiments.runs import environment, write_json
from experiments.timing import take_turns
from gmoe import MoELayer

LIVE = 0.01
"""An expert lives that takes more than this share of the tokens in evaluation."""

QUICK = {"epochs": 3, "seeds": 1, "repeats": 3}
QUICK_ROWS = ("cora-gcn", "cora-gat", "minesweeper", "mosaic")


@dataclass(frozen=True, kw_only=True)
class SwapBenchmark(Benchmark):
    """The class swapped and nothing else: PyG's examples, presets, a ViT. Resumes from the file of `--json`."""

    keeps_json: ClassVar[bool] = True

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
        """Train what is not finished yet, and measure steps.

        Returns:
            By row: ``runs``, by arm the results of its seeds, and ``time``, see :func:`step_times`.

        Raises:
            ValueError: an unknown row, an arm that no row has, or a number below 1.
            FileNotFoundError: data are missing.
        """
        unknown = sorted(set(self.rows) - set(ROWS))
        if unknown:
            raise ValueError(f"rows: got {', '.join(unknown)}, expected some of {', '.join(ROWS)}")
        for name, value in (("seeds", self.seeds), ("epochs", self.epochs)):
            if value is not None and value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        names = self.rows or (QUICK_ROWS if self.quick else tuple(ROWS))
        if self.json is not None:
            return self._fill(names, self.json)
        with tempfile.TemporaryDirectory() as folder:
            return self._fill(names, Path(folder) / "swap.json")

    def table(self, found: dict[str, Any]) -> Table:
        """What :meth:`run` returned, to read."""
        return swap_table(found)

    def _fill(self, names: Sequence[str], path: Path) -> dict[str, Any]:
        """Everything that is missing in the file, which is written after each run."""
        epochs = self.epochs or (QUICK["epochs"] if self.quick else None)
        where = Where(
            data_root=self.data_root.expanduser(), offline=self.offline, device=self.torch_device(), epochs=epochs
        )
        for name in names:
            row = ROWS[name]
            count = self.seeds or (QUICK["seeds"] if self.quick else row.seeds)
            chosen = (arm for arm in row.arms if not self.arms or arm in self.arms)
            arms: tuple[Arm, ...] = ("dense", "moe", *chosen)
            run_row(name, row, arms, range(self.seed, self.seed + count), where, path, self._file, self._repeats)
        return read_file(path)

    @property
    def _repeats(self) -> int:
        return min(self.repeats, QUICK["repeats"]) if self.quick else self.repeats

    def _file(self, variants: dict[str, Any]) -> dict[str, Any]:
        """The content of the file."""
        settings = {name: value for name, value in asdict(self).items() if name not in ("json", "data_root")}
        return {"config": settings, "variants": variants, "environment": environment()}


# the runner -----------------------------------------------------------------------------------------------------------


def run_row(
    name: str,
    row: Row,
    arms: Sequence[Arm],
    seeds: Sequence[int],
    where: Where,
    path: Path,
    content: Callable[[dict[str, Any]], dict[str, Any]],
    repeats: int,
) -> None:
    """Train every arm with every seed that the file lacks, seed by seed; measure steps if it has too few times.

    Args:
        name, row: the row.
        arms: of it.
        seeds: the seeds.
        where: the data.
        path: the file of results; beside it is a folder for what is not finished.
        content: of all variants, the content of the file.
        repeats: of the times; 0 for none.
    """
    found = read_file(path).get(name, {"runs": {}, "time": None})
    problem_of: Callable[[int], Problem] | None = None  # the data are read if anything is missing
    matched: dict[str, Any] = found.get("matched") or {}
    for seed in seeds:
        for arm in arms:
            if any(run["seed"] == seed and _same(run, where) for run in found["runs"].get(arm, [])):
                continue
            if problem_of is None:
                problem_of = row.load(where)
            problem = problem_of(seed)
            if arm == "dense-flops" and not matched:
                matched = match(problem, where, Progress(f"{name} widths"))
                found = add(path, name, content, matched=matched)
            width = matched["hidden"] if arm == "dense-flops" else problem.width
            say = Progress(f"{name} {arm} seed {seed}")
            part = path.with_suffix("") / f"{name}-{arm}-{seed}-{problem.epochs}"
            result = train_arm(problem, arm, width, seed, part, say, where)
            found = add(path, name, content, arm=arm, run=result)
            shutil.rmtree(part, ignore_errors=True)
            off = "" if "off" not in result else f", {100 * result['off']:.2f} with the experts off"
            say.now(f"test {100 * result['test']:.2f}{off}, epoch {result['best_epoch']}, {result['seconds']:.0f} s")
    if repeats and (not found["time"] or len(found["time"]["moe"]["wall"]["values"]) < repeats):
        problem = (problem_of or row.load(where))(seeds[0])
        matched = matched or match(problem, where, Progress(f"{name} widths"))
        timed: dict[Arm, int] = {"dense": problem.width, "moe": problem.width, "dense-flops": matched["hidden"]}
        timed |= {arm: problem.width for arm in row.arms if arm == "shared-transform"}
        times = step_times(problem, timed, repeats, where, seeds[0], Progress(f"{name} times"))
        add(path, name, content, matched=matched, time=times)


def read_file(path: Path) -> dict[str, Any]:
    """The variants of a file of results; none where there is no file."""
    if not path.exists():
        return {}
    found: dict[str, Any] = json.loads(path.read_text())["variants"]
    return found


def add(
    path: Path,
    name: str,
    content: Callable[[dict[str, Any]], dict[str, Any]],
    *,
    arm: str = "",
    run: Mapping[str, Any] | None = None,
    **values: Any,
) -> dict[str, Any]:
    """Add to a row of the file, which other processes may write to as well; the row."""
    with locked(path.parent):
        variants = read_file(path)
        row: dict[str, Any] = variants.setdefault(name, {"about": ROWS[name].about, "runs": {}, "time": None})
        row |= values
        if run is not None:
            others = [other for other in row["runs"].get(arm, []) if other["seed"] != run["seed"]]
            row["runs"][arm] = sorted([*others, run], key=lambda other: other["seed"])
        variants = {known: variants[known] for known in ROWS if known in variants}
        write_json(path, content(variants))
    return row


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


def train_arm(
    problem: Problem, arm: Arm, width: int, seed: int, folder: Path, say: Say, where: Where
) -> dict[str, Any]:
    """Train one arm with one seed, and test it at the epoch that validation selects.

    Returns:
        As JSON: ``test``, ``val``, ``best_epoch`` (from 1), and of a model with experts ``off``, the test score with
        all gains at zero, and by layer ``share``, ``live`` and ``gain``, see :func:`routed_part`.
    """
    started = time.perf_counter()
    model = drawn(problem, arm, width, seed, where)
    fitted = train(problem, model, say) if problem.train is None else problem.train(model, arm, folder, say)
    result = {
        "seed": seed,
        "metric": problem.metric,
        "test": evaluated(problem.score, model, "test"),
        "val": fitted[0] if math.isfinite(fitted[0]) else None,
        "best_epoch": fitted[1],
        "epochs": problem.epochs,
        "shortened": where.epochs is not None,
        "hidden": width,
        "parameters": num_parameters(model),
    }
    if gains(model):
        result |= routed_part(model, problem.forward)
        with switched_off(model):
            result["off"] = evaluated(problem.score, model, "test")
    return result | {"seconds": round(time.perf_counter() - started, 2), "commit": environment()["commit"]}


def train(problem: Problem, model: nn.Module, say: Say) -> tuple[float, int]:
    """Train, and leave the model as it was at the first epoch that validated best; the score and number of it."""
    optimizer = problem.optimizer(model)
    best: tuple[float, int] = (-math.inf, problem.epochs)
    state: dict[str, Tensor] | None = None
    for epoch in range(1, problem.epochs + 1):
        loss = step(problem, model, optimizer)
        if problem.validated and (epoch % problem.eval_every == 0 or epoch == problem.epochs):
            val = evaluated(problem.score, model, "val")
            if val > best[0]:
                best = val, epoch
                state = {name: value.detach().clone() for name, value in model.state_dict().items()}
        say(f"epoch {epoch} of {problem.epochs}, loss {float(loss):.3f}, best validation {best[0]:.4f}")
    if state is not None:
        model.load_state_dict(state)
    return best


def step(problem: Problem, model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensor:
    """Forward, loss, backward and optimizer."""
    model.train()
    optimizer.zero_grad()
    loss = problem.loss(model)
    loss.backward()
    optimizer.step()
    return loss.detach()


def gains(model: nn.Module) -> dict[MoELayer, nn.Parameter]:
    """The layers that start dense, and their gains."""
    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, MoELayer)]
    return {layer: layer.gain for layer in layers if layer.gain is not None}


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """What the routed experts give is multiplied by zero."""
    kept = [(gain, gain.detach().clone()) for gain in gains(model).values()]
    with torch.no_grad():
        for gain, _ in kept:
            gain.zero_()
        yield
        for gain, value in kept:
            gain.copy_(value)


def routed_part(model: nn.Module, forward: Callable[[Any], Any]) -> dict[str, list[float]]:
    """What the routed experts do in evaluation, by layer.

    Returns:
        ``share``, the norm of what they add over the norm of the layer's output; ``live``, how many of them take more
        than 1 % of the tokens, by decision of a router; ``gain``.
    """
    found = {layer: [0.0, 0.0] for layer in gains(model)}

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
        "gain": [float(gain.detach().abs().mean()) for gain in gains(model).values()],
    }


# cost -----------------------------------------------------------------------------------------------------------------


def match(problem: Problem, where: Where, say: Say) -> dict[str, Any]:
    """The hidden width at which the dense model has the active FLOPs of the one with experts: ``hidden``, and
    ``flops`` of the forward pass by arm."""

    def cost(arm: Arm, width: int) -> int:
        say(f"width {width}")
        model = drawn(problem, arm, width, 0, where)
        return gmoe.count_flops(partial(evaluated, problem.forward), model)

    target = cost("moe", problem.width)
    hidden = gmoe.match_width(partial(cost, "dense"), target, start=problem.width, tolerance=0.5)
    flops = {"dense": cost("dense", problem.width), "moe": target, "dense-flops": cost("dense", hidden)}
    return {"hidden": hidden, "flops": flops}


def step_times(
    problem: Problem, arms: Mapping[Arm, int], repeats: int, where: Where, seed: int, say: Say = lambda _: None
) -> dict[str, Any]:
    """Seconds of a training step of models of these arms and hidden widths, in turns; see
    :func:`experiments.timing.take_turns`. ``layers`` is how many layers have experts."""
    steps: dict[str, Callable[[], object]] = {}
    layers = 0

    def run(arm: Arm, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        say(arm)
        step(problem, model, optimizer)

    for arm, width in arms.items():
        model = drawn(problem, arm, width, seed, where)
        layers = max(layers, len(gains(model)))
        steps[arm] = partial(run, arm, model, problem.optimizer(model))
    return {**take_turns(steps, repeats, where.device, warmup=3), "layers": layers, "threads": torch.get_num_threads()}
