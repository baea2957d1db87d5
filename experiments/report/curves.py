"""Figures of a run's training: curves, costs, and what the routers did while they learned. Shapes: E experts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.run_folder import Rows, RunFolder
from vision.patch_maps import palette

SHARES = ("coverage", "dropped", "dead")


def learning_curves(runs: Sequence[RunFolder]) -> Figure:
    """Validation metric and training loss against epochs: the mean over seeds, and the band from worst to best."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    metric, loss = figure.subplots(1, 2)
    for run in runs:
        curve = run.summary["curve"]
        for axis, name, factor in ((metric, "val", 100.0), (loss, "loss", 1.0)):
            band(axis, curve["epoch"], factor * np.array(curve[name]), f"{run.name} (n = {len(curve[name])})")
    metric.set(xlabel="epochs", ylabel=f"validation {runs[0].summary['metric']} (%)")
    loss.set(xlabel="epochs", ylabel="training loss")
    metric.legend(fontsize="small")
    for axis in (metric, loss):
        axis.grid(alpha=0.3)
    return figure


def band(axis: Axes, x: Sequence[float], values: np.ndarray, label: str, color: str | None = None) -> None:
    """The mean of (seeds, points), and the band from the lowest to the highest."""
    (line,) = axis.plot(x, values.mean(axis=0), label=label, color=color, marker="." if len(x) < 2 else "")
    axis.fill_between(x, values.min(axis=0), values.max(axis=0), color=line.get_color(), alpha=0.2, linewidth=0)


def cost(runs: Sequence[RunFolder]) -> Figure:
    """The test metric against active FLOPs and against parameters; bars are one standard deviation over seeds."""
    figure = Figure(figsize=(11, 3.8), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, name, text in zip(
        axes, ("flops", "parameters"), ("active FLOPs of a forward pass", "parameters"), strict=True
    ):
        for run in runs:
            test = run.summary["test"]
            error = None if test["std"] is None else 100 * test["std"]
            axis.errorbar(run.summary[name], 100 * test["mean"], error, fmt="o", capsize=3, label=run.name)
        values = [run.summary[name] for run in runs]
        axis.set(xlabel=text, xscale="log" if max(values) > 5 * min(values) else "linear")
        axis.grid(alpha=0.3)
    axes[0].set(ylabel=f"test {runs[0].summary['metric']} (%)")
    axes[0].legend(fontsize="small")
    return figure


def routing_over_training(run: RunFolder) -> Figure:
    """A row a MoE layer: load and mean weight of every expert (first seed); entropy and shares (band over seeds)."""
    first = run.seeds[run.config.seeds[0]].routing
    layers = sorted({int(row["layer"] or 0) for row in first})
    figure = Figure(figsize=(12, 0.6 + 2.3 * len(layers)), layout="constrained")
    grid = figure.subplots(len(layers), 4, squeeze=False)
    for layer, (load, weight, entropy, shares) in zip(layers, grid, strict=True):
        x, loads = experts_over_epochs(first, layer, "load")
        colors = [tuple(color) for color in palette(loads.shape[1]).tolist()]
        load.stackplot(x, loads.T, colors=colors)
        load.set(ylim=(0, 1), ylabel=f"MoE layer {layer + 1}")
        _, weights = experts_over_epochs(first, layer, "weight")
        for expert in range(weights.shape[1]):
            weight.plot(x, weights[:, expert], color=colors[expert], label=str(expert))
        for axis, names in ((entropy, ("entropy",)), (shares, SHARES)):
            for name in names:
                seeds = [_over_epochs(seed.routing, layer, name) for seed in run.seeds.values()]
                values = np.array(seeds) / (loads.shape[1] if name == "dead" else 1)
                band(axis, x.tolist(), values, name)
        shares.set(ylim=(-0.05, 1.05))
        for axis in (load, weight, entropy, shares):
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.grid(alpha=0.3)
    titles = ("load of the experts", "mean weight of an expert's tokens", "entropy of the scores (nats)", "shares")
    for axis, title in zip(grid[0], titles, strict=True):
        axis.set_title(title, fontsize="medium")
    for axis in grid[-1]:
        axis.set_xlabel("epoch")
    grid[0, 3].legend(fontsize="small")
    if len(run.seeds) and weights.shape[1] <= 16:
        grid[0, 1].legend(fontsize="x-small", ncols=2, title="expert", title_fontsize="x-small")
    return figure


def experts_over_epochs(rows: Rows, layer: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Epochs done (n,), and of a layer's experts the figure ``name`` (n, E)."""
    mine = [row for row in rows if row["layer"] == layer]
    columns = [column for column in mine[0] if column.startswith(f"{name}_") and mine[0][column] is not None]
    values = np.array([[row[column] or 0.0 for column in columns] for row in mine])
    return np.array([row["epoch"] for row in mine], dtype=float) + 1, values


def _over_epochs(rows: Rows, layer: int, name: str) -> list[float]:
    return [row[name] or 0.0 for row in rows if row["layer"] == layer]
