"""What an MLP computes is compared with its form, and experts of it give the same numbers."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Hashable
from typing import Any

import pytest
import torch
from timm.layers import LayerNormFp32, RmsNormFp32
from timm.layers.mlp import GlobalResponseNormMlp, Mlp, SwiGLU
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from gmoe._check_mlp import read_mlp
from gmoe.experts import MLPExperts
from gmoe.mlps import READERS, MLPForm
from tests.helpers.mlps import (
    FORMS,
    CalledByKeyword,
    NormBeforeActivation,
    RowsOnly,
    TwoArguments,
    plain_mlp,
)


def form_of_mlp(name: str, mlp: nn.Module, **options: Any) -> MLPForm:
    """What is read of an MLP, which is no single linear layer."""
    form = read_mlp(name, mlp, **options)
    assert isinstance(form, MLPForm)
    return form


def copies_of(mlp: nn.Module) -> MLPExperts:
    """Two experts that are copies of an MLP."""
    return form_of_mlp("mlp", mlp).experts(2, copied=True, zero_init=False)


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
    assert form_of_mlp("mlp", mlp).dropout == rates


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


def test_one_norm_may_stand_in_both_places() -> None:
    norm = nn.LayerNorm(8)
    form = form_of_mlp(
        "mlp", nn.Sequential(norm, nn.Linear(8, 8), nn.GELU(), norm, nn.Linear(8, 8))
    )
    assert form.input_norm is norm
    assert form.hidden_norm is norm


DROPOUTS_ELSEWHERE: dict[str, Callable[[], list[nn.Module]]] = {
    "before the activation": lambda: [nn.Linear(8, 12), nn.Dropout(0.5), *plain_mlp()[1:]],
    "behind the norm": lambda: [
        *plain_mlp()[:2],
        nn.LayerNorm(12),
        nn.Dropout(0.5),
        nn.Linear(12, 8),
    ],
}


@pytest.mark.parametrize("place", DROPOUTS_ELSEWHERE)
@pytest.mark.parametrize("is_replaced", [True, False])
def test_a_dropout_in_a_place_that_experts_lack_is_refused(place: str, is_replaced: bool) -> None:
    mlp = nn.Sequential(*DROPOUTS_ELSEWHERE[place]())
    with pytest.raises(ValueError, match=r"^model: got mlp, .* drops numbers in another place"):
        read_mlp("mlp", mlp, is_replaced=is_replaced)


@pytest.mark.parametrize("dim", [-2, 0, 1])
def test_an_activation_that_mixes_tokens_is_refused(dim: int) -> None:
    mlp = nn.Sequential(nn.Linear(8, 12), nn.Softmax(dim=dim), nn.Linear(12, 8))
    with pytest.raises(ValueError, match=r"^model: got mlp, .* computes something else"):
        read_mlp("mlp", mlp)


def test_an_activation_that_mixes_rows_is_refused_where_an_mlp_takes_rows_alone() -> None:
    mlp = RowsOnly()
    mlp.act = nn.Softmax(dim=0)
    with pytest.raises(ValueError, match=r"^model: got mlp, .* computes something else"):
        read_mlp("mlp", mlp)


class TwoNorms(CalledByKeyword):
    """Two norms of one width."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 8)
        self.last = nn.LayerNorm(8)
        self.first = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.last(F.gelu(self.fc1(self.first(x)))))
        return out


def test_two_norms_are_told_by_what_they_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(mlp: Any, *norms: str) -> MLPForm:
        first, last = (getattr(mlp, norm) for norm in norms)
        return MLPForm([mlp.fc1], mlp.fc2, F.gelu, input_norm=first, hidden_norm=last)

    mlp = TwoNorms()
    monkeypatch.setitem(READERS, TwoNorms, lambda mlp: read(mlp, "first", "last"))
    assert form_of_mlp("mlp", mlp, is_replaced=True).hidden_norm is mlp.last
    monkeypatch.setitem(READERS, TwoNorms, lambda mlp: read(mlp, "last", "first"))
    with pytest.raises(ValueError, match=r"^model: got mlp, a TwoNorms .* computes something else"):
        read_mlp("mlp", mlp)


