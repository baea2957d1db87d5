"""Every kind of file that gmoe and the experiments read: how one is made, read, and used.

A kind's ``write`` fills an empty folder, by the code under test where it writes such files; its
``read`` gets a copy of the folder in which one file is damaged, reads it as a user's call or
command does, and uses what came: what cannot be used has not been read.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch_geometric.data import Data
from torch_geometric.nn.models import GCN
from torchvision.datasets import Imagenette

import gmoe
from experiments.convert.graph import convert
from experiments.convert.planted import write_planted
from experiments.convert.smiles import molecules
from experiments.show.report_page import write_report
from experiments.train.command import main, parse
from experiments.train.config import PAPERS, GraphConfig, ImageConfig, MoleculeConfig
from experiments.train.data.graphs import graph_task, with_features
from experiments.train.data.load import load_tasks
from experiments.train.data.named import load_graph
from experiments.train.data.ogb import load_ogb
from experiments.train.data.own_graph import own_graph
from experiments.train.data.task import GraphData, Split, Task
from experiments.train.logs import Log
from experiments.train.predictions import mean_of
from experiments.train.run_folder import read_run
from tests.helpers.made_images import pack, write_imagenette, write_images
from tests.helpers.molecule_data import write_set, write_table
from tests.helpers.pyg_data import write_raw
from tests.helpers.stored_files import store
from tests.helpers.user_data import FORMS, write_npz

QUICK = ["--hidden", "4", "--experts", "2", "--no-progress", "--device", "cpu"]


@dataclass(frozen=True)
class Kind:
    """A kind of file, or of folder."""

    write: Callable[[Path], object]
    read: Callable[[Path], object]
    files: str = "**/*"
    """Which files are damaged."""
    weight: int = 10
    """How often it is drawn; slow ones are not drawn as often."""


# Using what was read -----------------------------------------------------------------------------


def use(task: Task, size: int = 8, is_checked: bool = True) -> None:
    """Take some batches of each part, and their losses of logits that are all zero.

    Graphs on disk are not checked for finite features whenever they are opened.
    """
    assert 0 < task.num_classes <= 10_000, f"{task.num_classes} classes"
    for part in get_args(Split):
        for batch in islice(task.loader(part, size, None), 2):
            target = batch.target
            assert len(target), f"an empty batch of {part}"
            is_finite = torch.isfinite(batch.inputs[0].float()).all()
            assert is_finite or not is_checked, "inputs that are not finite"
            loss = task.loss(torch.zeros(len(target), task.num_classes), target)
            assert torch.isfinite(loss), f"the loss of {part} is {loss}"


def use_graph(graph: GraphData, dataset: str = "graph", **options: Any) -> None:
    """Make a task of a graph and use it, as the full graph and by neighborhoods."""
    options = {"undirected": False, "adjacency": "edge_index", **options}
    sampled: dict[str, Any] = {"sampling": "neighbor", "fanout": (2, 2), "evaluation": "sampled"}
    for more in ({}, sampled):
        config = GraphConfig(dataset=dataset, **options, **more)
        use(graph_task(graph, config, 0))


def use_stored(folder: Path) -> None:
    """Open, sample, and read a stored graph."""
    graph = gmoe.StoredGraph(folder)
    graph.verify()
    batches = gmoe.neighbor_loader(graph, [2, 2], graph.train, batch_size=4)
    for batch in islice(batches, 2):
        assert batch.x.size(0) > int(batch.edge_index.max()) if batch.num_edges else True


# Graphs ------------------------------------------------------------------------------------------


def own(form: str) -> Kind:
    """A graph of the user's own."""
    return Kind(FORMS[form], lambda folder: use_graph(own_graph(next(folder.glob("mine*")))))


def read_named(name: str, folder: Path) -> None:
    use_graph(load_graph(name, folder, offline=True))


def named(name: str) -> Kind:
    """One of PyG's data sets, from its raw files."""
    return Kind(partial(write_raw, name), partial(read_named, name), weight=3)


def write_features(folder: Path) -> None:
    write_npz(folder)
    np.save(folder / "features.npy", np.random.default_rng(0).normal(size=(40, 3)))


