"""Studies: lists of arms, fixed before the first of them is run. `python -m experiments.sweep NAME` runs one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from experiments.config import RouterName, RouterOptions, TrainConfig
from experiments.presets import CIFAR10, CITESEER, CORA, DIGITS, DIGITS_GRAPH, FACEBOOK, MINESWEEPER, MOSAIC


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One line of a study's table.

    Args:
        name: of its run folder.
        label: in the table.
        config: what is run.
    """

    name: str
    label: str
    config: TrainConfig


@dataclass(frozen=True, kw_only=True)
class Study:
    """Arms that are compared.

    Args:
        about: what is asked, and what was tuned.
        arms: the arms.
        reference: the narrow dense arm that costs and headroom are relative to.
        wide: the dense arm four times as wide.
        chosen_on: seeds (splits) that an earlier study chose the arms on, by validation.
    """

    about: str
    arms: tuple[Arm, ...]
    reference: str = "dense"
    wide: str = "dense-4x"
    chosen_on: tuple[int, ...] = ()


def _controls(base: TrainConfig, equal_to: RouterName, ks: tuple[int, ...]) -> Iterator[Arm]:
    """Dense models: as wide as an expert, four times as wide, and at the cost of the MoE."""
    dense = replace(base, router="dense", options=RouterOptions())
    yield Arm(name="dense", label="dense", config=dense)
    yield Arm(name="dense-4x", label="dense, four times as wide", config=replace(dense, hidden=4 * base.hidden))
    for k in ks:
        yield Arm(
            name=f"dense-flops-k{k}",
            label=f"dense, active FLOPs of `{equal_to}` K={k}",
            config=replace(dense, equal="flops", equal_to=equal_to, k=k),
        )
    yield Arm(
        name="dense-parameters",
        label=f"dense, parameters of `{equal_to}`",
        config=replace(dense, equal="parameters", equal_to=equal_to),
    )


def _arm(base: TrainConfig, router: RouterName, note: str = "", slug: str = "", **changes: Any) -> Arm:
    config = replace(base, router=router, **changes)
    parts = [router, *([config.routing] if base.dataset == "mosaic" and router not in ("uniform", "oracle") else [])]
    k = "" if router in ("uniform", "oracle") else f", K={config.k}"
    name = "-".join([*parts, *([f"k{config.k}"] if k else []), *([slug] if slug else [])]).replace("_", "-")
    label = ", ".join([f"`{router}`", *([f"{config.routing} routing"] if len(parts) > 1 else [])]) + k
    label += f", {note}" if note else ""
    return Arm(name=name, label=label, config=config)


def _mosaic() -> Study:
    base = replace(MOSAIC, routing="shared", seeds=(5, 6, 7, 8, 9))
    score = RouterOptions(weight="score")  # K = 1; at K = 2 weights are normalized
    one_centroid = RouterOptions(num_centroids=1)
    near = RouterOptions(scope="neighbours", head_dim=8)
    arms = [*_controls(base, "token_choice", (1, 2)), _arm(base, "oracle"), _arm(base, "uniform")]
    modes: tuple[Literal["shared", "layer"], ...] = ("shared", "layer")
    for k in (1, 2):
        for routing in modes:
            run = replace(base, k=k, routing=routing)
            by_score = "by score" if k == 1 else ""
            plain = RouterOptions(weight="score" if k == 1 else None)
            noisy = replace(plain, balance="importance_load", balance_coef=0.1)
            arms += [
                _arm(run, "random"),
                _arm(run, "token_choice", by_score, options=plain),
                _arm(run, "token_choice", f"{by_score}{', ' if by_score else ''}balanced", "balanced", options=noisy),
                _arm(run, "expert_choice"),
                _arm(run, "multi_centroid", "one centroid", "one", options=one_centroid),
                _arm(run, "multi_centroid", "one centroid, k-means", "kmeans", options=one_centroid, kmeans_init=True),
            ]
    only_x = replace(base, route_on=("input",))
    balanced = replace(score, balance="importance_load", balance_coef=0.1)
    arms += [  # what closed the distance, one change at a time
        _arm(base, "token_choice", "by score, initial weights × 10", "sharp", options=replace(score, init_scale=1.0)),
        _arm(base, "expert_choice", "initial weights × 10", "sharp", options=RouterOptions(init_scale=1.0)),
        _arm(
            base,
            "token_choice",
            "by score, Switch loss",
            "switch",
            options=replace(score, balance="switch", balance_coef=0.1),
        ),
        _arm(base, "token_choice", "by score, noise alone", "noise", options=replace(score, noise=True)),
        _arm(
            base,
            "token_choice",
            "straight-through (the default)",
            "straight",
            options=RouterOptions(weight="straight_through"),
        ),
        _arm(only_x, "token_choice", "by score, balanced, on x alone", "balanced-x", options=balanced),
        _arm(only_x, "expert_choice", "on x alone", "x"),
        _arm(base, "expert_choice", "softmax along tokens", "tokens", options=RouterOptions(normalize="tokens")),
        _arm(base, "multi_centroid", "four centroids", "four"),
        _arm(
            base,
            "multi_centroid",
            "one centroid, experts choose",
            "experts",
            options=RouterOptions(num_centroids=1, choice="experts"),
        ),
        _arm(
            base,
            "multi_centroid",
            "one centroid, k-means, experts choose",
            "kmeans-experts",
            options=RouterOptions(num_centroids=1, choice="experts"),
            kmeans_init=True,
        ),
    ]
    for k in (1, 2):
        for routing in modes:
            run = replace(base, k=k, routing=routing)
            arms.append(_arm(run, "attention_vote", "neighbours", "neighbours", options=near))
    residual = replace(base, residual="identity")
    arms.append(_arm(residual, "attention_vote", "neighbours, residual", "neighbours-residual", options=near))
    return Study(
        about=(
            "Does a learned router find planted regions, and does it pay? Width 16, 8 experts, 150 epochs, Adam at "
            "0.01; the options of the arms were chosen on seeds 0 and 1, the table is on seeds 5 to 9."
        ),
        arms=tuple(arms),
    )


