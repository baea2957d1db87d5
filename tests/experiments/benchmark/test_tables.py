"""A line of the swap table compares what both arms have."""

from __future__ import annotations

from experiments.benchmark.tables import swap_line


def test_ok_is_within_a_standard_deviation() -> None:  # of 81 ± 1.41: from 79.59 on
    rest = {"off": 0.5, "share": [], "live": []}
    for moe, n, ok in ((0.8, 2, "ok"), (0.795, 2, "no"), (0.8, 1, "ok"), (0.799, 1, "no")):
        dense = [{"seed": seed, "test": test} for seed, test in enumerate([0.8, 0.82][:n])]
        assert (
            swap_line(
                {"runs": {"dense": dense, "moe": [run | rest | {"test": moe} for run in dense]}}
            )["ok"]
            == ok
        )


def test_a_swap_compares_the_seeds_that_both_have() -> None:
    dense = [{"seed": seed, "test": test} for seed, test in enumerate([0.8, 0.82, 0.1])]
    moe = [
        {"seed": seed, "test": 0.83, "off": 0.7, "share": [0.1, 0.3], "live": [8.0, 4.0]}
        for seed in (0, 1)
    ]
    line = swap_line({"runs": {"dense": dense, "moe": moe, "random": dense[:1]}})
    assert (line["n"], line["dense"], line["random"]) == ("2", "81.00 ± 1.41", "80.00 (1)")
