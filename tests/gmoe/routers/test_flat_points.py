"""Gradients and second gradients where formulas are not smooth: at zeros, duplicates, constants."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch_geometric.nn import SAGEConv

from gmoe import LinearExperts, MoEConv, Router, SoftMoE, SoftSlots
from gmoe._autograd import row_norms
from gmoe.losses import separation_loss
from tests.helpers.flat import FLAT, gradients_of, require_finite
from tests.helpers.reference import CASES, Case

T, D, E = 6, 4, 3
EDGES = torch.tensor([[0, 1, 2, 3, 4, 0], [1, 2, 3, 4, 0, 2]])  # the last node has no edge


def drawn(flat: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(T, D, dtype=torch.float64, generator=generator)
    return FLAT[flat](x).requires_grad_()


def require_finite_gradients(value: Tensor, leaves: list[Tensor]) -> None:
    """Of first and second order, by the leaves that matter."""
    require_finite(gradients_of(value, {str(number): leaf for number, leaf in enumerate(leaves)}))


@pytest.mark.parametrize("flat", FLAT)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_routers_have_finite_second_gradients(case: Case, flat: str) -> None:
    torch.manual_seed(0)
    router = case.build(D, E, 2, num_tokens=T)
    if hasattr(router, "center_D"):  # else no centered token is one of zeros
        router.get_buffer("center_D").zero_()
    x = drawn(flat)
    routing = router(x, edge_index=EDGES if case.needs_edges else None)
    value = routing.weight.sin().sum() + routing.scores.cos().sum() + routing.aux_loss
    require_finite_gradients(value, [x, *router.parameters()])


@pytest.mark.parametrize("flat", FLAT)
def test_soft_slots_have_finite_second_gradients(flat: str) -> None:
    torch.manual_seed(0)
    layer = SoftMoE(SoftSlots(D, num_experts=E, slots=2), LinearExperts(D, D, num_experts=E))
    layer.double()
    x = drawn(flat)
    require_finite_gradients(layer(x).sin().sum(), [x, *layer.parameters()])


@pytest.mark.parametrize("flat", FLAT)
def test_normalized_outputs_have_finite_second_gradients(flat: str) -> None:
    """A node of zeros with neighbors of zeros has an output of zeros: PyG's is NaN there."""
    torch.manual_seed(0)
    layer = MoEConv(SAGEConv, D, D, normalize=True, bias=False, num_experts=E, start="plain")
    layer.double()
    x = drawn(flat)
    require_finite_gradients(layer(x, EDGES).sin().sum(), [x, *layer.parameters()])


@pytest.mark.parametrize("flat", FLAT)
def test_centroids_have_a_separation_of_finite_second_gradients(flat: str) -> None:
    centroid = drawn(flat)
    unit = centroid / row_norms(centroid)
    require_finite_gradients(separation_loss(unit.view(E, -1, D)), [centroid])


@pytest.mark.parametrize("order", [1, 2])
def test_the_gradients_of_tokens_of_zeros_are_those_of_a_norm_of_one(order: int) -> None:
    """Not of a norm of 1e-12, which would make one token of padding outweigh all others."""
    case = next(case for case in CASES if case.name == "multi_centroid")
    torch.manual_seed(0)
    router: Router = case.build(D, E, 2)
    router.get_buffer("center_D").zero_()
    x = drawn("rows of zeros")
    value = router(x).scores.square().sum()
    for _ in range(order):
        (value,) = torch.autograd.grad(value, x, create_graph=True)
        assert value[2].abs().max() < 1e3
        value = value.square().sum()
