"""Do experts pay on your graph? Two questions, and a trial of their answers.

    python -m experiments.advise graph --data-root FILE.npz --out DIR   # or a preset of nodes

First: would a wider model be better? A dense model and one four times as wide are trained, seed by
seed, each on its split. If the wide one is not surely better, capacity is not what the graph lacks,
and experts for capacity are none. If it is, the part of that gain is said which experts had on
other graphs.

Second, in seconds and without a GNN: do nodes follow different rules, and by what: their features,
their neighbors, their degree, or their place in the graph? routing.npy then holds the expert of
each node, for `train ... --routing`.

After a yes, experts are tried: the default ones, and those that are routed by the second answer,
beside the dense model, that at twice the step size, and that whose layers see the input again.
Paired 95 % intervals say what is above what, and the command is printed that trains the best. The
same command goes on where it was stopped.
"""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from experiments.study.studies import CONTROLS
from experiments.train.checks import check, check_choice
from experiments.train.command_line import program
from experiments.train.config import GraphConfig
from experiments.train.files import RESULTS, read_json, replacing
from experiments.train.presets import PRESETS, command
from experiments.train.scores import Difference, gains, scored

if TYPE_CHECKING:
    import numpy as np

    from experiments.study.question import Answer

LEAST = 3
MOST = 5
"""Seeds of a trial: of masks for S splits seed s takes split s % S."""
TIMES = 4
"""By what the wide model is wider."""
DENSE = ("dense", "dense-lr2", "dense-input-again")
"""Models of the width of the experts, which these have to be above."""
WIDE = "dense-wide"
FIRST = ("dense", WIDE)
"""The arms of the first question."""
FOUND = "experts-routed"
DEFAULT = "experts-default"
AS_LONG = {"dense-lr2": "dense", FOUND: DEFAULT}
"""Arms that take as long as another."""


def arms_of(
    base: GraphConfig, routing: Path | None = None, groups: int = 0
) -> dict[str, GraphConfig]:
    """What is trained, by name; experts that are told a node's group are as many as groups."""
    arms: dict[str, Any] = {
        name: replace(base, **CONTROLS[name].changes, lr=CONTROLS[name].lr_factor * base.lr)
        for name in DENSE
    }
    arms[WIDE] = replace(arms["dense"], hidden=TIMES * base.hidden)
    arms[DEFAULT] = base
    if routing is not None:
        arms[FOUND] = replace(base, router="oracle", routing=str(routing), experts=groups)
    return arms


