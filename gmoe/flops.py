"""Count active parameters and FLOPs, and match dense baselines to them."""

from __future__ import annotations

import bisect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop

from gmoe._checks import check, check_counts, check_positive
from gmoe.moe import MoELayer  # and so the operators of gmoe.dispatch

aten = torch.ops.aten


def active_parameters(model: nn.Module) -> int:
    """Count the active parameters per token.

    The experts of a :class:`gmoe.MoE` or :class:`gmoe.MoEConv` count with the share
    ``experts_per_token / E``, everything else in full. A shared parameter counts once.

    Args:
        model: any model.
    """
    share = {
        p: layer.experts_per_token / layer.num_experts
        for layer in model.modules()
        if isinstance(layer, MoELayer)
        for p in layer.routed_parameters()
    }
    return round(sum(p.numel() * share.get(p, 1.0) for p in model.parameters()))


def count_flops(model: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Count the FLOPs of one call, as torch's ``FlopCounterMode`` does (a multiply-add is two).

    Of a training step: ``count_flops(lambda: model(x).sum().backward())``.

    Also counts grouped products, attention on the CPU, and sums over messages (one per element,
    whether by ``index_add``, ``scatter_add`` or a sparse product).

    Args:
        model: what is called as ``model(*args, **kwargs)``.
    """
    with FlopCounterMode(display=False, custom_mapping=_EXTRA_FLOPS) as counter:
        model(*args, **kwargs)
    return counter.get_total_flops()


def match_width(
    cost: Callable[[int], float],
    target: float,
    *,
    start: int = 1,
    stop: int = 2**16,
    tolerance: float = 0.02,
) -> int:
    """Find the width whose cost is nearest to ``target``, to match a dense baseline to a MoE.

    Args:
        cost: FLOPs or parameters of the model of that width; grows with it.
        target: the cost to meet.
        start, stop: the range of widths.
        tolerance: largest relative difference (default 0.02); a narrow model may have no width that
            close.

    Raises:
        ValueError: no width in range comes within ``tolerance``; the message says which is nearest.
    """
    check_positive("target", target)
    check_counts(start=start)
    low = high = start
    # double first, since wide models are slow to measure; not by powers of two, at which a model
    # may have a special case (a residual without a projection where input and hidden width agree)
    while high < stop and cost(high) < target:
        low, high = high, min(2 * high + 1, stop)
    low = bisect.bisect_left(
        range(high), target, lo=low, key=cost
    )  # the first that costs at least the target
    width = min((w for w in (low - 1, low) if w >= start), key=lambda w: abs(cost(w) - target))
    off = cost(width) / target - 1.0
    got = f"{target:g}; the nearest width, {width}, is off by {off:+.1%}"
    check(abs(off) <= tolerance, "target", got, f"within {tolerance:.0%}")
    return width


def _product(a: Tensor, b: Tensor, *_: Any) -> int:
    """(N, M) x (M, D): a multiply-add an element of ``a`` and column of ``b``; an add where ``a``
    is sparse, as for messages that are gathered and scattered. In a grouped product each row meets
    one expert.
    """
    return (2 * a.numel() if a.layout == torch.strided else a._nnz()) * b.size(-1)


_FORMULAS: dict[tuple[Any, ...], Callable[..., int]] = {
    (
        aten.mm,
        aten._grouped_mm,
        aten._sparse_mm_reduce_impl,
        aten._sparse_mm_reduce_impl_backward,
    ): _product,
    (aten.addmm, aten.addmm_, aten._sparse_addmm): lambda _, *factors: _product(*factors),
    (aten.sparse_sampled_addmm,): lambda pattern, a, *_: 2 * pattern._nnz() * a.size(-1),
    (aten.index_add, aten.index_add_): lambda *args: args[3].numel(),  # self, dim, index, source
    (aten.scatter_add, aten.scatter_add_): lambda *args: args[2].numel(),
    (aten._scaled_dot_product_flash_attention_for_cpu,): sdpa_flop,
    (aten._scaled_dot_product_flash_attention_for_cpu_backward,): sdpa_backward_flop,
}


def _of_tensors(formula: Callable[..., int]) -> Callable[..., int]:
    """A formula that FlopCounterMode gives the tensors themselves, in place of their shapes."""

    def count(*args: Any, **_: Any) -> int:
        return formula(*args)

    count._get_raw = True  # type: ignore[attr-defined]  # by this name: it has no public one for a mapping
    return count


_EXTRA_FLOPS = {
    operator: _of_tensors(formula)
    for operators, formula in _FORMULAS.items()
    for operator in operators
}
