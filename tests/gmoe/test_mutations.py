"""One list of mutations for every convertible kind: refused by name, or what the dense one is.

A mutation changes what a layer computes, for all tokens or for some, or which of its parameters
train. As copies, experts either do the same, in outputs, gradients and training, or are refused.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch_geometric.nn import GCNConv, SAGEConv
from torch_geometric.nn import Linear as PyGLinear

from gmoe import moefy
from gmoe.mlps import MLPForm, register

D = 8


class Dense(nn.Module):
    """An MLP of a class that is registered."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(D, 12), nn.Linear(12, D)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(self.fc1(x).relu())
        return y


register(Dense, lambda mlp: MLPForm([mlp.fc1], mlp.fc2, torch.relu))

KINDS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "MLP": (Dense, ()),
    "linear": (nn.Linear, (D, D)),
    "PyG's linear": (PyGLinear, (D, D)),
    "stacked conv": (GCNConv, (D, D)),
    "conv of two maps": (SAGEConv, (D, D)),
}
"""Classes, and what their layers are built with."""

CONVS = ("stacked conv", "conv of two maps")
Compute = Callable[[Tensor], Tensor]


def without_gradient(x: Tensor, dense: Compute) -> Tensor:
    with torch.no_grad():
        return dense(x)


MUTATIONS: dict[str, Callable[[nn.Module, Tensor, Compute], Tensor]] = {
    "nothing": lambda _, x, dense: dense(x),
    "twice": lambda _, x, dense: 2 * dense(x),
    "residual": lambda _, x, dense: dense(x) + x,
    "clamped": lambda _, x, dense: dense(x).clamp(-50, 50),
    "detached input": lambda _, x, dense: dense(x.detach()),
    "half of the gradient": lambda _, x, dense: dense((x + x.detach()) / 2),
    "no_grad": lambda _, x, dense: without_gradient(x, dense),
    "zeros stay zeros": lambda _, x, dense: torch.where((x == 0).all(-1, True), 0.0, dense(x)),
    "small tokens": lambda _, x, dense: dense(torch.where(x.abs().amax(-1, True) < 0.01, 0.0, x)),
    "one token": lambda _, x, dense: 2 * dense(x) if x.numel() == D else dense(x),
    "many tokens": lambda _, x, dense: 2 * dense(x) if x.numel() > 64 * D else dense(x),
    "mean of tokens": lambda _, x, dense: dense(x - x.mean(dim=0)),
    "training": lambda layer, x, dense: 2 * dense(x) if layer.training else dense(x),
    "own dtype": lambda _, x, dense: 2 * dense(x) if x.dtype == torch.float32 else dense(x),
    "random in training": lambda layer, x, dense: nn.functional.dropout(
        dense(x), 0.5, layer.training
    ),
}
FROZEN = ("weight", "bias")


def mutated(kind: str, mutation: str) -> nn.Module:
    """A layer of a class that inherits from the kind's."""
    base: Any = KINDS[kind][0]

    class Mutated(base):
        def forward(self, x: Tensor) -> Tensor:
            return MUTATIONS[mutation](self, x, super().forward)

    class MutatedConv(base):
        def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
            return MUTATIONS[mutation](self, x, lambda x: base.forward(self, x, edge_index))

    MutatedConv.__name__ += base.__name__  # by which PyG caches what it generates
    torch.manual_seed(0)
    made: nn.Module = (MutatedConv if kind in CONVS else Mutated)(*KINDS[kind][1])
    return made


def frozen(kind: str, part: str) -> nn.Module:
    base, arguments = KINDS[kind]
    torch.manual_seed(0)
    layer: nn.Module = base(*arguments)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(part not in name)
    return layer


class Model(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        is_conv = hasattr(self.layer, "flow")
        y: Tensor = self.layer(x, loops(x)) if is_conv else self.layer(x)
        return y


def loops(x: Tensor) -> Tensor:
    """An edge from each node to itself and to the next one."""
    node = torch.arange(len(x))
    return torch.stack([torch.cat([node, node]), torch.cat([node, (node + 1) % len(x)])])


def tokens() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(65, D, generator=generator)
    with_zeros = x.clone()
    with_zeros[3:9] = 0
    return [x[:1], x[:8], x, with_zeros, 0.001 * x, 1000 * x, x.double()]


def converted(dense: nn.Module, start: str) -> tuple[nn.Module, nn.Module] | None:
    """A model and its copy with experts; ``None`` if it is refused in gmoe's words."""
    model = Model(dense)
    other = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # convs of one's own run one by one
        try:
            # Its weights have no gradient, of which the tokens would get a part.
            options: Any = {"router": "uniform", "k": 2, "num_experts": 2, "start": start}
            return model, moefy(other, targets="layer", **options)
        except ValueError as error:
            if ": got " not in str(error) or ", expected " not in str(error):
                raise
            return None


def require_equal(model: nn.Module, moefied: nn.Module, x: Tensor) -> None:
    """Outputs, the gradient of the input, and whether there is one."""
    found = []
    for one in (model, moefied):
        torch.manual_seed(0)
        leaf = x.clone().requires_grad_()
        y = one.to(x.dtype)(leaf)
        gradient = None
        if y.requires_grad:
            (gradient,) = torch.autograd.grad(y.square().sum(), leaf, allow_unused=True)
        found.append((y.detach(), leaf.new_zeros(leaf.shape) if gradient is None else gradient))
    for ours, theirs in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("start", ["copies", "shared"])
@pytest.mark.parametrize("mutation", MUTATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_mutated_layer_is_refused_or_stays_what_it_is(
    kind: str, mutation: str, start: str
) -> None:
    both = converted(mutated(kind, mutation), start)
    if mutation == "nothing" and not ("linear" in kind and start == "copies"):
        assert both is not None  # of a linear layer, a class with a forward is refused by its name
    if both is None:
        return
    model, moefied = both
    for x in tokens():
        for training in (False, True):
            if mutation == "random in training" and training:
                continue  # the experts draw numbers of their own
            require_equal(model.train(training), moefied.train(training), x)


@pytest.mark.parametrize("start", ["copies", "shared"])
@pytest.mark.parametrize("part", FROZEN)
@pytest.mark.parametrize("kind", KINDS)
def test_what_was_frozen_does_not_train(kind: str, part: str, start: str) -> None:
    both = converted(frozen(kind, part), start)
    if both is None:
        assert start == "copies"
        return
    model, moefied = both
    require_equal(model, moefied, tokens()[1])
    owner: Any = moefied.layer
    owner = owner.experts if start == "copies" else owner.shared_expert
    names = [name for name, value in owner.named_parameters() if value.requires_grad]
    assert not [name for name in names if part in name]
