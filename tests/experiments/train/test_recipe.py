"""The recipe of images in training: what it computes, that it resumes, and what it refuses."""

from __future__ import annotations

import copy
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from PIL import Image
from timm.scheduler import CosineLRScheduler

from experiments.train.build import build_model
from experiments.train.command import main, parse
from experiments.train.config import ImageConfig
from experiments.train.kinds import kind_of
from experiments.train.loop import run
from experiments.train.presets import IMAGE_FOLDER
from experiments.train.run_folder import read_run
from experiments.train.training import learning_rate, set_up
from tests.helpers.command import QUICK, quick, refused, run_until
from tests.helpers.made_images import cut, write_folder, write_images, write_photo
from tests.helpers.run_folders import assert_same
from vision.recipe import Recipe

OF_VIT = "--patch 4 --dim 8 --vit-heads 2 --hidden 8 --layers 2"
OF_TIMM = (
    "--model timm/vit_tiny_patch16_224 --model-kwargs patch_size=4 embed_dim=8 depth=2 num_heads=2"
)
RECIPES = {
    "all": f"{OF_VIT} --router token_choice --balance bias --scale 0.3 1 --reprob 0.5 "
    "--aa rand-m9-mstd0.5-inc1 --mixup 0.4 --cutmix 1 --label-smoothing 0.1 "
    "--grad-accum-steps 2 --model-ema-decay 0.8 --warmup-epochs 1 --clip-norm 1",
    "small": f"{OF_VIT} --router expert_choice --every 1 --scale None --augment standard "
    "--interpolation bicubic --crop-pct 0.8 --schedule constant --precision bf16-mixed",
    "timm": f"{OF_TIMM} --router token_choice --start copies --k 2 --aa augmix-m5 --drop-path 0.3 "
    "--layer-decay 0.7 --model-ema-decay 0.8 --precision 64-true",
}
"""Everything that draws or remembers, in gmoe's ViT and in timm's."""

