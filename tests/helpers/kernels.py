"""What the tests of kernels share.

Shapes: T tokens, E experts, P pairs sorted by expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gmoe import products
from gmoe.products import Kernel
from gmoe.routing import Routing
from tests.helpers.masked import features, routing_of


def ends(loads: Sequence[int]) -> Tensor:
    return torch.tensor(loads).cumsum(0).to(torch.int32)


def gradients(y: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    cotangent = features(*y.shape, seed=9).to(y.dtype)
    found = torch.autograd.grad(
        y, leaves, cotangent, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return list(found)


def check_second_and_third_gradients(run: Callable[..., Tensor], leaves: Sequence[Tensor]) -> None:
    """Compare them with differences."""

    def differentiate(*leaves: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(*leaves).sum(), leaves, create_graph=True)

    assert torch.autograd.gradgradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(differentiate, leaves, fast_mode=True)


def routings() -> list[Routing]:
    """Routings of tokens with K pairs each, and with any number."""
    generator = torch.Generator().manual_seed(0)
    chosen = [torch.rand(9, 4, generator=generator).topk(k).indices for k in (1, 3, 0)]
    weights = [torch.rand(9, k, generator=generator, dtype=torch.float64) for k in (1, 3, 0)]
    by_token = [
        Routing.from_choices(*pair, num_experts=4) for pair in zip(chosen, weights, strict=True)
    ]
    none = Routing.from_choices(chosen[0][:0], weights[0][:0], num_experts=4)
    return [*by_token, none, routing_of(features(9, 4) * (features(9, 4, seed=1) > 0))]


class Noted(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(str(func).split(".")[1])
        return func(*args, **(kwargs or {}))


@contextmanager
def kernel_is(kernel: Kernel) -> Iterator[None]:
    """Multiply by one kernel inside the block, as on a device that takes it.

    Torch's own refuses float64, which is looped over.
    """
    chosen = products.kernel_of

    def kernel_of(dtype: torch.dtype, capability: Any) -> Kernel:
        return "loop" if kernel == "grouped" and dtype == torch.float64 else kernel

    products.kernel_of = kernel_of
    try:
        yield
    finally:
        products.kernel_of = chosen
