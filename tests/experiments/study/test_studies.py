"""A study: its cells, and what is refused of it."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import gmoe
from experiments.study.studies import CONTROLS, Row, Study
from experiments.train.config import GraphConfig, ImageConfig, MoleculeConfig, TypedConfig
from experiments.train.presets import DIGITS_GRAPH, MOSAIC, PRESETS

STUDY = Study(
    name="small",
    about="a test",
    columns={"digits-graph": DIGITS_GRAPH, "mosaic": replace(MOSAIC, seeds=(7, 8))},
    rows={
        "dense": Row(label="dense", changes={"router": "dense"}),
        "four": Row(label="four experts", changes={"experts": 4}),
        "default": Row(label="the default"),
    },
    controls=("dense",),
)


def test_a_cell_is_the_recipe_of_its_column_with_the_changes_of_its_row() -> None:
    cells = STUDY.cells()
    assert list(cells) == [
        f"{column}/{row}" for column in STUDY.columns for row in ("dense", "four", "default")
    ]
    assert cells["mosaic/four"] == replace(MOSAIC, seeds=(7, 8), experts=4)
    assert cells["digits-graph/default"] == DIGITS_GRAPH
    assert list(STUDY.cells(["mosaic"], ["four", "dense"])) == ["mosaic/four", "mosaic/dense"]


def test_controls_are_rows_of_any_study_of_nodes() -> None:
    cells = replace(STUDY, rows=CONTROLS).cells(["mosaic"])
    dense = cells["mosaic/dense"]
    assert cells["mosaic/dense-lr2"] == replace(dense, lr=2 * dense.lr)
    assert cells["mosaic/dense-input-again"] == replace(dense, input_again=True)  # type: ignore[call-arg]
    assert cells["mosaic/one-expert"].experts == 1
    assert cells["mosaic/random"].router == "random"


def test_what_a_study_does_not_have_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^columns: got sea, expected some of digits-graph, mo"):
        STUDY.cells(["mosaic", "sea"])
    with pytest.raises(ValueError, match=r"^rows: got five, expected some of dense, four, default"):
        STUDY.cells(rows=["five"])
    with pytest.raises(ValueError, match=r"^controls: got 'wide', expected one of dense, four"):
        replace(STUDY, controls=("wide",))
    with pytest.raises(ValueError, match=r"^published: got 'sea/four'"):
        replace(STUDY, published={"sea/four": "1"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expert": 4}, r"rows: own: got 'expert', expected .*did you mean 'experts'"),
        ({"experts": "four"}, "rows: own: got experts='four', expected values of the options"),
    ],
    ids=str,
)
def test_options_that_a_recipe_does_not_have_are_named(
    changes: dict[str, Any], message: str
) -> None:
    study = replace(STUDY, rows={"own": Row(label="own", changes=changes)}, controls=())
    with pytest.raises(ValueError, match=message):
        study.cells()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_leave_routing_to_the_library(name: str) -> None:
    config = PRESETS[name][1]
    assert config.layer_options() == config.options.given() == {}
    models = {
        ImageConfig: gmoe.ViTMoE,
        TypedConfig: gmoe.MoEConv,
        GraphConfig: gmoe.GNNMoE,
        MoleculeConfig: gmoe.GNNMoE,
    }
    (model,) = (model for kind, model in models.items() if isinstance(config, kind))
    default = inspect.signature(model).parameters["router"].default
    assert (config.router, config.equal_to) == (default, default)


def test_the_study_of_the_docs_runs_as_it_stands_and_takes_a_column_and_a_row_more() -> None:
    page = Path(__file__).parents[3] / "docs" / "tutorials" / "command-line.md"
    code = page.read_text().partition("# mine.py\n")[2].partition("\n```")[0]
    names: dict[str, Any] = {}
    exec(code, names)
    study = names["STUDY"]
    assert isinstance(study, Study)
    assert list(study.cells()) == [
        f"{column}/{row}"
        for column in ("mosaic", "digits-graph")
        for row in (*CONTROLS, "four", "sixteen")
    ]
    column = '"digits-graph": DIGITS_GRAPH'
    row = '"sixteen": Row('
    more = code.replace(column, f'"own": MOSAIC, {column}')
    more = more.replace(row, f'"two": Row(label="two", changes={{"k": 2}}), {row}')
    exec(more, names)
    assert len(names["STUDY"].cells()) == 3 * 8