def read_features(folder: Path) -> None:
    features = str(folder / "features.npy")
    use_graph(with_features(own_graph(folder / "mine.npz"), features), "made")


def write_stored(folder: Path) -> None:
    ids, generator = torch.arange(40), torch.Generator().manual_seed(0)
    edges = torch.randint(40, (2, 90), generator=generator)
    data = Data(x=torch.randn(40, 3, generator=generator), edge_index=edges, y=ids % 3)
    said: dict[str, Any] = {"train": ids[::2], "val": ids[1::4], "test": ids[3::4]}
    store(folder, data, **said)
    path = folder / "graph.json"
    more = '{"undirected": false, "num_classes": 3, "source": "a test", '
    path.write_text(path.read_text().replace("{", more, 1))


def read_task(folder: Path) -> None:
    options: dict[str, Any] = {"sampling": "neighbor", "evaluation": "sampled", "fanout": (2, 2)}
    config = GraphConfig(dataset="graph", data_root=folder, undirected=False, **options)
    use(load_tasks(config)(0), is_checked=False)


def write_ogb(name: str, folder: Path) -> None:
    write_planted(name, folder, 200, 600, 7)


def read_ogb(name: str, folder: Path) -> None:
    graph = load_ogb(name, folder, offline=True)
    graph.splits(0)
    if name in ("ogbn-arxiv", "ogbn-products"):
        use_graph(graph, name)


def write_archive(folder: Path) -> None:
    """OGB's zip file, in place of the folder."""
    made = write_planted("ogbn-arxiv", folder, 200, 600, 7)
    shutil.make_archive(str(folder / "arxiv"), "zip", folder, made.name)
    made.rename(folder / "arxiv")
    shutil.make_archive(str(folder / "arxiv"), "zip", folder, "arxiv")
    shutil.rmtree(folder / "arxiv")


def read_kept(folder: Path) -> None:
    """What the last run kept of OGB's files."""
    load_ogb("ogbn-arxiv", folder, offline=True)


def write_kept(folder: Path) -> None:
    write_ogb("ogbn-arxiv", folder)
    load_ogb("ogbn-arxiv", folder, offline=True)


def write_pairs(path: Path, rng: np.random.Generator, nodes: int) -> None:
    """A table of 300 edges, in the format that the suffix says."""
    edges = pd.DataFrame(rng.integers(0, nodes, size=(300, 2)), columns=["source", "target"])
    if path.suffix == ".npy":
        np.save(path, edges.to_numpy())
    elif path.suffix == ".csv":
        edges.to_csv(path, index=False)
    else:
        import duckdb

        with duckdb.connect() as connection:
            connection.register("given", edges)
            connection.execute(f"COPY given TO '{path}' (FORMAT parquet)")


def write_edges(suffix: str, folder: Path) -> None:
    rng = np.random.default_rng(0)
    write_pairs(folder / f"edges{suffix}", rng, nodes=50)
    arrays = {"x": rng.normal(size=(50, 4)), "y": rng.integers(0, 3, 50).astype(float)}
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    np.save(folder / "train.npy", np.arange(0, 20))
    (folder / "val.csv").write_text("".join(f"{node}\n" for node in range(20, 30)))


def read_edges(suffix: str, folder: Path) -> None:
    files: dict[str, Any] = {name: folder / f"{name}.npy" for name in ("x", "y", "train")}
    convert(
        str(folder / f"edges{suffix}"),
        folder / "out",
        val=folder / "val.csv",
        memory=0.2,
        **files,
    )
    use_stored(folder / "out")


def write_papers(folder: Path) -> None:
    write_planted(PAPERS, folder, 3_000, 600, 7)


def read_papers(folder: Path) -> None:
    convert(PAPERS, folder / "out", folder, half=True, memory=0.2)
    use_stored(folder / "out")


# Molecules and images ----------------------------------------------------------------------------


def read_molecules(folder: Path) -> None:
    use_task = load_tasks(MoleculeConfig(dataset="ogbg-molhiv", data_root=folder, offline=True))
    use(use_task(0))


