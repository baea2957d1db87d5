"""A random composer of ``moefy``: a number is a dense model, and how it is converted.

``python -m tests.compose_moefy 4711`` shows a number, ``python -m tests.compose_moefy 0 5000`` runs
a range. Each number has to start as its dense model, then each layer, with new random parameters,
has to equal its definition in output and gradients, and last the model has to stay the same through
a copy, a save, a fold, an unstack. What is refused is refused in the library's own words, and a
plain MLP is not refused.

Shapes: T tokens, D width, H hidden features, E experts, P pairs.
"""

from __future__ import annotations

import copy
import pickle
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import gmoe
from gmoe.moe import MoELayer
from tests.composer import Composer, Outcome, judged

TOLERANCE = 1e-9
EXPERTS = 3

ACTIVATIONS: dict[str, tuple[Callable[[], nn.Module], Callable[[Tensor], Tensor]]] = {
    "gelu": (nn.GELU, F.gelu),
    "tanh-gelu": (partial(nn.GELU, "tanh"), partial(F.gelu, approximate="tanh")),
    "relu": (nn.ReLU, F.relu),
    "relu in place": (partial(nn.ReLU, inplace=True), F.relu),
    "silu": (nn.SiLU, F.silu),
    "sigmoid": (nn.Sigmoid, torch.sigmoid),
    "tanh": (nn.Tanh, torch.tanh),
}
"""Each as a module and as a function. All of them are found when an MLP calls the function."""

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
AFTER = (
    *("nothing", "deepcopy", "pickle", "state dict", "save", "fold", "unstack", "restack"),
    *("prune", "densify"),
)
ROUTERS: dict[str, Sequence[Mapping[str, Any]]] = {
    "token_choice": (
        {},
        {},
        {"balance": "bias"},
        {"noise": True},
        {"capacity_factor": 0.7},
        {"weight": "normalized"},
        {"top_p": 0.7},
    ),
    "expert_choice": ({}, {"normalize": "tokens"}, {"capacity_factor": 2.0}),
    "attention_vote": ({}, {"shared_queries": True}),
    "multi_centroid": ({}, {"choice": "experts"}, {"num_centroids": 2}),
    "random": ({},),
    "uniform": ({},),
}


class Doubled(nn.Linear):
    """A linear layer that computes something else than ``nn.Linear``."""

    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * super().forward(x)


class Named(nn.Linear):
    """A linear layer of a user's class that computes what ``nn.Linear`` does."""


@dataclass(frozen=True)
class Config:
    """What a number draws."""

    number: int
    width: int
    hidden: int
    gate: str
    gate_is_second: bool
    activation: str
    calls_function: bool
    input_norm: str
    hidden_norm: str
    biases: tuple[bool, bool, bool]
    dropout: tuple[float, float]
    order: tuple[int, ...]
    """In which the parts are registered."""
    nested: bool
    change: str
    num_blocks: int
    shape: tuple[int, ...]
    """Of the tokens, without D."""
    used_twice: bool
    by_targets: bool
    training: bool
    options: Mapping[str, Any]
    after: str


def draw(number: int) -> Config:
    random = Random(number)
    gate = random.choice(GATES)
    training = random.random() < 0.3
    rates = (0.0, 0.0) if training else (random.choice((0.0, 0.3)), random.choice((0.0, 0.3)))
    num_blocks = random.randint(2, 4)
    start = random.choice((None, "shared", "copies", "copies", "plain"))
    # Most routers are refused beside copies.
    often = ("token_choice",) * (9 if start == "copies" else 2)
    router = random.choice([*ROUTERS, *often])
    options: dict[str, Any] = {
        "router": router,
        "router_kwargs": random.choice(ROUTERS[router]),
        "num_experts": EXPERTS,
        "start": start,
        "backend": random.choice(("auto", "auto", "loop", "padded", "grouped")),
    }
    options["k"] = EXPERTS if router == "uniform" else random.choice((1, 1, 2, EXPERTS))
    if options["start"] != "copies":
        options["upcycle"] = random.random() < 0.7
    where = random.choice(("every", "blocks", "default"))
    if where == "every":
        options["every"] = random.randint(1, num_blocks)
    elif where == "blocks":
        options["blocks"] = random.sample(range(-num_blocks, 0), random.randint(1, num_blocks))
    rows = random.choice(((2, 5), (1, 7), (3, 1), (2, 2, 3), (1, 3, 1)))
    width = random.choice((4, 6))
    hidden = random.choice((width, 5, 8))
    change = random.choice(CHANGES)
    return Config(
        number=number,
        width=width,
        hidden=hidden,
        gate=gate,
        gate_is_second=random.random() < 0.5,
        activation=random.choice(list(ACTIVATIONS)),
        calls_function=random.random() < 0.4,
        input_norm=random.choice(("none", "none", *NORMS)),
        hidden_norm=random.choice(("none", "none", *NORMS)),
        biases=(random.random() < 0.7, random.random() < 0.7, random.random() < 0.7),
        dropout=rates,
        order=tuple(random.sample(range(8), 8)),
        nested=random.random() < 0.3,
        change=change,
        num_blocks=num_blocks,
        shape=rows,
        used_twice=random.random() < 0.15,
        by_targets=random.random() < 0.3,
        # In training these two change from call to call.
        training=training and change not in ("dropout as a function", "spectral norm"),
        options=options,
        after=random.choice(AFTER),
    )