def test_mlps_of_one_form_are_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = plain_mlp(), plain_mlp()
    checked: set[Hashable] = set()
    read_mlp("first", first, checked=checked)
    monkeypatch.setattr("gmoe._check_mlp._check_form", None)
    form = form_of_mlp("second", second, checked=checked)
    assert [*form.ups, form.activation, form.down] == [*second]


class Sine(CalledByKeyword):
    """It inherits from a class that is known, and has another activation."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.fc1(x).sin())
        return out


class Pair(CalledByKeyword):
    """It gives more than tokens."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


def locked_mlp() -> nn.Module:
    mlp = plain_mlp()
    mlp.lock = threading.Lock()
    return mlp


REFUSED: dict[str, tuple[Any, str]] = {
    "no linear layer": (nn.ReLU, r"a ReLU of \(ReLU\)"),
    "an activation at the end": (lambda: nn.Sequential(*plain_mlp(), nn.ReLU()), "a Sequential of"),
    "a norm at the end": (lambda: nn.Sequential(*plain_mlp(), nn.LayerNorm(8)), "a Sequential of"),
    "a dropout first": (lambda: nn.Sequential(nn.Dropout(0.5), *plain_mlp()), "a Sequential of"),
    "an activation with parameters": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.PReLU(), nn.Linear(8, 8)),
        "a Sequential of .* has an activation with parameters",
    ),
    "a norm in front of the activation": (NormBeforeActivation, "a NormBeforeActivation of"),
    "a part that experts lack": (lambda: GlobalResponseNormMlp(8, 12), "a GlobalResponseNormMlp"),
    "convolutions": (lambda: Mlp(8, 12, use_conv=True), r"a Mlp of \(Conv2d"),
    "an unknown activation": (Sine, "a Sine .* computes something else"),
    "two arguments": (TwoArguments, "a TwoArguments .* which fails on tokens alone"),
    "two outputs": (Pair, "a Pair .* which fails on tokens alone .*it returns a tuple"),
    "no copy": (locked_mlp, "a Sequential .* which cannot be copied"),
}


@pytest.mark.parametrize("form", REFUSED)
def test_an_mlp_of_another_form_is_refused_by_its_name(form: str) -> None:
    build, got = REFUSED[form]
    with pytest.raises(ValueError, match=rf"^model: got 0\.mlp, {got}.*, expected linear, "):
        read_mlp("0.mlp", build())


@pytest.mark.parametrize("norm", [LayerNormFp32, RmsNormFp32])
@pytest.mark.parametrize("is_replaced", [True, False])
@pytest.mark.parametrize("width", [8, 256])
def test_a_norm_that_computes_in_float32_is_read(norm: Any, is_replaced: bool, width: int) -> None:
    mlp = SwiGLU(width, 2 * width, norm_layer=norm)
    x = torch.randn(6, width)
    dense = read_mlp("mlp", mlp, is_replaced=is_replaced)
    experts = dense.experts(2, copied=True, zero_init=False)
    torch.testing.assert_close(experts(x, torch.tensor([3, 6])), mlp(x))


class Untrained(CalledByKeyword):
    """An MLP of which a layer is not trained."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.fc1(x), approximate="tanh")
        return F.linear(hidden, self.fc2.weight.detach(), self.fc2.bias)


def test_an_mlp_that_does_not_train_a_layer_stays_as_the_shared_expert() -> None:
    """``test_mutations.py`` has other gradients, and other outputs for some tokens."""
    mlp = Untrained()
    assert form_of_mlp("mlp", mlp).down is mlp.fc2
    with pytest.raises(ValueError, match=r"^model: got mlp, a Untrained .*(train|gradient)"):
        read_mlp("mlp", mlp, is_replaced=True)
