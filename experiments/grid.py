"""A study of the user's own: a preset, over routers, numbers of experts and experts per token."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

from experiments.config import RouterName, RunConfig
from experiments.presets import PRESETS
from experiments.studies import Study, Variant


def grid(
    preset: str,
    routers: tuple[RouterName, ...],
    experts: tuple[int, ...],
    ks: tuple[int, ...],
    seeds: tuple[int, ...],
    epochs: int | None,
) -> Study:
    """Every router at every E and K that it has, beside the dense model and one four times as wide.

    Args:
        preset: name of the preset.
        routers: the routers; ``"dense"`` is always there.
        experts: numbers of experts, E.
        ks: experts per token, K; larger than E is left out, and ``"uniform"`` and ``"oracle"`` have none.
        seeds: seeds of every variant; the preset's where empty.
        epochs: epochs of every variant; the preset's where ``None``.

    Raises:
        ValueError: an unknown preset, a K larger than every E, or no variant.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset: got {preset!r}, expected one of {', '.join(PRESETS)}")
    base = PRESETS[preset][1]
    base = replace(base, seeds=seeds or base.seeds, epochs=base.epochs if epochs is None else epochs)
    if preset == "graph":
        base = replace(base, data_root=Path())  # the file is the root itself
    dense = replace(base, router="dense")
    variants = [
        Variant(name="dense", label="dense", config=dense),
        Variant(name="dense-4x", label="dense, four times as wide", config=replace(dense, hidden=4 * base.hidden)),
    ]
    ks = tuple(dict.fromkeys(ks))
    for router, e in product([name for name in dict.fromkeys(routers) if name != "dense"], dict.fromkeys(experts)):
        fixed = router in ("uniform", "oracle")
        for k in ks[:1] if fixed else [k for k in ks if k <= e]:
            variants.append(_variant(base, router, e, None if fixed else k))
    chosen = set(routers) - {"dense", "uniform", "oracle"}
    if chosen and any(k > max(experts, default=k) for k in ks):
        raise ValueError(f"ks: got {ks}, expected none larger than all of experts={experts}")
    if len(variants) == 2:
        raise ValueError(f"ks: got {ks} with experts={experts} and routers={routers}, which leaves no variant")
    return Study(about=f"A grid over {preset}; nothing was tuned for a variant.", variants=tuple(variants))


def _variant(base: RunConfig, router: RouterName, experts: int, k: int | None) -> Variant:
    config = replace(base, router=router, experts=experts, k=base.k if k is None else k)
    name = f"{router.replace('_', '-')}-e{experts}" + ("" if k is None else f"-k{k}")
    label = f"`{router}`, E={experts}" + ("" if k is None else f", K={k}")
    return Variant(name=name, label=label, config=config)
