"""Commands that are cut off, or whose disk is full: what each leaves, and that it goes on.

Quick cases of what ``python -m tests.faults`` has found, and that it can find; the slow ones draw.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from safetensors import SafetensorError
from safetensors.torch import load_file

import gmoe
from experiments.convert.graph import (
    SCRATCH,
    building,
    write_edges,
    write_features,
    write_npy,
)
from experiments.show.report_page import Page
from experiments.study.advise import keep_regimes
from experiments.study.pages import update
from experiments.train import predictions
from experiments.train.build import build_model
from experiments.train.command import parse
from experiments.train.loop import run
from experiments.train.presets import DIGITS_GRAPH
from experiments.train.results import write_json
from experiments.train.run_folder import begin, so_far
from experiments.train.training import set_up
from tests import faults
from tests.experiments.command import QUICK, full_disk, refused
from tests.experiments.made_graph import make_config, make_task

LARGE = np.random.default_rng(0).standard_normal((1_000, 3))
REPLACED: dict[str, Callable[[Path], object]] = {
    "a.json": lambda path: write_json(path, LARGE.tolist()),
    "index.html": Page(["<p>"] * 1_000).write,
    "predictions.safetensors": lambda path: predictions.write(path.parent, torch.tensor(LARGE)),
    "regimes.npy": lambda path: keep_regimes(path.parent, torch.arange(1_000)),
}
LAST: dict[str, Callable[[Path], object]] = {
    "regimes.npy": lambda path: keep_regimes(path.parent, torch.arange(400)),
    "a.npy": lambda path: write_npy(path, np.arange(400)),
    "x.npy": lambda path: write_features(path, np.ones((400, 2)), np.dtype(np.float32), "x"),
    "source.npy": lambda path: write_edges([np.arange(800)], path.parent, 800, directed=True),
}
"""Writers of arrays of less than 4 kB, or of such an end."""
BASE = replace(DIGITS_GRAPH, epochs=1, seeds=(0,), hidden=4, router="dense")


@pytest.mark.parametrize("name", REPLACED)
def test_a_full_disk_leaves_the_file_that_was_there(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text("of before")
    with full_disk(), pytest.raises(OSError, match=f"^{path}: cannot be written"):
        REPLACED[name](path)
    assert path.read_text() == "of before"
    assert list(tmp_path.iterdir()) == [path]
    REPLACED[name](path)
    assert path.stat().st_size > 2_000


@pytest.mark.parametrize("name", LAST)
def test_an_array_whose_end_finds_no_room_is_named(name: str, tmp_path: Path) -> None:
    with full_disk(), pytest.raises(OSError, match=f"^{tmp_path / name}: cannot be written"):
        LAST[name](tmp_path / name)


def test_a_full_disk_leaves_the_page_of_the_docs(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text := "By hand.\n<!-- presets: presets -->\n<!-- end -->\n" + "." * 2_000)
    with full_disk(), pytest.raises(SystemExit, match=rf"^error: {page}: .*cannot be written"):
        update((page,))
    assert page.read_text() == text


def test_a_run_that_is_killed_inside_its_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights are on disk in the end."""
    config = parse(["digits-graph", *QUICK, "--seeds", "0", "--out", str(tmp_path)])
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", stopped_at("checkpoint", 2, Path.replace))
        with pytest.raises(KeyboardInterrupt):
            run(config)
    run(config)
    folder = tmp_path / "seed-0" / "checkpoint"
    state = torch.load(folder / "state.ckpt", weights_only=True)
    torch.testing.assert_close(load_file(folder / "best.safetensors"), state["best"])


def stopped_at(folder: str, number: int, call: Callable[..., Any]) -> Callable[..., Any]:
    """A method of paths whose n-th call in a folder of that name stops, and all after it."""
    calls = list[Path]()

    def counted(path: Path, *args: Any) -> Any:
        calls.extend([path] * (path.parent.name == folder))
        if len(calls) >= number and path.parent.name == folder:
            raise KeyboardInterrupt
        return call(path, *args)

    return counted


def test_a_process_that_has_nothing_left_to_train_or_test_ends_well() -> None:
    """As the second one does where a run was killed behind its last epoch."""
    config = make_config(router="token_choice")
    task = make_task(config)
    model = build_model(config, task)
    for is_first, ends in ((False, nullcontext()), (True, pytest.raises(RuntimeError))):
        fabric = Fabric(accelerator="cpu", devices=1)
        at = mock.patch.object(Fabric, "is_global_zero", is_first)
        with at, ends, set_up(fabric, model, config, task):
            pass


def test_a_summary_of_fewer_seeds_is_not_that_of_more(tmp_path: Path) -> None:
    """Another command, of fewer seeds, may end after the folder has become one of more."""
    one = parse(["digits-graph", *QUICK, "--seeds", "0", "--out", str(tmp_path)])
    summary, two = run(one), replace(one, seeds=(0, 1))
    begin(two)
    write_json(tmp_path / "summary.json", summary)
    found, results = so_far(two)
    assert found is None
    assert list(results) == [0]


