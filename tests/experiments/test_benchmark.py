"""The benchmarks compute what they say, and compare it in turns."""

from __future__ import annotations

import importlib.util
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric

from experiments import timing
from experiments.benchmark import order, peers
from experiments.benchmark.__main__ import main
from experiments.benchmark.conv import ByHeteroLinear, Masked
from experiments.benchmark.peers import NonzeroLoop
from experiments.benchmark.train import Clock
from experiments.build import build_model
from experiments.data import load_tasks
from experiments.loop import set_up
from experiments.presets import DIGITS
from gmoe import Graph, MLPExperts, MoE, MoEConv, TokenChoice

SMALL = ["conv", "--nodes", "60", "--edges", "150", "--width", "6", "--out", "8", "--repeats", "2"]
SMALL_FFN = ["ffn", "--tokens", "64", "--width", "16", "--hidden", "24"]
SMALL_VIT = ["vit", "--batch", "2", "--image", "8", "--layers", "2", "--heads", "2", "--dim", "8", "--hidden", "6"]


def test_variants_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = [0.0], list[str]()
    monkeypatch.setattr("experiments.timing.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("experiments.timing.time.process_time", lambda: 2 * now[0])

    def variant(name: str, seconds: float) -> None:
        order.append(name)
        now[0] += seconds

    variants = {"a": lambda: variant("a", 1.0), "b": lambda: variant("b", 3.0), "c": lambda: variant("c", 5.0)}
    found = timing.take_turns(variants, repeats=2, device=torch.device("cpu"))
    assert order == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]
    assert found["b"]["wall"] == {"median": 3.0, "min": 3.0, "max": 3.0, "values": [3.0, 3.0]}
    assert found["c"]["cpu"]["median"] == 10.0


def test_no_repeats_are_refused() -> None:
    with pytest.raises(ValueError, match="repeats: got 0, expected at least 1"):
        timing.take_turns({"a": lambda: None}, repeats=0, device=torch.device("cpu"))


def test_peak_memory_is_that_of_what_lives_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    def step() -> torch.Tensor:
        a = torch.ones(256, 1024)
        b = a + 1  # two of 1 MiB
        del a
        return b * 2

    assert timing.peak_bytes(step, torch.device("cpu")) == pytest.approx(2 * 2**20, abs=100)
    assert timing.peak_bytes(lambda: None, torch.device("cpu")) == 0
    assert capfd.readouterr().err == ""  # what the profiler says of itself


