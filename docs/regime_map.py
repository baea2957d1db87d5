"""Draw the map of when experts pay: ``python -m docs.regime_map`` writes ``docs/figures/regime-map.png``."""

from __future__ import annotations

import json
import statistics
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from experiments.study.regime_map import LABELS, REGIMES, WAYS, WIDTHS, gains

HERE = Path(__file__).parent


def draw_map(found: dict[str, Any], path: Path) -> None:
    """Experts and oracle above equal FLOPs, over the number of regimes: a panel a width and way that regimes show."""
    known = gains(found)
    figure, axes = plt.subplots(
        len(WIDTHS), len(WAYS), figsize=(10, 5.6), sharex=True, sharey=True, squeeze=False
    )
    for (row, width), (column, shown) in product(enumerate(WIDTHS), enumerate(WAYS)):
        panel = axes[row][column]
        for (number, labels), (model, style) in product(
            enumerate(LABELS), {"experts": "o-", "oracle": "x:"}.items()
        ):
            keys = [(count, labels, width, shown, model) for count in REGIMES]
            line = [(key[0], statistics.fmean(known[key])) for key in keys if key in known]
            if line:
                label = f"{model}, {labels} labels a regime"
                panel.plot(*zip(*line, strict=True), style, color=f"C{number}", label=label)
        panel.axhline(0, color="gray", linewidth=0.8)
        panel.set_xscale("log", base=2)
        panel.set_xticks(REGIMES, [str(count) for count in REGIMES])
        panel.set_title(f"regime shows in: {shown}, width {width}", fontsize=9)
    figure.supxlabel("regimes")
    figure.supylabel("points above dense of equal FLOPs")
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="upper center", ncols=3, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0.02, 0.02, 1, 0.9))
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    results: dict[str, Any] = json.loads((HERE.parent / "results" / "regime-map.json").read_text())
    draw_map(results, HERE / "figures" / "regime-map.png")
