"""Forms of MLPs of a user's own classes, which are told and verified."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.layers.mlp import Mlp
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.gpt2 import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

import gmoe
from gmoe import mlps
from gmoe.mlps import MLPForm, register
from tests.helpers.mlps import CalledByKeyword


@pytest.fixture(autouse=True)
def nothing_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlps, "READERS", {})


class Sine(CalledByKeyword):
    """An MLP whose activation nobody else has, and with a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.drop(self.fc1(x).sin()))
        return out


class Cosine(Sine):
    """It inherits from another one, and computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.drop(self.fc1(x).cos()))
        return out


def form_of(mlp: Any) -> MLPForm:
    return MLPForm([mlp.fc1], mlp.fc2, torch.sin, hidden_dropouts=[mlp.drop])


def moefied(mlp: nn.Module, **options: Any) -> Any:
    """The layer that replaces an MLP."""
    model = gmoe.moefy(nn.Sequential(copy.deepcopy(mlp)), targets="0", num_experts=2, **options)
    return model[0]  # type: ignore[index]


COPIES = {"start": "copies", "k": 2}


@pytest.mark.parametrize("options", [{}, COPIES], ids=["shared", "copies"])
def test_an_mlp_of_ones_own_class_is_converted_once_it_is_registered(
    options: dict[str, Any],
) -> None:
    mlp = Sine().double().eval()
    with pytest.raises(ValueError, match=r"^model: got 0, a Sine .*to gmoe\.mlps\.register"):
        moefied(mlp, **options)
    register(Sine, form_of)
    layer = moefied(mlp, **options)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), mlp(x), rtol=0, atol=1e-10)
    experts = layer.experts
    assert experts.hidden_dropout.p == 0.5


WRONG: dict[str, tuple[Callable[[Any], Any], str]] = {
    "an activation": (
        lambda mlp: MLPForm([mlp.fc1], mlp.fc2, torch.cos, hidden_dropouts=[mlp.drop]),
        "model: got 0, a Sine .* computes something else",
    ),
    "layers": (
        lambda mlp: MLPForm([mlp.fc2], mlp.fc1, torch.sin, hidden_dropouts=[mlp.drop]),
        "model: got 0, a Sine .* fails on tokens alone",
    ),
    "a dropout": (
        lambda mlp: MLPForm([mlp.fc1], mlp.fc2, torch.sin, output_dropouts=[mlp.drop]),
        "model: got 0, a Sine .* drops numbers in another place",
    ),
    "no dropout": (
        lambda mlp: MLPForm([mlp.fc1], mlp.fc2, torch.sin),
        "model: got 0, a Sine .* drops numbers in another place",
    ),
    "no form": (lambda mlp: (mlp.fc1, mlp.fc2), "read: got .* for a Sine, expected an MLPForm"),
}


@pytest.mark.parametrize("start", ["shared", "copies"])
@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_form_is_refused(wrong: str, start: str) -> None:
    read, message = WRONG[wrong]
    register(Sine, read)
    with pytest.raises(ValueError, match=f"^{message}"):
        moefied(Sine(), start=start, k=2)


def test_a_class_that_inherits_is_verified_by_itself() -> None:
    register(Sine, form_of)
    with pytest.raises(ValueError, match=r"^model: got 0, a Cosine .* computes something else"):
        moefied(Cosine())


def test_linear_layers_may_be_made_of_other_parts() -> None:
    """GPT-2 has layers of its own, with weights (I, O)."""

    def linear(conv: Any) -> nn.Linear:
        made = nn.Linear(*conv.weight.shape)
        made.weight = nn.Parameter(conv.weight.T)
        made.bias = conv.bias
        return made

    def read(mlp: Any) -> MLPForm:
        output_dropouts = [mlp.dropout]
        ups, down = [linear(mlp.c_fc)], linear(mlp.c_proj)
        return MLPForm(ups, down, mlp.act, output_dropouts=output_dropouts)

    mlp = GPT2MLP(24, GPT2Config(n_embd=8)).double().eval()
    with pytest.raises(ValueError, match=r"^model: got 0, a GPT2MLP of "):
        moefied(mlp)
    register(GPT2MLP, read)
    layer = moefied(mlp)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    assert torch.equal(layer(x), mlp(x))
    torch.testing.assert_close(layer.experts.up.bias[1], mlp.c_fc.bias)
    nn.init.normal_(layer.experts.down.weight)
    assert not torch.equal(layer(x), mlp(x))


def test_what_is_registered_is_a_class_and_a_function() -> None:
    with pytest.raises(ValueError, match=r"^read: got 3, expected a function"):
        register(Sine, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^mlp_class: got 'Sine', expected a class of modules"):
        register("Sine", form_of)  # type: ignore[arg-type]
    assert mlps.READERS == {}


def test_a_form_has_one_first_layer_or_two() -> None:
    for count in (0, 3):
        with pytest.raises(ValueError, match=f"^ups: got {count} layers, expected one, or two"):
            MLPForm([nn.Linear(2, 2)] * count, nn.Linear(2, 2), torch.sin)


@pytest.mark.parametrize("name", mlps.ACT)
def test_an_activation_may_be_a_function_that_the_mlp_keeps(name: str) -> None:
    """As T5 of older versions of transformers: a class is known by the path of its module."""

    class Dense(nn.Module):
        __module__ = "transformers.models.mine.modeling_mine"

        def __init__(self) -> None:
            super().__init__()
            self.wi, self.wo = nn.Linear(8, 12), nn.Linear(12, 8)
            setattr(self, name, F.softplus)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.wo(getattr(self, name)(self.wi(x)))
            return out

    assert moefied(Dense()).experts.activation is F.softplus


def test_a_class_with_a_part_that_no_row_names_is_not_read() -> None:
    mlp = Mlp(8, 12)
    assert mlps.form_of_class(mlp) is not None
    mlp.scale = nn.Linear(8, 8)
    assert mlps.form_of_class(mlp) is None


def test_copies_of_timms_mlp_in_other_packages_are_read() -> None:
    """DINO's, MAE's and Swin's code has one dropout, called twice."""
    copied = type("Mlp", (Copied,), {"__module__": "models.vision_transformer"})
    assert moefied(copied(), **COPIES).experts.hidden_dropout.p == 0.5
    with pytest.raises(ValueError, match=r"^model: got 0, a Copied .*to gmoe\.mlps\.register"):
        moefied(Copied())


class Copied(nn.Module):
    """An MLP as DINO's code has it, of another name."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))
        return out
