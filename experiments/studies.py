"""Studies: lists of variants, fixed before the first of them is run. `python -m experiments.sweep NAME` runs one.

Their results are committed, so they say all that the library has a default for: see :func:`_written_out`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

from experiments.config import GraphConfig, ImageConfig, RouterName, RouterOptions, RunConfig
from experiments.presets import CIFAR10, CITESEER, CORA, DIGITS, DIGITS_GRAPH, FACEBOOK, MINESWEEPER, MOSAIC


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One line of a study's table.

    Args:
        name: of its run folder.
        label: in the table.
        config: what is run.
    """

    name: str
    label: str
    config: RunConfig


@dataclass(frozen=True, kw_only=True)
class Study:
    """Variants that are compared.

    Args:
        about: what is asked, and what was tuned.
        variants: the variants.
        reference: the narrow dense variant that costs and headroom are relative to.
        wide: the dense variant four times as wide.
        chosen_on: seeds (splits) that an earlier study chose the variants on, by validation.
    """

    about: str
    variants: tuple[Variant, ...]
    reference: str = "dense"
    wide: str = "dense-4x"
    chosen_on: tuple[int, ...] = ()


def _baselines(base: RunConfig, equal_to: RouterName, ks: tuple[int, ...]) -> Iterator[Variant]:
    """Dense models: as wide as an expert, four times as wide, and at the cost of the MoE."""
    dense = replace(base, router="dense", options=RouterOptions())
    yield Variant(name="dense", label="dense", config=dense)
    yield Variant(name="dense-4x", label="dense, four times as wide", config=replace(dense, hidden=4 * base.hidden))
    for k in ks:
        yield Variant(
            name=f"dense-flops-k{k}",
            label=f"dense, active FLOPs of `{equal_to}` K={k}",
            config=replace(dense, equal="flops", equal_to=equal_to, k=k),
        )
    yield Variant(
        name="dense-parameters",
        label=f"dense, parameters of `{equal_to}`",
        config=replace(dense, equal="parameters", equal_to=equal_to),
    )


def _variant(base: RunConfig, router: RouterName, note: str = "", slug: str = "", **changes: Any) -> Variant:
    config = replace(base, router=router, **changes)
    is_shared = isinstance(config, GraphConfig) and config.shared_router
    shared, decision = ("shared", "shared router") if is_shared else ("layer", "router per layer")
    parts = [router, *([shared] if base.dataset == "mosaic" and router not in ("uniform", "oracle") else [])]
    k = "" if router in ("uniform", "oracle") else f", K={config.k}"
    name = "-".join([*parts, *([f"k{config.k}"] if k else []), *([slug] if slug else [])]).replace("_", "-")
    label = ", ".join([f"`{router}`", *([decision] if len(parts) > 1 else [])]) + k
    label += f", {note}" if note else ""
    return Variant(name=name, label=label, config=config)