def label_of(arm: str, view: str) -> str:
    """An arm in words."""
    from experiments.study.question import VIEWS

    own = {
        WIDE: "dense, four times as wide",
        DEFAULT: "experts, the default",
        FOUND: f"experts, routed by {VIEWS[view]}",
    }
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
    """Ask a graph whether it lacks capacity, and whether its nodes follow different rules.

    Args:
        preset: `graph` for your own graph, or another preset of nodes.
        out: folder of the answers and of the runs.
        data_root: the file of your graph, or the root folder of the data.
        metric: of your own graph (default accuracy).
        undirected: add the reverse of every edge, where the preset does; try `--no-undirected`,
            too, where an edge means something in one direction only.
        budget: minutes for the first question, and as many for the trial; a seed is begun only if
            it fits, three are the least.
        price: only say how long the first question and the trial would take.
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
    from experiments.study.question import ask, nodes_to_ask
    from experiments.train.kinds import kind_of
    from experiments.train.results import environment, write_json

    with redirect_stdout(sys.stderr):  # what loaders say on the way
        task = kind_of(replace(base, seeds=tuple(range(MOST)))).tasks()(0)
    nodes_to_ask(task)  # refuses what cannot be asked, before anything is trained
    trial = Trial(arms_of(base), out, budget)
    if price:
        one = minutes_of(trial.arms, FIRST)
        rest = minutes_of(trial.arms, (*DENSE[1:], DEFAULT, DEFAULT))  # one may be routed
        each = f"{LEAST} to {MOST} seeds, about {one:.1f} minutes each; "
        print(f"{each}a trial of the answers takes {rest:.1f} minutes more each")
        return
    print("would a wider model be better?", file=sys.stderr, flush=True)
    first = trial.run(FIRST)
    lines = width_lines(first)
    print("\n".join(lines), flush=True)
    print("asking whether rules differ, without a GNN", file=sys.stderr, flush=True)
    answer = ask(task, base.experts)
    print("\n".join(answer.lines()), flush=True)
    lines += answer.lines()
    found: dict[str, Any] = {"lines": lines, "view": answer.view, "differ": answer.differ}
    routing = out / "routing.npy"
    routing.unlink(missing_ok=True)  # it would be an earlier answer's
    if answer.differ:
        keep_routing(routing, answer.expert)
        trial = Trial(arms_of(base, routing, answer.groups), out, budget)
        print("experts of these groups beside the dense model, to paste; a trial of them follows:")
        print(f"  {command(trial.arms[FOUND])} --compare", flush=True)
    if answer.differ or width_gain(first).low > 0:
        summaries = trial.run(tuple(trial.arms))
        found["trial"] = told(summaries, answer, trial.arms)
        print("\n".join(found["trial"]))
    else:
        print(f"so experts were not tried; the dense model: {command(arms_of(base)['dense'])}")
    write_json(out / "advice.json", found | {"environment": environment()})


def keep_routing(path: Path, expert: np.ndarray) -> None:
    """Write the expert of each node."""
    import numpy as np

    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()  # to a file, numpy does not say that the last 4 kB found no room
    np.save(content, expert)
    with replacing(path) as fresh:
        fresh.write_bytes(content.getvalue())


def minutes_of(arms: Mapping[str, GraphConfig], names: Sequence[str]) -> float:
    """About how long one seed of some arms takes, on one core."""
    from experiments.study.price import price

    like = [AS_LONG.get(name, name) for name in names]
    with redirect_stdout(None):  # loaders say the same each time
        hours = {name: price(replace(arms[name], seeds=(0,)))["hours"] for name in {*like}}
    return 60 * sum(hours[name] for name in like)


class Trial:
    """Arms, seed after seed, as long as the budget lasts."""

    def __init__(self, arms: Mapping[str, GraphConfig], out: Path, budget: float) -> None:
        self.arms = {name: replace(arm, out=out / name, resume=True) for name, arm in arms.items()}
        self.budget = budget

    def trained(self, name: str) -> int:
        """Seeds of an arm that are begun."""
        path = self.arms[name].folder() / "config.json"
        return len(read_json(path, dict[str, Any]).get("seeds", ())) if path.exists() else 0

    def run(self, names: Sequence[str]) -> dict[str, Any]:
        """The summary of each of some arms.

        Raises:
            ValueError: a budget that three seeds do not fit into.
        """
        from experiments.train.loop import run

        if lacking := [name for name in names if self.trained(name) < LEAST]:
            each = minutes_of(self.arms, lacking)
            missing = LEAST - min(map(self.trained, lacking))
            legal = f"at least {missing * each:.1f} minutes, for {LEAST} seeds"
            check(missing * each <= self.budget, "budget", self.budget, legal)
            price = f"{len(lacking)} models, {LEAST} to {MOST} seeds, {each:.1f} minutes a seed"
            print(f"to train: {price}", file=sys.stderr, flush=True)
        begun = time.monotonic()
        longest = 0.0
        summaries: dict[str, Any] = {}
        for n in range(1, MOST + 1):
            start = time.monotonic()
            fits = start + longest - begun < 60 * self.budget
            if n > LEAST and not fits:
                break
            with redirect_stdout(None):  # what loaders said when the graph was asked
                for name in names:
                    seeds = tuple(range(max(n, self.trained(name))))
                    summaries[name] = run(replace(self.arms[name], seeds=seeds))
            print(f"seed {n} of {MOST} is trained", file=sys.stderr, flush=True)
            longest = max(longest, time.monotonic() - start)
        return summaries


def width_gain(summaries: Mapping[str, Any]) -> Difference:
    """How much better the wide model is."""
    return over(summaries, WIDE, "dense")


def width_lines(summaries: Mapping[str, Any]) -> list[str]:
    """Whether the wide model is better, and if so, what part of that experts had elsewhere."""
    from experiments.study.front import part_of_width, what_pays

    gain = width_gain(summaries)
    wide = summaries[WIDE]
    what = f"a model {TIMES} times as wide ({wide['hidden']})"
    by = f"{gain}, {gain.n} seeds, {wide['metric']}"
    if not gain.low > 0:  # NaN of a training that diverged is no gain
        return [f"no: {what} is not surely better: {by}; so no experts for capacity"]
    part = part_of_width(what_pays(RESULTS))
    expected = "what part of it experts have was measured on too few graphs"
    if part is not None:
        low, high = (f"{share * gain.mean:+.2f}" for share in (part.low, part.high))
        expected = f"experts had {part.text('.2f')} of it on {part.n} graphs: here {low} to {high}"
    return [f"yes: {what} is better: {by}", f"  {expected}"]


def over(summaries: Mapping[str, Any], arm: str, other: str) -> Difference:
    """How much better an arm is than another on the seeds that both have."""
    ours, theirs = (summaries[name]["test"]["values"] for name in (arm, other))
    common = min(len(ours), len(theirs))
    return Difference.of(gains(summaries[arm]["metric"], ours[:common], theirs[:common]))


def told(
    summaries: Mapping[str, Any], answer: Answer, arms: Mapping[str, GraphConfig]
) -> list[str]:
    """The scores of the trial, what is above what, and the command to train.

    Experts are advised that are surely above all three dense models of their width; validation
    chooses among them, else among all dense models.
    """
    dense = summaries["dense"]
    metric = dense["metric"]
    experts = [arm for arm in (FOUND, DEFAULT) if arm in summaries]
    labels = {name: label_of(name, answer.view) for name in summaries}
    lines = [f"trial on {dense['test']['n']} seeds, test {metric}:"]
    for name, summary in summaries.items():
        line = f"  {labels[name]}: {scored(metric, summary['test'])}"
        if name != "dense":
            times = summary["flops"] / dense["flops"]
            line += f"; over dense {over(summaries, name, 'dense')}, {times:.2f} times its FLOPs"
        lines.append(line)
    for other in (*DENSE[1:], WIDE, *experts[1:]):
        lines.append(
            f"  {labels[experts[0]]} over {labels[other]}: {over(summaries, experts[0], other)}"
        )
    above = [arm for arm in experts if all(over(summaries, arm, one).low > 0 for one in DENSE)]
    best = max(above or (*DENSE, WIDE), key=lambda name: summaries[name]["val"]["mean"])
    verdict = "experts are" if above else "no experts are"
    verdict += f" surely above all dense models of their width; train {labels[best]}:"
    lines += [verdict, f"  {command(arms[best])}"]
    if best != experts[0]:
        lines += [f"{labels[experts[0]]}:", f"  {command(arms[experts[0]])}"]
    return lines


main = program("advise", advise, __doc__)
