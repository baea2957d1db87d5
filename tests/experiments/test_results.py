"""The committed results: their numbers are those that were measured, and their runs those of the studies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments.studies import STUDIES

RESULTS = Path(__file__).parents[2] / "results"
NUMBERS = {
    "benchmark-conv-100k-1-thread.json": "c1281410bd124e0cd248508b5bea6a218c0c2e4e53a23d3aa9f4ea38aeecb799",
    "benchmark-conv-100k-2-threads.json": "5420130c285f9a5a7ce71b90510c7a27db680ed3fded4ce7fdecc6432d0c11d7",
    "benchmark-conv-edge-index.json": "a19942564666d21ab524e266dc8ab2a50c40e65523da2587366fb75d56228321",
    "benchmark-conv-experts.json": "25afafd6acc6ba6d93cabdea927b18a78db191dc3c1a4dd543ee9cf99fafc7db",
    "benchmark-conv.json": "4062a1a152ceb6aa4cf35d71080332a63b1ebf4a1cafe27a6fcbf9ce6c36f42c",
    "benchmark-ffn-2-threads.json": "edca3abfd46175d2b60af96bd79e25176071e18b4df7ae4103ae5b9586701c6b",
    "benchmark-ffn-experts.json": "909aacb0afeeb6f5a96553b560c695577d57646df2421d78ca100100a357e37c",
    "benchmark-ffn.json": "8b9f764dc3633898576f6d9c3b2cfa7b8eb907e2022c405217a06bd8a77dfe9d",
    "benchmark-gat.json": "2bb5bb4b2307b7a4de0b80ea2516bd5703e869b998d99ba8110294502b808cca",
    "benchmark-router-conv.json": "e98c94f5512df957d2fad4002174da18a47a9ed124be056aca7323e675900803",
    "benchmark-router.json": "73ceed044543d91e594bbed84fb5c795f2822f5eaa2f4a9780546ea842db951a",
    "benchmark-train-arxiv.json": "9da461ba8a70a77d9f674993da774d466e0ada98d67e0c1cbbf3826872b518ec",
    "benchmark-train.json": "bd876cdb1deb69a756a09441c917c0ea54d920b173c221070e75b93c3dd0df42",
    "benchmark-vit-bf16.json": "e046692794590f28e1408c86db32da08fa3e0b2d4502e8f423473c5b488040b8",
    "benchmark-vit.json": "addbb528ec10466e030fd1d54d0a2db8caf855b793e770508b30be9618faefad",
    "benchmark-vote-arxiv.json": "066ef965d9e9925ce7cba41d065e4b781c1da807d4179324be098cdc01cfaa19",
    "benchmark-vote.json": "164d3da1ab01fc183fe84d407c35e7dc400c205419e30224d709aaf810f4aa2b",
    "cifar10-claims.json": "ad5445a917a1e2929184bb989f7fc95dbd80466ae558f9c05520c2c4ae1d49bc",
    "cifar10-scale.json": "da6fe2f22da94ca673f3c11ef4e5795630e7afb69fe200dce03c5413c46b35f2",
    "cifar10.json": "bc09d9b0512d75dbd0aa4734d966535c38cdd5b26f54eb6ea44847c9e561f31d",
    "citeseer.json": "27f61ed0612da7fcf927c4dd6a3dcdef636325c580a87d236fc528ee2145115f",
    "cora.json": "f78ed700f8ae65a1d9a3f6695b1b2f5814b8e9f887d3d38b55a12f65c71a2a71",
    "digits-graph.json": "6d85314ba7288fcf329e638eda9ca18e7c95d67cb647840f0e40cc3b41723caf",
    "digits.json": "4fbb09711a87eea85407000175d468454f7af0e102218f5eeca70c13a75d63d5",
    "facebook-10splits.json": "5082e81848f6e7a6e2e138fdd19df0ef447dddc4f3f4f69b595ef97676e4dd9b",
    "facebook.json": "4edd807f3e4749f6f8b11cf4db9e07e33d1f0a79dc72778a4b821e93ff4fab4f",
    "minesweeper-10splits.json": "db0514fb518f5bdb1aefc09079bbb709dcb3746a47ec08f0db8f5c6237e19f7a",
    "minesweeper.json": "492a1b4b021ca5a2dd3ab0caa2be96a5df5421b5c13c8ea7fe923e3aa6f20365",
    "mosaic.json": "982752591a647e2e1d92dc16b966442c99f9ba80e439f90b691df2afb7a66daf",
    "throughput.json": "4ca55dce99bbcd5a5371c88fa92eee09bad9f518a75e6acc32e4fa7265e2dbad",
}
"""SHA-256 of the numbers of a file, in order, one a line: renaming keys, options or files leaves them as they are."""


def numbers(value: Any) -> Iterator[int | float]:
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from numbers(part)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_those_that_were_measured(name: str) -> None:
    lines = "\n".join(map(repr, numbers(json.loads((RESULTS / name).read_text()))))
    assert hashlib.sha256(lines.encode()).hexdigest() == NUMBERS[name]


@pytest.mark.parametrize("name", [name for name in STUDIES if (RESULTS / f"{name}.json").exists()])
def test_runs_are_those_of_the_study(name: str) -> None:
    found = json.loads((RESULTS / f"{name}.json").read_text())
    recorded = {variant["variant"]: variant for variant in found["variants"]}
    variants = {variant.name: variant for variant in STUDIES[name].variants if variant.name in recorded}
    assert list(recorded) == list(variants)
    assert (found["study"], found["about"]) == (name, STUDIES[name].about)
    for variant in variants.values():
        assert recorded[variant.name]["label"] == variant.label
        differences = variant.config.differences(recorded[variant.name]["config"])
        assert set(differences) <= {"digest", "file"}, variant.name  # the data are not here
