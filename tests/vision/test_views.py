"""Views of an image, to a router or as a token."""

from __future__ import annotations

import copy
from dataclasses import asdict
from itertools import product
from typing import Any

import pytest
import torch

import gmoe
from gmoe.models.vit import ViTSize
from vision.views import ViewViT, view_of

SIZE = ViTSize(image_size=8, patch_size=4, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16)


def images_of(number: int = 6) -> Any:
    return torch.randn(number, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def made(router: Any = "token_choice", **options: Any) -> Any:
    torch.manual_seed(0)
    model = ViewViT(SIZE, 5, router, **({"num_experts": 4, "every": 1} | options))
    torch.nn.init.normal_(model.heads.head.weight)
    return model


def test_a_view_is_colors_and_edges() -> None:
    images = images_of(2)
    for image, view in zip(images, view_of(images), strict=True):
        assert view[:3].allclose(image.flatten(1).mean(dim=1))
        edges = 0.0
        for channel, y, x in product(range(3), range(8), range(7)):
            edges += abs(float(image[channel, y, x + 1] - image[channel, y, x]))
            edges += abs(float(image[channel, x + 1, y] - image[channel, x, y]))
        assert float(view[3]) == pytest.approx(edges / 2 / 168, rel=1e-5)
    assert view_of(torch.ones(2, 1, 8, 8)).tolist() == [[1, 1, 1, 0]] * 2


@pytest.mark.parametrize("start", ["copies", "shared"])
def test_one_decision_by_the_view_for_all_tokens_of_all_blocks(start: Any) -> None:
    model = made(by_view=True, start=start, router_kwargs={"noise": False})
    images = images_of()
    # What the router sees are the standardized views, by hand
    view = view_of(images)
    seen = (view - view.mean(0)) / (view.var(0, unbiased=False) + 1e-5).sqrt()
    expected = copy.deepcopy(model.view_router)(seen[:, None]).to_dense()
    with gmoe.record_routing(model) as decided:
        logits, routings = model(images, return_routing=True)
    assert [routing.num_tokens for routing in decided] == [6]  # the one decision, of images
    assert len(routings) == 2
    assert logits.shape == (6, 5)
    for routing in routings:
        weight_BTE = routing.to_dense().view(6, 5, 4)
        assert torch.equal(weight_BTE, weight_BTE[:, :1].expand(-1, 5, -1))
    assert torch.equal(routings[0].to_dense(), routings[1].to_dense())
    assert torch.equal(expected > 0, weight_BTE[:, 0] > 0)


@pytest.mark.parametrize(("start", "learns"), [("copies", True), ("plain", True)])
def test_the_router_by_view_learns_where_experts_differ(start: Any, learns: bool) -> None:
    model = made(by_view=True, start=start, k=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model(images_of()).square().sum().backward()
    grown = [p.grad is not None and bool(p.grad.any()) for p in model.view_router.parameters()]
    assert any(grown) is learns
    frozen = made("random", by_view=True)
    before = [p.clone() for p in frozen.view_router.state_dict().values()]
    frozen(images_of()).sum().backward()
    assert all(map(torch.equal, before, frozen.view_router.state_dict().values()))
    assert not any(p.requires_grad for p in frozen.view_router.parameters())


@pytest.mark.parametrize("extra", ["view", "domain"])
@pytest.mark.parametrize("router", [None, "token_choice"])
def test_a_token_is_one_more_of_the_encoder(extra: Any, router: Any) -> None:
    model = made(router, extra_input=extra, num_domains=3).eval()
    images, domain = images_of(), torch.tensor([0, 1, 2, 0, 1, 2])
    args = (images, domain) if extra == "domain" else (images,)
    patches = model._process_input(images)
    tokens = torch.cat([model.class_token.expand(6, -1, -1), patches], dim=1)
    tokens = tokens + model.encoder.pos_embedding
    more = model.embedding(domain if extra == "domain" else model.standardized(view_of(images)))
    tokens = torch.cat([tokens, more[:, None]], dim=1)
    expected = model.heads(model.encoder.ln(model.encoder.layers(tokens))[:, 0])
    torch.testing.assert_close(model(*args), expected)


def test_without_a_view_it_is_the_vit() -> None:
    model = made(None)
    torch.manual_seed(0)
    plain = gmoe.ViTMoE(asdict(SIZE), 5, None)
    plain.heads.head.weight.data.copy_(model.heads.head.weight.data)
    assert torch.equal(model(images_of()), plain(images_of()))


@pytest.mark.parametrize("number", [0, 1])
def test_a_batch_of_one_image_or_none_trains(number: int) -> None:
    """A single one is standardized by the averages; the last slice of a batch may be empty."""
    model = made(by_view=True, extra_input="view")
    model(images_of())
    mean = model.standardized.running_mean.clone()
    logits = model(images_of()[:number])
    assert logits.shape == (number, 5)
    logits.sum().backward()
    assert torch.equal(model.standardized.running_mean, mean)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match="router: got None, expected one, to decide by the view"):
        made(None, by_view=True)
    with pytest.raises(ValueError, match="extra_input: got 'domain' without domains"):
        made(extra_input="domain")
    with pytest.raises(ValueError, match="domain_B: got no domain, expected the domain of each"):
        made(extra_input="domain", num_domains=2)(images_of())
    with pytest.raises(ValueError, match="domain_B: got domains, expected none"):
        made()(images_of(), torch.zeros(6, dtype=torch.int64))
