"""Count active parameters and FLOPs, and match dense baselines to them.

Shapes: N rows, M inner and D outer width of a product.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop

from gmoe._checks import check, check_at_least, check_module, check_positive, shown
from gmoe._torch import given_tensors, num_stored
from gmoe.moe import MoELayer

WIDEST = 2**16
"""Where the search for a width ends."""

aten = torch.ops.aten


def active_parameters(model: nn.Module) -> int:
    """Count the active parameters per token.

    Of the experts of a :class:`gmoe.MoE` or :class:`gmoe.MoEConv`, the share
    ``experts_per_token / E`` counts; everything else counts in full. A shared parameter counts
    once.

    Args:
        model: any model.
    """
    check_module("model", model)
    share: dict[nn.Parameter, float] = {}
    for layer in model.modules():
        if isinstance(layer, MoELayer):
            for parameter in layer.routed_parameters():
                share[parameter] = layer.experts_per_token / layer.num_experts
    return round(sum(p.numel() * share.get(p, 1.0) for p in model.parameters()))


def count_flops(model: Callable[..., object], *args: object, **kwargs: object) -> int:
    """Count the FLOPs of one call, as torch's ``FlopCounterMode`` does (a multiply-add is two).

    For a training step: ``count_flops(lambda: model(x).sum().backward())``.

    Also counts grouped products, attention on the CPU, and sums over messages (one per element,
    whether by ``index_add``, ``scatter_add`` or a sparse product). What runs is what counts, on the
    road that a call takes outside of this function, too: on a CPU, routed experts count with the
    tokens that they are given. Zeros count that fill blocks with ``backend="padded"``, and so on
    most GPUs by default, or widths with ``"grouped"``. A token with one expert has no sum.

    Args:
        model: a model or function, called as ``model(*args, **kwargs)``.
    """
    check(callable(model), "model", shown(model), "a model or function")
    with FlopCounterMode(display=False, custom_mapping=_EXTRA_FLOPS) as counter:
        model(*args, **kwargs)
    return counter.get_total_flops()


def match_width(
    cost: Callable[[int], float],
    target: float,
    *,
    tolerance: float = 0.02,
) -> int:
    """Find the width whose cost is nearest to ``target``, to match a dense baseline to a MoE.

    Args:
        cost: FLOPs or parameters of the model of that width; grows with it.
        target: the cost to meet.
        tolerance: largest relative difference (default 0.02); a narrow model may have no width that
            close.

    Raises:
        ValueError: no width up to 2^16 comes within ``tolerance``; the message names the nearest.
    """
    check(callable(cost), "cost", shown(cost), "a function of a width")
    check_positive("target", target)
    check_at_least(0, tolerance=tolerance)
    cost = functools.cache(cost)  # the search meets its last widths again
    # 1. Double the width until it costs enough, since wide models are slow to measure. Not by
    # powers of two, where a model may have a special case (input and hidden width agree: no
    # projection).
    low = high = 1
    while high < WIDEST and cost(high) < target:
        low, high = high, min(2 * high + 1, WIDEST)
    # 2. Search between the last two for the first width that costs at least the target.
    low = bisect.bisect_left(range(high), target, lo=low, key=cost)
    # 3. The nearest is this width or the one before.
    candidates = [width for width in (low - 1, low) if width >= 1]
    width = min(candidates, key=lambda width: abs(cost(width) - target))
    off = cost(width) / target - 1.0
    if not abs(off) <= tolerance:  # a cost of NaN is not
        raise ValueError(
            f"target: got {target:g}; the nearest width, {width}, is off by {off:+.1%}, expected "
            f"within {tolerance:.0%}"
        )
    return width


def _product(a: Tensor, b: Tensor, *_: object) -> int:
    """FLOPs of (N, M) x (M, D), also of a grouped product, in which each row meets one expert.

    Two (a multiply-add) for each element of a dense ``a`` and column of ``b``. One (an add) if
    ``a`` is sparse, as for messages that are gathered and scattered.
    """
    per_column = 2 * a.numel() if a.layout == torch.strided else num_stored(a)
    return per_column * b.size(-1)


# By the operators' positional arguments.
_FORMULAS: dict[tuple[object, ...], Callable[..., int]] = {
    (
        aten.mm,
        aten._grouped_mm,
        aten._sparse_mm_reduce_impl,
        aten._sparse_mm_reduce_impl_backward,
    ): _product,
    (aten.addmm, aten.addmm_, aten._sparse_addmm): lambda _, *factors: _product(*factors),
    (aten._embedding_bag_forward_only,): lambda values, index, *_: index.numel() * values.size(-1),
    (aten.sparse_sampled_addmm,): lambda pattern, a, *_: 2 * num_stored(pattern) * a.size(-1),
    (aten.index_add, aten.index_add_): lambda *args: args[3].numel(),  # self, dim, index, source
    (aten.scatter_add, aten.scatter_add_): lambda *args: args[2].numel(),
    (aten._scaled_dot_product_flash_attention_for_cpu,): sdpa_flop,
    (aten._scaled_dot_product_flash_attention_for_cpu_backward,): sdpa_backward_flop,
}


_EXTRA_FLOPS = {
    operator: given_tensors(formula)
    for operators, formula in _FORMULAS.items()
    for operator in operators
}
