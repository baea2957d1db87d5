"""The report of molecules: atoms in the colors of their experts, and what experts follow."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from experiments.convert.__main__ import main as convert
from experiments.show import molecules, report_page
from experiments.show.report import main
from gmoe.plot import palette
from tests.helpers.command import quick
from tests.helpers.molecule_data import TEN, write_set, write_table
from tests.helpers.pages import words_of

SMALL = ("--hidden", "8", "--layers", "2", "--batch-size", "4", "--experts", "3")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FreeSolv, of ten molecules."""
    pytest.importorskip("rdkit.Chem")
    root = tmp_path_factory.mktemp("data")
    table = write_table(root / "FreeSolv.csv", (), expt=[number / 10 for number in range(10)])
    convert(["molecules", str(table), "--out", str(root)])
    return root


@pytest.mark.parametrize(
    ("options", "figures"),
    [((), 1), (("--shared-router", "False", "--k", "2"), 2)],
    ids=["once", "layers"],
)
def test_the_report_draws_molecules_in_the_colors_of_experts(
    options: tuple[str, ...],
    figures: int,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[tuple[Any, ...]] = []
    draw = molecules.drawing

    def noted(*given: Any) -> Any:
        drawn.append(given)
        return draw(*given)

    monkeypatch.setattr(molecules, "drawing", noted)
    quick(tmp_path / "run", "--data-root", str(data), *SMALL, *options, preset="ogbg-molfreesolv")
    main([str(tmp_path / "run"), "--out", str(tmp_path / "report")])
    words = words_of(tmp_path / "report" / "index.html")
    assert "Which atoms go to which expert?" in words
    assert "each atom has the color of the expert" in words
    assert "test (%; errors as they are)" in words
    assert "ami element" in words
    assert "ami ring" in words
    assert len(drawn) == figures
    for smiles, experts, num_experts, titles in drawn:
        assert set(smiles) <= set(TEN)
        assert len(smiles) == len(experts) == len(titles) == 1  # one molecule validates
        assert max(map(max, experts)) < num_experts == 3


def test_elements_go_by_their_symbols(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As OGB numbers them, one by one or, of many, several in a bin."""
    from ogb.utils.features import allowable_features

    numbers = allowable_features["possible_atomic_num_list"]
    assert len(molecules.SYMBOLS) == len(numbers)
    assert molecules.SYMBOLS[numbers.index(6)] == "C"
    assert molecules.SYMBOLS[numbers.index(118)] == "Og"
    element = torch.tensor([numbers.index(number) for number in (6, 17, 7, 35, 6)])
    names = molecules.element_names(element, torch.tensor([0, 1, 0, 1, 0]))
    assert names == ["C, N", "Cl, Br"]
    maps = dict[str, Any]()
    draw = report_page.share_map
    monkeypatch.setattr(
        report_page,
        "share_map",
        lambda *given: maps.update({given[2]: given[3]}) or draw(*given),
    )
    quick(tmp_path / "run", "--data-root", str(data), *SMALL, preset="ogbg-molfreesolv")
    main([str(tmp_path / "run"), "--out", str(tmp_path / "report")])
    assert set(maps["element"]) <= set(molecules.SYMBOLS)
    assert maps["ring membership"] == ("in none", "in a ring")
    assert all(name.isdecimal() for name in maps["degree"])


@pytest.mark.parametrize("number", [1, 6, 17, 79, 118])
def test_symbols_are_those_of_rdkit(number: int) -> None:
    chem = pytest.importorskip("rdkit.Chem")
    assert molecules.SYMBOLS[number - 1] == chem.GetPeriodicTable().GetElementSymbol(number)


def test_a_drawing_has_the_color_of_each_expert_of_an_atom(data: Path) -> None:
    figure = molecules.drawing(list(TEN)[-2:], [[0, 1] * 5, [2] * 18], 3, ["1", "0"])
    assert figure is not None
    for axis, experts in zip(figure.axes, ({0, 1}, {2}), strict=False):
        image = axis.images[0].get_array()
        assert image is not None
        pixels = np.asarray(image)[..., :3].reshape(-1, 3)
        for expert, color in enumerate(palette(num_experts=3)):
            furthest_channel = np.abs(pixels - np.array(color)).max(axis=1)
            assert (furthest_channel.min() < 3 / 255) == (expert in experts)


def test_without_rdkit_the_report_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(molecules, "drawing", lambda *_: None)
    folder = write_set(tmp_path)
    (folder / "mapping").mkdir()
    rows = "\n".join(f"1,C,{row}" for row in range(60))
    import gzip

    (folder / "mapping" / "mol.csv.gz").write_bytes(
        gzip.compress(f"HIV_active,smiles,mol_id\n{rows}\n".encode())
    )
    quick(tmp_path / "run", "--data-root", str(tmp_path), *SMALL, preset="ogbg-molhiv")
    main([str(tmp_path / "run"), "--out", str(tmp_path / "report")])
    words = words_of(tmp_path / "report" / "index.html")
    assert "which is not installed: pip install rdkit" in words
    assert re.search(r"follow the (element|degree|ring membership)|do not follow", words)
    assert report_page.DRAWN["atoms"] not in words
