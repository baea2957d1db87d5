"""Inputs where formulas are not smooth: norms, deviations and ties of zeros, duplicates, constants.

And the check that gradients of them are finite, whatever a definition of the same formula gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

FLAT: dict[str, Callable[[Tensor], Tensor]] = {
    "rows of zeros": lambda x: torch.where(every_third(x), 0.0, x),
    "zeros alone": torch.zeros_like,
    "duplicates": lambda x: x[torch.arange(len(x)) // 2 * 2],
    "the same row": lambda x: x[:1].expand_as(x).clone(),
    "constant rows": lambda x: x[:, :1].expand_as(x).clone(),
    "tiny rows": lambda x: 1e-30 * x,
}
"""What becomes of random rows."""


def every_third(x: Tensor) -> Tensor:
    """(T, 1) True for the rows 2, 5, ..."""
    return (torch.arange(len(x)) % 3 == 2).unsqueeze(1)


def gradients_of(value: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """First gradients by the leaves that learn, and second ones: of a sum of their squares."""
    names = [name for name, leaf in leaves.items() if leaf.requires_grad]
    values = [leaves[name] for name in names]
    if not names or not value.requires_grad:
        return {}
    given: Any = {"materialize_grads": True}
    first = torch.autograd.grad(value, values, create_graph=True, **given)
    size = torch.stack([spread(one.square()) for one in first]).sum()
    second = tuple(torch.zeros_like(one) for one in values)
    if size.requires_grad:
        second = torch.autograd.grad(size, values, **given)
    orders = {"gradient": first, "second gradient": second}
    return {
        f"{order} of {name}": one.detach()
        for order, found in orders.items()
        for name, one in zip(names, found, strict=True)
    }


def spread(value: Tensor) -> Tensor:
    """A sum with a weight for each number."""
    weight = torch.linspace(0.5, 1, value.numel(), dtype=value.dtype)
    return (value * weight.view_as(value)).sum()


def require_finite(values: Mapping[str, Any]) -> None:
    """Raise an :class:`AssertionError` that names what is NaN or infinite."""
    wrong = [name for name, one in values.items() if one is not None and not one.isfinite().all()]
    if wrong:
        raise AssertionError(f"not finite: {', '.join(wrong)}")
