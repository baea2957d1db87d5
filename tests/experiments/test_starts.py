"""The study of experts begun as copies: its arms, what copies share, its planted graph, and how arms are ranked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import gmoe
from experiments.build import build_model
from experiments.config import RouterOptions
from experiments.data import load_tasks
from experiments.loop import run
from experiments.presets import DIGITS_GRAPH, MOSAIC
from experiments.sharing import FromBaseOfLowRank, GumbelChoice, share_among_copies, tie_copies
from experiments.starts import (
    ARMS,
    COLUMNS,
    OFFERED,
    RANDOM,
    SECOND,
    WEIGHED,
    cells,
    confirmed,
    confirmed_table,
    interval,
    passes,
    ranking,
    table,
)

STRAIGHT = {"weight": "straight_through", "noise": False, "balance": None}


def trained(sharing: Any, steps: int = 3) -> Any:
    """A layer of copies after a few steps of plain gradient descent."""
    torch.manual_seed(0)
    layer = gmoe.MoEConv(
        "sage", 4, 4, num_experts=3, start="copies", router_kwargs=STRAIGHT
    ).double()
    if sharing is not None:
        share_among_copies(layer, sharing)
    x, edge_index = torch.randn(20, 4, dtype=torch.float64), torch.randint(20, (2, 60))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        layer(x, edge_index).sin().sum().backward()
        optimizer.step()
    return layer


def test_pooled_gradients_are_a_base_and_differences_under_gradient_descent() -> None:
    pooled, difference, alone = trained("pooled"), trained("difference"), trained(None)
    weight = pooled.experts.linear.weight
    torch.testing.assert_close(weight, difference.experts.linear.weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        pooled.router.gate.weight, difference.router.gate.weight, rtol=0, atol=1e-12
    )
    assert not torch.allclose(weight, alone.experts.linear.weight)
    assert not torch.allclose(weight[0], weight[1])


def test_ten_times_the_pooled_gradient_moves_copies_together() -> None:
    apart = [
        (
            trained(sharing).experts.linear.weight.std(dim=0)
            / trained(sharing).experts.linear.weight.std()
        ).mean()
        for sharing in (None, "pooled", "pooled-10")
    ]
    assert apart[0] > apart[1] > apart[2] > 0


def test_tied_copies_train_as_the_dense_layer() -> None:
    layer = trained("tied-half", steps=0)
    x, edge_index = torch.randn(20, 4, dtype=torch.float64), torch.randint(20, (2, 60))
    layer(x, edge_index).sin().sum().backward()
    weight = layer.experts.linear.weight
    summed = weight.grad.sum(dim=0)
    assert not torch.allclose(weight.grad[0], weight.grad[1])
    tie_copies(layer)
    for gradient in weight.grad:
        torch.testing.assert_close(gradient, summed)


@pytest.mark.parametrize("sharing", ["difference-gain", "difference-rank", "difference-decay"])
def test_differences_that_are_held_back_start_at_zero_and_are_trained(sharing: Any) -> None:
    at_start, later = (trained(sharing, steps).experts.linear.weight for steps in (0, 3))
    torch.testing.assert_close(at_start, at_start[:1].expand_as(at_start))
    assert not torch.allclose(later[0], later[1])
    if sharing == "difference-rank":
        wide = torch.nn.Linear(12, 12)
        wide.weight = torch.nn.Parameter(wide.weight.detach().expand(2, 12, 12).clone())
        difference = FromBaseOfLowRank(wide.weight.detach()[:1], wide.weight)
        torch.nn.init.ones_(difference.right)
        added = difference(wide.weight.detach() * 0) - difference.base
        assert torch.linalg.matrix_rank(added).tolist() == [1, 1]  # of ones; 4 at most
        assert difference.left.shape == (2, 12, 4)


def test_gumbel_choice_draws_in_training_and_weighs_by_one() -> None:
    torch.manual_seed(0)
    x = torch.randn(200, 6)
    gumbel = GumbelChoice(6, 4, weight="straight_through")
    first, second = (gumbel(x).offsets for _ in range(2))
    assert not torch.equal(first, second)
    gumbel.eval()
    torch.testing.assert_close(gumbel(x).weight, torch.ones(200))


def test_a_model_whose_copies_share_starts_as_the_dense_one() -> None:
    task = load_tasks(DIGITS_GRAPH)(0)
    inputs = next(iter(task.loader("train", 128, 0))).inputs
    outputs = []
    for config in (
        replace(DIGITS_GRAPH, router="dense"),
        *(arm.applied(DIGITS_GRAPH) for arm in ARMS if arm.choice == "quiet"),
    ):
        torch.manual_seed(0)
        outputs.append(build_model(config, task).eval()(*inputs))
    assert len(outputs) == 13
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=0, atol=1e-5)


def test_the_noise_falls_to_zero_over_the_first_half(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scales: list[float] = []
    route = gmoe.TokenChoice.route

    def noted(router: gmoe.TokenChoice, *args: Any) -> Any:
        if router.training:
            scales.append(router.noise_scale)
        return route(router, *args)

    monkeypatch.setattr(gmoe.TokenChoice, "route", noted)
    config = replace(
        DIGITS_GRAPH, epochs=8, seeds=(0,), anneal_noise=True, out=tmp_path / "run", progress=False
    )
    run(config)
    assert scales[-8:] == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0, 0.0]


def test_the_arms_are_those_that_were_fixed() -> None:
    names = {arm.name for arm in (*ARMS, *SECOND)}
    assert (len(ARMS), len(SECOND), len(RANDOM)) == (36, 24, 12)
    assert len(names) == 36 + 24
    found = cells((), Path("data"))
    assert len(found) == 7 * (36 + 12 + 5) + (9 + 3 + 5) + 24 * len(WEIGHED)
    top_2 = found["cora/difference-once-neighbors-constant-top2"]
    assert (top_2.k, top_2.options.weight, top_2.sharing) == (2, "normalized", "difference")
    mosaic = found["mosaic/pooled-once-neighbors-annealed"]
    assert (mosaic.start, mosaic.sharing, mosaic.anneal_noise) == ("copies", "pooled", True)
    assert found["cora/dense-lr2"].lr == 2 * COLUMNS["cora"].lr
    assert found["digits/copies-layer-node-random"].router == "random"
    with pytest.raises(ValueError, match="columns: got sea, expected some of digits-graph"):
        cells(["sea"], Path("data"))


def validated(value: float) -> dict[str, Any]:
    """The summary of two seeds of a score."""
    return {"val": {"values": [value, value], "mean": value}}


def screened_columns() -> dict[str, dict[str, Any]]:
    """Results of all arms and variants on the weighed columns; two stand out."""
    columns = {}
    for column in WEIGHED:
        known = {arm.name: validated(0.5) for arm in (*ARMS, *SECOND)}
        known |= {"dense": validated(0.4), "copies-layer-node-quiet": validated(0.8)}
        columns[column] = known | {"copies-once-neighbors-constant-tied-half": validated(0.7)}
    return columns


def test_arms_are_ranked_by_their_mean_gain_in_validation_over_the_weighed_columns() -> None:
    results = screened_columns()
    results["mosaic"]["copies-layer-node-quiet"] = validated(0.9)
    # Is not weighed
    results["digits"] = {
        "dense": validated(0.4),
        "copies-layer-node-quiet": validated(0.0),
    }
    del results["cora"]["pooled-layer-node-quiet"]  # so that this arm is not ranked
    ranked = ranking(results)
    assert [name for name, _ in ranked[:2]] == [
        "copies-layer-node-quiet",
        "copies-once-neighbors-constant-tied-half",
    ]
    assert [mean for _, mean in ranked[:2]] == pytest.approx([42.0, 30.0])
    assert len(ranked) == len(ARMS) + len(SECOND) - 1
    head, _, best, *_ = table(results).splitlines()
    assert head.startswith("| validation − dense (points) | mean | digits-graph | cora | mosaic |")
    assert best.startswith("| copies-layer-node-quiet | +42.00 | +40.00 | +40.00 | +50.00 |")
    assert "| dense | – | 40.00 | 40.00 | 40.00 |" in table(results)
    assert "| pooled-layer-node-quiet | – | +10.00 | – | +10.00 |" in table(results)
    assert table({}) == "no arm is finished yet"


def test_the_best_two_are_confirmed_on_seeds_that_were_not_looked_at() -> None:
    screened = screened_columns()
    found = confirmed((), Path("data"), screened)
    on_graphs = {name for name in found if not name.startswith("digits/")}
    assert {name.partition("/")[2] for name in on_graphs} == {
        *("dense", "dense-flops", "default"),
        *("copies-layer-node-quiet", "copies-once-neighbors-constant-tied-half"),
        *(arm.name for arm in OFFERED),
    }
    # Images have a router in each layer, and a patch has no neighbors.
    tied = found["digits/copies-layer-node-constant-tied-half"]
    assert (tied.sharing, tied.options.weight) == ("tied-half", "straight_through")
    assert {config.seeds for config in found.values()} == {tuple(range(3, 13))}
    del screened["mosaic"]["difference-once-neighbors-constant-gain"]
    with pytest.raises(ValueError, match=r"^columns: got not all variants of mosaic, expected all"):
        confirmed((), Path("data"), screened)


def test_an_arm_passes_unless_it_is_surely_worse() -> None:
    def run(values: list[float]) -> dict[str, Any]:
        return {"test": {"values": values, "mean": sum(values) / len(values)}, "flops": 100}

    dense = [0.80, 0.81, 0.82, 0.83]
    known = {
        "dense": run(dense),
        "dense-flops": run(dense),
        "default": run([value - 0.002 for value in dense]),  # .2 points below, always
        "worse": run([value - 0.01 for value in dense]),
        "unsure": run(
            [
                value + change
                for value, change in zip(dense, (0.02, -0.05, 0.01, -0.04), strict=True)
            ]
        ),
    }
    assert [passes(known, name) for name in ("default", "worse", "unsure")] == [True, False, True]
    # Mean 2, standard error 1 / sqrt(3), t of two degrees 4.3027
    low, high = interval([1.0, 2.0, 3.0])
    assert (low, high) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-4)
    _, _, first, _, _, worse, _ = confirmed_table({"cora": known}).splitlines()
    assert first == "| cora | dense | 81.50 | 1.00 × | – | – | – |"
    assert worse.startswith("| cora | worse | 80.50 | 1.00 × | -1.00 (-1.00 to -1.00) |")


def test_edges_of_a_concept_graph_say_nothing_and_the_rule_of_the_regime_does() -> None:
    task = load_tasks(replace(MOSAIC, dataset="concept-8-512-features"))(0)
    data: Any = task.graph
    planted: Any = task.planted
    source, destination = data.edge_index
    assert data.x.shape == (8_000, 24)
    assert planted.bincount().tolist() == [1_000] * 8
    same_class = (data.y[source] == data.y[destination]).float().mean()
    chance = (data.y.bincount() / 8_000).square().sum()
    assert abs(same_class - chance) < 0.01
    same_regime = (planted[source] == planted[destination]).float().mean()
    assert abs(same_regime - 1 / 8) < 0.01
    plain: Any = load_tasks(replace(MOSAIC, dataset="concept-8-512-nothing"))(0).graph
    assert torch.equal(plain.x, data.x[:, :16])


@pytest.mark.parametrize(
    "name", ["concept-0-8-features", "concept-2-801-features", "concept-2-8-colors", "concept-2"]
)
def test_an_unknown_concept_graph_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^dataset: got 'concept-"):
        load_tasks(replace(MOSAIC, dataset=name))(0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sharing": "pooled"}, "sharing: got 'pooled', expected none without start='copies'"),
        ({"anneal_noise": True, "router": "random"}, "anneal_noise: got True"),
        ({"anneal_noise": True, "options": RouterOptions(noise=False)}, "anneal_noise: got True"),
    ],
)
def test_options_that_need_another_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        replace(DIGITS_GRAPH, **changes)
