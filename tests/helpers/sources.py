"""A model of atoms whose molecules have sources, beside its definition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import gmoe
from gmoe.routers import ByType, FromInput

SOURCES = [0, 3, 7]
SOURCE = torch.tensor([7, 0, 3, 7])
"""Of each of four molecules."""
BATCH = torch.tensor([0, 0, 1, 2, 2, 2, 3])
DIM = 3
BY_SOURCE = ByType("source", SOURCES, batch="batch")
BY_VECTOR = FromInput("system", dim=DIM, batch="batch")


class Net(nn.Module):
    """Two layers on atoms, the second of them an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.lin1 = nn.Linear(4, 4)
        self.lin2 = nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 2))

    def forward(
        self,
        x: Tensor,
        batch: Tensor | None = None,
        source: Tensor | None = None,
        *,
        system: Tensor | None = None,
    ) -> Tensor:
        out: Tensor = self.lin2(self.lin1(x).tanh())
        return out


class ByPosition(Net):
    """All arguments by position, as ``torch.jit.trace`` takes them."""

    def forward(  # type: ignore[override]
        self, x: Tensor, batch: Tensor, source: Tensor, system: Tensor
    ) -> Tensor:
        return super().forward(x, batch, source, system=system)


def net(router: Any, mix: Any = "weights", model: nn.Module | None = None, **options: Any) -> Any:
    torch.manual_seed(0)
    dense = (Net() if model is None else model).double()
    options = {"start": "copies", "targets": "lin*", **options}
    moe = gmoe.moefy(dense, router=router, mix=mix, **options)
    with torch.no_grad():
        for name, parameter in moe.named_parameters():
            if "difference" in name:
                parameter.normal_()
    return moe


def atoms() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(len(BATCH), 4, dtype=torch.float64, generator=generator, requires_grad=True)


def systems() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(len(SOURCE), DIM, dtype=torch.float64, generator=generator)


def naive(model: Any, x: Tensor, weight_GE: Tensor, batch: Tensor = BATCH) -> Tensor:
    """Each atom by itself, through the weights that its molecule's row mixes."""
    rows = []
    first, second = (
        getattr(one.experts, "stacked", one.experts) for one in (model.lin1, model.lin2)
    )
    for row, group in zip(x, batch.tolist(), strict=True):
        w_E = weight_GE[group]

        def mixed(linear: Any, value: Tensor, w_E: Tensor = w_E) -> Tensor:
            weight = torch.einsum("e,eoi->oi", w_E, linear.weight)
            return weight @ value + w_E @ linear.bias

        h = nn.functional.silu(mixed(second.up, mixed(first, row).tanh()))
        rows.append(mixed(second.down, h))
    return torch.stack(rows)


def one_hot(source: Tensor = SOURCE) -> Tensor:
    return torch.stack([(source == value).double() for value in SOURCES], dim=1)


def equal_with_gradients(model: Any, out: Tensor, expected: Tensor, x: Tensor) -> None:
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)
    leaves = [x, *model.parameters()]
    found = torch.autograd.grad(out.square().sum(), leaves)
    wanted = torch.autograd.grad(expected.square().sum(), leaves)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-11)
