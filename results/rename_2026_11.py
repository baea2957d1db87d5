"""Of November 2026: gives result files the names that options, studies and variants have since; their numbers stay."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from experiments.config import pinned

FILES = {
    "founding": "cifar10-claims",
    "minesweeper-10": "minesweeper-10splits",
    "facebook-10": "facebook-10splits",
}
"""Studies, and the files named after them."""

KEYS = {"arm": "variant", "arms": "variants", "optimiser": "optimizer", "pool": "group"}
"""Keys of all files."""

OPTIONS = {
    "share_router": "tie_routers",
    "share_experts": "tie_experts",
    "routing": "shared_router",
    "route_on": "router_input",
    "route_hops": "router_hops",
    "label_use": "label_reuse",
}
"""Keys of the configuration of a run."""

INPUTS = {"input": ["node"], "aggregate": ["neighbors"], "both": ["node", "neighbors"], "degree": ["degree"]}

WORDS = (
    (r"\barm(s?)\b", r"variant\1"),
    (r"\b([Aa])n (variant)", r"\1 \2"),
    ("neighbour", "neighbor"),
    ("shared routing", "shared router"),
    ("layer routing", "router per layer"),
    (r" \(the default\)", ""),
    ("AttentionVote, pool", "AttentionVote, group"),
)
"""In labels and descriptions."""

SLUGS = (
    ("shared-beside", "shared-router-shared-expert"),
    ("beside", "shared-expert"),
    ("neighbours", "neighbors"),
)
"""In the names of variants."""


def reword(text: str, rules: tuple[tuple[str, str], ...]) -> str:
    """The text after all substitutions."""
    for old, new in rules:
        text = re.sub(old, new, text)
    return text


def renamed(value: Any) -> Any:
    """The content of a result file, key by key in the same order."""
    if isinstance(value, list):
        return [renamed(part) for part in value]
    if not isinstance(value, dict):
        return value
    found: dict[str, Any] = {}
    for key, part in value.items():
        if key == "config" and "dataset" in part:
            found[key] = science(part)
        elif key == "study":
            found[key] = FILES.get(part, part)
        elif key == "arm":
            found["variant"] = reword(part, SLUGS)
        elif key in ("label", "about"):
            found[key] = reword(part, WORDS)
        else:
            found[KEYS.get(key, reword(key, WORDS))] = renamed(part)
    return found


def science(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a run, with the weight and the balance that were its router's defaults written out.

    Records of the first days name one conv and one router input, not lists of them, and know nothing of edges that are
    added or of sparse matrices: there were none.
    """
    first_days = isinstance(config["conv"], str)
    found: dict[str, Any] = {}
    for key, part in config.items():
        if key == "routing":
            part = part == "shared"
        elif key == "route_on":
            parts = [name for old in ([part] if isinstance(part, str) else part) for name in INPUTS[old]]
            part = ["node"] if is_image(config) else parts  # there it means nothing, and is at its default
        elif key == "conv" and first_days:
            part = [part]
        elif key == "options":
            part = pinned({**config, "options": options(part)})
        found[OPTIONS.get(key, key)] = part
    if first_days and not is_image(config):
        found |= {"undirected": False, "shared_expert": False}
        if config["dataset"] == "mosaic":
            found["adjacency"] = "edge_index"
    return found


def options(given: dict[str, Any]) -> dict[str, Any]:
    """The options of a router."""
    found = dict(given)
    if "queries" in found:
        found["shared_queries"] = found.pop("queries") == "shared"
    for key, old, new in (
        ("scope", "neighbours", "neighbors"),
        ("scope", "pool", "group"),
        ("inference", "pool", "group"),
    ):
        if found.get(key) == old:
            found[key] = new
    return found


def is_image(config: dict[str, Any]) -> bool:
    """Whether the run is one of images."""
    return config["dataset"] in ("digits", "cifar10", "cifar100", "imagenette", "images")


def main(folder: Path) -> None:
    """Rewrite the files of a folder."""
    for path in sorted(folder.glob("*.json")):
        new = json.dumps(renamed(json.loads(path.read_text())), indent=2) + "\n"
        path.with_name(f"{FILES.get(path.stem, path.stem)}.json").write_text(new)
        if path.stem in FILES:
            path.unlink()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