def _digits(base: TrainConfig) -> Study:
    routers: tuple[RouterName, ...] = (
        "random",
        "uniform",
        "token_choice",
        "expert_choice",
        "attention_vote",
        "multi_centroid",
    )
    return Study(
        about="All routers with their defaults on data that ships with scikit-learn; nothing was tuned for an arm.",
        arms=(*_controls(base, "token_choice", (1,)), *(_arm(base, router) for router in routers)),
    )


def _real(base: TrainConfig, about: str) -> Study:
    """The same arms on every real graph, none of them tuned: recipe and width are the dense model's."""
    kmeans = {"options": RouterOptions(num_centroids=1), "kmeans_init": True}
    balanced = RouterOptions(balance="importance_load", balance_coef=0.1)
    near = RouterOptions(scope="neighbours", head_dim=8)
    filters = replace(base, conv=("low_pass", "identity", "high_pass", "two_hop"))
    mixed = replace(base, conv=("gcn", "gat", "mlp", "sage"))
    beside = replace(base, shared_expert=True)
    two, two_filters = replace(base, k=2), replace(filters, k=2)
    dense = replace(base, router="dense")
    others = [kind for kind in ("gcn", "sage", "gat", "two_hop") if (kind,) != base.conv]
    return Study(
        about=about,
        arms=(
            *_controls(base, "token_choice", (1, 2)),
            *(Arm(name=f"dense-{k}", label=f"dense, `{k}`", config=replace(dense, conv=(k,))) for k in others),
            _arm(base, "random"),
            _arm(base, "uniform"),
            _arm(base, "token_choice"),
            _arm(base, "token_choice", "balanced", "balanced", options=balanced),
            _arm(two, "token_choice"),
            _arm(two, "token_choice", "balanced", "balanced", options=balanced),
            _arm(base, "expert_choice"),
            _arm(two, "expert_choice"),
            _arm(base, "attention_vote", "neighbours", "neighbours", options=near),
            _arm(base, "multi_centroid", "one centroid", "one", options=RouterOptions(num_centroids=1)),
            _arm(base, "multi_centroid", "k-means, shared routing", "kmeans", routing="shared", **kmeans),
            _arm(two, "multi_centroid", "k-means, shared routing", "kmeans", routing="shared", **kmeans),
            _arm(beside, "random", "shared expert", "beside"),
            _arm(beside, "token_choice", "shared expert", "beside"),
            _arm(beside, "expert_choice", "shared expert", "beside"),
            _arm(
                beside,
                "multi_centroid",
                "k-means, shared routing, shared expert",
                "kmeans-beside",
                routing="shared",
                **kmeans,
            ),
            _arm(filters, "random", "filters", "filters"),
            _arm(filters, "token_choice", "filters", "filters"),
            _arm(filters, "token_choice", "filters, degree seen too", "filters-degree", route_on=("both", "degree")),
            _arm(two_filters, "token_choice", "filters", "filters"),
            _arm(two_filters, "expert_choice", "filters", "filters"),
            _arm(
                two_filters,
                "multi_centroid",
                "filters, k-means, shared routing",
                "filters-kmeans",
                routing="shared",
                **kmeans,
            ),
            _arm(replace(mixed, k=2), "token_choice", "GCN, GAT, MLP and SAGE experts", "mixed"),
        ),
    )


