"""The parts of both GNNs: which activation, norm and residual map an argument stands for."""

from __future__ import annotations

from collections.abc import Callable
from types import NoneType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gmoe.models.parts import activated, activation_of, norm_of, residual_of


def test_none_is_the_identity() -> None:
    assert isinstance(activation_of(None), nn.Identity)
    assert isinstance(norm_of(None, 8), nn.Identity)


@pytest.mark.parametrize("act", [3, "foo", "none", "threshold", nn.ReLU])
def test_what_is_no_activation_is_refused(act: Any) -> None:
    with pytest.raises(ValueError, match=r"^act: got .*, expected the name of one of PyTorch's"):
        activation_of(act)


@pytest.mark.parametrize(
    "norm", [3, "foo", "none", "MessageNorm", "graph_size_norm", "hetero_batch_norm", nn.LayerNorm]
)
def test_what_is_no_norm_of_a_width_is_refused(norm: Any) -> None:
    with pytest.raises(ValueError, match=r"^norm: got .*, expected the name of one of PyG's norms"):
        norm_of(norm, 8)


@pytest.mark.parametrize(
    ("residual", "out", "expected"),
    [
        ("identity", 8, nn.Identity),
        ("identity", 4, NoneType),
        ("linear", 8, nn.Linear),
        ("linear", 4, nn.Linear),
        ("none", 8, NoneType),
    ],
)
def test_a_residual_is_the_input_where_widths_are_equal_or_linear_if_asked_for(
    residual: Any, out: int, expected: type[Any]
) -> None:
    assert isinstance(residual_of(residual, 8, out), expected)


def test_an_unknown_residual_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^residual: got 'sum', expected one of"):
        residual_of("sum", 8, 8)  # type: ignore[arg-type]


def doubled(*_: Any) -> Any:
    return 2 * _[-1]


CHANGED: dict[str, Callable[[nn.Module, Any], object]] = {
    "nothing": lambda _, __: None,
    "a hook on the activation": lambda act, _: act.register_forward_hook(doubled),
    "a hook on the dropout": lambda _, dropout: dropout.register_forward_hook(doubled),
    "evaluation": lambda _, dropout: dropout.eval(),
    "all are dropped": lambda _, dropout: setattr(dropout, "p", 1.0),
    "none are dropped": lambda _, dropout: setattr(dropout, "p", 0.0),
}


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("name", CHANGED)
def test_relu_and_dropout_in_one_are_both(name: str, is_compiled: bool) -> None:
    """Outputs and gradients, first and second, from the same random numbers."""
    act, dropout = nn.ReLU(), nn.Dropout(0.3)
    CHANGED[name](act, dropout)
    torch.compiler.reset()  # it does not look for hooks again
    x = torch.linspace(-1, 1, 60, dtype=torch.float64).view(12, 5).requires_grad_()
    run: Any = torch.compile(activated, backend="eager") if is_compiled else activated
    found = []
    for both in (lambda: dropout(act(x)), lambda: run(x, act, dropout)):
        torch.manual_seed(0)
        y = both()
        (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=not is_compiled)
        found.append([y, grad])
        if not is_compiled:
            found[-1] += torch.autograd.grad(grad.sin().sum(), x)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-12)


def test_dropout_of_a_relu_keeps_its_output_alone() -> None:
    kept: list[Tensor] = []

    def pack(value: Tensor) -> Tensor:
        kept.append(value)
        return value

    x = torch.randn(12, 5, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        y = activated(x, nn.ReLU(), nn.Dropout(0.3))
    assert [value.data_ptr() for value in kept] == [y.data_ptr()]
