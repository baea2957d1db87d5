"""The record of a sample: what became of each mutant, the score, and what the page says of it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.helpers.symbols import symbols
from tools.trust.mutants.drawing import MODULES, sample, sources, symbol_of
from tools.trust.mutants.survivors import EQUIVALENT, UNSEEN
from tools.trust.page import ROOT

FILE = ROOT / "results" / "mutants.json"
"""The sample whose scores the page shows."""

SEED = 20261201
SIZE = 1000
MOST_EXCUSED = 0.03
"""The share of mutants that may be excused as equivalent."""

NOTICED = ("killed", "crashed", "timeout")

IN_CONV = "additive adjacency aggregate attention graph kinds matrix"
IN_GMOE = "convert edges folder losses padded places products routing routers sums"
ROOMS = tuple(f"gmoe/conv/{name}" for name in IN_CONV.split()) + tuple(
    f"gmoe/{name}" for name in IN_GMOE.split()
)
"""The mathematics, and what decides which of it runs: a score of their own."""


@cache
def environment() -> dict[str, Any]:
    from experiments.train.results import environment

    return environment()


def write(record: dict[str, Any], file: Path) -> None:
    file.parent.mkdir(exist_ok=True)
    fresh = file.with_suffix(".new")
    fresh.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    fresh.replace(file)


def pending(record: dict[str, Any], again: bool) -> list[dict[str, Any]]:
    """Those to run: the ones that have no outcome but an error of this tool, or that survived."""
    if not again:
        return [entry for entry in record["mutants"] if last(entry) in (None, "error")]
    return [entry for entry in record["mutants"] if last(entry) == "survived"]


def last(entry: dict[str, Any]) -> str | None:
    return {**entry.get("first", {}), **entry.get("again", {})}.get("outcome")


def wilson(noticed: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share."""
    z = 1.96
    middle_share = noticed / total
    middle = middle_share + z * z / (2 * total)
    half = z * math.sqrt(middle_share * (1 - middle_share) / total + z * z / (4 * total * total))
    return (middle - half) / (1 + z * z / total), (middle + half) / (1 + z * z / total)


def share(outcomes: Iterable[str | None]) -> tuple[int, int]:
    """How many were noticed, and of how many that ran."""
    ran = [outcome for outcome in outcomes if outcome not in (None, "gone")]
    return sum(outcome in NOTICED for outcome in ran), len(ran)


def score(outcomes: Sequence[str | None]) -> str:
    """What was noticed of all that ran; equivalent ones are no part of ``outcomes``."""
    noticed, total = share(outcomes)
    if not total:
        return "none has run"
    low, high = wilson(noticed, total)
    return f"{noticed / total:.1%} ({low:.1%} to {high:.1%}) of {total}"


def check_reasons(record: dict[str, Any]) -> None:
    """Reasons are given for survivors, and few of them are excused.

    Raises:
        ValueError: a number has a reason and is no survivor, or has two; too many are excused.
    """
    survivors = {entry["number"] for entry in record["mutants"] if last(entry) == "survived"}
    if wrong := sorted({*EQUIVALENT, *UNSEEN} - survivors):
        raise ValueError(f"EQUIVALENT, UNSEEN: got {wrong}, expected numbers of survivors")
    if twice := sorted(EQUIVALENT.keys() & UNSEEN.keys()):
        raise ValueError(f"EQUIVALENT, UNSEEN: got {twice} in both, expected one reason each")
    most = MOST_EXCUSED * sum("first" in entry for entry in record["mutants"])
    if len(EQUIVALENT) > most:
        raise ValueError(f"EQUIVALENT: got {len(EQUIVALENT)} excused, expected at most {most:.0f}")


def report(record: dict[str, Any]) -> str:
    """Both scores, by folder: what the page says."""
    check_reasons(record)
    ran = [entry for entry in record["mutants"] if "first" in entry]
    real = [entry for entry in ran if entry["number"] not in EQUIVALENT]
    gone = sum(last(entry) == "gone" for entry in real)
    lines = [
        f"{len(ran)} of {len(record['mutants'])} mutants have run, drawn from {record['places']} "
        f"places with seed {record['seed']}. {len(ran) - len(real)} compute the same and do not "
        f"count; {gone} are gone from the second column with their lines.",
        "",
        "| noticed (95 % interval) | before | after |",
        "|---|---|---|",
        *score_rows(real),
    ]
    return "\n".join(lines)


def survivors(record: dict[str, Any]) -> str:
    """Each mutant that no test notices, with the reason: a table for the terminal."""
    ran = [entry for entry in record["mutants"] if "first" in entry]
    header = ["| | where | change | why no test sees it |", "|---|---|---|---|"]
    return "\n".join([*header, *survivor_rows(ran)])


def score_rows(entries: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Both scores of all mutants, and of those of each folder."""
    files = {entry["file"] for entry in entries}
    groups = {"all": files, "routing, dispatch, aggregation": files.intersection(rooms())}
    for folder in sorted({folder_of(file) for file in files}):
        groups[folder] = {file for file in files if folder_of(file) == folder}
    for name, own_files in groups.items():
        own = [entry for entry in entries if entry["file"] in own_files]
        now = "survivors have not run again"
        if any("again" in entry for entry in own):
            now = score([last(entry) for entry in own])
        yield f"| {name} | {score([entry['first']['outcome'] for entry in own])} | {now} |"


def survivor_rows(entries: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What no test noticed, and why."""
    for entry in entries:
        if last(entry) not in ("survived", "error"):
            continue
        number = entry["number"]
        why = UNSEEN.get(number, "")
        if number in EQUIVALENT:
            why = f"**excused**: {EQUIVALENT[number]}"
        yield f"| {number} | {where(entry)} | {change_of(entry)} | {why} |"


def change_of(entry: dict[str, Any]) -> str:
    return f"`{cell(entry['before'])}` → `{cell(entry['after'])}`"


def where(entry: dict[str, Any]) -> str:
    """The file and the symbol of a mutant; the file alone where its symbol is gone, or it is."""
    path = ROOT / entry["file"]
    source = path.read_text() if path.exists() else ""
    if any(name == entry["symbol"] for name, _ in symbols(source)):
        return f"`{entry['file']}:{entry['symbol']}`"
    if not path.exists():
        return f"{path.stem}, a file that is gone"
    return f"`{entry['file']}`, code that is gone"


def rooms() -> list[str]:
    """The modules of :data:`ROOMS`, each a file or all files of a folder."""
    return [file for file in MODULES if {file.removesuffix(".py"), folder_of(file)} & {*ROOMS}]


def folder_of(file: str) -> str:
    return str(Path(file).parent)


def cell(lines: Sequence[str]) -> str:
    """Code that fits a cell of a table."""
    return " ".join(line.strip() for line in lines).replace("|", "\\|") or " "


def draw(seed: int = SEED, size: int = SIZE) -> dict[str, Any]:
    """A record of a sample, in which nothing has run."""
    total, mutants = sample(seed, size)
    entries = [
        {"number": i, **mutant._asdict(), "symbol": symbol_of(mutant, sources()[mutant.file])}
        for i, mutant in enumerate(mutants)
    ]
    versions = {name: version(name) for name in ("cosmic-ray", "coverage", "pytest", "hypothesis")}
    return {
        "seed": seed,
        "places": total,
        "environment": environment(),
        "tools": versions,
        "mutants": entries,
    }