def _mosaic() -> Study:
    base = replace(MOSAIC, shared_router=True, seeds=(5, 6, 7, 8, 9))
    score = RouterOptions(weight="score")  # K = 1; at K = 2 weights are normalized
    one_centroid = RouterOptions(num_centroids=1)
    near = RouterOptions(scope="neighbors", head_dim=8)
    variants = [*_baselines(base, "token_choice", (1, 2)), _variant(base, "oracle"), _variant(base, "uniform")]
    for k in (1, 2):
        for shared_router in (True, False):
            run = replace(base, k=k, shared_router=shared_router)
            by_score = "by score" if k == 1 else ""
            plain = RouterOptions(weight="score" if k == 1 else None)
            noisy = replace(plain, balance="importance_load", balance_coef=0.1)
            variants += [
                _variant(run, "random"),
                _variant(run, "token_choice", by_score, options=plain),
                _variant(
                    run, "token_choice", f"{by_score}{', ' if by_score else ''}balanced", "balanced", options=noisy
                ),
                _variant(run, "expert_choice"),
                _variant(run, "multi_centroid", "one centroid", "one", options=one_centroid),
                _variant(
                    run, "multi_centroid", "one centroid, k-means", "kmeans", options=one_centroid, kmeans_init=True
                ),
            ]
    only_x = replace(base, router_input=("node",))
    balanced = replace(score, balance="importance_load", balance_coef=0.1)
    variants += [  # what closed the distance, one change at a time
        _variant(
            base, "token_choice", "by score, initial weights × 10", "sharp", options=replace(score, init_scale=1.0)
        ),
        _variant(base, "expert_choice", "initial weights × 10", "sharp", options=RouterOptions(init_scale=1.0)),
        _variant(
            base,
            "token_choice",
            "by score, Switch loss",
            "switch",
            options=replace(score, balance="switch", balance_coef=0.1),
        ),
        _variant(base, "token_choice", "by score, noise alone", "noise", options=replace(score, noise=True)),
        _variant(
            base,
            "token_choice",
            "straight-through",
            "straight",
            options=RouterOptions(weight="straight_through"),
        ),
        _variant(only_x, "token_choice", "by score, balanced, on x alone", "balanced-x", options=balanced),
        _variant(only_x, "expert_choice", "on x alone", "x"),
        _variant(base, "expert_choice", "softmax along tokens", "tokens", options=RouterOptions(normalize="tokens")),
        _variant(base, "multi_centroid", "four centroids", "four"),
        _variant(
            base,
            "multi_centroid",
            "one centroid, experts choose",
            "experts",
            options=RouterOptions(num_centroids=1, choice="experts"),
        ),
        _variant(
            base,
            "multi_centroid",
            "one centroid, k-means, experts choose",
            "kmeans-experts",
            options=RouterOptions(num_centroids=1, choice="experts"),
            kmeans_init=True,
        ),
    ]
    for k in (1, 2):
        for shared_router in (True, False):
            run = replace(base, k=k, shared_router=shared_router)
            variants.append(_variant(run, "attention_vote", "neighbors", "neighbors", options=near))
    residual = replace(base, residual="identity")
    variants.append(_variant(residual, "attention_vote", "neighbors, residual", "neighbors-residual", options=near))
    return Study(
        about=(
            "Does a learned router find planted regions, and does it pay? Width 16, 8 experts, 150 epochs, Adam at "
            "0.01; the options of the variants were chosen on seeds 0 and 1, the table is on seeds 5 to 9."
        ),
        variants=tuple(variants),
    )


def _digits(base: RunConfig) -> Study:
    routers: tuple[RouterName, ...] = (
        "random",
        "uniform",
        "token_choice",
        "expert_choice",
        "attention_vote",
        "multi_centroid",
    )
    return Study(
        about="All routers with their defaults on data that ships with scikit-learn; nothing was tuned for a variant.",
        variants=(*_baselines(base, "token_choice", (1,)), *(_variant(base, router) for router in routers)),
    )


def _real(base: GraphConfig, about: str) -> Study:
    """The same variants on every real graph, none of them tuned: recipe and width are the dense model's."""
    kmeans = {"options": RouterOptions(num_centroids=1), "kmeans_init": True}
    balanced = RouterOptions(balance="importance_load", balance_coef=0.1)
    near = RouterOptions(scope="neighbors", head_dim=8)
    filters = replace(base, conv=("low_pass", "identity", "high_pass", "two_hop"))
    mixed = replace(base, conv=("gcn", "gat", "mlp", "sage"))
    with_shared = replace(base, shared_expert=True)
    two, two_filters = replace(base, k=2), replace(filters, k=2)
    dense = replace(base, router="dense")
    others = [kind for kind in ("gcn", "sage", "gat", "two_hop") if (kind,) != base.conv]
    return Study(
        about=about,
        variants=(
            *_baselines(base, "token_choice", (1, 2)),
            *(Variant(name=f"dense-{k}", label=f"dense, `{k}`", config=replace(dense, conv=(k,))) for k in others),
            _variant(base, "random"),
            _variant(base, "uniform"),
            _variant(base, "token_choice"),
            _variant(base, "token_choice", "balanced", "balanced", options=balanced),
            _variant(two, "token_choice"),
            _variant(two, "token_choice", "balanced", "balanced", options=balanced),
            _variant(base, "expert_choice"),
            _variant(two, "expert_choice"),
            _variant(base, "attention_vote", "neighbors", "neighbors", options=near),
            _variant(base, "multi_centroid", "one centroid", "one", options=RouterOptions(num_centroids=1)),
            _variant(base, "multi_centroid", "k-means, shared router", "kmeans", shared_router=True, **kmeans),
            _variant(two, "multi_centroid", "k-means, shared router", "kmeans", shared_router=True, **kmeans),
            _variant(with_shared, "random", "shared expert", "shared-expert"),
            _variant(with_shared, "token_choice", "shared expert", "shared-expert"),
            _variant(with_shared, "expert_choice", "shared expert", "shared-expert"),
            _variant(
                with_shared,
                "multi_centroid",
                "k-means, shared router, shared expert",
                "kmeans-shared-expert",
                shared_router=True,
                **kmeans,
            ),
            _variant(filters, "random", "filters", "filters"),
            _variant(filters, "token_choice", "filters", "filters"),
            _variant(
                filters,
                "token_choice",
                "filters, degree seen too",
                "filters-degree",
                router_input=("node", "neighbors", "degree"),
            ),
            _variant(two_filters, "token_choice", "filters", "filters"),
            _variant(two_filters, "expert_choice", "filters", "filters"),
            _variant(
                two_filters,
                "multi_centroid",
                "filters, k-means, shared router",
                "filters-kmeans",
                shared_router=True,
                **kmeans,
            ),
            _variant(replace(mixed, k=2), "token_choice", "GCN, GAT, MLP and SAGE experts", "mixed"),
        ),
    )


