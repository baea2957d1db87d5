"""Random layers and models give the same compiled."""

from __future__ import annotations

import pytest
import torch

from tests import compose_compile
from tests.compose_compile import COMPOSER
from tests.composer import CHUNK
from tests.torch_versions import COMPILES_GRAPHS


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 100, CHUNK))
@COMPILES_GRAPHS
def test_numbers(first: int) -> None:
    COMPOSER.check(first, equal=0.6)


def test_a_compiler_that_computes_something_else_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(module: torch.nn.Module, **_: object) -> object:
        module.register_forward_hook(lambda _, __, y: (1.001 * y[0], *y[1:]))
        return module

    monkeypatch.setattr(torch, "compile", compiled)
    outcomes = [compose_compile.run(number) for number in range(5)]
    assert {outcome.kind for outcome in outcomes} <= {"failed", "refused"}
    assert any(outcome.kind == "failed" for outcome in outcomes)
