"""Dense models, and how ``moefy`` converts them.

A converted model has to start as its dense one. The definition of a layer: one expert after another
on its tokens, by the formula of the case's MLP. A plain MLP may not be refused.

Shapes: T tokens, D width, H hidden features, E experts, P pairs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import gmoe
from gmoe.mlps import MLPForm, register
from gmoe.moe import MoELayer
from tests.compose import drawing, steps
from tests.compose.calls import Call
from tests.compose.drawing import EXPERTS, Reason, flip
from tests.compose.frame import Case, Output, Target, require_equal

ACTIVATIONS: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], Tensor]]] = {
    "gelu": (nn.GELU, F.gelu),
    "tanh-gelu": (partial(nn.GELU, "tanh"), partial(F.gelu, approximate="tanh")),
    "relu": (nn.ReLU, F.relu),
    "relu in place": (partial(nn.ReLU, inplace=True), F.relu),
    "silu": (nn.SiLU, F.silu),
    "sigmoid": (nn.Sigmoid, torch.sigmoid),
    "tanh": (nn.Tanh, torch.tanh),
}
"""Each as a module and as a function."""

NORMS: dict[str, Callable[[int], nn.Module | None]] = {
    "none": lambda _: None,
    "layer": nn.LayerNorm,
    "without parameters": partial(nn.LayerNorm, elementwise_affine=False),
    "without bias": partial(nn.LayerNorm, bias=False),
    "rms": partial(nn.RMSNorm, eps=1e-4),
}
GATES = ("none", "none", "two layers", "halves", "nn.GLU")
PLAIN = ("nothing", "subclass of nn.Linear", "frozen")
"""What leaves an MLP one of which experts can be copies."""
CHANGES = (
    *("nothing",) * 8,
    *("subclass of nn.Linear", "frozen"),
    *("hook that reads", "hook that scales", "own linear", "own forward"),
    *("weight norm", "spectral norm", "pruned", "tied", "residual", "dropout as a function"),
    *("batch norm between", "PReLU", "constant added", "third layer"),
)


class Doubled(nn.Linear):
    """A linear layer that computes something else than ``nn.Linear``."""

    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


class Named(nn.Linear):
    """A linear layer of a user's class that computes what ``nn.Linear`` does."""


@dataclass(kw_only=True, repr=False)
class Config(Case):
    """A dense model, its input, and what both go through."""

    width: int = 4
    hidden: int = 5
    gate: str = "none"
    gate_is_second: bool = False
    activation: str = "gelu"
    calls_function: bool = False
    input_norm: str = "none"
    hidden_norm: str = "none"
    biases: tuple[bool, bool, bool] = (True, True, True)
    dropout: tuple[float, float] = (0.0, 0.0)
    order: tuple[int, ...] = tuple(range(8))
    """In which the parts are registered."""
    nested: bool = False
    change: str = "nothing"
    num_blocks: int = 2
    shape: tuple[int, ...] = (2, 5)
    """Of the tokens, without D."""
    used_twice: bool = False


# Drawing


def draw_mlp(random: Random, c: Config) -> None:
    c.width = random.choice((4, 6))
    c.hidden = random.choice((c.width, 5, 8))
    c.gate = random.choice(GATES)
    c.gate_is_second = flip(random)
    c.activation = random.choice(list(ACTIVATIONS))
    c.calls_function = flip(random, 0.4)
    c.input_norm = random.choice(("none", "none", *NORMS))
    c.hidden_norm = random.choice(("none", "none", *NORMS))
    c.biases = (flip(random, 0.7), flip(random, 0.7), flip(random, 0.7))
    if not c.training:
        c.dropout = (random.choice((0.0, 0.3)), random.choice((0.0, 0.3)))
    c.order = tuple(random.sample(range(8), 8))
    c.nested = flip(random, 0.3)


def draw_options(random: Random, c: Config) -> None:
    """The options of ``moefy``."""
    start = random.choice((None, *drawing.STARTS, "copies"))
    # A class of one's own is not saved.
    named = [router for router in drawing.ROUTERS if isinstance(router, str)]
    names = ("token_choice", "token_choice", *named)
    # Before there are thresholds, a first call in evaluation is refused.
    left_out = ("scope",) if c.training else ("scope", "inference")
    c.options = drawing.draw_router(random, names, start, left_out=left_out)
    c.options |= {"num_experts": EXPERTS, "start": start}
    # It averages all experts.
    if c.options["router"] == "uniform":
        c.options["k"] = EXPERTS
    if flip(random):
        c.options["every"] = random.randint(1, c.num_blocks)
    if flip(random, 0.3):
        c.options["targets"] = "*.mlp"


