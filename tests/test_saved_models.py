"""Models that releases saved come back as they were."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import gmoe
from gmoe.saved import receipt
from tests import saved_models
from tests.saved_models import BASES, CALL, FOLDER, OWN, difference_of_own

VERSIONS = sorted(path.name for path in FOLDER.iterdir())


def folders(models: dict[str, object] | list[str]) -> list[Path]:
    return [FOLDER / version / name for version in VERSIONS for name in models]


def label(path: Path) -> str:
    return f"{path.parent.name}, {path.name}"


@pytest.mark.parametrize("folder", folders(list(OWN)), ids=label)
def test_a_model_that_a_release_saved_gives_what_it_gave(folder: Path) -> None:
    assert difference_of_own(folder.name, folder) < 1e-5


@pytest.mark.parametrize("folder", folders(list(BASES)), ids=label)
def test_a_moefied_model_that_a_release_saved_gives_what_it_gave(folder: Path) -> None:
    build, _ = BASES[folder.name]
    model = gmoe.load(folder, base=build())  # compares with the receipt
    assert receipt(model, folder) < 1e-5


def test_the_models_of_this_version_are_there() -> None:
    assert gmoe.__version__ in VERSIONS


def test_another_output_is_seen(tmp_path: Path) -> None:
    torch.manual_seed(0)
    saved_models.save_own("GNNMoE", tmp_path)
    assert difference_of_own("GNNMoE", tmp_path) == 0
    call = load_file(tmp_path / CALL)
    save_file({**call, "output": call["output"] + 1}, tmp_path / CALL)
    assert difference_of_own("GNNMoE", tmp_path) == pytest.approx(1, abs=1e-5)


def test_what_was_saved_stays(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="got models that were saved before"):
        saved_models.main(tmp_path)
