"""What do your data want, and will experts pay on them?

    python -m experiments.advise graph --data-root FILE.npz --out DIR   # or a preset

Of the nodes of a graph it asks cheap questions first, in seconds: is a dense model lacking an
input, do nodes follow several rules, does width help (:mod:`experiments.study.questions`)? It
prints one answer, the figures behind it, and the command that compares dense models with experts.

That comparison, ``--compare``, is all there is for images. First the dense model against one four
times as wide, split by split: where that gains nothing, nothing is left for experts to gain, and
that is the answer. Else a dense model of the experts' active FLOPs against experts in the two
settings that the docs name first, in turns, until the answer is clear or the budget is spent.
Validation chooses among the settings; all that is said is of the test set. The same command goes
on where it was stopped.

An answer is clear when the interval of the mean difference is above 0, or below half a point: a
99 % t interval over splits, from the third on, and a 95 % interval after the last of ten. Ten
splits without a difference are a no; fewer are not.
"""

from __future__ import annotations

import io
import os
import shlex
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from experiments.study.worth import WORTH
from experiments.train.checks import check, check_choice
from experiments.train.command_line import program
from experiments.train.config import (
    GraphConfig,
    HeteroConfig,
    MoleculeConfig,
    RouterOptions,
    RunConfig,
)
from experiments.train.files import read_json, replacing
from experiments.train.presets import MOSAIC, PRESETS, command
from experiments.train.scores import Difference, gains

if TYPE_CHECKING:
    from torch import Tensor

Verdict = Literal["yes", "no", "inconclusive"]
LEAST = 3
"""Splits that an answer takes at least."""
MOST = 10
"""Splits that an answer takes at most."""


