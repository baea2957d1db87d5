"""Do experts pay on molecules? Every arm beside dense models of equal FLOPs and parameters.

``results/molecules/COLUMN/ARM.json`` holds a run. The recipe is that of OGB's examples (GCN, 5
layers, dropout 0.5, batches of 32, Adam at 0.001) at width 64 and 20 epochs; nothing is tuned for
any arm, and the arms were fixed before the first of them was run. What was added after the others'
results, to see why the default loses on molbace: ``molbace-100`` has the 100 epochs of OGB: on so
small a set, 20 are 760 steps, and arms that learn slowly are read before they have learned.
``quiet`` is the default without noise on the selection. ``molbace-100-fresh`` has five seeds more,
for what the first five suggested.

``gmoe`` rebuilds GMoE (`Wang et al., 2023 <https://arxiv.org/abs/2304.02806>`_) from parts: experts
of one hop, which see the bonds, and of two, which are filters; noisy top-4 of 8 in each layer, the
losses of importance and load, no shared expert. Its controls are its own: a dense model of its
FLOPs, and the same experts behind a frozen random router.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.show.tables import markdown
from experiments.train import scores
from experiments.train.scores import form_of, mean_std, scored

ARMS = {
    "dense": "dense",
    "dense-flops": "dense, equal FLOPs",
    "dense-parameters": "dense, equal parameters",
    "default": "experts, the default",
    "graph": "experts, each molecule to one",
    "random": "experts, frozen random router",
    "quiet": "the default, no noise",
    "gmoe": "GMoE rebuilt",
    "gmoe-flops": "dense, equal FLOPs to GMoE",
    "gmoe-random": "GMoE, frozen random router",
}
"""Each arm's name in the table."""

BESIDE = {
    "default": "dense-flops",
    "graph": "dense",
    "random": "dense-flops",
    "quiet": "dense-flops",
    "gmoe": "gmoe-flops",
    "gmoe-random": "gmoe-flops",
}
"""The dense model of equal FLOPs that an arm is compared with.

By atom, an atom is transformed by its own expert and its neighbors': FLOPs follow from the routing,
and are matched at the start. By molecule, all of these are one expert.
"""


def gains(known: Mapping[str, Any], arm: str) -> list[float]:
    """By seed, how much better an arm is than the dense model of its FLOPs."""
    ours = known[arm]
    theirs = known[BESIDE[arm]]
    return scores.gains(ours["metric"], ours["test"]["values"], theirs["test"]["values"])


def table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """In Markdown: a line an arm, beside the dense model of its FLOPs."""
    lines = []
    for column, known in results.items():
        dense = known.get("dense")
        for arm, label in ARMS.items():
            if arm not in known:
                continue
            summary = known[arm]
            metric = summary["metric"]
            better = "–"
            if BESIDE.get(arm) in known:
                better = mean_std(gains(known, arm), form_of(metric))
            lines.append(
                {
                    "set": column,
                    "arm": label,
                    "metric": metric,
                    "n": str(summary["test"]["n"]),
                    "test": scored(metric, summary["test"]),
                    "better than equal FLOPs by": better,
                    "× FLOPs": f"{summary['flops'] / dense['flops']:.2f}" if dense else "–",
                    "parameters": f"{summary['parameters']:,}",
                }
            )
    return markdown(lines, left=("arm", "metric")) if lines else "no arm is finished yet"
