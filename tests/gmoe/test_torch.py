"""What gmoe uses of torch that is private there: each does what gmoe takes it for."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from gmoe import _torch

GMOE = Path(_torch.__file__).parent


def test_untraced_code_runs_and_cuts_a_compiled_function_in_two() -> None:
    assert _torch.untraced(lambda x: x + 1)(1) == 2
    untraced: Any = _torch.untraced(torch.exp)

    def run(x: Tensor) -> Any:
        return untraced(x)

    cut = torch.compile(run, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        cut(torch.ones(2))
    assert _torch.is_compiler_loaded()


def test_several_tensors_are_copied_at_once() -> None:
    targets = [torch.zeros(2), torch.zeros(3, dtype=torch.float64)]
    _torch.copy_all(targets, [torch.ones(2), torch.ones(3, dtype=torch.float64)])
    assert all(bool((target == 1).all()) for target in targets)


def test_code_that_becomes_untraced_does_not_load_the_compiler() -> None:
    script = """
from gmoe import _torch
_torch.untraced(lambda x: x)
assert not _torch.is_compiler_loaded()
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=GMOE.parent)


def test_a_transform_of_torch_func_is_seen_inside_of_it() -> None:
    def inside(x: Tensor) -> Tensor:
        assert _torch.in_transform()
        return x

    assert not _torch.in_transform()
    torch.func.vmap(inside)(torch.ones(2))


def test_tracing_is_seen_inside_of_it_and_compiled_code_is_not_traced() -> None:
    def is_traced(x: Tensor) -> Tensor:
        return x + 1 if _torch.is_tracing() else x

    assert is_traced(torch.zeros(1)) == 0
    assert torch.jit.trace(is_traced, torch.zeros(1))(torch.zeros(1)) == 1
    assert torch.compile(is_traced, backend="eager", fullgraph=True)(torch.zeros(1)) == 0


def test_a_batch_of_gradients_is_seen_in_the_backward() -> None:
    seen = []
    x = torch.ones(2, requires_grad=True)
    y = 2 * x
    y.register_hook(lambda grad: seen.append(_torch.is_batched(grad)))
    torch.autograd.grad(y, x, torch.eye(2), is_grads_batched=True, retain_graph=True)
    torch.autograd.grad(y, x, torch.ones(2))
    assert seen == [True, False]


def test_torch_is_watched_only_while_operators_are_counted() -> None:
    assert not _torch.is_watched()
    with FlopCounterMode(display=False):
        assert _torch.is_watched()
    assert not _torch.is_watched()


def test_a_checkpoint_recomputes_in_the_backward() -> None:
    seen = []

    def run(x: Tensor) -> Tensor:
        seen.append(_torch.in_backward())
        return x.exp()

    checkpoint(run, torch.ones(2, requires_grad=True), use_reentrant=False).sum().backward()
    assert seen == [False, True]


def test_backward_passes_have_numbers() -> None:
    seen = [_torch.backward_number()]
    x = torch.ones(2, requires_grad=True)
    x.register_hook(lambda _: seen.append(_torch.backward_number()))
    for _ in range(2):
        x.sum().backward()
    assert seen[0] == _torch.NO_BACKWARD
    assert len({*seen}) == 3


def test_the_innermost_hooks_of_what_is_saved_are_seen() -> None:
    assert _torch.hooks_of_saved() is None
    with torch.autograd.graph.saved_tensors_hooks(torch.abs, torch.neg):
        assert _torch.hooks_of_saved() == (torch.abs, torch.neg)


def test_a_tensor_knows_how_often_it_was_written_to() -> None:
    value = torch.ones(2)
    before = _torch.version_of(value)
    assert _torch.version_of(value.add_(1)) == before + 1


def test_row_pointers_and_rows_follow_from_each_other() -> None:
    row, ptr = torch.tensor([0, 0, 2]), torch.tensor([0, 2, 2, 3, 3])
    assert _torch.row_pointers(row, 4).equal(ptr)
    assert _torch.rows_of_pointers(ptr, torch.arange(3))[0].equal(row)


def test_values_put_at_one_index_add_up() -> None:
    index = torch.tensor([1, 1, 0])
    values = torch.tensor([1.0, 2.0, 4.0])
    out = _torch.index_put(torch.zeros(3), [index], values, accumulate=True, unsafe=True)
    assert out.tolist() == [4, 3, 0]


