"""The default tests on the oldest versions that pyproject.toml allows, and on the newest.

``versions`` makes both environments under ``build/versions`` (some gigabytes, since
the index has torch with CUDA), runs the tests in each, writes ``results/versions.json`` and the
table of ``docs/trust.md``. ``versions oldest -n 1 -k routing`` does one, with
options for pytest; its result is printed and not kept. ``versions next`` takes the newest torch
and PyTorch Geometric, whatever pyproject.toml allows; its result is not kept either. Needs `uv <https://docs.astral.sh/uv/>`_,
which finds or brings the Pythons.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from tools.trust import page
from tools.trust.page import ROOT

FILE = ROOT / "results" / "versions.json"
FOLDER = ROOT / "build" / "versions"


class Environment(NamedTuple):
    """A Python, which versions uv takes, and the packages whose bounds are lifted."""

    python: str
    resolution: str
    unbounded: tuple[str, ...] = ()


KEPT = {
    "oldest": Environment("3.11", "lowest-direct"),
    "newest": Environment("3.13", "highest"),
}
"""Those in the table."""

ENVIRONMENTS = {
    **KEPT,
    "next": Environment("3.13", "highest", ("torch", "torchvision", "torch-geometric")),
}

SHOWN = ("torch", "torch-geometric", "torchvision", "numpy", "pandas", "timm", "transformers")
"""The packages in the table; the result file has all."""


def python_of(name: str) -> Path:
    return FOLDER / name / "bin" / "python"


def uv(*arguments: str | Path) -> str:
    """What a command of uv prints."""
    command = ["uv", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout


def install(name: str) -> None:
    """Make an environment, or bring an old one up to date."""
    environment = ENVIRONMENTS[name]
    if not python_of(name).exists():
        uv("venv", "--python", environment.python, FOLDER / name)
    overrides = FOLDER / f"{name}.txt"
    overrides.write_text("\n".join(environment.unbounded))
    target = ("--python", python_of(name), "--resolution", environment.resolution, "--upgrade")
    uv("pip", "install", *target, "--override", overrides, "-e", ".[test]")


def commit_of() -> str:
    """The commit that is tested."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.check_output(command, cwd=ROOT, text=True).strip()


def counts(output: str) -> dict[str, int]:
    """How many tests passed, failed, ...: pytest's last line, where one error has no plural."""
    last = output.strip().splitlines()[-1].replace("1 error,", "1 errors,")
    return {word: int(number) for number, word in re.findall(r"(\d+) ([a-z]+)", last)}


def run(name: str, options: Sequence[str]) -> dict[str, Any]:
    """Run the tests in an environment; what came out."""
    command = [str(python_of(name)), "-m", "pytest", "-q", *options]
    begin = time.perf_counter()
    lines = list[str]()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            print(line, end="", flush=True)
            lines.append(line)
    packages = json.loads(uv("pip", "list", "--python", python_of(name), "--format", "json"))
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit_of(),
        "python": ENVIRONMENTS[name].python,
        "packages": {package["name"]: package["version"] for package in packages},
        "tests": counts("".join(lines)),
        "failed": [line.split(" - ")[0].split()[1] for line in lines if line.startswith("FAILED")],
        "status": process.returncode,
        "seconds": round(time.perf_counter() - begin),
    }


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """In Markdown, a line an environment."""
    lines = [
        f"| | date | Python | {' | '.join(SHOWN)} | tests |",
        f"|---|---|---|{'---|' * len(SHOWN)}---|",
    ]
    for name, found in results.items():
        versions = " | ".join(found["packages"][package] for package in SHOWN)
        tests = ", ".join(
            f"{found['tests'][word]:,} {word}"
            for word in ("passed", "failed", "errors", "skipped")
            if word in found["tests"]
        )
        lines.append(f"| {name} | {found['date']} | {found['python']} | {versions} | {tests} |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    """Run what the command line says; 1 if a test failed."""
    if {"-h", "--help"} & {*arguments}:
        print(__doc__)
        return 0
    names = [name for name in ENVIRONMENTS if name in arguments[:1]] or list(KEPT)
    options = [word for word in arguments if word not in ENVIRONMENTS]
    results = json.loads(FILE.read_text()) if FILE.exists() else {}
    has_failed = False
    for name in names:
        install(name)
        found = run(name, options)
        has_failed |= found["status"] != 0
        if not options and name in KEPT:
            results[name] = found
            results = {key: results[key] for key in KEPT if key in results}
            FILE.write_text(json.dumps(results, indent=1) + "\n")
            page.write("versions", table(results))
    return int(has_failed)
