"""Print where a training step on a GPU would wait, and what it launches, counted on a CPU.

How is in :mod:`tests.helpers.waits`, which tests hold to the same tables.

    python -m tools.waits
"""

from __future__ import annotations

import sys

from tests.helpers.steps import LAUNCHES, STEPS
from tests.helpers.waits import different, on_cuda_branches, results


def main() -> int:
    """Print where each step waits, and what it launches; 1 if that is not as its table says.

    Also 1 if the branches of CUDA compute something else, or call what has no CUDA kernel.
    """
    found = on_cuda_branches()
    wrong = different(found.results, results())
    for name, places in found.waits.items():
        waits = sum(places.values())
        if waits != STEPS[name].waits:
            wrong[name] = f"waits {waits} times, expected {STEPS[name].waits}"
        few, many = found.launches[name]
        if few > LAUNCHES[name][0] or many > LAUNCHES[name][1]:
            wrong[name] = f"launches {few}, {many} of many rows, expected {LAUNCHES[name]} at most"
        print(f"{name}: {waits} waits, {few} launches; {many} of many rows")
        for at, number in places.items():
            print(f"  {number} x {at}")
    for name, launches in found.pyg.items():
        print(f"PyG's {name}: {launches} launches")
    for operator in found.without_kernel:
        wrong[operator] = "torch has no CUDA kernel for it"
    for name, why in wrong.items():
        print(f"wrong: {name}: {why}")
    print(f"{len(found.waits)} steps; wrong: {len(wrong)}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