BRIEF = (
    *("dense", "dense-4x", "dense-flops-k1", "dense-parameters", "dense-gat", "dense-sage", "dense-two_hop"),
    *("random-k1", "uniform", "token-choice-k1", "token-choice-k1-balanced", "token-choice-k2", "expert-choice-k1"),
    *("attention-vote-k1-neighbours", "multi-centroid-k1-kmeans", "random-k1-beside", "token-choice-k1-beside"),
    *("multi-centroid-k1-kmeans-beside", "token-choice-k2-filters"),
)
"""Arms for graphs without headroom."""


def _brief(study: Study) -> Study:
    return replace(study, arms=tuple(arm for arm in study.arms if arm.name in BRIEF))


def _confirmed(study: Study, about: str, experts: tuple[str, ...], dense: str, others: tuple[Arm, ...] = ()) -> Study:
    """On all ten splits: the best arms of a study by validation, each with a dense model of its own FLOPs.

    Args:
        study: on the first splits.
        about: what is asked.
        experts: the best arms with experts.
        dense: the best dense arm.
        others: arms that tell what the experts' gain is due to.
    """
    arms = {arm.name: arm for arm in study.arms}
    found = [arms[name] for name in dict.fromkeys((study.reference, study.wide, dense))]
    for name in experts:
        arm = arms[name]
        found.append(arm)
        for equal in ("flops", "parameters"):
            twin = replace(arm.config, router="dense", equal=equal, equal_to=arm.config.router, kmeans_init=False)
            label = f"dense, {'active FLOPs' if equal == 'flops' else 'parameters'} of the arm above"
            found.append(Arm(name=f"dense-{equal}-{name}", label=label, config=twin))
    found += others
    ten = tuple(replace(arm, config=replace(arm.config, seeds=tuple(range(10)))) for arm in found)
    chosen_on = study.arms[0].config.seeds
    return Study(about=about, arms=ten, reference=study.reference, wide=study.wide, chosen_on=chosen_on)


NARROW_FACEBOOK = replace(FACEBOOK, hidden=8, jk="last", epochs=200, seeds=(0, 1, 2))
NARROW_MINESWEEPER = replace(MINESWEEPER, hidden=16, experts=4, epochs=200, seeds=(0, 1, 2))

STUDIES: dict[str, Study] = {
    "mosaic": _mosaic(),
    "digits": _digits(DIGITS),
    "digits-graph": _digits(DIGITS_GRAPH),
    "cora": _brief(_real(CORA, "Cora, 10 seeds: the published recipe, 2 GCN layers of 16; nothing tuned.")),
    "citeseer": _brief(_real(CITESEER, "CiteSeer, 10 seeds: the published recipe, 2 GCN layers of 16; nothing tuned.")),
    "facebook": _real(
        NARROW_FACEBOOK, "facebook, width 8, splits 0 to 2 of 10; recipe of the dense model, nothing tuned."
    ),
    "minesweeper": _real(
        NARROW_MINESWEEPER,
        "minesweeper, 8 layers of 16, 4 experts, splits 0 to 2 of 10; recipe of the dense model, nothing tuned.",
    ),
}
"""The studies by name."""

SMALL_VIT = replace(
    CIFAR10,
    dim=96,
    vit_heads=3,
    hidden=192,
    label_smoothing=0.0,
    epochs=5,
    precision="bf16-mixed",
    seeds=(0, 1, 2),
)


def _scale() -> Study:
    """Which weights a layer should start with, asked before any router is compared."""
    base = replace(SMALL_VIT, epochs=2, seeds=(0, 1))
    routers: tuple[RouterName, ...] = ("token_choice", "expert_choice")
    weights: tuple[Literal["score", "straight_through"], ...] = ("score", "straight_through")
    return Study(
        about="CIFAR-10 (JPEG), 6 blocks of 96, 2 epochs: weights by score start at 1/E, straight-through ones at 1.",
        arms=tuple(
            _arm(base, router, weight.replace("_", "-"), weight, options=RouterOptions(weight=weight))
            for router in routers
            for weight in weights
        ),
    )


