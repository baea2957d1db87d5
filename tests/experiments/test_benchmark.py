"""The benchmarks compute what they say, and compare it in turns."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch_geometric.data import Data

from experiments.benchmark import conv, measure, routers
from experiments.benchmark.__main__ import main, parse
from experiments.benchmark.peers import NonzeroLoop
from experiments.benchmark.train import Clock
from experiments.build import build_model
from experiments.data import load_tasks
from experiments.loop import set_up
from experiments.presets import DIGITS
from gmoe import MLPExperts, MoE, MoEConv, TokenChoice
from tests.gmoe.data.stored_files import store

CPU = torch.device("cpu")
CONV = "conv --nodes 60 --edges 150 --width 8"
FFN = "ffn --tokens 64 --width 16 --hidden 24"
ROUTER = "router --tokens 40 --edges 60 --width 8 --experts 3 --routers random uniform --ks 1 2"
TRAIN = "train --presets digits digits-graph cora --batches 2"
VIT = "vit --batch 2 --size.image-size 8 --size.num-layers 2 --size.num-heads 2 --size.hidden-dim 8 --size.mlp-dim 6"
VOTE = "vote --tokens 50 --edges 90"
VOTES = ["votes of neighbors", "AttentionVote, neighbors"]
VIT_WAYS = ["loop with nonzero", "loop", "padded", "grouped", "with a shared expert"]


def found_by(command: str, tmp_path: Path) -> dict[str, Any]:
    main([*command.split(), "--repeats", "2", "--json", str(tmp_path / "found.json")])
    found: dict[str, Any] = json.loads((tmp_path / "found.json").read_text())
    return found


def test_variants_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    now, turns = [0.0], list[str]()
    monkeypatch.setattr("experiments.benchmark.measure.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("experiments.benchmark.measure.time.process_time", lambda: 2 * now[0])

    def variant(name: str, seconds: float) -> None:
        turns.append(name)
        now[0] += seconds

    steps = {"a": lambda: variant("a", 1.0), "b": lambda: variant("b", 3.0), "c": lambda: variant("c", 5.0)}
    found = measure.take_turns(steps, repeats=2, device=CPU)
    assert turns == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert found["b"]["wall"] == {"median": 3.0, "min": 3.0, "max": 3.0, "values": [3.0, 3.0]}
    assert found["c"]["cpu"]["median"] == 10.0


def test_a_file_gets_a_line_a_case(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    monkeypatch.setattr("experiments.benchmark.measure.time.monotonic", lambda: now[0])
    for every in (0, 25):
        for _ in measure.told(["a", "b", ("c", 3)], "case", every):
            now[0] += 10
    lines = [
        "1 of 3 (a): 00:10, about 00:20 left",
        "2 of 3 (b): 00:20, about 00:10 left",
        "3 of 3 (c 3): 00:30, about 00:00 left",
    ]
    assert capsys.readouterr().err.splitlines() == [f"case {line}" for line in [*lines, lines[2]]]


def test_peak_memory_is_that_of_what_lives_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    def step() -> Tensor:
        a = torch.ones(256, 1024)
        b = a + 1  # two of 1 MiB
        del a
        return b * 2

    assert measure.peak_bytes(step, CPU) == pytest.approx(2 * 2**20, abs=100)
    assert measure.peak_bytes(lambda: None, CPU) == 0
    assert capfd.readouterr().err == ""  # what the profiler says of itself


PAIRS = "E=2 K=1", "E=4 K=1", "E=4 K=3"  # K = 3 of 2 experts is left out
ROUTED = [f"{what}, {name} K={k}" for k in (1, 2) for name in ("random", "uniform") for what in ("layer", "router")]


@pytest.mark.parametrize(
    ("command", "variants", "reference"),
    [
        (
            f"{CONV} --experts 2 4 --ks 1 3 --adjacency csr",
            [*(f"MoEConv {p}" for p in PAIRS), *(f"{kind} {p}" for p in PAIRS for kind in ("masked", "HeteroLinear"))],
            "dense, csr",
        ),
        (f"{CONV} --conv gat --heads 2 --ks 1", ["MoEConv E=8 K=1", "masked E=8 K=1"], "dense, edge_index"),
        (
            f"{FFN} --experts 2 4 --ks 3 --precisions bf16 --backends auto padded --no-peers",
            ["dense K=3", "gmoe auto E=4 K=3", "gmoe padded E=4 K=3"],
            "dense K=3, fp32",
        ),
        (f"{ROUTER} --layer conv", ROUTED, "layer, random K=1"),
        (f"{ROUTER} --layer ffn", ROUTED, "layer, random K=1"),
        (VOTE, [*VOTES, "naive votes", "votes in blocks", "AttentionVote, group"], "GATConv"),
        (f"{VOTE} --no-naive --no-group", VOTES, "GATConv"),
        (f"{VIT} --router token_choice", VIT_WAYS, "dense"),
        (f"{VIT} --bf16", VIT_WAYS, "dense"),
    ],
)
def test_variants(command: str, variants: list[str], reference: str, tmp_path: Path) -> None:
    found = found_by(command, tmp_path)["variants"]
    last = {"ffn": ", bf16", "conv": f", {reference.split(', ')[-1]}"}.get(command.split()[0], "")
    assert {*(f"{name}{last}" for name in variants), reference} <= set(found)
    for name in (variants[-1] + last, reference):
        figures, base = found[name], found[reference]
        if name.endswith("K=2"):  # a router's share is that of its own layer
            base = found[name.replace("router, ", "layer, ")]
        assert figures["ratio"]["wall"] == figures["wall"]["median"] / base["wall"]["median"]
        assert figures["ratio"]["memory"] == figures["memory"] / base["memory"]
        assert len(figures["cpu"]["values"]) == 2


def test_a_quick_case_is_small_but_for_what_is_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([*f"{ROUTER} --quick --json {tmp_path / 'found.json'}".split()])
    assert capsys.readouterr().err.startswith("router: The routers' share of a layer.")
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["config"]["tokens"], found["config"]["repeats"]) == (40, 3)
    assert all(len(figures["wall"]["values"]) == 3 for figures in found["variants"].values())


@pytest.mark.parametrize("name", ["conv", "ffn", "router", "vote", "train", "vit", "stored"])
def test_a_quick_case_has_sizes_of_its_own(name: str) -> None:
    config = parse([name, "--quick"])
    assert len(config.SMALL) > 1
    assert all(hasattr(config, option) for option in config.SMALL)


def test_ffn_benchmark_with_peers(tmp_path: Path) -> None:
    names = found_by(FFN, tmp_path)["variants"]
    assert {
        f"{name} E=8 K={k}, fp32" for name in ("gmoe auto", "loop with nonzero", "gmoe gated") for k in (1, 2)
    } <= set(names)


@pytest.mark.parametrize(
    ("owner", "name", "command"),
    [
        (conv.Masked, "forward", CONV),
        (NonzeroLoop, "forward", FFN),
        (NonzeroLoop, "forward", VIT),
        (routers, "in_blocks", VOTE),
    ],
)
def test_what_computes_something_else_is_found(
    owner: Any, name: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args: -right(*args))
    with pytest.raises(AssertionError, match="and gmoe differ"):
        main(command.split())


def test_loop_with_nonzero_has_the_layers_gradients() -> None:
    torch.manual_seed(0)
    layer = MoE(TokenChoice(5, 4, k=2, balance=None), MLPExperts(5, 7, 5, num_experts=4)).double()
    x = torch.randn(2, 9, 5, dtype=torch.float64, requires_grad=True)
    weights, grad = [x, *layer.parameters()], torch.randn_like(x)
    expected, found = (torch.autograd.grad(module(x), weights, grad) for module in (layer, NonzeroLoop(layer)))
    torch.testing.assert_close(found, expected)


def test_hetero_linear_equals_the_layer() -> None:
    torch.manual_seed(0)
    layer = MoEConv("gcn", 5, 4, num_experts=3, k=2, shared_expert=False, router_kwargs={"balance": None})
    x, edges = torch.randn(9, 5), torch.randint(9, (2, 30))
    torch.testing.assert_close(conv.Grouped(layer)(x, edges), layer(x, edges))


def test_stored_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, edges = torch.randn(30, 4), torch.randint(30, (2, 90))
    store(tmp_path, Data(x=x, edge_index=edges))
    options = ("--batches", "2", "--batch-size", "5", "--fanout", "3", "2", "--workers", "0", "--repeats", "1")
    main(["stored", "--folder", str(tmp_path), *options])
    printed = capsys.readouterr().out
    assert "memory, 0 workers" in printed
    assert "disk, 0 workers" in printed


def test_molecules_benchmark(tmp_path: Path) -> None:
    for kind in ("gine", "gcn"):
        found = found_by(f"molecules --quick --conv {kind}", tmp_path)["variants"]
        assert found["MoEConv"]["ratio"]["wall"] > 0


def test_train_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = found_by(f"{TRAIN} --data-root {tmp_path}", tmp_path)["variants"]
    assert {name: figures["batches"] for name, figures in found.items()} == {"digits": 2, "digits-graph": 1}
    for figures in found.values():
        assert list(figures["parts"]) == ["data", "forward", "backward", "optimizer", "rest"]
        assert sum(figures["share"].values()) == pytest.approx(1.0)
        assert min(figures["parts"].values()) >= 0
        assert len(figures["wall"]["values"]) == 2
    assert "cora is left out" in capsys.readouterr().err


def test_the_clock_lets_go_and_counts_what_sleeps() -> None:
    config = replace(DIGITS, layers=2, hidden=8, experts=2, batch_size=600)
    task = load_tasks(config)(0)
    with set_up(Fabric(accelerator="cpu", devices=1), build_model(config, task), config, task) as training:

        def slow_loss(logits: Tensor, target: Tensor) -> Tensor:
            time.sleep(0.2)
            return task.loss(logits, target)

        training.task = slow = replace(task, loss=slow_loss)
        with Clock(CPU).on(training, 2) as clock:
            training.train_epoch(0)
        assert training.task is slow
        assert not {"forward", "step", "backward"} & {*vars(training), *vars(training.fabric)}
        before = dict(clock.seconds)
        training.train_epoch(1)
    assert clock.seconds == before  # nothing is counted any more
    assert clock.batches == 2
    assert before["forward"] >= 0.4
    assert min(before.values()) > 0


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train --presets nothing", "presets: got nothing, expected some of digits"),
        ("train --repeats 0", "repeats: got 0, expected at least 1"),
        ("train --batches 0", "batches: got 0, expected at least 1"),
        ("train --presets cora --data-root nowhere", "presets: got none whose data are at hand"),
        (f"{CONV} --heads 2", "heads"),
        (f"{CONV} --heads 3", "width: got 8, expected a multiple of heads=3"),
        (f"{CONV} --device nowhere", "device: got 'nowhere'"),
        (f"{CONV} --repeats 0", "repeats: got 0, expected at least 1"),
        (f"{CONV} --conv nothing", "conv: got 'nothing'"),
        (f"{CONV} --ks 9", "ks: got (9,), expected one of at most experts=(8,)"),
        (f"{VIT} --router nothing", "router: got 'nothing'"),
        (f"{VIT} --size.image-size 9", "image_size: got 9, expected a multiple of patch_size=4"),
        ("swap --rows nothing", "rows: got nothing, expected some of cora-gcn"),
        ("swap --seeds 0", "seeds: got 0, expected at least 1"),
        ("swap --epochs 0", "epochs: got 0, expected at least 1"),
        ("swap --rows facebook-sage --offline --data-root nowhere", "facebook.npz, which does not exist"),
    ],
)
def test_bad_options(command: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(command.split())
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