BRIEF = (
    *("dense", "dense-4x", "dense-flops-k1", "dense-parameters", "dense-gat", "dense-sage", "dense-two_hop"),
    *("random-k1", "uniform", "token-choice-k1", "token-choice-k1-balanced", "token-choice-k2", "expert-choice-k1"),
    *(
        "attention-vote-k1-neighbors",
        "multi-centroid-k1-kmeans",
        "random-k1-shared-expert",
        "token-choice-k1-shared-expert",
    ),
    *("multi-centroid-k1-kmeans-shared-expert", "token-choice-k2-filters"),
)
"""Variants for graphs without headroom."""


def _brief(study: Study) -> Study:
    return replace(study, variants=tuple(variant for variant in study.variants if variant.name in BRIEF))


def _confirmed(
    study: Study, about: str, experts: tuple[str, ...], dense: str, others: tuple[Variant, ...] = ()
) -> Study:
    """On all ten splits: the best variants of a study by validation, each with a dense model of its own FLOPs.

    Args:
        study: on the first splits.
        about: what is asked.
        experts: the best variants with experts.
        dense: the best dense variant.
        others: variants that tell what the experts' gain is due to.
    """
    variants = {variant.name: variant for variant in study.variants}
    found = [variants[name] for name in dict.fromkeys((study.reference, study.wide, dense))]
    for name in experts:
        variant = variants[name]
        found.append(variant)
        for equal in ("flops", "parameters"):
            beside: Any = {"equal": equal, "equal_to": variant.config.router}
            twin = replace(variant.config, router="dense", kmeans_init=False, **beside)
            label = f"dense, {'active FLOPs' if equal == 'flops' else 'parameters'} of the variant above"
            found.append(Variant(name=f"dense-{equal}-{name}", label=label, config=twin))
    found += others
    ten = tuple(replace(variant, config=replace(variant.config, seeds=tuple(range(10)))) for variant in found)
    chosen_on = study.variants[0].config.seeds
    return Study(about=about, variants=ten, reference=study.reference, wide=study.wide, chosen_on=chosen_on)


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
        variants=tuple(
            _variant(base, router, weight.replace("_", "-"), weight, options=RouterOptions(weight=weight))
            for router in routers
            for weight in weights
        ),
    )


