from __future__ import annotations

from pathlib import Path

import pytest

from tests.vision.made_images import COUNTS, write_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes in train and in test."""
    write_folder(tmp_path / "train", COUNTS)
    write_folder(tmp_path / "test", {"cat": 1, "dog": 1, "owl": 1})
    return tmp_path
