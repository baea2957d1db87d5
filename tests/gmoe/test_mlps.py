"""Dense MLPs are read by what they compute, and experts of their form give the same numbers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from timm.layers import LayerNormFp32, RmsNormFp32
from timm.layers.mlp import GlobalResponseNormMlp, Mlp, SwiGLU
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from gmoe._mlps import read_mlp
from gmoe.experts import MLPExperts
from tests.gmoe.mlps import (
    FORMS,
    GEGLU,
    CalledByKeyword,
    Dropping,
    GateCalledLast,
    Llama,
    NormBeforeActivation,
    RowsOnly,
    TwoArguments,
    plain_mlp,
)


def copies_of(mlp: nn.Module) -> MLPExperts:
    """Two experts that are copies of an MLP."""
    return read_mlp("mlp", mlp).experts(2, upcycle=True, zero_init=False, backend="loop")


@pytest.mark.parametrize("form", FORMS)
def test_experts_are_copies_of_mlps_of_many_forms(form: str) -> None:
    torch.manual_seed(0)
    mlp: Any = FORMS[form]().double()
    for parameter in mlp.parameters():
        nn.init.normal_(parameter)
    experts = copies_of(mlp)
    x = torch.randn(6, experts.in_features, dtype=torch.float64)
    y = experts(x, torch.tensor([2, 6]))  # two tokens for one expert, four for the other
    torch.testing.assert_close(y, mlp(x), rtol=0, atol=1e-8)
    y.square().sum().backward()
    assert all(parameter.grad is not None for parameter in experts.parameters())


def test_the_first_and_the_last_layer_are_told_by_the_order_of_their_calls() -> None:
    mlp = GateCalledLast()
    dense = read_mlp("mlp", mlp)
    assert [dense.down.in_features, dense.down.out_features] == [12, 8]
    assert dense.glu
    assert dense.gate_is_second


@pytest.mark.parametrize("mlp", [plain_mlp(), Llama(), GEGLU()], ids=lambda mlp: type(mlp).__name__)
def test_a_gated_mlp_is_told_by_its_widths(mlp: nn.Module) -> None:
    assert read_mlp("mlp", mlp).glu == (not isinstance(mlp, nn.Sequential))


@pytest.mark.parametrize(
    ("order", "rates"),
    [
        (("up", "activation", "drop", "down", "drop"), (0.5, 0.5)),
        (("up", "activation", "down", "drop"), (0.0, 0.5)),
        (("up", "activation", "down"), (0.0, 0.0)),
    ],
)
def test_dropout_stays_where_it_is(order: tuple[str, ...], rates: tuple[float, float]) -> None:
    up, activation, down = plain_mlp()
    parts = {"up": up, "activation": activation, "down": down, "drop": nn.Dropout(0.5)}
    mlp = nn.Sequential(*(parts[name] for name in order))
    assert read_mlp("mlp", mlp).dropout == rates


def test_an_mlp_of_rows_alone_is_read() -> None:
    mlp = RowsOnly()
    x = torch.randn(6, 8)
    torch.testing.assert_close(copies_of(mlp)(x, torch.tensor([3, 6])), mlp(x))


def test_reading_an_mlp_leaves_it_as_it_is() -> None:
    """Spectral norm moves its buffers at each call in training, and a hook may count."""
    calls: list[None] = []
    mlp = plain_mlp().train()
    parametrizations.spectral_norm(mlp[0])
    mlp[2].register_forward_pre_hook(lambda *_: calls.append(None))
    before = copy.deepcopy(mlp.state_dict())
    read_mlp("mlp", mlp)
    assert calls == []
    assert all(torch.equal(value, before[name]) for name, value in mlp.state_dict().items())
    assert all(part.training for part in mlp.modules())


def test_the_last_layers_may_start_at_zero() -> None:
    experts = read_mlp("mlp", plain_mlp()).experts(2, upcycle=True, zero_init=True, backend="loop")
    assert experts.up.weight.all()
    assert not experts.down.weight.any()


class Sine(CalledByKeyword):
    """An activation that is not among the known ones."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.fc1(x).sin())
        return out


REFUSED: dict[str, tuple[Any, str]] = {
    "no linear layer": (nn.ReLU, "a ReLU without linear layers"),
    "an activation at the end": (lambda: nn.Sequential(*plain_mlp(), nn.ReLU()), "a Sequential of"),
    "a norm at the end": (lambda: nn.Sequential(*plain_mlp(), nn.LayerNorm(8)), "a Sequential of"),
    "a dropout first": (lambda: nn.Sequential(nn.Dropout(0.5), *plain_mlp()), "a Sequential of"),
    "an activation with parameters": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.PReLU(), nn.Linear(8, 8)),
        "a Sequential of",
    ),
    "a norm in front of the activation": (NormBeforeActivation, "a NormBeforeActivation of"),
    "a part that experts lack": (lambda: GlobalResponseNormMlp(8, 12), "a GlobalResponseNormMlp"),
    "convolutions": (lambda: Mlp(8, 12, use_conv=True), "a Mlp of convolutions"),
    "an unknown activation": (Sine, "a Sine .* whose activation is not a known one"),
    "two arguments": (TwoArguments, "a TwoArguments .* which fails on tokens alone"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_an_mlp_of_another_form_is_refused_by_its_name(form: str) -> None:
    build, got = REFUSED[form]
    with pytest.raises(ValueError, match=rf"^model: got 0\.mlp, {got}.*, expected linear layers"):
        read_mlp("0.mlp", build())


def test_a_dropout_that_is_a_function_does_not_hide_the_activation() -> None:
    assert isinstance(read_mlp("mlp", Dropping().train()).activation, nn.GELU)


@pytest.mark.parametrize("norm", [LayerNormFp32, RmsNormFp32])
@pytest.mark.parametrize("is_replaced", [True, False])
def test_a_norm_that_computes_in_float32_is_read(norm: Any, is_replaced: bool) -> None:
    mlp = SwiGLU(8, 12, norm_layer=norm)
    x = torch.randn(6, 8)
    dense = read_mlp("mlp", mlp, is_replaced=is_replaced)
    experts = dense.experts(2, upcycle=True, zero_init=False, backend="loop")
    torch.testing.assert_close(experts(x, torch.tensor([3, 6])), mlp(x))