TINY = replace(
    IMAGE_FOLDER,
    image_size=8,
    patch=4,
    dim=8,
    vit_heads=2,
    hidden=8,
    layers=2,
    batch_size=8,
    epochs=2,
    precision="64-true",
    recipe=Recipe(),
    augment="none",
    progress=False,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes, images of many sizes and shapes."""
    root = write_images(tmp_path_factory.mktemp("data"))
    for part in ("train", "test"):
        for label, name in enumerate("abc"):
            size = (9 + 5 * label, 12)
            write_photo(root / part / name / "other.jpg", size, seed=label)
    return root


def training_of(config: ImageConfig) -> Any:
    """A model in training, as a context."""
    task = kind_of(config).tasks()(0)
    torch.manual_seed(0)
    fabric = Fabric(accelerator="cpu", devices=1, precision=config.precision)
    return set_up(fabric, build_model(config, task), config, task)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_recipe_that_was_stopped_equals_one_in_one_go(
    name: str, workers: str, folder: Path, tmp_path: Path, capsys: Any
) -> None:
    """Bit for bit: within an epoch, and over its end; also if images were loaded by workers."""
    args = [*RECIPES[name].split(), "--image-size", "8", "--batch-size", "4"]
    args += ["--data-root", str(folder)]
    whole = quick(tmp_path / "whole", *args, preset="images")
    line = ["images", *QUICK, *args, "--seeds", "0", "--out", str(tmp_path / "cut")]
    line += ["--workers", workers]
    run_until(1, line)
    run_until(whole["steps"], [*line, "--resume"])
    *_, told = capsys.readouterr().err.splitlines()
    main(shlex.split(told.partition("continue with: python -m experiments.train ")[2]))
    assert_same(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("router", ["dense", "token_choice"])
def test_gradients_of_parts_add_up_to_those_of_the_batch(router: str, folder: Path) -> None:
    """Without what a part's own tokens decide: balance and a choice by experts."""
    whole = replace(TINY, data_root=folder, router=router, batch_size=12, clip_norm=0.0)
    parts = replace(whole, batch_size=3, recipe=Recipe(grad_accum_steps=4))
    grown = []
    for config in (whole, parts):
        with training_of(config) as training:
            batch = next(iter(training.batches("train", 0)))
            assert len(batch.target) == 12
            training.step(batch, 12)
            assert training.epoch.count == 12
            assert training.epoch.batches == 1
            grown.append({name: p.grad for name, p in training.model.named_parameters()})
    for name, value in grown[0].items():
        torch.testing.assert_close(grown[1][name], value, rtol=1e-9, atol=1e-12)


def test_the_schedule_is_timms() -> None:
    """Each step of warmup is one later there, where the first has the initial rate."""
    steps, warmup = 40, 8
    factors = [learning_rate("cosine", step, steps, warmup) for step in range(steps)]

    def theirs(warmup: int, start: float) -> Any:
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        return CosineLRScheduler(
            optimizer,
            t_initial=steps - warmup,
            warmup_t=warmup,
            warmup_lr_init=start,
            warmup_prefix=True,
        )

    rising = theirs(warmup - 1, 1 / warmup)
    falling = theirs(warmup, 0.0)
    expected = [rising._get_lr(step)[0] for step in range(warmup)]
    expected += [falling._get_lr(step)[0] for step in range(warmup, steps)]
    assert factors == pytest.approx(expected, rel=1e-12)
    assert learning_rate("constant", 3, 50, 5) == 1.0


def test_warmup_is_counted_in_epochs(folder: Path) -> None:
    recipe = Recipe(warmup_epochs=1.5)
    config = replace(TINY, data_root=folder, router="dense", epochs=4, recipe=recipe)
    with training_of(config) as training:
        epoch = training.task.steps(config.step_size)
        rates = []
        for _ in range(2 * epoch):
            rates.append(training.lr)
            training.optimizer.step()
            training.scheduler.step()
    assert rates.index(max(rates)) == round(1.5 * epoch) - 1
    assert rates[0] == pytest.approx(config.lr / round(1.5 * epoch))


def test_earlier_blocks_learn_more_slowly(folder: Path) -> None:
    """Adam's first step is the rate."""
    sizes = ("patch_size=4", "embed_dim=8", "depth=2", "num_heads=2")
    config = replace(
        TINY, data_root=folder, model="timm/vit_tiny_patch16_224", model_kwargs=sizes,
        router="dense", optimizer="adam", weight_decay=0.0,
        recipe=Recipe(layer_decay=0.5), clip_norm=0.0, schedule="constant",
    )  # fmt: skip
    with training_of(config) as training:
        before = copy.deepcopy(dict(training.model.module.named_parameters()))
        batch = next(iter(training.batches("train", 0)))
        training.step(batch, len(batch.target))
        for name, factor in (("head.bias", 1), ("patch_embed.proj.bias", 0.5**3)):
            moved = training.model.module.get_parameter(name) - before[name]
            assert float(moved.detach().abs().max()) == pytest.approx(factor * config.lr, rel=1e-4)
        assert training.lr == config.lr


def test_the_average_is_validated_and_kept_and_the_weights_train_on(
    folder: Path, tmp_path: Path
) -> None:
    """The run by hand: one average, from the initial weights on, a step at a time."""
    config = replace(
        TINY, data_root=folder, router="token_choice", epochs=1, recipe=Recipe(model_ema_decay=0.7)
    )
    with training_of(config) as training:
        expected = copy.deepcopy(training.model.state_dict())
        for batch in training.batches("train", 0):
            training.step(batch, len(batch.target))
            for name, value in training.model.state_dict().items():
                is_float = value.is_floating_point()
                expected[name] = 0.7 * expected[name] + 0.3 * value if is_float else value.clone()
        own = copy.deepcopy(training.model.state_dict())
        training.end_epoch(0)
        for name, value in training.model.state_dict().items():
            assert torch.equal(value, own[name])
            torch.testing.assert_close(training.best[name], expected[name], rtol=1e-9, atol=1e-12)
    run(replace(config, out=tmp_path / "run"))
    assert (tmp_path / "run" / "summary.json").exists()


def test_images_of_any_size_and_shape_train_by_default(folder: Path, tmp_path: Path) -> None:
    """As they are in a folder: the preset crops them as timm does, at 160 pixels."""
    config = parse(["images", "--data-root", str(folder)])
    task = kind_of(config).tasks()(0)
    (batch, *_) = task.loader("train", 4, 0)
    assert batch.inputs[0].shape == (4, 3, 160, 160)
    summary = quick(
        tmp_path, *f"--image-size 8 {OF_VIT} --data-root {folder}".split(), preset="images"
    )
    assert summary["images_per_second"]["mean"] > 0
    assert "top5" not in summary  # of three classes


def test_top_5_is_measured_of_more_than_five_classes(tmp_path: Path) -> None:
    root = write_images(tmp_path / "data", train=4, test=2, classes="abcdefg")
    args = f"--image-size 8 {OF_VIT} --data-root {root}".split()
    summary = quick(tmp_path / "run", *args, preset="images")
    assert summary["test"]["mean"] <= summary["top5"]["mean"] <= 1
    assert summary["top5"]["mean"] >= 5 / 14


def test_a_model_of_timm_starts_from_a_run_and_is_moefied(
    folder: Path, tmp_path: Path, capsys: Any
) -> None:
    """The dense run's own file of weights; experts begin with its outputs."""
    args = [*OF_TIMM.split(), "--image-size", "8", "--data-root", str(folder)]
    quick(tmp_path / "dense", *args, "--router", "dense", preset="images")
    weights = tmp_path / "dense" / "seed-0" / "checkpoint" / "best.safetensors"
    args += ["--checkpoint", str(weights), "--batch-size", "8"]
    dense = parse(["images", *args, "--router", "dense"])
    task = kind_of(dense).tasks()(0)
    images = next(iter(task.loader("val", 8, None))).inputs[0]
    trained = build_model(dense, task).eval()(images)
    chosen = "--targets blocks.*1.mlp"
    for words in ("--start copies --every 1", chosen, "--router expert_choice --k 2"):
        moe = parse(["images", *args, "--router", "token_choice", *words.split()])
        torch.testing.assert_close(build_model(moe, task).eval()(images), trained)
    options = ["--router", "token_choice", *chosen.split()]
    capsys.readouterr()
    main(["images", *QUICK, *args, *options, "--compare", "--out", str(tmp_path / "moe")])
    assert "experts − dense" in capsys.readouterr().out
    assert "1 of" not in (tmp_path / "moe" / "summary.json").read_text()


def test_other_weights_are_another_run(folder: Path, tmp_path: Path, capsys: Any) -> None:
    """The content of the file counts."""
    weights = tmp_path / "dense.pth"
    args = [*OF_TIMM.split(), "--router", "dense", "--image-size", "8", "--data-root", str(folder)]
    config = parse(["images", *args])
    model = build_model(config, kind_of(config).tasks()(0))
    torch.save(model.state_dict(), weights)
    args += ["--checkpoint", str(weights)]
    quick(tmp_path / "run", *args, preset="images")
    torch.save({name: value + 1 for name, value in model.state_dict().items()}, weights)
    again = ["images", *QUICK, *args, "--seeds", "0", "--out", str(tmp_path / "run"), "--resume"]
    assert "weights=" in refused(again, capsys)


def test_a_finished_run_is_drawn_without_the_weights_that_it_started_from(
    folder: Path, tmp_path: Path, capsys: Any
) -> None:
    weights = tmp_path / "dense.pth"
    args = [*OF_TIMM.split(), "--image-size", "8", "--data-root", str(folder)]
    config = parse(["images", *args, "--router", "dense"])
    torch.save(build_model(config, kind_of(config).tasks()(0)).state_dict(), weights)
    quick(tmp_path / "run", *args, "--checkpoint", str(weights), preset="images")
    weights.unlink()
    found = read_run(tmp_path / "run", folder)
    capsys.readouterr()
    assert found.load_model(found.load_task()) is not None
    assert "drawn anew" not in capsys.readouterr().out


def test_a_cait_of_timm_is_counted_and_trained(folder: Path, tmp_path: Path) -> None:
    """It gives a view of its class token to a module, which torch's counter does not bear."""
    sizes = ["patch_size=4", "depth=2", "embed_dim=8", "num_heads=2"]
    args = ["--model", "timm/cait_xxs24_224", "--model-kwargs", *sizes, "--image-size", "8"]
    args += ["--data-root", str(folder)]
    for router in ("dense", "token_choice"):
        summary = quick(tmp_path / router, *args, "--router", router, preset="images")
        assert summary["flops"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--scale 0.5 0.2", "scale: got (0.5, 0.2), expected two shares, 0 < LOW <= HIGH <= 1"),
        ("--crop-pct 0", "crop_pct: got 0.0, expected more than 0"),
        ("--reprob 1.5", "reprob: got 1.5, expected at most 1"),
        ("--mixup -1", "mixup: got -1.0, expected at least 0"),
        ("--data mine.py:made", "data: got 'mine.py:made', expected none: images of your own are"),
        ("--drop-path 0.2", "drop_path: got 0.2, expected 0, without --model timm/NAME"),
        (f"{OF_TIMM} --drop-path 1", "drop_path: got 1.0, expected less than 1"),
        ("--layer-decay 0.7", "layer_decay: got 0.7, expected none, without --model timm/NAME"),
        ("--model-ema-decay 1", "model_ema_decay: got 1.0, expected less than 1"),
        ("--layer-decay 0", "layer_decay: got 0.0, expected more than 0, at most 1"),
        ("--grad-accum-steps 0", "grad_accum_steps: got 0, expected at least 1"),
        ("--warmup-epochs 4", "warmup_epochs: got 4.0 with schedule='cosine' and 3 epochs"),
        ("--checkpoint x.pth", "checkpoint: got x.pth, expected none, without --model timm/NAME"),
        ("--model timm/vit_tinny", "model: got timm/vit_tinny, expected a model of timm"),
        (f"{OF_TIMM} --checkpoint x.pth", "checkpoint: found no file x.pth"),
        (f"{OF_TIMM} --hidden 8", "model: got timm/vit_tiny_patch16_224 and --hidden, expected"),
        (f"{OF_TIMM} --router soft_slots", "router: got 'soft_slots', expected another"),
        (f"{OF_TIMM} --equal flops --router dense", "equal: got flops, expected none with"),
        ("--model-kwargs depth=2", "model_kwargs: got ('depth=2',), expected none, without"),
        ("--aa rand-q9", "aa: got 'rand-q9'"),
        ("--augment standard", "augment: got 'standard' with scale=(0.35, 1.0), expected one of"),
    ],
)
def test_a_recipe_that_is_none_is_refused_before_training(
    words: str, message: str, folder: Path, tmp_path: Path, capsys: Any
) -> None:
    args = ["images", *QUICK, "--image-size", "8", "--data-root", str(folder)]
    args += ["--out", str(tmp_path / "run"), *words.split()]
    if "timm" not in words:
        args += OF_VIT.split()
    assert message in refused(args, capsys)
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: cut(root / "train" / "a" / "3.png"), "train/a/3.png: cannot be read"),
        (lambda root: cut(root / "test" / "b" / "0.png"), "test/b/0.png: cannot be read"),
        (
            lambda root: write_folder(root / "train", {"d": 1}),
            "train/d: got 1 image, expected at least 2, for train and validation",
        ),
        (
            lambda root: Image.fromarray(np.ones((8, 8), np.uint16)).save(
                root / "train" / "c" / "deep.png"
            ),
            "train/c/deep.png: cannot be read as an image (pixels of mode I;16",
        ),
    ],
)
@pytest.mark.parametrize("kept", ["--scale 0.5 1", "--scale None"])
def test_bad_images_are_named_before_training(
    spoil: Any, message: str, kept: str, tmp_path: Path, capsys: Any
) -> None:
    """Whether all images are decoded at once, or when they are taken."""
    root = write_images(tmp_path / "data")
    spoil(root)
    args = f"{OF_VIT} --image-size 8 --data-root {root} --out {tmp_path / 'run'} {kept}"
    assert message in refused(["images", *QUICK, *args.split()], capsys)
    assert not (tmp_path / "run").exists()


def test_gray_images_and_floats_have_no_policies(capsys: Any, tmp_path: Path) -> None:
    args = ["digits", *QUICK, "--out", str(tmp_path / "run"), "--aa", "rand-m9"]
    assert "aa: got 'rand-m9' for digits, expected uint8 images in color" in refused(args, capsys)
