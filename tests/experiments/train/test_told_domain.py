"""Images of several domains: who is told the domain, and what is measured of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import gmoe
from experiments.show.report import main as report
from experiments.train.build import build_model
from experiments.train.config import ImageConfig
from experiments.train.kinds import kind_of
from experiments.train.loop import run
from experiments.train.presets import PACS
from tests.helpers.made_images import write_pacs
from tests.helpers.pages import words_of
from vision.data import DOMAINS
from vision.recipe import Recipe

SMALL = replace(
    PACS,
    experts=4,
    image_size=8,
    patch=4,
    dim=16,
    vit_heads=2,
    hidden=16,
    layers=2,
    epochs=2,
    batch_size=32,
    precision="32-true",
    recipe=Recipe(),
    seeds=(0, 1),
    progress=False,
)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ImageConfig:
    return replace(SMALL, data_root=write_pacs(tmp_path_factory.mktemp("pacs"), count=10))


def test_all_tokens_of_an_image_go_to_the_expert_of_its_domain(config: ImageConfig) -> None:
    """The class token too; and its weight is 1."""
    told = replace(config, router="oracle")
    task = kind_of(told).tasks()(0)
    model: Any = build_model(told, task)
    for batch in task.loader("train", 9, 0):
        assert batch.domain is not None
        with gmoe.record_routing(model) as routings:
            model(*batch.inputs)
        weight_TE = routings[0].to_dense()
        expected = torch.nn.functional.one_hot(batch.domain.repeat_interleave(5), len(DOMAINS))
        assert torch.equal(weight_TE, expected.float())


def test_other_models_do_not_see_the_domain(config: ImageConfig) -> None:
    (inputs, *_) = next(iter(kind_of(config).tasks()(0).loader("train", 9, 0)))
    assert [tuple(one.shape) for one in inputs] == [(9, 3, 8, 8)]


def test_the_domain_is_what_the_batch_says(config: ImageConfig) -> None:
    """Shuffled or not: domains differ in brightness."""
    task = kind_of(config).tasks()(0)
    for seed in (None, 3):
        for batch in task.loader("test", 9, seed):
            rank = batch.inputs[0].mean(dim=(1, 2, 3))
            assert batch.domain is not None
            for low in range(len(DOMAINS) - 1):
                darker, brighter = rank[batch.domain == low], rank[batch.domain == low + 1]
                assert not len(darker) or not len(brighter) or darker.max() < brighter.min()


def test_experts_that_are_told_follow_the_domain_and_the_report_says_so(
    config: ImageConfig, tmp_path: Path
) -> None:
    """Its AMI with the experts is 1, of the summary and on the page."""
    told = replace(config, router="oracle", seeds=(0,), out=tmp_path / "told")
    (layer,) = run(told)["routing"]
    assert layer["ami_domain"]["mean"] == 1
    assert layer["ami_label"]["mean"] < 0.1
    learned = replace(config, router="token_choice", seeds=(0,), out=tmp_path / "learned")
    (layer,) = run(learned)["routing"]
    assert -0.1 < layer["ami_domain"]["mean"] < 1
    report([str(tmp_path / "told"), str(tmp_path / "learned"), "--out", str(tmp_path / "page")])
    words = words_of(tmp_path / "page" / "index.html")
    assert "told: 4 of 4 experts used" in words
    assert "they follow the domain (AMI 1.00)" in words
    assert "Not drawn" not in words


def test_the_oracle_needs_an_expert_a_domain_and_a_data_set_that_has_domains(
    config: ImageConfig,
) -> None:
    task = kind_of(config).tasks()(0)
    with pytest.raises(ValueError, match="experts: got 8, expected 4, one for each of art_paint"):
        build_model(replace(config, router="oracle", experts=8), task)
    model = build_model(replace(config, router="oracle"), task)
    with pytest.raises(ValueError, match="domain: got those of 0 images for 15 tokens, expected"):
        model(torch.randn(3, 3, 8, 8))
