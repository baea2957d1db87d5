"""How the site runs the examples, and in which order it shows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ORDER = (
    "swap_pyg_conv",
    "upcycle_timm_vit",
    "molecules",
    "forces",
    "ogbn_arxiv",
    "sources",
    "typed_nodes",
    "vit_cifar10",
    "own_router",
    "lightning_module",
    "shrink_and_save",
    "hub_save_load",
)
"""The examples as a user meets them: swap a layer, train on your data, change it, save it."""


def place(filename: str) -> int:
    """Where an example stands in the gallery."""
    return ORDER.index(Path(filename).stem)


def arguments(_: dict[str, Any], __: dict[str, Any]) -> list[str]:
    """What Sphinx-Gallery gives every script: seconds each, and nothing is downloaded."""
    return ["--fast"]
