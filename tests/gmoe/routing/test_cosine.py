"""Cosines and their gradients equal those of unit vectors. Shapes: T tokens, D width, N centroids."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from gmoe.routing.cosine import cosine


def inputs(tokens: int = 7, width: int = 5, centroids: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x, center, centroid = (
        torch.randn(shape, dtype=torch.float64) for shape in ((tokens, width), width, (centroids, width))
    )
    return x.requires_grad_(), center, F.normalize(centroid, dim=-1).requires_grad_()


def test_equals_products_of_unit_vectors() -> None:
    x, center, unit = inputs()
    found, expected = cosine(x, center, unit), F.normalize(x - center, dim=-1) @ unit.T
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    grad = torch.randn_like(found)
    torch.testing.assert_close(
        torch.autograd.grad(found, (x, unit), grad), torch.autograd.grad(expected, (x, unit), grad), atol=1e-12, rtol=0
    )


@pytest.mark.parametrize("frozen", [0, 2])
def test_gradcheck_where_one_side_is_frozen(frozen: int) -> None:
    given = inputs()
    given[frozen].requires_grad_(False)
    assert torch.autograd.gradcheck(cosine, given)


def test_a_token_at_the_center_is_like_nothing() -> None:
    _, center, unit = inputs()
    found = cosine(torch.stack([center, center + unit[0].detach()]), center, unit)
    assert (found[0] == 0).all()
    torch.testing.assert_close(found[1, 0].detach(), torch.tensor(1.0, dtype=torch.float64))


def test_no_tokens() -> None:
    x, center, unit = inputs(tokens=0)
    cosine(x, center, unit).sum().backward()
    assert x.grad is not None
    assert unit.grad is not None
    assert (unit.grad == 0).all()


def test_second_derivatives_are_refused() -> None:
    x, center, unit = inputs()
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(cosine(x, center, unit).sum(), x, create_graph=True)