# The dense model


class DrawnMLP(nn.Module):
    """The MLP of a case: its parts lie in any order, and are called in the right one."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        # Packed gates are halves of one layer.
        columns = 2 * c.hidden if c.gate in ("halves", "nn.GLU") else c.hidden
        linear = Named if c.change == "subclass of nn.Linear" else nn.Linear
        linear = Doubled if c.change == "own linear" else linear
        has_two = c.gate == "two layers"
        act: nn.Module = ACTIVATIONS[c.activation][0]()
        act = nn.GLU() if c.gate == "nn.GLU" else act
        act = nn.PReLU() if c.change == "PReLU" else act
        parts: dict[str, nn.Module | None] = {
            "up": linear(c.width, columns, bias=c.biases[0]),
            "other": linear(c.width, c.hidden, bias=c.biases[1]) if has_two else None,
            "act": None if self._calls_function else act,
            "norm": NORMS[c.input_norm](c.width),
            "hidden_norm": NORMS[c.hidden_norm](c.hidden),
            "drop": nn.Dropout(c.dropout[0]),
            "down": linear(c.hidden, c.width, bias=c.biases[2]),
            "last_drop": nn.Dropout(c.dropout[1]),
        }
        names = list(parts)
        if c.nested:
            self.inner: Any = nn.ModuleDict()
        for place in c.order:
            name = names[place]
            part = parts[names[place]]
            if part is None:
                continue
            # Names that say nothing of the roles.
            if c.nested and name in ("up", "drop"):
                self.inner[name] = part
            else:
                self.add_module(name, part)
        if c.change == "batch norm between":
            self.between = nn.BatchNorm1d(columns)
        if c.change == "third layer":
            self.third = nn.Linear(c.width, c.width)
        if c.change == "constant added":
            self.register_buffer("constant", torch.ones(c.width))
        # Biases and norms start at values that would hide their absence.
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.7)

    @property
    def _calls_function(self) -> bool:
        return self.c.calls_function and self.c.gate != "nn.GLU" and self.c.change != "PReLU"

    def part(self, name: str) -> Any:
        inner = self.inner if self.c.nested else {}
        return inner[name] if name in inner else getattr(self, name, None)

    def forward(self, x: Tensor) -> Tensor:
        c = self.c
        rows = x if self.part("norm") is None else self.part("norm")(x)
        u = self.part("up")(rows)
        if c.change == "batch norm between":
            u = self.between(u.flatten(0, -2)).view(u.shape)
        act = ACTIVATIONS[c.activation][1] if self._calls_function else self.part("act")
        if c.gate == "two layers":
            other = self.part("other")(rows)
            h = u * act(other) if c.gate_is_second else act(u) * other
        elif c.gate == "halves":
            first, second = u.chunk(2, dim=-1)
            # In-place activations may not write to a view.
            h = first * act(second.clone()) if c.gate_is_second else act(first.clone()) * second
        else:
            h = act(u)
        h = self.part("drop")(h)
        if c.change == "dropout as a function":
            h = F.dropout(h, 0.5, self.training)
        h = h if self.part("hidden_norm") is None else self.part("hidden_norm")(h)
        y = self.part("last_drop")(self.part("down")(h))
        if c.change == "third layer":
            y = self.third(y)
        if c.change == "constant added":
            y = y + self.constant
        return y + x if c.change == "residual" else y


def read(mlp: DrawnMLP) -> MLPForm:
    """The roles of its parts."""
    c = mlp.c
    activation = ACTIVATIONS[c.activation][1] if mlp._calls_function else mlp.part("act")
    first, other = mlp.part("up"), mlp.part("other")
    return MLPForm(
        [first] if other is None else [first, other],
        mlp.part("down"),
        torch.sigmoid if c.gate == "nn.GLU" else activation,
        gate_is_second=c.gate == "nn.GLU" or (c.gate != "none" and c.gate_is_second),
        input_norm=mlp.part("norm"),
        hidden_norm=mlp.part("hidden_norm"),
        hidden_dropouts=[mlp.part("drop")],
        output_dropouts=[mlp.part("last_drop")],
    )


register(DrawnMLP, read)


class Scale:
    """A hook that changes what a layer gives; a class, so that it pickles."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, part: nn.Module, args: Any, y: Tensor) -> Tensor | None:
        return None if self.factor == 1.0 else y * self.factor


