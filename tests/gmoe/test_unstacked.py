"""Experts as one nn.Linear each: the same outputs, found by quantization."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic
from torch.nn.utils import parametrizations

import gmoe
from gmoe.stack import has_base
from gmoe.unstacked import UnstackedLinears
from tests.helpers.equal import assert_same
from tests.helpers.folded import fold
from tests.helpers.shrunk import CONVS, EDGES, EXPERTS, WIDTH, X, conv_layer, moefied
from tests.helpers.vits import images

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def gradients(model: nn.Module, out: Tensor) -> dict[str, Tensor]:
    out.square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("conv", "start", "k"),
    [
        *((conv, "shared", 2) for conv in CONVS),
        # A base and its differences become whole weights; without either there is one tensor.
        ("gat", "copies", 1),
        ("gin", "copies", 2),
        ("gat", "plain", 2),
        ("several kinds", "shared", 1),
    ],
)
def test_unstacked_convs_give_the_same(conv: str, start: str, k: int) -> None:
    layer = conv_layer(CONVS[conv], start, "token_choice", k)
    expected = layer(X, EDGES)
    stacked = fold(copy.deepcopy(layer))
    gmoe.unstack(layer)
    is_stacked = conv != "one by one"
    assert any(isinstance(part, UnstackedLinears) for part in layer.modules()) == is_stacked
    assert not any(isinstance(part, gmoe.LinearExperts) for part in layer.modules())
    assert_same(layer(X, EDGES), expected)
    found = gradients(layer, layer(X, EDGES))
    of_stacked = gradients(stacked, stacked(X, EDGES))
    assert_same(found["router.gate.weight"], of_stacked["router.gate.weight"])
    for name, gradient in of_stacked.items():
        unstacked = f"{name.removesuffix('weight')}linears.0.weight"
        if unstacked in found:
            assert_same(found[unstacked], gradient[0])


def saved_size(model: nn.Module) -> int:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return file.tell()


def test_dynamic_quantization_finds_the_experts() -> None:
    """And leaves them alone where they are stacked. Some experts get no token."""
    model = moefied(start="copies").float()
    x = images(1).float()
    expected = model(x)
    left = quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    quantized = quantize_dynamic(gmoe.unstack(model), {nn.Linear}, dtype=torch.qint8)
    experts = [part for part in quantized.modules() if isinstance(part, UnstackedLinears)]
    assert len(experts) == 4
    for part in experts:
        assert all("quantized" in type(linear).__module__ for linear in part.linears)
    assert saved_size(quantized) < 0.6 * saved_size(left)
    assert float((quantized(x) - expected).norm() / expected.norm()) < 0.2


def test_one_layer_of_linear_experts_is_replaced_itself() -> None:
    experts = gmoe.LinearExperts(WIDTH, 3, num_experts=EXPERTS).double()
    layer = gmoe.MoE(gmoe.TokenChoice(WIDTH, num_experts=EXPERTS), experts).double().eval()
    expected = layer(X)
    assert_same(gmoe.unstack(layer)(X), expected)
    assert isinstance(gmoe.unstack(experts), UnstackedLinears)


def test_frozen_layers_stay_frozen() -> None:
    model = moefied(start="plain").requires_grad_(False)
    assert not any(p.requires_grad for p in gmoe.unstack(model).parameters())


@pytest.mark.parametrize("frozen", ["base", "difference"])
def test_unstacked_layers_learn_if_either_part_did(frozen: str) -> None:
    layer = conv_layer("gcn", "copies", "token_choice", 1)
    for name, parameter in layer.experts.named_parameters():
        parameter.requires_grad_(name.endswith(f"weight_{frozen}"))
    with torch.no_grad():
        linears = gmoe.unstack(layer).experts.lin.linears
    assert all(linear.weight.requires_grad for linear in linears)


def test_changed_layers_are_refused() -> None:
    model = moefied(start="plain")
    parametrizations.weight_norm(model.blocks[0].mlp.experts.up)
    with pytest.raises(ValueError, match=r"experts\.up with hooks"):
        gmoe.unstack(model)


@pytest.mark.parametrize("conv", [conv for conv in CONVS if conv != "one by one"])
def test_unstacked_experts_are_neither_taken_out_nor_drawn_anew(conv: str) -> None:
    layer = gmoe.unstack(conv_layer(CONVS[conv], "plain", "token_choice", 1))
    before = copy.deepcopy(layer.state_dict())
    for call in (layer.reset_parameters, lambda: layer.expert(0)):
        with pytest.raises(ValueError, match=r"^(experts|model): got .* unstack last$"):
            call()
    assert all(value.equal(before[name]) for name, value in layer.state_dict().items())
    experts = gmoe.unstack(gmoe.MLPExperts(4, 8, 4, num_experts=2))
    with pytest.raises(ValueError, match=r"^model: got .* unstack last$"):
        experts.reset_parameters()


def test_a_refused_unstack_changes_nothing() -> None:
    layer = conv_layer("gcn", "copies", "token_choice", 1)
    layer.experts.lin.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"^model: got .* with .*hook"):
        gmoe.unstack(layer)
    assert has_base(layer.experts)
