"""Mutation score: one small fault after another is put into the code, and the tests must notice.

``mutants`` draws a new sample each day, and fails if significantly fewer of it are noticed than of
the recorded one; ``mutants --size 20`` draws a smaller one.

``mutants record`` goes on with the recorded sample, ``results/mutants.json``, which is written
after each mutant. ``mutants survivors`` runs those that survived again, for tests written since:
both scores are kept. Either writes ``docs/trust.md`` at its end and prints the survivors, each
with the reason why no test sees it; ``mutants report`` does that alone, and ``mutants check``
fails if the page says something else. Needs
``pip install -e ".[trust]"``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from tools.trust import page
from tools.trust.mutants import record as of_record
from tools.trust.mutants.running import OPTIONS, TESTS, Runner, coverage_of_modules
from tools.trust.page import ROOT

DRAWN = ROOT / "build" / "mutants.json"
"""The sample of today."""

ACTIONS = ("sample", "record", "survivors", "report", "check")


def run(
    draw: Callable[[], dict[str, Any]], keep: Callable[[dict[str, Any]], None], again: bool = False
) -> dict[str, Any]:
    """Run what is left of a record, and keep it after each mutant."""
    torch.set_num_threads(1)
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["torch", "torch_geometric", "pytest", "hypothesis"])
    # From before the first import of gmoe on: what an import runs is no function's line.
    imports = coverage_of_modules()
    imports.start()
    record = draw()
    if not of_record.pending(record, again):
        return record
    keep(record)
    with TemporaryDirectory() as folder:
        options = [*OPTIONS, f"--basetemp={folder}/tests"]
        runner = Runner(record, again, options, imports, keep)
        pytest.main([*options, *TESTS], plugins=[runner])
    if any(of_record.last(entry) is None for entry in record["mutants"]):
        raise RuntimeError("some mutants have not run; pytest says why")
    return record


def recorded() -> dict[str, Any]:
    record: dict[str, Any] = json.loads(of_record.FILE.read_text())
    return record


def sample(size: int) -> int:
    """Run a new sample; 1 if its score is significantly below the recorded one."""
    draw = partial(of_record.draw, seed=date.today().toordinal(), size=size)
    record = run(draw, partial(of_record.write, file=DRAWN))
    for entry in record["mutants"]:
        if of_record.last(entry) not in of_record.NOTICED:
            print(f"{of_record.last(entry)}: {of_record.where(entry)} {of_record.change_of(entry)}")
    found = [of_record.last(entry) for entry in record["mutants"]]
    expected = [entry["first"]["outcome"] for entry in recorded()["mutants"]]
    noticed, total = of_record.share(expected)
    high = of_record.wilson(*of_record.share(found))[1]
    print(f"{of_record.score(found)}; recorded {noticed / total:.1%}, equivalent ones counted")
    return int(high < noticed / total)


def main(arguments: Sequence[str]) -> int:
    """Run the command; 1 if it found something wrong."""
    parser = argparse.ArgumentParser(prog="python -m tools.trust mutants", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("action", nargs="?", choices=ACTIONS, default="sample")
    parser.add_argument("--size", type=int, default=100, help="mutants of a new sample")
    args = parser.parse_args(arguments)
    if args.size < 1:
        parser.error(f"--size: got {args.size}, expected 1 or more")
    if args.action == "sample":
        return sample(args.size)
    if args.action in ("record", "survivors"):
        draw = recorded if of_record.FILE.exists() else of_record.draw
        keep = partial(of_record.write, file=of_record.FILE)
        record = run(draw, keep, again=args.action == "survivors")
    else:
        record = recorded()
    text = of_record.report(record)
    if args.action == "check":
        shown = page.PAGE.read_text()
        is_current = page.with_text(shown, "mutants", text) == shown
        print("up to date" if is_current else f"{page.PAGE.name} is out of date: mutants report")
        return int(not is_current)
    page.write("mutants", text)
    print(text, of_record.survivors(record), sep="\n\n")
    return 0
