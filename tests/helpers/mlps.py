"""MLPs in the forms in which models have them, 8 columns wide; own classes are registered."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from timm.layers.mlp import GluMlp, Mlp, SwiGLU, SwiGLUPacked
from timm.models.vitamin import GeGluMlp
from torch import Tensor, nn
from torch.nn import functional as F

from gmoe.mlps import MLPForm, register


def plain_mlp() -> Any:
    """The plainest one: linear, activation, linear."""
    return nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))


class ActivationFirst(nn.Module):
    """An MLP whose parts are called in another order than they were registered.

    Hugging Face's transformers have such ones.
    """

    def __init__(self, width: int = 8, hidden: int = 12) -> None:
        super().__init__()
        self.activation_fn = nn.GELU()
        self.norm = nn.LayerNorm(hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.fc1 = nn.Linear(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.norm(self.activation_fn(self.fc1(x))))
        return out


class GateCalledLast(nn.Module):
    """A gated MLP that calls its gate after the layer which it gates."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 12)
        self.gate = nn.Linear(8, 12)
        self.down = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.up(x) * F.silu(self.gate(x)))
        return out


class CalledByKeyword(nn.Module):
    """It calls its parts by keyword, and its activation by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(8, 12)
        self.fc2 = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(input=F.gelu(self.fc1(input=x), approximate="tanh"))
        return out


class GEGLU(nn.Module):
    """Diffusers' form: one layer twice as wide, whose second half is the gate of a GELU.

    The GELU is a function.
    """

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 24)
        self.down = nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden, gate = self.up(x).chunk(2, dim=-1)
        out: Tensor = self.down(hidden * F.gelu(gate))
        return out


class RowsOnly(nn.Module):
    """It takes (tokens, width) only."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = plain_mlp()

    def forward(self, x: Tensor) -> Tensor:
        tokens, _ = x.shape
        out: Tensor = self.down(self.act(self.up(x))).view(tokens, 8)
        return out


class NormBeforeActivation(nn.Module):
    """A norm in front of the activation, which experts do not have."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = plain_mlp()
        self.norm = nn.LayerNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self.act(self.norm(self.up(x))))
        return out


class Llama(nn.Module):
    """A gated MLP whose activation is a function."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = F.silu) -> None:
        super().__init__()
        self.w1 = nn.Linear(8, 12, bias=False)
        self.w2 = nn.Linear(12, 8, bias=False)
        self.w3 = nn.Linear(8, 12, bias=False)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.w2(self.activation(self.w1(x)) * self.w3(x))
        return out


class Dropping(nn.Module):
    """An MLP with a dropout that is a function, not a module."""

    def __init__(self, rate: float = 0.5) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = plain_mlp()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.dropout(self.act(self.fc1(x)), self.rate, self.training))
        return out


class TwoArguments(nn.Module):
    """An MLP that takes more than tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = plain_mlp()

    def forward(self, x: Tensor, height: int) -> Tensor:
        out: Tensor = self.down(self.act(self.up(x)))
        return out


READ: dict[type[nn.Module], Callable[[Any], MLPForm]] = {
    ActivationFirst: lambda mlp: MLPForm(
        [mlp.fc1], mlp.fc2, mlp.activation_fn, hidden_norm=mlp.norm
    ),
    GateCalledLast: lambda mlp: MLPForm([mlp.gate, mlp.up], mlp.down, F.silu),
    CalledByKeyword: lambda mlp: MLPForm([mlp.fc1], mlp.fc2, partial(F.gelu, approximate="tanh")),
    GEGLU: lambda mlp: MLPForm([mlp.up], mlp.down, F.gelu, gate_is_second=True),
    RowsOnly: lambda mlp: MLPForm([mlp.up], mlp.down, mlp.act),
    NormBeforeActivation: lambda mlp: MLPForm([mlp.up], mlp.down, mlp.act, hidden_norm=mlp.norm),
    Llama: lambda mlp: MLPForm([mlp.w1, mlp.w3], mlp.w2, mlp.activation),
    Dropping: lambda mlp: MLPForm([mlp.fc1], mlp.fc2, mlp.act),
    TwoArguments: lambda mlp: MLPForm([mlp.up], mlp.down, mlp.act),
}
for mlp_class, read in READ.items():
    register(mlp_class, read)

FORMS: dict[str, Callable[[], nn.Module]] = {
    "SwiGLU with a norm (EVA-02)": partial(SwiGLU, 8, 12, norm_layer=nn.LayerNorm, bias=False),
    "SwiGLUPacked": partial(SwiGLUPacked, 8, 24),
    "GluMlp with a norm": partial(GluMlp, 8, 24, norm_layer=nn.LayerNorm, drop=0.0),
    "GeGluMlp (ViTamin)": partial(GeGluMlp, 8, 12),
    "Mlp with a norm": partial(Mlp, 8, 12, norm_layer=nn.LayerNorm, bias=(False, True)),
    "Llama": Llama,
    "Llama, tanh-GELU": partial(Llama, partial(F.gelu, approximate="tanh")),
    "an activation in place": lambda: nn.Sequential(
        nn.Linear(8, 12), nn.ReLU(inplace=True), nn.Linear(12, 8)
    ),
    "nn.GLU": lambda: nn.Sequential(nn.Linear(8, 24), nn.GLU(), nn.Linear(12, 8)),
    "parts registered in another order (Hugging Face)": ActivationFirst,
    "a last layer as wide as the first, registered before it": partial(ActivationFirst, 12, 12),
    "a gate called last": GateCalledLast,
    "parts called by keyword, an activation called by itself": CalledByKeyword,
    "GEGLU (Diffusers)": GEGLU,
    "two dropouts behind each other": lambda: nn.Sequential(
        *plain_mlp(), nn.Dropout(0.0), nn.Dropout(0.0)
    ),
    "layers inside a container": lambda: nn.Sequential(
        nn.Sequential(*plain_mlp()[:2]), *plain_mlp()[2:]
    ),
    "a norm first (MaxViT)": lambda: nn.Sequential(nn.LayerNorm(8), *plain_mlp()),
}
"""Forms of which experts can be copies."""