@pytest.mark.parametrize("conv", ["gcn", "gat"])
def test_conv_benchmark(conv: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "found.json"
    heads = ["--conv", "gat", "--heads", "2", "--adjacency", "edge_index"] if conv == "gat" else []
    main([*SMALL, *heads, "--experts", "2", "4", "--ks", "1", "3", "--json", str(path)])
    found = json.loads(path.read_text())
    forms = ["edge_index"] if heads else ["edge_index", "csr"]
    pairs = ["E=2 K=1", "E=4 K=1", "E=4 K=3"]  # K = 3 of 2 experts is left out
    kinds = ["masked"] if heads else ["masked", "HeteroLinear"]
    others = [f"{kind} {pair}" for pair in pairs for kind in kinds]
    names = [["dense", *(f"MoEConv {pair}" for pair in pairs), *others] for _ in forms]
    assert list(found["variants"]) == [
        f"{name}, {form}" for form, group in zip(forms, names, strict=True) for name in group
    ]
    for name, figures in found["variants"].items():
        dense = found["variants"]["dense, " + name.rsplit(", ", 1)[1]]
        assert figures["ratio"]["wall"] == figures["wall"]["median"] / dense["wall"]["median"]
        assert len(figures["cpu"]["values"]) == 2
        assert figures["flops"] > 0
        assert figures["ratio"]["memory"] == figures["memory"] / dense["memory"]
    assert found["config"]["out"] == 8
    assert "MoEConv E=4 K=3, edge_index" in capsys.readouterr().out


PLAIN: dict[str, Any] = {"num_experts": 3, "shared_expert": False, "router_kwargs": {"balance": None}}


def test_masked_equals_the_layer_and_a_difference_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer, x, edges = MoEConv("gcn", 5, 4, **PLAIN, k=2), torch.randn(9, 5), torch.randint(9, (2, 30))
    torch.testing.assert_close(layer(x, edges), Masked(layer)(x, edges))
    monkeypatch.setattr(Masked, "forward", lambda *_: torch.zeros(60, 8))
    with pytest.raises(RuntimeError, match="differ"):
        main(SMALL)


def test_hetero_linear_equals_the_layer() -> None:
    torch.manual_seed(0)
    layer, x, edges = MoEConv("gcn", 5, 4, **PLAIN, k=2), torch.randn(9, 5), torch.randint(9, (2, 30))
    torch.testing.assert_close(ByHeteroLinear(layer)(x, edges), layer(x, edges))


def test_ffn_benchmark(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    options = ["--experts", "2", "4", "--ks", "1", "3", "--precisions", "bf16", "--backends", "auto", "padded"]
    main([*SMALL_FFN, *options, "--no-peers", "--repeats", "1", "--json", str(path)])
    found = json.loads(path.read_text())["variants"]
    pairs = {1: ["E=2 K=1", "E=4 K=1"], 3: ["E=4 K=3"]}
    ours = {k: [f"gmoe {way} {pair}, bf16" for pair in pairs[k] for way in ("auto", "padded")] for k in pairs}
    assert list(found) == [name for k in pairs for name in (f"dense K={k}, bf16", *ours[k], f"dense K={k}, fp32")]
    assert found[ours[3][0]]["ratio"]["wall"] == (
        found[ours[3][0]]["wall"]["median"] / found["dense K=3, fp32"]["wall"]["median"]
    )


def test_ffn_benchmark_with_peers(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    main([*SMALL_FFN, "--repeats", "1", "--json", str(path)])
    names = json.loads(path.read_text())["variants"]
    assert {"gmoe auto E=8 K=2, fp32", "loop with nonzero E=8 K=2, fp32"} <= set(names)
    for module, variant in (
        ("transformers", "Mixtral eager"),
        ("transformers", "Mixtral grouped_mm"),
        ("pytorch_mixtures", "pytorch-mixtures"),
        ("st_moe_pytorch", "st-moe-pytorch"),
        ("tutel", "Tutel"),
    ):
        assert (f"{variant} E=8 K=2, fp32" in names) == (importlib.util.find_spec(module) is not None)


def test_a_peer_that_computes_something_else_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.NonzeroLoop, "forward", lambda _, x: x)
    with pytest.raises(RuntimeError, match="loop with nonzero and gmoe differ"):
        main([*SMALL_FFN, "--repeats", "1"])


@pytest.mark.parametrize("options", [["--router", "token_choice", "--k", "2"], ["--bf16", "--experts", "3"]])
def test_vit_benchmark(options: list[str], tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    main([*SMALL_VIT, *options, "--repeats", "1", "--json", str(path)])
    found = json.loads(path.read_text())["variants"]
    assert list(found) == ["dense", "loop with nonzero", "loop", "padded", "grouped", "with a shared expert"]
    assert all(
        variant["ratio"]["cpu"] == variant["cpu"]["median"] / found["dense"]["cpu"]["median"]
        for variant in found.values()
    )


def test_loop_with_nonzero_equals_the_layer() -> None:
    torch.manual_seed(0)
    layer = MoE(TokenChoice(5, 4, k=2, balance=None), MLPExperts(5, 7, 6, num_experts=4)).double()
    x = torch.randn(2, 9, 5, dtype=torch.float64, requires_grad=True)
    weights = [x, *layer.parameters()]
    y, other = layer(x), NonzeroLoop(layer)(x)
    torch.testing.assert_close(other, y)
    grad = torch.randn_like(y)
    torch.testing.assert_close(torch.autograd.grad(other, weights, grad), torch.autograd.grad(y, weights, grad))


def test_ways_to_run_a_vit_that_differ_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NonzeroLoop, "forward", lambda _, x: torch.zeros_like(x))
    with pytest.raises(RuntimeError, match="loop with nonzero and loop differ"):
        main([*SMALL_VIT, "--repeats", "1"])


@pytest.mark.parametrize("options", [[], ["--no-naive"], ["--no-naive", "--no-group"]])
def test_vote_benchmark(options: list[str], tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    main(["vote", "--tokens", "50", "--edges", "90", "--width", "6", *options, "--repeats", "1", "--json", str(path)])
    variants = json.loads(path.read_text())["variants"]
    assert list(variants) == [
        "GATConv",
        *(["naive votes"] if not options else []),
        *(["votes in blocks"] if "--no-group" not in options else []),
        "votes of neighbors",
        *(["AttentionVote, group"] if "--no-group" not in options else []),
        "AttentionVote, neighbors",
    ]


def test_votes_that_differ_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.benchmark.vote.in_blocks", lambda *_: torch.ones(50, 8))
    with pytest.raises(AssertionError, match="not close"):
        main(["vote", "--tokens", "50", "--edges", "90", "--width", "6"])


def test_order_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "WIDE", ((20, 40, 9, 4),))
    path = tmp_path / "found.json"
    sizes = ["--nodes", "20", "--ins", "6", "9", "--outs", "8", "--degrees", "2", "--experts", "2", "--ks", "1", "3"]
    main(["order", *sizes, "--repeats", "2", "--json", str(path)])
    found = json.loads(path.read_text())["variants"]
    extras = [
        "",
        ", shared expert",
        ", gradient of x",
        ", gradient of x, shared expert",
    ]  # 6 to 8 and K = 3 are left out
    assert list(found["grid"]) == [f"9 to 8, degree 2, E=2 K=1{extra}" for extra in extras]
    assert list(found["wide"]) == [f"20 nodes, 40 edges, 9 to 4{extra}" for extra in extras[:2]]
    for figures in found["grid"].values():
        best = min(figures[name] for name in order.ORDERS)
        assert figures["ratio"] == figures[figures["chosen"]] / best
    assert 0 <= found["within"] <= 1
    assert "4 of 4: 9 to 8" in capsys.readouterr().err


@pytest.mark.parametrize("name", order.ORDERS)
@pytest.mark.parametrize("shared_expert", [False, True])
@pytest.mark.parametrize("k", [1, 2])
def test_bare_torch_equals_the_layer_in_every_order(k: int, shared_expert: bool, name: Any) -> None:
    torch.manual_seed(0)
    options = {**PLAIN, "shared_expert": shared_expert, "dense_start": False}
    layer = MoEConv("gcn", 5, 4, k=k, **options).double()
    graph, x = Graph(torch.randint(9, (2, 30)), 9), torch.randn(9, 5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(order.Bare(layer, graph, name)(x), layer(x, graph))
    weights = [x, *layer.parameters()]
    grad = torch.randn(9, 4, dtype=torch.float64)
    theirs, ours = (torch.autograd.grad(y, weights, grad) for y in (order.Bare(layer, graph, name)(x), layer(x, graph)))
    torch.testing.assert_close(theirs, ours)


@pytest.mark.parametrize("layer", ["ffn", "conv"])
def test_router_benchmark(layer: str, tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    sizes = ["--layer", layer, "--tokens", "40", "--edges", "60", "--width", "8", "--hidden", "12", "--experts", "3"]
    routers = ["token_choice", "random", "uniform"]
    main(["router", *sizes, "--routers", *routers, "--ks", "1", "2", "--repeats", "1", "--json", str(path)])
    variants = json.loads(path.read_text())["variants"]
    assert list(variants) == [
        f"{what}, {name} K={k}" for k in (1, 2) for name in routers for what in ("layer", "router")
    ]
    for name, figures in variants.items():
        whole = variants[name.replace("router, ", "layer, ")]
        assert figures["ratio"]["wall"] == figures["wall"]["median"] / whole["wall"]["median"]


def test_train_benchmark(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "found.json"
    presets = ["--presets", "digits", "digits-graph", "cora", "--data-root", str(tmp_path)]
    main(["train", *presets, "--batches", "2", "--repeats", "2", "--json", str(path)])
    found = json.loads(path.read_text())["variants"]
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
    torch.manual_seed(0)
    with set_up(Fabric(accelerator="cpu", devices=1), build_model(config, task), config, task) as training:

        def slow_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            time.sleep(0.2)
            return task.loss(logits, target)

        training.task = slow = replace(task, loss=slow_loss)
        with Clock(torch.device("cpu")).on(training, 2) as clock:
            training.train_epoch(0)
        assert training.task is slow
        assert not {"forward", "step", "backward"} & set(vars(training)).union(vars(training.fabric))
        before = dict(clock.seconds)
        training.train_epoch(1)
    assert clock.seconds == before  # nothing is counted any more
    assert clock.batches == 2
    assert before["forward"] >= 0.4
    assert min(before.values()) > 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["train", "--presets", "nothing"], "presets: got nothing, expected some of digits"),
        (["train", "--repeats", "0"], "repeats: got 0, expected at least 1"),
        (["train", "--batches", "0"], "batches: got 0, expected at least 1"),
        (["--heads", "2"], "heads: got 2, but gcn takes none"),
        (["train", "--presets", "cora"], "presets: got none whose data are at hand"),
        (["--adjacency", "dense"], "adjacency: got 'dense', expected one of edge_index, csr"),
        (["--heads", "3"], "out: got 8, expected a multiple of heads=3"),
        (["--device", "nowhere"], "device: got 'nowhere'"),
        (["--repeats", "0"], "repeats: got 0"),
        (["--conv", "nothing"], "conv: got 'nothing'"),
        (["vit", "--router", "nothing"], "router: got 'nothing'"),
        (["vit", "--image", "9"], "image_size: got 9, expected a multiple of patch_size=4"),
    ],
)
def test_bad_options(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(args if args[0] in ("vit", "train") else [*SMALL, *args])
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
