"""moefy where blocks hold the layers of their MLP themselves: torch's, and halves."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gmoe import MoE, moefy
from gmoe.split_mlps import joined

WIDTH = 16


def _encoder(**options: Any) -> Any:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 24, **{"batch_first": True, **options})
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor="activation" not in options)


MODELS: dict[str, tuple[Callable[[], Any], int]] = {
    "encoder": (_encoder, 1),
    "encoder, norm first": (lambda: _encoder(norm_first=True), 1),
    "encoder, GELU": (lambda: _encoder(activation=nn.GELU()), 1),
    "encoder, a function": (lambda: _encoder(activation=F.silu), 1),
    "encoder, batch second": (lambda: _encoder(batch_first=False), 1),
    "encoder, no bias": (lambda: _encoder(bias=False), 1),
    "decoder": (lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, 2, 24), 2), 2),
    "both": (lambda: nn.Transformer(WIDTH, 2, 2, 2, 24), 2),
}
"""Models of torch's layers, and how many inputs they take."""


def _run(model: Any, num_inputs: int, *, has_gradients: bool, is_padded: bool) -> Tensor:
    torch.manual_seed(0)
    x = torch.randn(3, 5, WIDTH)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    with torch.set_grad_enabled(has_gradients):
        if not is_padded:
            return model(*[x] * num_inputs)
        out: Tensor = model(x, src_key_padding_mask=padding)
        return out.masked_fill(padding[:, :, None], 0)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("start", ["shared", "copies"])
@pytest.mark.parametrize("name", MODELS)
def test_torchs_layers_start_as_they_are_and_train(name: str, start: Any) -> None:
    build, num_inputs = MODELS[name]
    torch.manual_seed(1)
    dense = build().eval()
    model = moefy(copy.deepcopy(dense), num_experts=3, start=start, every=1)
    # In evaluation without gradients, torch takes roads that read weights and call no layer.
    for is_padded in (False, True) if name == "encoder" else (False,):
        for has_gradients in (False, True):
            found, expected = (
                _run(one, num_inputs, has_gradients=has_gradients, is_padded=is_padded)
                for one in (model, dense)
            )
            torch.testing.assert_close(found, expected)
    model.train()
    _run(model, num_inputs, has_gradients=True, is_padded=False).square().sum().backward()
    layers = [part for part in model.modules() if isinstance(part, MoE)]
    assert len(layers) == (4 if name == "both" else 2)
    assert all(parameter.grad is not None for layer in layers for parameter in layer.parameters())
    model.eval()
    expected = _run(model, num_inputs, has_gradients=True, is_padded=False)
    for twin in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        found = _run(twin, num_inputs, has_gradients=True, is_padded=False)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "target", ["layers.*.linear1", "layers.*.linear2", "layers.*.self_attn.out_proj"]
)
def test_layers_that_torch_reads_and_does_not_call_are_refused(target: str) -> None:
    model = _encoder()
    with pytest.raises(ValueError, match=rf"targets: got {target.replace('*', '0')}, whose weight"):
        moefy(model, targets=target)
    moefy(model, targets="layers.1")
    assert [isinstance(layer.linear1, MoE) for layer in model.layers] == [False, True]


@pytest.mark.parametrize("activation", [F.relu, nn.SiLU()])
def test_an_error_leaves_the_model_as_it_was(activation: Any) -> None:
    model = _encoder(activation=activation)
    before = sorted(repr(model).splitlines())
    kept, keys = model.layers[0].activation, model.state_dict().keys()
    with pytest.raises(ValueError, match="router_kwargs"):
        moefy(model, router_kwargs={"temperatur": 1})
    assert sorted(repr(model).splitlines()) == before
    assert model.layers[0].activation is kept
    assert model.state_dict().keys() == keys
    with joined(nn.ModuleDict({"mlp": nn.Linear(2, 2)}), ["mlp"]):
        pass  # a name that is no such place is left alone


def _block(begins_with_dense: bool) -> Any:
    """A block as Hugging Face's are: of two halves."""

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(WIDTH, 24)
            self.intermediate_act_fn = F.gelu

        def forward(self, x: Tensor) -> Tensor:
            return self.intermediate_act_fn(self.dense(x))

    class Second(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(24)
            self.dense = nn.Linear(24, WIDTH)

        def forward(self, x: Tensor, residual: Tensor) -> Tensor:
            out: Tensor = self.dense(x if begins_with_dense else self.norm(x))
            return out + residual

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.intermediate = First()
            self.output = Second()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.output(self.intermediate(x), x)
            return out

    for cls in (First, Second, Block):
        cls.__module__ = "transformers.models.made_up"
    return Block()


def test_a_second_half_that_begins_with_something_else_is_refused() -> None:
    model: nn.Module = nn.Sequential(*(_block(begins_with_dense=False) for _ in range(2)))
    with pytest.raises(ValueError, match="output, a Second, expected one whose `dense` acts first"):
        moefy(model)
    dense = nn.Sequential(*(_block(begins_with_dense=True) for _ in range(2)))
    x = torch.randn(2, 3, WIDTH)
    model = moefy(copy.deepcopy(dense), targets="*", num_experts=3)
    torch.testing.assert_close(model(x), dense(x))
    assert sum(isinstance(part, MoE) for part in model.modules()) == 2
