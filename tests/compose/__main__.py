"""The random composer: a number is a case, which has to equal its definition.

``python -m tests.compose [TARGET] 4711`` prints a number as a script, ``python -m tests.compose
[TARGET] 0 2000`` runs a range and prints what fails, as scripts. The targets are ``graphs``
(the default) and ``moefy``.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence

import torch

from tests.compose.frame import Target
from tests.compose.graphs import Graphs
from tests.compose.moefy import Moefy

TARGETS = {target.name: target for target in (Graphs(), Moefy())}

KINDS = ("equal", "refused", "tied", "failed")


def run_range(target: Target, numbers: range) -> int:
    """Print the failures, and what came of each trait; how many numbers failed."""
    counts = Counter[tuple[str, str]]()
    failures = list[int]()
    begin = time.perf_counter()
    for done, number in enumerate(numbers, 1):
        case = target.of(number)
        kind = target.run(case).kind
        traits = {*target.traits(case), case.flat, "all"} - {""}
        counts.update((trait, kind) for trait in traits)
        if kind == "failed":
            failures.append(number)
            print(target.show(number), flush=True)
        if done % 500 == 0:
            print(f"{done} of {len(numbers)}", file=sys.stderr, flush=True)
    for trait in sorted({trait for trait, _ in counts}):
        print(f"{trait:22}", *(f"{kind} {counts[trait, kind]:5}" for kind in KINDS))
    each = 1000 * (time.perf_counter() - begin) / len(numbers)
    print(f"{len(numbers)} numbers, {each:.0f} ms each; failed: {failures or 'none'}")
    return len(failures)


def main(arguments: Sequence[str]) -> int:
    """Print a number, or run a range; 1 if some number failed."""
    has_target = bool(arguments) and arguments[0] in TARGETS
    name, *numbers = arguments if has_target else ("graphs", *arguments)
    if not numbers or {"-h", "--help"} & {*numbers}:
        print(__doc__)
        return 0
    torch.set_num_threads(1)
    target = TARGETS[name]
    (first, *last) = map(int, numbers)
    if not last:
        print(target.show(first))
        return int(target.run(target.of(first)).kind == "failed")
    return int(run_range(target, range(first, *last)) > 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
