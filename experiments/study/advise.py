"""Do experts pay on your graph, and routed by what? One question, and a trial of its answer.

    python -m experiments.advise graph --data-root FILE.npz --out DIR   # or a preset of nodes

First it asks, in seconds and without a GNN, whether nodes follow different rules, and by what:
their features, their neighbors, their degree, or their place in the graph. If they do, it trains
experts that are routed so, split by split, beside the dense model, the dense model at twice the
step size, the dense model whose layers see the input again, and the default experts. It says with
paired 95 % intervals and one picture (trial.png) what is above what, and prints the command that
trains the best. routing.npy holds the expert of each node, for `train ... --routing`. If rules do
not differ, it says so, and trains nothing. The same command goes on where it was stopped.
"""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from experiments.study.studies import CONTROLS
from experiments.train.checks import check, check_choice
from experiments.train.command_line import program
from experiments.train.config import GraphConfig
from experiments.train.files import read_json, replacing
from experiments.train.presets import PRESETS, command
from experiments.train.scores import Difference, better_in, gains, scored

if TYPE_CHECKING:
    import numpy as np

    from experiments.study.question import Answer

LEAST = 3
MOST = 5
"""Splits of a trial."""
DENSE = ("dense", "dense-lr2", "dense-input-again")
FOUND = "experts-routed"
DEFAULT = "experts-default"


def arms_of(base: GraphConfig, routing: Path, groups: int) -> dict[str, GraphConfig]:
    """What is trained, by name; experts that are told a node's group are as many as groups."""
    arms: dict[str, Any] = {
        name: replace(base, **CONTROLS[name].changes, lr=CONTROLS[name].lr_factor * base.lr)
        for name in DENSE
    }
    arms[DEFAULT] = base
    arms[FOUND] = replace(base, router="oracle", routing=str(routing), experts=groups)
    return arms


def label_of(arm: str, view: str) -> str:
    """An arm in words."""
    from experiments.study.question import VIEWS

    own = {DEFAULT: "experts, the default", FOUND: f"experts, routed by {VIEWS[view]}"}
    return own[arm] if arm in own else CONTROLS[arm].label


def base_of(preset: str) -> GraphConfig:
    """The configuration of a preset of nodes, by its name."""
    legal = {name: own for name, (_, own) in PRESETS.items() if isinstance(own, GraphConfig)}
    check_choice("preset", preset, legal)
    return legal[preset]


def advise(
    preset: tyro.conf.Positional[str],
    out: Path,
    data_root: Path = Path("data"),
    metric: Literal["accuracy", "roc_auc"] | None = None,
    undirected: bool = True,
    budget: float = 30.0,
    price: bool = False,
    offline: bool = False,
) -> None:
    """Ask a graph whether nodes follow different rules, and try what it answers.

    Args:
        preset: `graph` for your own graph, or another preset of nodes.
        out: folder of the answer and of the runs.
        data_root: the file of your graph, or the root folder of the data.
        metric: of your own graph (default accuracy).
        undirected: add the reverse of every edge, where the preset does; try `--no-undirected`,
            too, where an edge means something in one direction only.
        budget: minutes; a split is begun only if it fits, three are the least.
        price: only say how long the trial would take.
        offline: download nothing; an error says what is missing.
    """
    base = base_of(preset)
    check(budget > 0, "budget", budget, "minutes above 0")
    is_writable = not out.exists() or (out.is_dir() and os.access(out, os.W_OK))
    check(is_writable, "out", out, "a folder that can be written to")
    legal = "none; `graph` leaves it open"
    check(metric is None or preset == "graph", "metric", f"{metric!r} for {preset}", legal)
    base = replace(base, data_root=data_root, offline=offline, progress=sys.stderr.isatty())
    base = base if metric is None else replace(base, metric=metric)
    base = replace(base, undirected=base.undirected and undirected)
    legal = "'full': a graph that is trained on as a whole"
    check(base.sampling == "full", "sampling", f"{base.sampling!r} of {preset}", legal)
    if price:
        each = minutes_of(base)
        print(f"a trial of {LEAST} to {MOST} splits takes about {each:.1f} minutes each")
        return
    print("asking whether rules differ, without a GNN", file=sys.stderr, flush=True)
    from experiments.study.question import ask
    from experiments.train.data.load import load_tasks
    from experiments.train.results import environment, write_json

    with redirect_stdout(sys.stderr):  # what loaders say on the way
        answer = ask(load_tasks(base)(0), base.experts)
    found: dict[str, Any] = {"lines": answer.lines(), "view": answer.view, "differ": answer.differ}
    print("\n".join(answer.lines()), flush=True)
    routing = out / "routing.npy"
    arms = arms_of(base, routing, answer.groups)
    if answer.differ:
        keep_routing(routing, answer.expert)
        print("experts of these groups beside the dense model, to paste; a trial of them follows:")
        print(f"  {command(arms[FOUND])} --compare", flush=True)
        summaries = Trial(arms, out, budget).run()
        lines = told(summaries, answer, arms)
        write_picture(summaries, answer, out / "trial.png")
        print("\n".join(lines))
        found["trial"] = lines
    else:
        routing.unlink(missing_ok=True)  # it would be an earlier answer's
        print(f"so nothing was trained; the dense model: {command(arms['dense'])}")
    write_json(out / "advice.json", found | {"environment": environment()})


def keep_routing(path: Path, expert: np.ndarray) -> None:
    """Write the expert of each node."""
    import numpy as np

    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()  # to a file, numpy does not say that the last 4 kB found no room
    np.save(content, expert)
    with replacing(path) as fresh:
        fresh.write_bytes(content.getvalue())