# The dense model ----------------------------------------------------------------------------------


class DrawnMLP(nn.Module):
    """The MLP of a number: its parts lie in any order, and are called in the right one."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.c = c
        columns = 2 * c.hidden if c.gate in ("halves", "nn.GLU") else c.hidden
        linear = Named if c.change == "subclass of nn.Linear" else nn.Linear
        linear = Doubled if c.change == "own linear" else linear
        act: nn.Module = ACTIVATIONS[c.activation][0]()
        act = nn.GLU() if c.gate == "nn.GLU" else act
        act = nn.PReLU() if c.change == "PReLU" else act
        parts: dict[str, nn.Module | None] = {
            "up": linear(c.width, columns, bias=c.biases[0]),
            "other": linear(c.width, c.hidden, bias=c.biases[1])
            if c.gate == "two layers"
            else None,
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
            name, part = names[place], parts[names[place]]
            if part is None:
                continue
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


class Scale:
    """A hook that changes what a layer gives; a class, so that it pickles."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, part: nn.Module, args: Any, y: Tensor) -> Tensor | None:
        return None if self.factor == 1.0 else y * self.factor


def change(mlp: DrawnMLP) -> None:
    """What a user did to the MLP before."""
    up, down, what = mlp.part("up"), mlp.part("down"), mlp.c.change
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


def build(c: Config) -> nn.Sequential:
    """The dense model of a number, the same each time."""
    torch.manual_seed(c.number)
    mlps = [DrawnMLP(c) for _ in range(c.num_blocks)]
    for mlp in mlps:
        change(mlp)
    if c.used_twice:
        mlps[-1] = mlps[0]
    return nn.Sequential(*(Block(c.width, mlp) for mlp in mlps)).train(c.training)


def options_of(c: Config) -> dict[str, Any]:
    """The arguments of ``moefy``."""
    return dict(c.options) | ({"targets": "*.mlp"} if c.by_targets else {})


# The definition -----------------------------------------------------------------------------------


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


def by_hand(c: Config, layer: Any, x: Tensor, routing: gmoe.Routing) -> Tensor:
    """One expert after another on its tokens, by the formula of the number's MLP."""
    norms = DrawnMLP(c)
    act = torch.sigmoid if c.gate == "nn.GLU" else ACTIVATIONS[c.activation][1]
    x_TD = x.reshape(-1, c.width)
    y_TD = torch.zeros_like(x_TD)
    ends = [0, *routing.offsets.tolist()]
    for expert in range(EXPERTS):
        pairs = slice(ends[expert], ends[expert + 1])
        token_P = routing.token[pairs]
        up, up_bias, down, down_bias = weights_of(layer.experts, expert)
        u_PU = without_parameters(norms.part("norm"), x_TD[token_P]) @ up.T
        u_PU = u_PU if up_bias is None else u_PU + up_bias
        h_PH = act(u_PU[:, : c.hidden])
        if c.gate != "none":  # whichever half the MLP gates by, an expert's first half is the gate
            h_PH = h_PH * u_PU[:, c.hidden :]
        y_PD = without_parameters(norms.part("hidden_norm"), h_PH) @ down.T
        y_PD = y_PD if down_bias is None else y_PD + down_bias
        y_TD = y_TD.index_add(0, token_P, y_PD * routing.weight[pairs, None])
    y = y_TD.view(x.shape)
    return y if layer.shared_expert is None else y + layer.shared_expert(x)


# Running ------------------------------------------------------------------------------------------


class DifferentError(AssertionError):
    """Numbers that should be equal are not."""


def same(what: str, ours: Tensor, theirs: Tensor) -> None:
    """Raise :class:`DifferentError` for numbers that differ."""
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs, TOLERANCE, TOLERANCE):
        gap = (ours - theirs).abs().max().item() if ours.shape == theirs.shape else torch.nan
        raise DifferentError(f"{what}: differs by {gap:.1e}")


