"""Branches that the default tests run: those of gmoe and of the experiments.

Commands that the tests start count. Lines for the type checker and overloads do not. What was
measured stays in ``.coverage``: ``coverage report --include="gmoe/*" --show-missing``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence

from tools.trust.page import ROOT

LEAST = {"gmoe": 98, "experiments": 95}
"""Percent of lines and branches that have to run, a little less than what the page says."""


def main(arguments: Sequence[str]) -> int:
    """Run the tests, and print both shares; 1 if a test failed, or a share is too small."""
    parser = argparse.ArgumentParser(prog="python -m tools.trust coverage", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.parse_args(arguments)
    python = (sys.executable, "-m")
    tests = subprocess.run([*python, "pytest", "--cov", "--cov-report="], cwd=ROOT, check=False)
    has_failed = tests.returncode != 0
    for package, least in LEAST.items():
        report = [*python, "coverage", "report", f"--include={package}/*", f"--fail-under={least}"]
        has_failed |= subprocess.run(report, cwd=ROOT, check=False).returncode != 0
    return int(has_failed)