def test_an_assertion_of_a_tensor_raises_its_message() -> None:
    _torch.assert_async(torch.tensor(True), "holds")
    with pytest.raises(RuntimeError, match="does not hold"):
        _torch.assert_async(torch.tensor(False), "does not hold")


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_the_stored_values_of_a_sparse_tensor_are_counted(layout: torch.layout) -> None:
    assert _torch.num_stored(torch.eye(3).to_sparse(layout=layout)) == 3


def test_a_module_names_its_own_parameters_also_those_that_are_none() -> None:
    assert _torch.parameter_names(nn.Linear(2, 2, bias=False)) == ("weight", "bias")


def test_hooks_are_in_the_tables_of_a_module() -> None:
    hooks = {
        "register_forward_pre_hook": _torch.forward_hooks,
        "register_forward_hook": _torch.forward_hooks,
        "register_full_backward_pre_hook": _torch.backward_hooks,
        "register_full_backward_hook": _torch.backward_hooks,
    }
    for register, tables in hooks.items():
        module = nn.Linear(2, 2)
        assert not any(tables(module))
        getattr(module, register)(print)
        assert [hook for table in tables(module) for hook in table.values()] == [print], register


def test_the_flop_counter_gives_a_marked_formula_tensors() -> None:
    given = []
    formula = _torch.given_tensors(lambda *args: given.append(args) or 7)  # type: ignore[func-returns-value]
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.exp: formula}) as counter:
        torch.ones(2).exp()
    assert counter.get_total_flops() == 7
    assert isinstance(given[0][0], Tensor)


PRIVATE = {
    name
    for held in (nn.Module(), torch.ones(1), torch.UntypedStorage())
    for name in dir(held)
    if name.startswith("_") and not name.endswith("__")
}
"""Private attributes of what torch makes."""


def private_uses(source: str) -> Iterator[str]:
    """The private parts of torch that a file reads or calls."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            text = ast.unparse(node)
            of_torch = text.startswith("torch.") and not node.attr.endswith("__")
            if of_torch or (node.attr in PRIVATE and text != "super()._apply"):
                yield text
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "torch":
            names = (*str(node.module).split("."), *(alias.name for alias in node.names))
            yield from (name for name in names if name.startswith("_"))


def test_the_dtype_of_a_module_is_that_of_its_first_floating_point_parameter() -> None:
    counts = nn.ParameterList([nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)])
    module = nn.Sequential(nn.ReLU(), counts, nn.Linear(2, 3).double(), nn.Linear(3, 2))
    assert _torch.dtype_of(module) is torch.float64
    assert _torch.dtype_of(nn.ReLU()) is None
    assert _torch.dtype_of(nn.Sequential(counts)) is None


def test_no_other_file_of_gmoe_uses_what_is_private_in_torch() -> None:
    uses = {
        str(path.relative_to(GMOE)): list(private_uses(path.read_text()))
        for path in GMOE.rglob("*.py")
    }
    assert len(uses.pop("_torch.py")) > 10
    assert not any(uses.values()), {name: used for name, used in uses.items() if used}


class Late(_torch.LateState):
    """Has a parameter without a size."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = UninitializedParameter()

    def is_built(self) -> bool:
        return not isinstance(self.weight, UninitializedParameter)

    def refuse_state(self) -> None:
        raise RuntimeError("not built")


def test_a_module_has_no_state_until_it_is_built() -> None:
    model = nn.ModuleList([Late()])
    assert model.state_dict() == {}
    model.load_state_dict({})
    with pytest.raises(RuntimeError, match="not built"):
        model.load_state_dict({"0.weight": torch.ones(2)}, strict=False)
    model[0].weight = nn.Parameter(torch.zeros(2))
    model.load_state_dict({"0.weight": torch.ones(2)})
    assert model.state_dict()["0.weight"].tolist() == [1, 1]


def test_a_part_that_is_named_module_is_not_the_model_inside_of_a_wrapper() -> None:
    model = nn.Sequential()
    model.add_module("module", nn.Linear(2, 2))
    model.add_module("head", nn.Linear(2, 2))
    assert _torch.unwrapped(model) is model
