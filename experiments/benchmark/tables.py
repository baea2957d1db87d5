"""Tables of what the benchmarks found."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from experiments.show.tables import Line, extremes, known, markdown, short_commit
from experiments.train.scores import mean_std


def benchmark_table(results: dict[str, Any]) -> str:
    """What a benchmark found, and where."""
    table = markdown(benchmark_lines(results["variants"]))
    return (
        f"{table}\n\n{measured_on(results['environment'], results['config'].get('device', 'cpu'))}"
    )


def benchmark_lines(variants: Mapping[str, Any]) -> list[Line]:
    """One line a variant: times, ratios to the reference, memory.

    Of ``train``, shares; of ``swap``, accuracies; of ``latency``, percentiles.
    """
    if any("runs" in variant for variant in variants.values()):
        return known([{"": name} | swap_line(row) for name, row in variants.items()])
    if any("waits" in variant or "error" in variant for variant in variants.values()):
        return [gpu_line(name, variant) for name, variant in variants.items()]
    if any("p95" in variant.get("wall", {}) for variant in variants.values()):
        return known([latency_line(name, variant) for name, variant in variants.items()])
    if any("least" in variant for variant in variants.values()):
        return known([step_line(name, variant) for name, variant in variants.items()])
    if any("grown" in variant for variant in variants.values()):
        return [serve_line(name, variant) for name, variant in variants.items()]
    if any("resident" in variant for variant in variants.values()):
        return [memory_line(name, variant) for name, variant in variants.items()]
    return [_time_line(name, variant) for name, variant in variants.items()]


def memory_line(name: str, variant: Mapping[str, Any]) -> Line:
    """A step: what tensors hold at most, and the process beyond what it had before."""
    alive = variant["alive"]
    resident = variant["resident"]
    return {
        "variant": name,
        "tensors (MiB)": f"{alive / 2**20:,.0f}",
        "process (MiB)": f"{resident / 2**20:,.0f}",
        "×": f"{resident / alive:.2f}" if alive else "–",
    }


def step_line(name: str, variant: Mapping[str, Any]) -> Line:
    """A training step: the least times of it and its parts, and memory.

    Ratios are to the first of the row.
    """
    least = variant["least"]
    ratio = variant["ratio"]
    line = {
        "variant": name,
        "step (ms)": f"{1000 * least['step']:,.1f}",
        "×": f"{ratio['step']:.2f}",
    }
    for part in ("forward", "backward", "optimizer"):
        line[part] = f"{1000 * least[part]:,.1f}"
    line["× before"] = "–"
    line["noise"] = "–"
    if "before" in variant:
        line["× before"] = f"{variant['before']['ratio']:.2f}"
        line["noise"] = f"{variant['before']['noise']:.2f}"
    line["kept (MiB)"] = "–"
    line["peak (MiB)"] = "–"
    line["× peak"] = "–"
    if "memory" in variant:
        line["kept (MiB)"] = f"{variant['kept'] / 2**20:,.1f}"
        line["peak (MiB)"] = f"{variant['memory'] / 2**20:,.1f}"
        line["× peak"] = f"{ratio['memory']:.2f}"
    return line


def serve_line(name: str, variant: Mapping[str, Any]) -> Line:
    """A model that was served: calls, and what the process held."""
    held = variant["resident"]
    return {
        "variant": name,
        "calls": f"{variant['calls']:,}",
        "at first (MiB)": f"{held[0] / 2**20:,.0f}",
        "at most (MiB)": f"{max(held) / 2**20:,.0f}",
        "at last (MiB)": f"{held[-1] / 2**20:,.0f}",
        "grown (MiB)": f"{variant['grown'] / 2**20:+.1f}",
    }


def _time_line(name: str, variant: Mapping[str, Any]) -> Line:
    if parts := variant.get("parts"):
        line = {
            "preset": name,
            "batches": str(variant["batches"]),
            "seconds": f"{sum(parts.values()):.3f}",
        }
        return line | {
            f"{part} (%)": f"{100 * share:.1f}" for part, share in variant["share"].items()
        }
    wall = {key: 1000 * value for key, value in variant["wall"].items()}
    ratio = variant["ratio"]
    return {
        "variant": name,
        "wall (ms)": f"{wall['median']:,.1f}",
        "from": f"{wall['min']:,.1f}",
        "to": f"{wall['max']:,.1f}",
        "× wall": f"{ratio['wall']:.3f}" if "wall" in ratio else "–",
        "× CPU": f"{ratio['cpu']:.3f}" if "cpu" in ratio else "–",
        "× FLOPs": "–" if ratio.get("flops") is None else f"{ratio['flops']:.2f}",
        "MiB": f"{variant['memory'] / 2**20:,.0f}" if "memory" in variant else "–",
    }


def latency_line(name: str, variant: Mapping[str, Any]) -> Line:
    """A call: medians, 95th percentiles, and CPU times over those of dense ones.

    On one thread, CPU time is what the call takes where nothing else runs.
    """
    line = {"variant": name}
    for clock, unit in (("wall", "ms"), ("cpu", "ms CPU")):
        for percentile, key in (("p50", "median"), ("p95", "p95")):
            line[f"{percentile} ({unit})"] = f"{1000 * variant[clock][key]:.2f}"
    for column, key in (
        ("× compiled dense (CPU)", "ratio"),
        ("× dense in this form (CPU)", "ratio in form"),
    ):
        line[column] = f"{variant[key]['cpu']:.2f}" if key in variant else "–"
    return line


def gpu_line(name: str, variant: Mapping[str, Any]) -> Line:
    """A layer on a GPU: times, waits of a step, whether results are the CPU's.

    Or only why it failed.
    """
    columns = ("moe (ms)", "dense (ms)", "×", "waits", "float64", "float32", "error")
    line = {"variant": name} | dict.fromkeys(columns, "–")
    for dtype, of in variant.get("equal", {}).items():
        line[dtype] = "equal" if of["within"] else "NOT EQUAL"
    if "error" in variant:
        return line | {"error": variant["error"].partition("\n")[0]}
    moe, dense = (1000 * of["median"] for of in (variant["wall"], variant["dense"]["wall"]))
    times = {"moe (ms)": f"{moe:.2f}", "dense (ms)": f"{dense:.2f}", "×": f"{moe / dense:.2f}"}
    return line | times | {"waits": str(sum(variant["waits"].values()))}


def swap_line(row: Mapping[str, Any]) -> Line:
    """Dense and MoE of the seeds that both have, and the other arms, with their number of seeds if
    it is less; ok is a MoE whose mean is no less than a standard deviation below the dense
    one's."""
    runs: dict[str, dict[int, Any]] = {
        arm: {run["seed"]: run for run in of} for arm, of in row["runs"].items()
    }
    moes = runs.get("moe", {})
    both = sorted(set(runs.get("dense", {})) & set(moes))
    dense, moe = ([100 * runs[arm][seed]["test"] for seed in both] for arm in ("dense", "moe"))
    line = {
        "n": str(len(both) or "–"),
        "dense": mean_std(dense),
        "moe": mean_std(moe),
        "moe − dense": "–",
        "ok": "–",
    }
    if both:
        difference = statistics.fmean(moe) - statistics.fmean(dense)
        std = statistics.stdev(dense) if both[1:] else 0.0
        line |= {"moe − dense": f"{difference:+.2f}", "ok": "ok" if difference >= -std else "no"}
    arms = ("copies", "shared", "dense-flops", "random", "oracle", "k-means", "shared-transform")
    for arm in arms:
        tests = [100 * run["test"] for run in runs.get(arm, {}).values()]
        line[arm] = mean_std(tests) + (f" ({len(tests)})" if 0 < len(tests) < len(both) else "")
    with_shared = runs.get("shared", moes)  # which is the default but for a GNN that routes once
    line["shared-off"] = mean_std(
        [100 * run["off"] for run in with_shared.values() if "off" in run]
    )
    for name, form, shown in (("share", ".2f", with_shared), ("live", ".3g", moes)):
        by_layer = zip(*(run[name] for run in shown.values() if name in run), strict=True)
        means = [statistics.fmean(layer) for layer in by_layer]
        line[name] = (
            extremes(means, form)
            if len(means) > 3
            else " ".join(f"{mean:{form}}" for mean in means) or "–"
        )
    line |= dict.fromkeys(("ms dense / moe / flops", "×", "× shared-transform", "+ms a layer"), "–")
    if times := row.get("time"):
        ms = {
            arm: 1000 * time["wall"]["median"]
            for arm, time in times.items()
            if isinstance(time, dict)
        }
        line["ms dense / moe / flops"] = " / ".join(
            f"{ms[arm]:.1f}" if arm in ms else "–" for arm in ("dense", "moe", "dense-flops")
        )
        for column, arm in (("×", "moe"), ("× shared-transform", "shared-transform")):
            line[column] = f"{ms[arm] / ms['dense']:.2f}" if arm in ms else "–"
        if "moe" in ms:
            line["+ms a layer"] = f"{(ms['moe'] - ms['dense']) / times['layers']:.1f}"
    return line


def measured_on(where: dict[str, Any], device: str) -> str:
    """Hardware, versions and commit in a line, for a run on a device.

    ``where`` is what :func:`experiments.train.results.environment` returns.
    """
    versions = ", ".join(
        f"{name} {where['versions'][name]}" for name in ("torch", "torch-geometric")
    )
    place = where["cpu"] if device == "cpu" else where["gpu"]
    commit = "" if where["commit"] is None else f"; commit {short_commit(where)}"
    return f"{place}, {where['threads']} thread{'s' * (where['threads'] > 1)}; {versions}{commit}."