def write_smiles(suffix: str, folder: Path) -> None:
    write_table(folder / f"HIV{suffix}")


def read_smiles(suffix: str, folder: Path) -> None:
    molecules(folder / f"HIV{suffix}", folder / "out")
    assert (folder / "out" / "ogbg_molhiv" / "raw" / "edge.csv.gz").exists()


def write_photos(folder: Path) -> None:
    """PNG, JPEG, BMP, GIF and WebP."""
    write_images(folder, train=3, test=1)
    for path in sorted(folder.glob("train/*/*.png")):
        suffix = {"0": ".jpg", "1": ".png", "2": ".webp"}[path.stem]
        Image.open(path).save(path.with_suffix(suffix))
        if suffix != ".png":
            path.unlink()


def read_photos(folder: Path, name: Any = "images", size: int | None = None) -> None:
    config = ImageConfig(dataset=name, data_root=folder, offline=True, image_size=size)
    use(load_tasks(config)(0))


def write_imagenette_archive(folder: Path) -> None:
    made = write_imagenette(folder, count=2)
    pack(made, folder / Path(Imagenette._ARCHIVES["160px"][0]).name)
    shutil.rmtree(made)


# Models ------------------------------------------------------------------------------------------


def hub_model() -> gmoe.GNNMoE:
    torch.manual_seed(0)
    return gmoe.GNNMoE(3, 4, 2, num_experts=2, conv=("gcn", "sage"), router="token_choice")


X, EDGES = torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), torch.arange(6)[None]
EDGES = torch.cat([EDGES, EDGES.roll(1, 1)])


def read_hub(folder: Path) -> None:
    model: Any = gmoe.GNNMoE.from_pretrained(folder)
    model(X, EDGES)


def write_vit(folder: Path) -> None:
    size = gmoe.ViTSize(
        image_size=8, patch_size=4, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=8
    )
    gmoe.ViTMoE(size=size, num_experts=2).save_pretrained(folder)


def read_vit(folder: Path) -> None:
    model: Any = gmoe.ViTMoE.from_pretrained(folder)
    model(torch.zeros(1, 1, 8, 8))


def dense_model() -> GCN:
    torch.manual_seed(0)
    return GCN(3, 4, 2, 2).eval()


def write_moefied(folder: Path) -> None:
    gmoe.save(gmoe.moefy(dense_model(), num_experts=2), folder, (X, EDGES))


def read_moefied(folder: Path) -> None:
    gmoe.load(folder, dense_model())(X, EDGES)


# Runs --------------------------------------------------------------------------------------------


def write_config(folder: Path) -> None:
    """One with an option of each type."""
    run = folder / "run"
    write_run(run)
    for name in ("config.json", "code.py"):
        (run / "run" / name).rename(folder / name)
    shutil.rmtree(run)


def read_config(folder: Path) -> None:
    config = parse(["--config", str(folder / "config.json")])
    assert len(str(config.folder())) < 4_000
    config.science()


def write_run(folder: Path) -> None:
    """A finished run of two seeds, and its data; and code, as a stranger's folder may hold."""
    folder.mkdir(exist_ok=True)
    data, out = write_npz(folder), folder / "run"
    args = ["graph", "--data-root", str(data), "--epochs", "2", "--seeds", "0", "1", *QUICK]
    main([*args, "--conv", "sage", "--out", str(out)])
    (out / "code.py").write_text("import os\nos.mkdir('../outside/ran')\nmade = None\n")


def of_run(folder: Path) -> list[str]:
    return ["--data-root", str(folder / "mine.npz"), "--out", str(folder / "run")]


def read_finished(folder: Path) -> None:
    run = read_run(folder / "run", folder / "mine.npz")
    task = run.load_task()
    run.load_model(task)(*next(iter(task.loader("val", 8, None))).inputs)


def read_where(folder: Path) -> None:
    """Without a data root: where it was trained on them."""
    read_run(folder / "run")


def read_report(folder: Path) -> None:
    """Left out is what is broken, in one line."""
    page = folder / "page" / "index.html"
    left_out = write_report([folder / "run"], page, folder / "mine.npz")
    if left_out:
        raise ValueError("; ".join(left_out))


