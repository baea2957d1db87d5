"""torch's own kernels of grouped products, which want columns that fill 16 bytes.

Shapes: P rows sorted by expert, E experts, I in, O out features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def grouped_mm(x_PI: Tensor, weight_EIO: Tensor, offsets_E: Tensor) -> Tensor:
    """(P, O) rows times the weight of their expert, by torch's kernel."""
    weight = _aligned(packed(weight_EIO), 2)
    y_PO = F.grouped_mm(_aligned(x_PI.contiguous()), weight, offs=offsets_E.int())
    is_padded = y_PO.size(1) > weight_EIO.size(2)
    return y_PO[:, : weight_EIO.size(2)].clone() if is_padded else y_PO


def grouped_outer(x_PI: Tensor, grad_PO: Tensor, offsets_E: Tensor) -> Tensor:
    """(E, I, O) the gradient of the weights, by torch's kernel."""
    padded_EIO = F.grouped_mm(
        _aligned(x_PI.contiguous()).T, _aligned(grad_PO.contiguous()), offs=offsets_E.int()
    )
    # Contiguous, as compiled code expects of each operator: not a part of the padded product.
    grad_EIO = padded_EIO[:, : x_PI.size(1), : grad_PO.size(1)].contiguous()
    if not grad_EIO.is_cuda:
        return grad_EIO
    # The kernel of CUDA leaves anything in the place of an expert without rows.
    has_rows_E = offsets_E.diff(prepend=offsets_E.new_zeros(1)) > 0
    return torch.where(has_rows_E[:, None, None], grad_EIO, 0.0)


def packed(weight_EIO: Tensor) -> Tensor:
    """The same weights, each one's rows or columns side by side, as torch's kernel wants them."""
    is_packed = weight_EIO.is_contiguous() or weight_EIO.mT.is_contiguous()
    return weight_EIO if is_packed else weight_EIO.contiguous()


def has_own_loop(x_PI: Tensor, out_features: int) -> bool:
    """True if torch's own loop over experts, that of a CPU, takes rows, if any, as they are.

    It takes 0.4 to 1.0 of the time of Python's, with 4 to 64 experts of 16 to 512 features; with
    weights that are padded first, up to 17 times as long.
    """
    step = 16 // x_PI.element_size()
    fits = x_PI.size(1) % step == 0 and out_features % step == 0
    is_own = x_PI.dtype != torch.float64 and x_PI.device.type == "cpu"
    return len(x_PI) > 0 and fits and is_own


def _aligned(x: Tensor, dims: int = 1) -> Tensor:
    """Pad the last dimensions with zeros to multiples of 16 bytes, and start at such an address.

    A part of a flat buffer, as FSDP2 keeps parameters, may start anywhere.
    """
    step = 16 // x.element_size()
    pads = [pad for width in reversed(x.shape[-dims:]) for pad in (0, -width % step)]
    if any(pads):
        return F.pad(x, pads)
    return x if x.data_ptr() % 16 == 0 else x.clone()
