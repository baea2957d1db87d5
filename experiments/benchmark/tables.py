"""Tables of what the benchmarks found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments.show.tables import Line, known, markdown, short_commit

DTYPES = ("float64", "float32")
WAYS = ("compiled", "captured", "bf16", "sharded", "twice")
"""What a layer on a GPU is compared in: with the CPU, and with itself run in another way."""


def benchmark_table(results: dict[str, Any]) -> str:
    """What a benchmark found, and where."""
    table = markdown(benchmark_lines(results["variants"]))
    return (
        f"{table}\n\n{measured_on(results['environment'], results['config'].get('device', 'cpu'))}"
    )


def benchmark_lines(variants: Mapping[str, Any]) -> list[Line]:
    """One line a variant: times, ratios to the reference, memory."""
    is_of_gpu = any("waits" in variant or "error" in variant for variant in variants.values())
    line = gpu_line if is_of_gpu else step_line
    return known([line(name, variant) for name, variant in variants.items()])


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
    line["kept (MiB)"] = "–"
    line["peak (MiB)"] = "–"
    line["× peak"] = "–"
    if "memory" in variant:
        line["kept (MiB)"] = f"{variant['kept'] / 2**20:,.1f}"
        line["peak (MiB)"] = f"{variant['memory'] / 2**20:,.1f}"
        line["× peak"] = f"{ratio['memory']:.2f}"
    return line


def gpu_line(name: str, variant: Mapping[str, Any]) -> Line:
    """A layer on a GPU: what it was compared with, and waits of a step by precision.

    Of a whole model the time of a step, beside the first of its row; of what fails, why.
    """
    columns = (*DTYPES, *WAYS, "waits, fp32", "waits, bf16", "step (ms)", "×", "error")
    line = {"variant": name} | dict.fromkeys(columns, "–")
    if "least" in variant:
        line["step (ms)"] = f"{1000 * variant['least']['step']:.2f}"
        line["×"] = f"{variant['ratio']['step']:.2f}"
    compared = variant.get("equal", {}) | variant.get("ways", {})
    line |= {way: said_of(of) for way, of in compared.items()}
    waits = variant.get("waits", {})
    line |= {f"waits, {precision}": str(sum(of.values())) for precision, of in waits.items()}
    if "error" in variant:
        line["error"] = variant["error"].partition("\n")[0]
    return line


def said_of(compared: Mapping[str, Any]) -> str:
    """What a comparison found, in two words at most."""
    if "error" in compared:
        return "fails"
    return "equal" if compared["within"] else "NOT EQUAL"


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
