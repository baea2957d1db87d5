"""Argument checks: what is refused, in which words, and what a module is asked about itself."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from gmoe._checks import (
    change_of,
    check_choice,
    check_counts,
    check_positive,
    check_range,
    in_short,
    must_be_called,
    naming_extras,
    nearest,
    parameters_of,
    readable,
)


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "2", None])
def test_a_count_is_a_whole_number_of_at_least_one(value: Any) -> None:
    other: Any = np.int64(3)
    check_counts(size=1, other=other)
    with pytest.raises(ValueError, match=rf"^size: got {value!r}, expected (a whole|at least 1)"):
        check_counts(size=value)


def test_a_word_of_megabytes_is_not_compared_with_names() -> None:
    begin = time.process_time()
    assert nearest("x" * 2**20, ["gcn", "sage"] * 20) == ""
    assert time.process_time() - begin < 1


def test_an_error_is_told_in_one_line_of_some_length() -> None:
    assert in_short(ValueError("a\n\tb  c")) == "a b c"
    assert in_short(ValueError("x" * 2**20)) == f"{'x' * 500} …"
    assert in_short(ValueError("abcdef"), most=3) == "abc …"


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_a_positive_number_is_finite(value: float) -> None:
    check_positive("rate", 0.1)
    with pytest.raises(ValueError, match=rf"^rate: got {value}, expected a positive number"):
        check_positive("rate", value)


def test_indices_outside_the_range_are_named_where_they_can_be_read() -> None:
    index = torch.tensor([0, 5, -1, 200], dtype=torch.int16)
    with pytest.raises(ValueError, match=r"^index: got \[5, -1, 200\], expected values in 0..4"):
        check_range("index", index, 5)
    assert not readable(index.to("meta"))
    check_range("index", index.to("meta"), 5)


def test_a_choice_lists_the_legal_values_and_the_one_that_is_meant() -> None:
    check_choice("mode", "mean", ("sum", "mean"))
    with pytest.raises(ValueError, match=r"'maen', expected one of 'sum', 'mean'; .* 'mean'\?"):
        check_choice("mode", "maen", ("sum", "mean"))


def test_only_a_similar_name_is_suggested() -> None:
    assert nearest("num_expert", ("num_experts", "k")) == "; did you mean 'num_experts'?"
    assert nearest("top_k", ("num_experts", "k")) == "; did you mean 'k'?"
    assert nearest("flow", ("num_experts", "k")) == ""


def test_a_missing_package_is_named_with_its_extra_and_any_other_is_not() -> None:
    with pytest.raises(ImportError, match=r'pip install "gmoe\[plot\]"'), naming_extras():
        raise ModuleNotFoundError(name="matplotlib.pyplot")
    with pytest.raises(ModuleNotFoundError), naming_extras():
        raise ModuleNotFoundError(name="mine")


def test_the_arguments_of_a_forward_are_given_in_order() -> None:
    assert parameters_of(nn.Bilinear(1, 1, 1)) == ("input1", "input2")


def patched(linear: Any) -> None:
    linear.forward = lambda x: x


def hooked(linear: Any) -> None:
    linear.register_forward_hook(lambda *_: None)


def normed(linear: Any) -> None:
    parametrize.register_parametrization(linear, "weight", nn.Identity())


def with_a_parameter_more(linear: Any) -> None:
    linear.scale = nn.Parameter(torch.ones(1))


def of_another_class(linear: Any) -> None:
    linear.weight = type("Quantized", (nn.Parameter,), {})(linear.weight.detach())


@pytest.mark.parametrize(
    ("change", "words", "is_called"),
    [
        (hooked, "hooks", True),
        (patched, "a forward of its own", True),
        (normed, "a parametrized weight", False),
        (of_another_class, "parameters of their own class", False),
        (with_a_parameter_more, "a linear layer of its own class, Linear", False),
    ],
)
def test_what_a_user_changed_in_a_module_is_named(change: Any, words: str, is_called: bool) -> None:
    linear = nn.Linear(2, 2)
    assert change_of(linear) is None
    assert not must_be_called(linear)
    change(linear)
    assert change_of(linear) == words
    assert must_be_called(linear) == is_called