def check_layer(c: Config, name: str, layer: Any, x: Tensor) -> None:
    """Output and gradients of a layer are those of its definition."""
    x = x.detach().requires_grad_()
    mixed, routing = layer(x, return_routing=True)
    expected = by_hand(c, layer, x, routing)
    same(f"{name}, output", mixed, expected)
    leaves = {"x": x, **{key: p for key, p in layer.named_parameters() if p.requires_grad}}
    factor = torch.linspace(0.5, 1.5, mixed.numel()).view(mixed.shape)
    pairs = [
        torch.autograd.grad(
            (y * factor).sum(),
            list(leaves.values()),
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        for y in (mixed, expected)
    ]
    for key, ours, theirs in zip(leaves, *pairs, strict=True):
        same(f"{name}, gradient of {key}", ours, theirs)


@torch.no_grad()
def redraw(c: Config, model: nn.Module) -> None:
    """New values for all parameters, so that experts differ."""
    generator = torch.Generator().manual_seed(c.number)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)


def inputs_of(model: nn.Module, x: Tensor) -> dict[str, tuple[Any, Tensor]]:
    """The layers with experts, and the tokens that each gets first."""
    found: dict[str, tuple[Any, Tensor]] = {}
    hooks = []
    for name, part in model.named_modules():
        if isinstance(part, MoELayer):

            def note(part: Any, args: Any, name: str = name) -> None:
                found.setdefault(name, (part, args[0]))

            hooks.append(part.register_forward_pre_hook(note))
    model(x)
    for hook in hooks:
        hook.remove()
    return found


def go_on(c: Config, model: nn.Module, x: Tensor) -> nn.Module:
    """What the model goes through at the end; outputs should stay."""
    if c.after == "deepcopy" and c.change != "pruned":  # torch refuses this one itself
        return copy.deepcopy(model)
    if c.after == "pickle" and not c.change.endswith(" norm"):  # torch refuses those itself
        again: nn.Module = pickle.loads(pickle.dumps(model))
        return again
    if c.after == "state dict":
        other = gmoe.moefy(build(c).eval(), **options_of(c))
        other.load_state_dict(model.state_dict())
        return other
    if c.after == "save":
        with tempfile.TemporaryDirectory() as folder:
            gmoe.save(model, folder, x)
            return gmoe.load(folder, base=build(c).eval())
    if c.after == "fold":
        return gmoe.fold(model)
    if c.after in ("unstack", "restack"):
        gmoe.unstack(model)
        return gmoe.restack(model) if c.after == "restack" else model
    if c.after == "prune":
        gmoe.prune(model, x)
    if c.after == "densify":
        gmoe.densify(model)
    return model


def compute(c: Config) -> Outcome:
    """Raise what is wrong with a number."""
    dense = build(c)
    x = torch.randn(*c.shape, c.width, generator=torch.Generator().manual_seed(c.number))
    expected = build(c)
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    try:
        model = gmoe.moefy(dense, **options_of(c))
    except ValueError:
        for name, value in dense.state_dict().items():
            same(f"{name} after a refusal", value, before[name])
        raise
    torch.manual_seed(1)
    theirs = expected(x)
    torch.manual_seed(1)
    ours = model(x)
    if c.options["start"] != "plain":
        same("first forward", ours, theirs)
    redraw(c, model)
    for name, (layer, tokens) in inputs_of(model, x).items():
        check_layer(c, name, layer, tokens)
    model.eval()
    torch.manual_seed(2)
    last = model(x)
    model = go_on(c, model, x)
    torch.manual_seed(2)
    same(f"after {c.after}", model.eval()(x), last)
    return Outcome(0.0, "equal")


def may_refuse(c: Config, message: str) -> bool:
    """True if a refusal is one that this number can get."""
    start = c.options["start"]
    if message.startswith("start: got 'copies' with"):
        return start == "copies"
    if message.startswith("every: got"):
        return "every" not in c.options or c.options["every"] > c.num_blocks
    if "with a gate or a value that has no bias" in message:
        return start in ("copies", "plain")
    if message.startswith(("k: got", "weight: got", "normalize: got", "top_p: got")):
        return True
    return c.change not in PLAIN


def run(number: int) -> Outcome:
    """A number's outcome."""
    return judged(draw, compute, may_refuse, number)


def traits(c: Config) -> set[str]:
    return {c.change, c.after, str(c.options["start"]), c.options["router"]}


COMPOSER = Composer("compose_moefy", draw, run, traits)

if __name__ == "__main__":
    raise SystemExit(COMPOSER.main(*map(int, sys.argv[1:])))