def change(mlp: DrawnMLP) -> None:
    """What a user did to the MLP before."""
    up = mlp.part("up")
    down = mlp.part("down")
    what = mlp.c.change
    if what == "frozen":
        mlp.requires_grad_(False)
    elif what == "hook that reads":
        up.register_forward_hook(Scale(1.0))
    elif what == "hook that scales":
        up.register_forward_hook(Scale(1.5))
    elif what == "own forward":
        down.forward = partial(F.linear, weight=torch.ones(mlp.c.width, mlp.c.hidden))
    elif what == "weight norm":
        parametrizations.weight_norm(up)
    elif what == "spectral norm":
        parametrizations.spectral_norm(down)
    elif what == "pruned":
        prune.random_unstructured(up, "weight", amount=0.4)
    elif what == "tied" and up.weight.shape == down.weight.shape:
        down.weight = up.weight


class Block(nn.Module):
    """Tokens hear their mean, then the MLP."""

    def __init__(self, width: int, mlp: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(1, -2)
        x = x + rows.mean(dim=1).view(len(x), *[1] * (x.dim() - 2), -1)
        y: Tensor = self.mlp(self.norm(x))
        return x + y


def dense_model(c: Config) -> nn.Sequential:
    """The dense model of a case, the same each time."""
    torch.manual_seed(c.seed)
    mlps = [DrawnMLP(c) for _ in range(c.num_blocks)]
    for mlp in mlps:
        change(mlp)
    if c.used_twice:
        mlps[-1] = mlps[0]
    return nn.Sequential(*(Block(c.width, mlp) for mlp in mlps)).train(c.training)


# The definition


def without_parameters(norm: Any, x: Tensor) -> Tensor:
    """A norm whose scale and shift are part of the layer behind it."""
    if norm is None:
        return x
    centered = x if isinstance(norm, nn.RMSNorm) else x - x.mean(dim=-1, keepdim=True)
    return centered / (centered.square().mean(dim=-1, keepdim=True) + norm.eps).sqrt()


def weights_of(experts: Any, expert: int) -> list[Any]:
    """The weights of one expert, and its biases: first layer, last layer."""
    found = list[Tensor | None]()
    for layer in ("up", "down"):
        for name in ("weight", "bias"):
            value = getattr(getattr(experts, layer), name)
            found.append(None if value is None else value[expert])
    return found


def mlp_by_formula(c: Config, x_TD: Tensor, weights: list[Any]) -> Tensor:
    """The case's MLP with these weights and biases: first layer, last layer."""
    up, up_bias, down, down_bias = weights
    act = torch.sigmoid if c.gate == "nn.GLU" else ACTIVATIONS[c.activation][1]
    u_TU = without_parameters(NORMS[c.input_norm](c.width), x_TD) @ up.T
    u_TU = u_TU if up_bias is None else u_TU + up_bias
    h_TH = act(u_TU[:, : c.hidden])
    if c.gate != "none":  # whichever half the MLP gates by, an expert's first half is the gate
        h_TH = h_TH * u_TU[:, c.hidden :]
    y_TD = without_parameters(NORMS[c.hidden_norm](c.hidden), h_TH) @ down.T
    return y_TD if down_bias is None else y_TD + down_bias


def by_hand(c: Config, layer: Any, x: Tensor, routing: gmoe.Routing) -> Tensor:
    """One expert after another on its tokens."""
    x_TD = x.reshape(-1, c.width)
    weights_E = [weights_of(layer.experts, expert) for expert in range(EXPERTS)]
    y_TD = torch.zeros_like(x_TD)
    ends = [0, *routing.offsets.tolist()]
    for expert in range(EXPERTS):
        pairs = slice(ends[expert], ends[expert + 1])
        token_P = routing.token[pairs]
        y_PD = mlp_by_formula(c, x_TD[token_P], weights_E[expert])
        y_TD = y_TD.index_add(0, token_P, y_PD * routing.weight[pairs, None])
    y = y_TD.view(x.shape)
    return y if layer.shared_expert is None else y + layer.shared_expert(x)


class Given(NamedTuple):
    """The tokens of a call."""

    x: Tensor

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {"x": self.x}


def layers_of(model: nn.Module) -> list[Any]:
    return [part for part in model.modules() if isinstance(part, MoELayer)]


def save(c: Config, model: nn.Module, given: Given) -> nn.Module:
    """Through files."""
    with tempfile.TemporaryDirectory() as folder:
        gmoe.save(model, folder)
        return gmoe.load(folder, base=dense_model(c).eval())


def without_idle_experts(c: Config, model: nn.Module, given: Given) -> nn.Module:
    with torch.no_grad(), gmoe.record_routing(model.eval()) as routings:
        model(given.x)
    gmoe.prune(model, routings)
    return model


class Moefy(Target):
    """Random MLPs that become experts."""

    name = "moefy"
    tolerance = 1e-9
    share = 0.2
    own_after: ClassVar = {"save": save, "prune": without_idle_experts}
    reasons = (
        Reason("every: got", lambda c: c.options.get("every", EXPERTS) > c.num_blocks),
        Reason(
            "model: got .* with a gate or a value that has no bias",
            lambda c: c.options["start"] in ("copies", "plain"),
        ),
        Reason("model: got", lambda c: c.change not in PLAIN),
        Reason("routings: got .* of a forward", lambda c: c.used_twice and c.after == "prune"),
        Reason("routings: got some in which no expert", lambda c: c.after == "prune"),
        Reason(r"model: got \w+, of which no expert", lambda c: c.after == "prune"),
    )

    def draw(self, random: Random) -> Config:
        c = Config(seed=random.getrandbits(30), change=random.choice(CHANGES))
        c.num_blocks = random.randint(2, 4)
        c.used_twice = flip(random, 0.15)
        c.shape = random.choice(((2, 5), (1, 7), (3, 1), (2, 2, 3), (1, 3, 1)))
        # In training these two change from call to call.
        changes = c.change in ("dropout as a function", "spectral norm")
        c.training = not changes and flip(random, 0.3)
        draw_mlp(random, c)
        draw_options(random, c)
        fails = {"deepcopy"} if c.change == "pruned" else set()  # torch refuses these itself
        fails |= {"pickle"} if c.change.endswith(" norm") else set()
        self.draw_steps(random, c, fails)
        return c

    def traits(self, case: Config) -> Collection[str]:
        options = case.options
        named = {case.change, f"start {options['start']}", options["router"]}
        return {*named, *case.before, case.after}

    def has_layers(self, case: Config) -> bool:
        return True

    def module_of(self, case: Config) -> Call:
        return Call(gmoe.moefy, Call(dense_model, case), **case.options)

    def given_of(self, case: Config, seed: int, dtype: torch.dtype = torch.float64) -> Given:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(*case.shape, case.width, generator=generator, dtype=dtype)
        return Given(case.features(x).requires_grad_())

    def dense(self, case: Config) -> Any:
        return dense_model(case)

    def build(self, case: Config) -> Any:
        """The converted model; raise if a refusal changes the dense one."""
        dense = dense_model(case)
        try:
            return gmoe.moefy(dense, **case.options)
        except ValueError:
            states = dense.state_dict(), dense_model(case).state_dict()
            require_equal("the dense model after a refusal", *states, self.tolerance)
            raise

    def twin(self, case: Config, module: nn.Module) -> Any:
        """Another one, since torch does not copy weights that it pruned."""
        return self.ready(case)

    def call(self, case: Config, module: nn.Module, given: Given) -> Output:
        if not layers_of(module):
            return Output({"y": module(given.x)}, [])
        with gmoe.record_routing(module) as routings:
            y = module(given.x)
        return Output({"y": y}, routings)

    def define(self, case: Config, module: nn.Module, given: Given) -> Output:
        """The model with each layer of experts by hand, on the layer's own routing."""

        def forward(layer: Any, x: Tensor) -> Tensor:
            _, routing = type(layer).forward(layer, x, return_routing=True)
            return by_hand(case, layer, x, routing)

        # An attribute of the layer, which the blocks that share it all find.
        for layer in layers_of(module):
            layer.forward = partial(forward, layer)
        return self.call(case, module, given)

    def change(self, given: Given) -> Given:
        steps.change_in_place([given.x])
        return given