def _cifar10_claims() -> Study:
    """The claims this project started from, on CIFAR-10; docs/claims.md judges them."""
    score = RouterOptions(weight="score")  # of all variants but one, as cifar10-scale found; the default of the others
    straight = RouterOptions(weight="straight_through")  # at the scale of a dense MLP, and of attention votes
    once = replace(SMALL_VIT, seeds=(0,))
    deep = replace(SMALL_VIT, layers=12)

    def dense(base: ImageConfig) -> ImageConfig:
        return replace(base, router="dense", equal="flops", equal_to="expert_choice")

    one = RouterOptions(num_centroids=1, choice="experts")
    four = RouterOptions(num_centroids=4, choice="experts", separation_coef=0.01)
    return Study(
        about=(
            "CIFAR-10 (JPEG), all 45,000 training images, ViTs of width 96, 5 epochs in bf16, experts in every second "
            "block, E = 8, K = 1, weights by score but for one variant; one recipe for all variants, nothing tuned "
            "for any. *Headroom* is here that of the dense model of equal parameters."
        ),
        variants=(
            Variant(name="dense", label="dense, active FLOPs of `expert_choice`", config=dense(SMALL_VIT)),
            _variant(SMALL_VIT, "expert_choice"),
            _variant(SMALL_VIT, "expert_choice", "straight-through", "straight", options=straight),
            _variant(SMALL_VIT, "token_choice", options=score),
            _variant(SMALL_VIT, "token_choice", "balanced", "balanced", options=replace(score, balance="switch")),
            _variant(SMALL_VIT, "attention_vote"),
            _variant(once, "attention_vote", "shared queries", "shared", options=RouterOptions(shared_queries=True)),
            _variant(once, "multi_centroid", "experts choose, one centroid", "one", options=one),
            _variant(once, "multi_centroid", "experts choose, four centroids", "four", options=four),
            Variant(name="dense-12", label="12 blocks, dense, active FLOPs of `expert_choice`", config=dense(deep)),
            replace(_variant(deep, "expert_choice", slug="12"), label="12 blocks, `expert_choice`, K=1"),
            _variant(SMALL_VIT, "random", options=score),
            Variant(
                name="dense-scaled",
                label="dense, active FLOPs of `expert_choice`, every second MLP × 1/8",
                config=replace(dense(SMALL_VIT), mlp_scale=0.125, seeds=(0, 1)),
            ),
            Variant(
                name="dense-parameters",
                label="dense, parameters of `expert_choice`",
                config=replace(dense(once), equal="parameters"),
            ),
            _variant(once, "uniform"),
        ),
        wide="dense-parameters",
    )


STUDIES["cifar10-scale"] = _scale()
STUDIES["cifar10-claims"] = _cifar10_claims()

SHARED = replace(NARROW_MINESWEEPER, shared_expert=True, shared_router=True)
STUDIES["minesweeper-10splits"] = _confirmed(
    STUDIES["minesweeper"],
    "minesweeper, all 10 splits: the variants that validated best on the first three, and what their gain is due to.",
    experts=("multi-centroid-k1-kmeans-shared-expert", "multi-centroid-k2-kmeans"),
    dense="dense-parameters",
    others=(
        _variant(SHARED, "random", "shared router, shared expert", "shared-router-shared-expert"),
        _variant(SHARED, "token_choice", "shared router, shared expert", "shared-router-shared-expert"),
        _variant(SHARED, "expert_choice", "shared router, shared expert", "shared-router-shared-expert"),
        _variant(SHARED, "uniform", "shared expert", "shared-expert"),
    ),
)

STUDIES["facebook-10splits"] = _confirmed(
    STUDIES["facebook"],
    "facebook, all 10 splits: the variants that validated best on the first three.",
    experts=("token-choice-k1-balanced", "token-choice-k1-filters"),
    dense="dense-two_hop",
)

LONGER = (
    "dense",
    "dense-4x",
    "multi-centroid-k1-kmeans-shared-expert",
    "dense-flops-multi-centroid-k1-kmeans-shared-expert",
)
STUDIES["minesweeper-500"] = Study(
    about="minesweeper, all 10 splits, 500 epochs in place of 200: does the dense model catch up?",
    variants=tuple(
        replace(variant, config=replace(variant.config, epochs=500))
        for variant in STUDIES["minesweeper-10splits"].variants
        if variant.name in LONGER
    ),
)


def _written_out(config: RunConfig) -> RunConfig:
    """What a variant was measured with where it names nothing else: the plain mixture, each option said."""
    by_gate = "normalized" if config.k > 1 else None
    options: dict[str, dict[str, Any]] = {
        "token_choice": {"weight": by_gate or "straight_through", "balance": "none"},
        "random": {"weight": by_gate or "straight_through"},
        "expert_choice": {"weight": "score"},
        "attention_vote": {"weight": "score"},
        "multi_centroid": {"weight": "score" if config.options.choice == "experts" else by_gate or "score"},
    }
    router = config.equal_to if config.router == "dense" and config.equal else config.router
    layer: dict[str, Any] = {"shared_expert": False, "dense_start": False}
    if isinstance(config, GraphConfig):
        layer["router_input"] = ("node",) if config.dataset in ("cora", "citeseer") else ("node", "neighbors")
    return replace(
        config,
        options=RouterOptions(**options.get(router, {}) | config.options.given()),
        equal_to="token_choice" if config.equal is None else config.equal_to,
        **layer | config.layer_options(),
    )


STUDIES = {
    name: replace(
        study,
        variants=tuple(replace(variant, config=_written_out(variant.config)) for variant in study.variants),
    )
    for name, study in STUDIES.items()
}
