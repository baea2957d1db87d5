"""What nodes are like, and how far an assignment follows it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch_geometric.data import Data

from experiments.show.report import main as report
from experiments.train.command import parse
from experiments.train.config import RouterOptions, RunConfig
from experiments.train.presets import PRESETS
from experiments.train.routing_stats import (
    advice,
    alignment,
    in_words,
    node_properties,
    quantile_bins,
)
from tests.helpers.command import quick


def test_properties_of_a_small_graph() -> None:
    edges = torch.tensor([[1, 2, 0, 3, 3, 1], [0, 0, 1, 1, 3, 2]])  # node 3 hears itself alone
    found = node_properties(Data(edge_index=edges, y=torch.tensor([0, 0, 1, 1]), num_nodes=4))
    assert set(found) == {"label", "degree", "homophily"}
    assert found["degree"].tolist() == [2, 2, 1, 0]
    assert found["homophily"].tolist() == [2, 2, 1, 0]  # shares .5, .5, 0, and none
    # Labels a node
    several = node_properties(Data(edge_index=edges, y=torch.zeros(4, 3), num_nodes=4))
    assert set(several) == {"degree"}


@given(st.lists(st.integers(-3, 60), min_size=1, max_size=200), st.integers(1, 9))
def test_bins_keep_order_and_equal_values_together(values: list[int], bins: int) -> None:
    found = quantile_bins(torch.tensor(values, dtype=torch.float32), bins).tolist()
    assert len(set(found)) <= bins
    for a, i in zip(values, found, strict=True):
        for b, j in zip(values, found, strict=True):
            assert i <= j if a <= b else i >= j


def test_distinct_values_fill_the_bins_evenly_and_few_are_told_apart_however_rare() -> None:
    counts = quantile_bins(torch.randperm(800).float(), 8).bincount()
    assert [len(counts), int(counts.min()) >= 99, int(counts.max()) <= 101] == [8, True, True]
    # A grid: corners, edges, and the rest
    degrees = torch.tensor([8.0] * 970 + [3.0] * 4 + [5.0] * 26)
    assert quantile_bins(degrees).unique().tolist() == [0, 1, 2]
    many = torch.cat([torch.full((900,), 50.0), torch.arange(100).float()])
    assert (quantile_bins(many)[:900] > quantile_bins(many)[900]).all()


def test_alignment_is_one_with_itself_and_none_by_chance() -> None:
    generator = torch.Generator().manual_seed(0)
    experts = torch.randint(8, (5000,), generator=generator)
    other = torch.randint(4, (5000,), generator=generator)
    found = alignment(experts, {"renamed": 7 - experts, "other": other})
    assert found["renamed"] == pytest.approx(1)
    assert abs(found["other"]) < 0.01
    assert abs(found["shuffled"]) < 0.01
    assert alignment(experts, {"constant": torch.zeros(5000)}) == {"constant": 0.0, "shuffled": 0.0}


def test_unlabeled_nodes_are_left_out() -> None:
    y = torch.tensor([0, 1, -1, 0])
    properties = node_properties(
        Data(edge_index=torch.tensor([[0, 2, 3], [1, 0, 0]]), y=y, num_nodes=4)
    )
    assert properties["label"].tolist() == [0, 1, -1, 0]
    assert properties["homophily"][2] == -1
    assert alignment(torch.tensor([0, 1, 0, 0]), properties)["label"] == pytest.approx(1)


def layer(experts: int = 8, **figures: list[float]) -> dict[str, list[float]]:
    """The figures of a MoE layer, of one seed or several, whose experts are all used alike."""
    usual = {"experts": [float(experts)], "dead": [0.0], "coverage": [1.0]}
    return usual | {"max_over_mean_load": [1.0]} | figures


UNEVEN = "not balanced (the busiest takes {} times an even share)"
EVEN = "8 of 8 experts used, balanced (the busiest takes 1.0 times an even share)"


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([layer()], EVEN),
        ([layer(max_over_mean_load=[1.1, 2.0])], EVEN.replace("1.0", "2.0")),
        (
            [layer(max_over_mean_load=[2.1])],
            f"8 of 8 experts used, {UNEVEN.format('2.1')}",
        ),
        (
            [layer(dead=[1], max_over_mean_load=[1.4])],
            f"7 of 8 experts used, {UNEVEN.format('1.4')}",
        ),
        (
            [layer(dead=[0, 2]), layer(dead=[1, 3], max_over_mean_load=[4.0, 5.0])],
            f"5–8 of 8 experts used (by layer and seed), {UNEVEN.format('5.0')}",
        ),
        ([layer(3)], EVEN.replace("8 of 8", "3 of 3")),
        ([layer(coverage=[0.8, 0.9]), layer()], f"{EVEN}; up to 15% of the tokens have no expert"),
        ([layer(nmi=[0.3])], f"{EVEN}; they follow the planted region (NMI 0.30)"),
        ([layer(ami_label=[0.1])], f"{EVEN}; they loosely follow the class (AMI 0.10)"),
        (
            [layer(ami_label=[0.2], ami_degree=[0.1]), layer(ami_label=[0.5, 0.6])],
            f"{EVEN}; they follow the class (AMI 0.55 in MoE layer 2)",
        ),
        (
            [layer(ami_label=[0.02], ami_degree=[0.0], ami_homophily=[0.09], ami_shuffled=[0.5])],
            f"{EVEN}; they do not follow class, degree or local homophily (AMI at most 0.09)",
        ),
    ],
)
def test_routing_in_words(layers: list[dict[str, list[float]]], words: str) -> None:
    assert in_words(layers, PRESETS["digits-graph"][1]) == words


TOKEN = replace(PRESETS["digits-graph"][1], router="token_choice")


@pytest.mark.parametrize(
    ("layers", "config", "words"),
    [
        ([layer()], TOKEN, None),
        ([layer(dead=[5])], TOKEN, None),
        ([layer(dead=[0, 6])], TOKEN, "2 of 8 experts take nearly all tokens"),
        ([layer(), layer(dead=[7])], TOKEN, "1 of 8 experts takes nearly all tokens"),
        # The others get a few tokens
        ([layer(max_over_mean_load=[7.3])], TOKEN, "1 of 8 experts takes nearly all tokens"),
        ([layer(max_over_mean_load=[7.1])], TOKEN, None),
        ([layer(4, dead=[2])], replace(TOKEN, k=2), "2 of 4 experts take nearly all tokens"),
        ([layer(2)], replace(TOKEN, k=2), None),
        ([layer(1)], TOKEN, None),
    ],
)
def test_advice_where_few_experts_have_all_tokens(
    layers: list[dict[str, list[float]]], config: RunConfig, words: str | None
) -> None:
    found = advice(layers, config)
    assert found.startswith(words) if words else found == ""
    assert found.count(".") == (1 if words else 0)


def test_advice_names_options_that_the_run_can_take() -> None:
    layers = [layer(dead=[7])]
    assert "train with --balance bias or --router expert_choice to use" in advice(layers, TOKEN)
    balanced = replace(TOKEN, options=RouterOptions(balance="bias"))
    assert "train with --router expert_choice to use" in advice(layers, balanced)
    assert "train with --router expert_choice to use" in advice(
        layers, replace(TOKEN, router="random")
    )
    own = replace(TOKEN, model="mine.py:make")
    assert "train with a balance in your model's router to use" in advice(layers, own)
    for args in (["--balance", "bias"], ["--router", "expert_choice"], ["--router", "dense"]):
        parse(["digits-graph", *args])


def test_the_terminal_and_the_report_say_what_to_do(tmp_path: Path, capsys: Any) -> None:
    """Experts of digits-graph collapse by default, and do not with the advice followed."""
    line = "1 of 8 experts takes nearly all tokens, as a dense layer does: train with --balance"
    quick(tmp_path / "run", "--epochs", "60")
    assert line in capsys.readouterr().out
    report([str(tmp_path / "run"), "--out", str(tmp_path / "page")])
    assert line in (tmp_path / "page" / "index.html").read_text()
    quick(tmp_path / "balanced", "--epochs", "60", "--balance", "bias")
    assert "nearly all tokens" not in capsys.readouterr().out