def _founding() -> Study:
    """The claims this project started from, on CIFAR-10; experiments/claims.py reads them off."""
    score = RouterOptions(weight="score")  # of all arms but one, as cifar10-scale found; the default of the others
    straight = RouterOptions(weight="straight_through")  # at the scale of a dense MLP, and of attention votes
    once = replace(SMALL_VIT, seeds=(0,))
    deep = replace(SMALL_VIT, layers=12)

    def dense(base: TrainConfig) -> TrainConfig:
        return replace(base, router="dense", equal="flops", equal_to="expert_choice")

    one = RouterOptions(num_centroids=1, choice="experts")
    four = RouterOptions(num_centroids=4, choice="experts", separation_coef=0.01)
    return Study(
        about=(
            "CIFAR-10 (JPEG), all 45,000 training images, ViTs of width 96, 5 epochs in bf16, experts in every second "
            "block, E = 8, K = 1, weights by score but for one arm; one recipe for all arms, nothing tuned for any. "
            "*Headroom* is here that of the dense model of equal parameters."
        ),
        arms=(
            Arm(name="dense", label="dense, active FLOPs of `expert_choice`", config=dense(SMALL_VIT)),
            _arm(SMALL_VIT, "expert_choice"),
            _arm(SMALL_VIT, "expert_choice", "straight-through", "straight", options=straight),
            _arm(SMALL_VIT, "token_choice", options=score),
            _arm(SMALL_VIT, "token_choice", "balanced", "balanced", options=replace(score, balance="switch")),
            _arm(SMALL_VIT, "attention_vote"),
            _arm(once, "attention_vote", "shared queries", "shared", options=RouterOptions(queries="shared")),
            _arm(once, "multi_centroid", "experts choose, one centroid", "one", options=one),
            _arm(once, "multi_centroid", "experts choose, four centroids", "four", options=four),
            Arm(name="dense-12", label="12 blocks, dense, active FLOPs of `expert_choice`", config=dense(deep)),
            replace(_arm(deep, "expert_choice", slug="12"), label="12 blocks, `expert_choice`, K=1"),
            _arm(SMALL_VIT, "random", options=score),
            Arm(
                name="dense-scaled",
                label="dense, active FLOPs of `expert_choice`, every second MLP × 1/8",
                config=replace(dense(SMALL_VIT), mlp_scale=0.125, seeds=(0, 1)),
            ),
            Arm(
                name="dense-parameters",
                label="dense, parameters of `expert_choice`",
                config=replace(dense(once), equal="parameters"),
            ),
            _arm(once, "uniform"),
        ),
        wide="dense-parameters",
    )


STUDIES["cifar10-scale"] = _scale()
STUDIES["founding"] = _founding()

BESIDE = replace(NARROW_MINESWEEPER, shared_expert=True, routing="shared")
STUDIES["minesweeper-10"] = _confirmed(
    STUDIES["minesweeper"],
    "minesweeper, all 10 splits: the arms that validated best on the first three, and what their gain is due to.",
    experts=("multi-centroid-k1-kmeans-beside", "multi-centroid-k2-kmeans"),
    dense="dense-parameters",
    others=(
        _arm(BESIDE, "random", "shared routing, shared expert", "shared-beside"),
        _arm(BESIDE, "token_choice", "shared routing, shared expert", "shared-beside"),
        _arm(BESIDE, "expert_choice", "shared routing, shared expert", "shared-beside"),
        _arm(BESIDE, "uniform", "shared expert", "beside"),
    ),
)

STUDIES["facebook-10"] = _confirmed(
    STUDIES["facebook"],
    "facebook, all 10 splits: the arms that validated best on the first three.",
    experts=("token-choice-k1-balanced", "token-choice-k1-filters"),
    dense="dense-two_hop",
)

LONGER = ("dense", "dense-4x", "multi-centroid-k1-kmeans-beside", "dense-flops-multi-centroid-k1-kmeans-beside")
STUDIES["minesweeper-500"] = Study(
    about="minesweeper, all 10 splits, 500 epochs in place of 200: does the dense model catch up?",
    arms=tuple(
        replace(arm, config=replace(arm.config, epochs=500))
        for arm in STUDIES["minesweeper-10"].arms
        if arm.name in LONGER
    ),
)