def write_unfinished(folder: Path) -> None:
    """Seed 0 is finished, seed 1 has a checkpoint."""
    write_run(folder)
    (folder / "run" / "summary.json").unlink()
    (folder / "run" / "seed-1" / "result.json").unlink()


def read_unfinished(folder: Path) -> None:
    """Train on, as the command does."""
    options = ["--config", str(folder / "run" / "config.json"), "--no-progress", "--resume"]
    main([*options, "--device", "cpu", *of_run(folder)])


def read_logs(folder: Path) -> None:
    """Cut logs behind an epoch, as a run does that continues, and add to them."""
    for name in ("metrics", "routing"):
        path = folder / "run" / "seed-0" / f"{name}.csv"
        Log(path, keep=1).write([{"epoch": 1}])


def write_predictions(folder: Path) -> None:
    from safetensors.torch import save_file

    for seed in range(2):
        save_file({"probability": torch.rand(20, 3)}, folder / f"{seed}.safetensors")


def read_predictions(folder: Path) -> None:
    found = mean_of(sorted(folder.glob("*.safetensors")))
    assert found.shape == (20, 3)
    assert found.is_floating_point()


ALL_BUT_README = "*[!d]"
"""The files of a model on the hub, without README.md: this is its only one that ends with a d."""
OGB: Iterable[str] = ("ogbn-arxiv", "ogbn-proteins", "ogbn-mag")
RAW = ("citeseer", "amazon-photo", "wikics", "roman-empire", "actor")
KINDS: dict[str, Kind] = {
    **{form: own(form) for form in FORMS},
    **{name: named(name) for name in RAW},
    "features": Kind(write_features, read_features, "features.npy", 4),
    "stored graph": Kind(write_stored, use_stored),
    "stored graph, trained on": Kind(write_stored, read_task),
    **{name: Kind(partial(write_ogb, name), partial(read_ogb, name), weight=4) for name in OGB},
    "OGB's archive": Kind(write_archive, read_kept, weight=4),
    "OGB, kept": Kind(write_kept, read_kept, "**/tensors.pt", weight=5),
    "edges .npy": Kind(partial(write_edges, ".npy"), partial(read_edges, ".npy"), weight=4),
    "edges .csv": Kind(partial(write_edges, ".csv"), partial(read_edges, ".csv"), "edges*", 4),
    "edges .parquet": Kind(
        partial(write_edges, ".parquet"), partial(read_edges, ".parquet"), "edges*"
    ),
    "papers100M": Kind(write_papers, read_papers, weight=3),
    "molecules": Kind(write_set, read_molecules),
    "SMILES": Kind(partial(write_smiles, ".csv"), partial(read_smiles, ".csv")),
    "SMILES .gz": Kind(partial(write_smiles, ".csv.gz"), partial(read_smiles, ".csv.gz"), weight=3),
    "images": Kind(write_photos, read_photos, weight=14),
    "images, resized": Kind(write_photos, partial(read_photos, size=12), weight=4),
    "Imagenette's archive": Kind(
        write_imagenette_archive, partial(read_photos, name="imagenette", size=8), weight=3
    ),
    "hub, GNN": Kind(lambda folder: hub_model().save_pretrained(folder), read_hub, ALL_BUT_README),
    "hub, ViT": Kind(write_vit, read_vit, ALL_BUT_README, 6),
    "moefied": Kind(write_moefied, read_moefied, weight=14),
    "config": Kind(write_config, read_config, "*.json", 14),
    "run": Kind(write_run, read_finished, "run/**/*", 14),
    "run, where": Kind(write_run, read_where, "run/*.json", 4),
    "run, continued": Kind(write_unfinished, read_unfinished, "run/**/*", 6),
    "checkpoint": Kind(write_unfinished, read_unfinished, "run/seed-1/checkpoint/state.ckpt", 6),
    "logs": Kind(write_run, read_logs, "run/seed-0/*.csv", 6),
    "report": Kind(write_run, read_report, "run/*.json", 2),
    "predictions": Kind(write_predictions, read_predictions, weight=4),
}
