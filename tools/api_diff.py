"""What a change breaks in the public API, found by `griffe <https://mkdocstrings.github.io/griffe/>`_.

``python -m tools.api_diff [REF]`` compares the checkout with the last release (a tag ``v*``), or
with ``main`` while there is none. Public is what ``docs/api.md`` lists at REF; a name that starts
with an underscore is private. A break fails the check unless ``CHANGELOG.md`` names what broke
under "Unreleased".
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import griffe

ROOT = Path(__file__).parents[1]


def git(*arguments: str) -> str:
    """What a command of git prints."""
    return subprocess.check_output(["git", *arguments], cwd=ROOT, text=True)


def last_release() -> str:
    """The newest tag of a release, or ``main`` if there is none."""
    tags = git("tag", "--list", "v*", "--sort=-version:refname").split()
    return tags[0] if tags else "main"


def public_names(page: str) -> list[str]:
    """The names that an API page lists, each with its module."""
    module = "gmoe"
    found = list[str]()
    for line in page.splitlines():
        if line.startswith(".. currentmodule::"):
            module = line.split()[-1]
        elif name := re.fullmatch(r"   (\w+)", line):
            found.append(f"{module}.{name[1]}")
    return found


def is_part(path: str, owner: str) -> bool:
    """Whether a path is that of its owner, or of something inside it."""
    return path == owner or path.startswith(f"{owner}.")


def breaks(
    old: griffe.Module, new: griffe.Module, names: Iterable[str]
) -> Iterator[tuple[str, griffe.Breakage]]:
    """Each break with the public name that it belongs to."""
    # A public name is imported from the module that defines it, and griffe reports either path.
    paths = {name: {name, old[name.removeprefix("gmoe.")].canonical_path} for name in names}
    for breakage in griffe.find_breaking_changes(old, new):
        for name, owners in paths.items():
            if any(is_part(breakage.obj.path, owner) for owner in owners):
                yield name, breakage
                break


def unreleased(changelog: str) -> str:
    """The section of the changelog that the next release gets."""
    return changelog.partition("## Unreleased")[2].partition("\n## ")[0]


def main(arguments: Sequence[str]) -> int:
    """Print what breaks; 1 if the changelog does not name it."""
    # Where this branch began, so that what others changed since is no break of ours.
    ref = git("merge-base", "HEAD", arguments[0] if arguments else last_release()).strip()
    old = griffe.load_git("gmoe", ref=ref, repo=ROOT)
    new = griffe.load("gmoe", search_paths=[ROOT])
    names = public_names(git("show", f"{ref}:docs/api.md"))
    if not isinstance(old, griffe.Module) or not isinstance(new, griffe.Module):
        raise TypeError(f"gmoe: got {old} and {new}, expected two modules")
    said = unreleased((ROOT / "CHANGELOG.md").read_text())
    silent = 0
    for name, breakage in breaks(old, new, names):
        is_said = re.search(rf"\b{breakage.obj.name}\b", said) is not None
        silent += not is_said
        print(f"{name}{'' if is_said else ', not in CHANGELOG.md'}: ", end="")
        print(breakage.explain(griffe.ExplanationStyle.MARKDOWN))
    print(f"{len(names)} public names compared with {ref[:8]}: {silent} breaks not in CHANGELOG.md")
    return int(silent > 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
