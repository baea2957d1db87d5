"""The test machines: what the tests notice, and what gmoe and its commands withstand.

``python -m tools.trust`` runs all of them, in order; ``python -m tools.trust waits fuzz`` some.
What follows a name is said to that machine: ``python -m tools.trust fuzz 0 100 csv``, and
``python -m tools.trust fuzz --help`` says what there is.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from tools.trust.page import ROOT


class Machine(NamedTuple):
    """A module whose ``main`` takes arguments, and gives 1 if it found something wrong."""

    module: str
    about: str


MACHINES = {
    "waits": Machine("waits", "how often a step on a GPU would wait; half a minute"),
    "names": Machine("names", "3,000 odd names of files; ten minutes"),
    "fuzz": Machine("fuzz", "10,000 broken files; half an hour"),
    "faults": Machine("faults", "160 commands that are cut off; an hour"),
    "coverage": Machine("coverage", "the branches that the tests run; ten minutes"),
    "mutants": Machine("mutants.command", "the faults that the tests notice; half an hour"),
    "versions": Machine("versions", "the tests on old and new versions; half an hour, needs uv"),
}
"""In the order in which they run."""


def grouped(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Names of machines, each with the words that follow it."""
    found: list[tuple[str, list[str]]] = []
    for word in words:
        if word in MACHINES:
            found.append((word, []))
        elif not found:
            raise ValueError(f"NAME: got {word!r}, expected one of {', '.join(MACHINES)}")
        else:
            found[-1][1].append(word)
    return found or [(name, []) for name in MACHINES]


def run_apart(name: str, arguments: Sequence[str]) -> tuple[int, str]:
    """Run a machine in a process of its own; its exit code, and the last line that it printed.

    Mutants are measured where nothing of gmoe has been imported yet.
    """
    command = [sys.executable, "-m", "tools.trust", name, *arguments]
    last = ""
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            last = line.strip() or last
    return process.returncode, last


def run_all(chosen: Sequence[tuple[str, list[str]]]) -> int:
    """Run machines one after another; 1 if one found something wrong."""
    rows = list[str]()
    has_failed = False
    for number, (name, arguments) in enumerate(chosen, 1):
        print(f"\n=== {number} of {len(chosen)}: {name}, {MACHINES[name].about}", flush=True)
        begin = time.monotonic()
        status, last = run_apart(name, arguments)
        has_failed |= status != 0
        minutes = (time.monotonic() - begin) / 60
        rows.append(f"{name:9} {'failed' if status else 'passed'} {minutes:4.0f} min  {last}")
    print("\n=== all", *rows, sep="\n")
    return int(has_failed)


def main(words: Sequence[str]) -> int:
    """Run the machines that the command line names; 1 if one found something wrong."""
    listed = "\n".join(f"  {name:9} {machine.about}" for name, machine in MACHINES.items())
    parser = argparse.ArgumentParser(
        prog="python -m tools.trust",
        usage="%(prog)s [NAME [ARGUMENT ...] ...]",
        description=__doc__,
        epilog=f"machines:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if words[:1] in (["-h"], ["--help"]):
        parser.print_help()
        return 0
    try:
        chosen = grouped(words)
    except ValueError as error:
        parser.error(str(error))
    if len(chosen) > 1:
        return run_all(chosen)
    ((name, arguments),) = chosen
    found: int = import_module(f"tools.trust.{MACHINES[name].module}").main(arguments)
    return found


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