PLANTED = ("concept-", "regimes-")
"""What the names of planted graphs begin with that are no presets; they take mosaic's recipe."""


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A mean of paired differences on the test set, in points, its interval, and what it says."""

    mean: float
    interval: tuple[float, float] | None  # of fewer than three, none
    n: int
    verdict: Verdict

    def __str__(self) -> str:
        interval = "" if self.interval is None else " [{:+.2f}, {:+.2f}]".format(*self.interval)
        return f"{self.mean:+.2f} points{interval}, n = {self.n}"


def judge(differences: Sequence[float]) -> Judged:
    """What paired differences say; see the module."""
    n = len(differences)
    mean = statistics.fmean(differences)
    has_no_spread = min(differences) == max(differences)
    if n < LEAST or (n < MOST and has_no_spread):
        return Judged(mean=mean, interval=None, n=n, verdict="inconclusive")
    difference = Difference.of(differences, confidence=0.95 if n >= MOST else 0.99)
    verdict: Verdict = "inconclusive"
    if difference.high < WORTH:
        verdict = "no"
    elif difference.low > 0:
        verdict = "yes"
    elif n >= MOST:
        verdict = "no"
    return Judged(mean=mean, interval=(difference.low, difference.high), n=n, verdict=verdict)


def arms_of(base: RunConfig) -> dict[str, RunConfig]:
    """What is compared, by name; the last two are the settings."""
    dense = replace(base, router="dense")
    arms = {"dense": dense, "dense-4x": replace(dense, hidden=4 * base.hidden)}
    settings: dict[str, RunConfig]
    if isinstance(base, GraphConfig):
        once = replace(
            base, router="token_choice", shared_router=True, router_input=("node", "neighbors")
        )
        centers: dict[str, Any] = {"kmeans_init": True, "options": RouterOptions(num_centroids=1)}
        settings = {
            "route-once": once,
            "k-means": replace(once, router="multi_centroid", **centers),
        }
    else:
        settings = {
            name: replace(base, router=name.replace("-", "_"))
            for name in ("expert-choice", "token-choice")
        }
    first = next(iter(settings.values()))
    matched: Any = {"router": "dense", "equal": "flops", "equal_to": first.router}
    return arms | {"dense-flops": replace(first, **matched)} | settings


def data_of(config: RunConfig) -> dict[str, Any]:
    """What tells one data set from another."""
    from experiments.train.run_folder import described

    description = described(config)
    return {name: description.get(name) for name in ("dataset", "file", "digest")}


def answer_of(base: RunConfig, out: Path) -> dict[str, Any]:
    """What questions about these data were answered in a folder, if they were."""
    path = out / "questions.json"
    answer = read_json(path, dict[str, Any]) if path.exists() else {}
    if answer and answer.get("data") != data_of(base):
        print(f"{path} is of other data, and not read", file=sys.stderr)
        return {}
    return answer


class Comparison:
    """Arms in turns, a seed (and so a split) after the other, as long as the budget lasts."""

    def __init__(self, base: RunConfig, out: Path, seconds: float) -> None:
        self.rules_differ = answer_of(base, out).get("kind") == "rules"
        self.arms = {
            name: replace(arm, out=out / name, resume=True) for name, arm in arms_of(base).items()
        }
        self.ends = time.monotonic() + seconds
        self.summaries: dict[str, Any] = {}
        self.longest = 0.0  # of a turn so far: another one has to fit into the budget

    def foretell(self, names: Sequence[str]) -> None:
        """Say how long the first turn of some arms takes, if it is not finished."""
        if all((self.arms[name].folder() / "summary.json").exists() for name in names):
            return
        seconds = self.seconds_of(names)
        epochs = self.arms[names[0]].epochs
        length = f"{seconds / 60:.1f} minutes" if seconds > 90 else f"{seconds:.0f} seconds"
        first = f"the first turn ({' and '.join(names)}, {epochs} epochs on one split)"
        print(f"{first} takes about {length}", file=sys.stderr, flush=True)

    def seconds_of(self, names: Sequence[str]) -> float:
        """About how long a turn takes: training steps, and validations that take a whole graph."""
        from experiments.benchmark.measure import take_turns
        from experiments.train.build import build_model
        from experiments.train.data.load import load_tasks
        from experiments.train.processes import make_fabric
        from experiments.train.training import set_up

        config = self.arms[names[0]]  # the others have the same data
        task = load_tasks(config)(0)
        fabric = make_fabric(config)
        calls: dict[str, Callable[[], object]] = {}
        times_each: dict[str, float] = {}
        with ExitStack() as stack:
            for name in names:
                arm = self.arms[name]
                training = stack.enter_context(set_up(fabric, build_model(arm, task), arm, task))
                batch = fabric.to_device(next(iter(task.loader("train", arm.batch_size, 0))))
                calls[f"{name}: step"] = partial(training.update, batch, len(batch.target))
                times_each[f"{name}: step"] = arm.epochs * task.steps(arm.step_size)
                if getattr(arm, "sampling", "") == "full":
                    calls[f"{name}: validation"] = partial(training.evaluate, "val")
                    times_each[f"{name}: validation"] = arm.epochs / arm.eval_every
            measured = take_turns(calls, 1, fabric.device)
        return sum(times_each[call] * measured[call]["wall"]["min"] for call in calls)

    def turn(self, names: Sequence[str], n: int) -> bool:
        """Train some arms with the first ``n`` seeds.

        Whether there was time to, as there is for the first turn.
        """
        from experiments.train.loop import run

        begun = time.monotonic()
        if self.summaries and begun + self.longest > self.ends:
            return False
        for name in names:
            path = self.arms[name].folder() / "config.json"
            there = len(read_json(path, dict[str, Any])["seeds"]) if path.exists() else 0
            self.summaries[name] = run(replace(self.arms[name], seeds=tuple(range(max(n, there)))))
        self.longest = max(self.longest, time.monotonic() - begun)
        return True

    def told(self, names: Sequence[str], better: Callable[[], str], other: str) -> Judged | None:
        """The difference of two arms, after as many turns as it takes to tell.

        None where there was no time for one.
        """
        judged = None
        for n in range(1, MOST + 1):
            if not self.turn(names, n):
                break
            before = judged
            judged = self.difference(better(), other)
            if (
                before is None or judged.n > before.n
            ):  # a run that goes on has several turns at once
                print(f"{better()} - {other}: {judged}", file=sys.stderr)
            if judged.verdict != "inconclusive":
                break
        return judged

    def difference(self, one: str, other: str, most: int = MOST) -> Judged:
        """The difference of two arms over the seeds that both have."""
        ours, theirs = (self.summaries[arm]["test"]["values"] for arm in (one, other))
        common = min(len(ours), len(theirs), most)
        metric = self.summaries[one]["metric"]
        return judge(gains(metric, ours[:common], theirs[:common]))

    def step_ratio(self, arm: str) -> float:
        """The time of a training step over the dense model's."""
        from experiments.study.price import price

        config = replace(self.arms[arm], seeds=(0,))
        each = [
            price(one)["per_second"] for one in (replace(self.arms["dense"], seeds=(0,)), config)
        ]
        return each[0] / each[1]

    def better(self) -> str:
        """The setting that validates better."""
        return max(list(self.arms)[-2:], key=lambda name: self.summaries[name]["val"]["mean"])


