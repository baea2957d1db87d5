"""How the site runs the examples."""

from __future__ import annotations

from typing import Any


def arguments(_: dict[str, Any], __: dict[str, Any]) -> list[str]:
    """What Sphinx-Gallery gives every script: seconds each, and nothing is downloaded."""
    return ["--fast"]