def test_a_run_on_a_full_disk_says_how_it_goes_on(tmp_path: Path, capsys: Any) -> None:
    command = ["digits-graph", *QUICK, "--seeds", "0", "--out", str(tmp_path / "run")]
    with full_disk(10_000):
        said = refused(command, capsys)
    assert "state.ckpt: cannot be written (" in said
    assert "; continue with: python -m experiments.train digits-graph" in said


SAVED: dict[str, tuple[Callable[[Any, Path], object], Callable[[Path], object]]] = {
    "save": (gmoe.save, lambda folder: gmoe.load(folder, base=gnn(k=1))),
    "save_pretrained": (gmoe.GNNMoE.save_pretrained, gmoe.GNNMoE.from_pretrained),
}


def gnn(k: int) -> gmoe.GNNMoE:
    return gmoe.GNNMoE(8, 16, 4, k=k, start="plain")


@pytest.mark.parametrize("name", SAVED)
def test_a_model_whose_saving_is_cut_off_is_no_mixture(name: str, tmp_path: Path) -> None:
    """Else an earlier one's weights would meet this one's configuration."""
    save, load = SAVED[name]
    save(gnn(k=1), tmp_path)
    load(tmp_path)
    with full_disk(), pytest.raises((OSError, SafetensorError)):
        save(gnn(k=2), tmp_path)
    with pytest.raises((ValueError, OSError)):
        load(tmp_path)


@pytest.fixture
def deletes_in_vain(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Folders list their scratch first, and the first file that is to go stops the process."""
    listed, rmtree = Path.iterdir, shutil.rmtree

    def without_the_whole(path: Path, **options: Any) -> None:
        if path.name == "to.new":
            raise KeyboardInterrupt
        rmtree(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", lambda path: iter(sorted(listed(path), reverse=True)))
        patch.setattr(Path, "unlink", stopped_at("to.new", 1, Path.unlink))
        patch.setattr(shutil, "rmtree", without_the_whole)
        yield patch


def test_a_folder_that_was_being_emptied_is_still_the_converters(
    tmp_path: Path, deletes_in_vain: pytest.MonkeyPatch
) -> None:
    left = tmp_path / "to.new"
    (left / SCRATCH).mkdir(parents=True)
    (left / "edges.npy").touch()
    with pytest.raises(KeyboardInterrupt), building(tmp_path / "to"):
        pytest.fail("it was not emptied")
    deletes_in_vain.undo()
    with building(tmp_path / "to") as folder:
        (folder / "x.npy").touch()
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["x.npy"]


def test_a_folder_on_a_full_disk_is_named(tmp_path: Path) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with (
        pytest.raises(OSError, match=rf"^{tmp_path / 'to.new'}: cannot be written \(.*No space"),
        building(tmp_path / "to"),
    ):
        raise full
    assert list(tmp_path.iterdir()) == []


# That the faults are noticed


def test_what_differs_is_named(tmp_path: Path) -> None:
    for name, text in (("a.json", '{"loss": 1, "seconds": 2}'), ("b.csv", "epoch,seconds\n0,3\n")):
        (tmp_path / name).write_text(text)
    (tmp_path / "a.json.7.new").touch()
    whole = faults.content(tmp_path)
    assert set(whole) == {"a.json", "b.csv"}
    (tmp_path / "b.csv").write_text("epoch,seconds\n0,4\n")
    (tmp_path / "a.json").write_text('{"loss": 1, "seconds": 3}')
    assert not faults.difference(faults.content(tmp_path), whole)
    (tmp_path / "a.json").write_text('{"loss": 2}')
    (tmp_path / "c.npy").touch()
    assert faults.difference(faults.content(tmp_path), whole) == "a.json is other, c.npy is new"


def test_half_a_file_under_its_final_name_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"loss": ')
    assert faults.unreadable(tmp_path).startswith("a.json is half written")
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize(
    ("codes", "said", "wrong"),
    [
        ([2], "error: OUT/a.json: cannot be written", ""),
        ([2], "error: no space left", "no line names a file"),
        ([1], "Traceback (most recent call last)\nOSError: OUT/a.json", "a traceback"),
        ([70], "OUT", "ended with [70]"),
        ([0], "", "a.json is missing"),
    ],
)
def test_how_a_command_ends_is_judged(
    codes: list[int], said: str, wrong: str, tmp_path: Path
) -> None:
    said = said.replace("OUT", str(tmp_path))
    assert faults.untold(codes, said, tmp_path, {}, {"a.json": 1}) == wrong


def test_every_command_meets_every_fault() -> None:
    for name, command in faults.COMMANDS.items():
        met = {fault for of, fault in faults.PAIRS if of == name}
        assert met == {*(faults.TRAINED if command.trains else faults.ONE)}


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, len(faults.PAIRS), len(faults.COMMANDS)))
def test_faults(first: int) -> None:
    pytest.importorskip("rdkit")
    assert faults.main(first, first + len(faults.COMMANDS)) == 0