SAID = {"yes": "headroom", "no": "no headroom", "inconclusive": "headroom inconclusive"}
ADVICE = {
    "no": "do not use experts",
    "inconclusive": "inconclusive: the time is up; the same command goes on where it stopped",
}


def base_of(preset: str) -> RunConfig:
    """The configuration of a preset, or of a planted graph, by its name."""
    presets = {name: config for name, (_, config) in PRESETS.items()}
    legal = [
        name
        for name, config in presets.items()
        if not isinstance(config, HeteroConfig | MoleculeConfig)
    ]
    if preset.startswith(PLANTED):
        return replace(MOSAIC, dataset=preset)
    check_choice("preset", preset, legal)
    return presets[preset]


def advise(
    preset: tyro.conf.Positional[str],
    out: Path,
    data_root: Path = Path("data"),
    metric: Literal["accuracy", "roc_auc"] | None = None,
    width: int | None = None,
    undirected: bool = True,
    budget: float = 30.0,
    compare: bool = False,
    offline: bool = False,
) -> None:
    """Print what the data want, or, with ``--compare``, whether experts pay.

    Args:
        preset: `graph` for your own graph, whose edge weights are not used; `images` for a
            folder of squares of 8, 32 or 160 pixels; another preset of experiments.train; or a
            planted graph, `concept-R-L-SHOWN` or `regimes-R-L-SHOWN`.
        out: folder of the runs and of the report.
        data_root: the file of your graph, or the root folder of the data.
        metric: of your own graph (default accuracy).
        width: of the dense model's hidden layers; by default the preset's.
        undirected: train on the reverse of each edge, too, where the preset does;
            `--no-undirected` keeps edges in one direction.
        budget: minutes, in which another turn of all arms has to fit.
        compare: train dense models and experts, and write a report. Of images that is all there
            is.
        offline: download nothing; an error says what is missing.
    """
    base = replace(
        base_of(preset), data_root=data_root, offline=offline, progress=sys.stderr.isatty()
    )
    check(budget > 0, "budget", budget, "minutes above 0")
    check(width is None or width > 0, "width", width, "at least 1")
    is_writable = not out.exists() or (out.is_dir() and os.access(out, os.W_OK))
    check(is_writable, "out", out, "a folder that can be written to")
    check(
        metric is None or preset == "graph",
        "metric",
        f"{metric!r} for {preset}",
        "none; `graph` leaves it open",
    )
    given = {"metric": metric, "hidden": width}
    base = replace(base, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
    if not undirected:
        if not isinstance(base, GraphConfig):
            raise ValueError(f"undirected: got False for {preset}, expected a preset of nodes")
        base = replace(base, undirected=False)
    if isinstance(base, GraphConfig) and not compare:
        lines, choice = ask(base, out)
        print("\n".join(lines), flush=True)
        if choice is not None:
            words = [preset, "--out", out, "--data-root", data_root, "--compare"]
            for name, value in {"--metric": metric, "--width": width}.items():
                words += [] if value is None else [name, value]
            words += ["--offline"] if offline else []
            words += ["--no-undirected"] if choice == "one way" or not undirected else []
            again = f"python -m experiments.advise {shlex.join(map(str, words))}"
            print(f"to train dense models and experts on it (half an hour): {again}")
            return
    compare_with_experts(base, out, budget)


def ask(base: GraphConfig, out: Path) -> tuple[list[str], str | None]:
    """Ask what the nodes want: the lines to print, and what the answer names.

    ``None`` if no question was asked, the empty string if the answer names nothing.

    ``questions.json`` holds it, and ``regimes.npy`` the expert of each node where rules differ.
    """
    print("asking what the data want, without a GNN", file=sys.stderr, flush=True)
    from experiments.study.questions import Survey, nodes_of
    from experiments.train.results import environment, write_json

    with redirect_stdout(sys.stderr):  # what loaders say on the way
        nodes = nodes_of(base)
    if isinstance(nodes, str):
        return [f"no questions asked: {nodes}"], None
    answer = Survey(nodes).answer()
    content = {"kind": answer.kind, "choice": answer.choice, "line": answer.line}
    gains = {name: vars(gain) for name, gain in answer.gains.items()}
    write_json(
        out / "questions.json",
        content
        | {"figures": answer.figures, "gains": gains}
        | {"data": data_of(base), "environment": environment()},
    )
    lines = [answer.line, *answer.figures]
    if answer.expert is not None:
        keep_regimes(out, answer.expert)
        lines.append(f"the expert of each node: {out / 'regimes.npy'}")
    else:  # an earlier answer's
        (out / "regimes.npy").unlink(missing_ok=True)
    return lines, answer.choice or ""


def keep_regimes(out: Path, expert: Tensor) -> None:
    """Write ``regimes.npy``."""
    import numpy as np

    content = io.BytesIO()  # to a file, numpy does not say that the last 4 kB found no room
    np.save(content, expert.numpy())
    with replacing(out / "regimes.npy") as fresh:
        fresh.write_bytes(content.getvalue())


def compare_with_experts(base: RunConfig, out: Path, budget: float) -> None:
    """Print three lines of advice, also in ``advice.json`` beside the report of all runs."""
    plan = "comparing a dense model with one four times as wide, split by split"
    plan += f"; budget {budget:g} min; measuring how long the first turn takes"
    print(plan, file=sys.stderr, flush=True)
    # and so torch, for which nobody waits in silence
    from experiments.show.report_page import write_report
    from experiments.train.results import write_json

    usual = "Sparse (CSR tensor support is in beta|invariant checks are implicitly)"
    warnings.filterwarnings("ignore", usual)

    comparison = Comparison(base, out, 60 * budget)
    with redirect_stdout(sys.stderr):  # what runs say on the way
        lines, figures = advice(comparison)
        write_json(out / "advice.json", {"lines": lines, **figures})
        folders = [comparison.arms[name].folder() for name in comparison.summaries]
        write_report(folders, out / "index.html", base.data_root, lines)
    print("\n".join(lines))


def advice(comparison: Comparison) -> tuple[list[str], dict[str, Any]]:
    """The three lines, and the figures in them."""
    *_, matched, first, second = comparison.arms
    comparison.foretell(("dense", "dense-4x"))
    room = comparison.told(("dense", "dense-4x"), lambda: "dense-4x", "dense")
    assert room is not None
    lines = [f"{SAID[room.verdict]}: a dense model four times as wide gains {room}"]
    figures: dict[str, Any] = {
        "headroom": vars(room),
        "experts": None,
        "setting": None,
        "step": None,
    }
    if room.verdict != "yes" and not comparison.rules_differ:
        why = "they need headroom" if room.verdict == "no" else "headroom is not sure"
        return [*lines, f"experts: not tried, since {why}", ADVICE[room.verdict]], figures
    gain = comparison.told((matched, first, second), comparison.better, matched)
    if gain is None:
        why = "no time is left"
        return [*lines, f"experts: not tried, since {why}", ADVICE["inconclusive"]], figures
    setting = comparison.better()
    step = comparison.step_ratio(setting)
    more = comparison.difference(setting, "dense")
    wider = comparison.difference("dense-4x", "dense", more.n).mean
    share = f"; {round(100 * more.mean / wider)} % of the headroom" if wider > 0 else ""
    lines.append(
        f"experts ({setting}): {gain}, against a dense model of their active FLOPs{share}, at "
        f"{step:.2f} times the dense model's step"
    )
    use = f"use them: {command(comparison.arms[setting])}"
    last = ADVICE.get(gain.verdict, use)
    if gain.verdict == "no" and comparison.rules_differ:
        last = "do not use these two settings: rules differ, so route by regimes.npy"
    figures |= {"experts": vars(gain), "setting": setting, "step": step}
    return [*lines, last], figures


main = program("advise", advise, __doc__)