def minutes_of(base: GraphConfig) -> float:
    """About how long one split of all arms takes, on one core."""
    from experiments.study.price import price

    arms = arms_of(base, Path(), base.experts)
    names = ("dense", "dense-input-again", DEFAULT)
    with redirect_stdout(None):  # loaders say the same three times
        of_dense, of_again, of_experts = (
            price(replace(arms[name], seeds=(0,)))["hours"] for name in names
        )
    return 60 * (2 * of_dense + of_again + 2 * of_experts)


class Trial:
    """All arms, split after split, as long as the budget lasts."""

    def __init__(self, arms: Mapping[str, GraphConfig], out: Path, budget: float) -> None:
        self.arms = {name: replace(arm, out=out / name, resume=True) for name, arm in arms.items()}
        self.budget = budget

    def trained(self, name: str) -> int:
        """Splits of an arm that are begun."""
        path = self.arms[name].folder() / "config.json"
        return len(read_json(path, dict[str, Any])["seeds"]) if path.exists() else 0

    def run(self) -> dict[str, Any]:
        """The summary of each arm.

        Raises:
            ValueError: a budget that three splits do not fit into.
        """
        from experiments.train.loop import run

        if min(map(self.trained, self.arms)) < LEAST:
            each = minutes_of(self.arms[DEFAULT])
            missing = LEAST - min(map(self.trained, self.arms))
            legal = f"at least {missing * each:.1f} minutes, for {LEAST} splits"
            check(missing * each <= self.budget, "budget", self.budget, legal)
            price = f"{len(self.arms)} models, {LEAST} to {MOST} splits, {each:.1f} minutes a split"
            print(f"the trial: {price}", file=sys.stderr, flush=True)
        begun = time.monotonic()
        longest = 0.0
        summaries: dict[str, Any] = {}
        for n in range(1, MOST + 1):
            start = time.monotonic()
            fits = start + longest - begun < 60 * self.budget
            if n > LEAST and not fits:
                break
            with redirect_stdout(None):  # what loaders said when the graph was asked
                for name, arm in self.arms.items():
                    seeds = tuple(range(max(n, self.trained(name))))
                    summaries[name] = run(replace(arm, seeds=seeds))
            print(f"split {n} of {MOST} is trained", file=sys.stderr, flush=True)
            longest = max(longest, time.monotonic() - start)
        return summaries


def over(summaries: Mapping[str, Any], arm: str, other: str) -> Difference:
    """How much better an arm is than another on the splits that both have."""
    ours, theirs = (summaries[name]["test"]["values"] for name in (arm, other))
    common = min(len(ours), len(theirs))
    return Difference.of(gains(summaries[arm]["metric"], ours[:common], theirs[:common]))


def told(
    summaries: Mapping[str, Any], answer: Answer, arms: Mapping[str, GraphConfig]
) -> list[str]:
    """The scores of the trial, what is above what, and the command to train.

    Experts are advised that are surely above all three dense models; validation chooses among
    them, else among the dense models.
    """
    metric = summaries["dense"]["metric"]
    lines = [f"trial on {summaries['dense']['test']['n']} splits, test {metric}:"]
    for name, summary in summaries.items():
        line = f"  {label_of(name, answer.view)}: {scored(metric, summary['test'])}"
        if name != "dense":
            values = [summary["test"]["values"], summaries["dense"]["test"]["values"]]
            common = min(map(len, values))
            better = better_in(metric, *(value[:common] for value in values))
            line += f"; over dense {over(summaries, name, 'dense')}, better on {better}"
        lines.append(line)
    for other in (*DENSE[1:], DEFAULT):
        gain = over(summaries, FOUND, other)
        lines.append(
            f"  {label_of(FOUND, answer.view)} over {label_of(other, answer.view)}: {gain}"
        )
    above = [
        arm
        for arm in (FOUND, DEFAULT)
        if all(over(summaries, arm, dense).low > 0 for dense in DENSE)
    ]
    best = max(above or DENSE, key=lambda name: summaries[name]["val"]["mean"])
    verdict = "experts are" if above else "no experts are"
    verdict += f" surely above all dense models; train {label_of(best, answer.view)}:"
    lines += [verdict, f"  {command(arms[best])}"]
    if best != FOUND:
        lines += [f"{label_of(FOUND, answer.view)}:", f"  {command(arms[FOUND])}"]
    return lines


def write_picture(summaries: Mapping[str, Any], answer: Answer, path: Path) -> None:
    """Draw each arm's difference to the dense model, with its interval."""
    from matplotlib.figure import Figure

    names = [name for name in summaries if name != "dense"]
    figure = Figure(figsize=(7, 0.9 + 0.5 * len(names)), layout="constrained")
    axis = figure.subplots()
    axis.axvline(0, color="#6e7781", linewidth=1)
    for place, name in enumerate(names):
        gain = over(summaries, name, "dense")
        error = [[gain.mean - gain.low], [gain.high - gain.mean]]
        color = "#0969da" if name in (FOUND, DEFAULT) else "#6e7781"
        axis.errorbar(gain.mean, place, xerr=error, fmt="o", color=color)
    axis.set_yticks(range(len(names)), [label_of(name, answer.view) for name in names])
    axis.set_ylim(len(names) - 0.5, -0.5)
    figure.supxlabel("test, points above the dense model (paired 95 % interval)", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    with replacing(path) as fresh:
        figure.savefig(fresh, dpi=150, facecolor="white", format="png")


main = program("advise", advise, __doc__)
