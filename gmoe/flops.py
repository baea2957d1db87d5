"""Count active parameters and FLOPs.

Shapes: N rows, M inner and D outer width of a product.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop

from gmoe._checks import check, check_module, shown
from gmoe._torch import given_tensors, num_stored
from gmoe.moe import MoELayer

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
    tokens that they are given. Zeros count that fill blocks, as on most GPUs, or widths. A token
    with one expert has no sum.

    Args:
        model: a model or function, called as ``model(*args, **kwargs)``.
    """
    check(callable(model), "model", shown(model), "a model or function")
    with FlopCounterMode(display=False, custom_mapping=_EXTRA_FLOPS) as counter:
        model(*args, **kwargs)
    return counter.get_total_flops()


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
