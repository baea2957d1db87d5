"""Draw the picture at the top of the README: ``python docs/hero.py``, a minute on one core.

Left: the patches of a photo (scikit-learn's ``china.jpg``). A mixture of eight small autoencoders
reconstructs them; each patch is tinted by its expert. Right: scikit-learn's handwritten digits,
joined to their nearest neighbors. A GNN-MoE is trained to classify them; each digit has the color
of its expert. Nobody tells the routers what to look at.
"""

from __future__ import annotations

from pathlib import Path

import networkx as nx
import torch
from matplotlib import colormaps
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image
from sklearn.metrics import adjusted_mutual_info_score
from sklearn.neighbors import kneighbors_graph
from torch import Tensor
from torch.nn import functional as F
from torch_geometric.utils import from_scipy_sparse_matrix, to_undirected

import gmoe

E, PATCH = 8, 7
COLORS = torch.tensor(colormaps["Set1"](range(E)))[:, :3].float()


def photo() -> Tensor:
    """(H, W, 3) the photo, tinted."""
    image = torch.from_numpy(load_sample_image("china.jpg").copy()).float() / 255
    rows, columns = (size // PATCH for size in image.shape[:2])
    image = image[: rows * PATCH, : columns * PATCH]
    patches = (
        image.unflatten(0, (rows, PATCH))
        .unflatten(2, (columns, PATCH))
        .permute(0, 2, 1, 3, 4)
        .flatten(2)
        .flatten(0, 1)
    )
    tokens = (patches - patches.mean(0)) / patches.std(0)
    torch.manual_seed(0)
    dim = tokens.size(1)
    layer = gmoe.MoE(
        gmoe.ExpertChoice(dim, num_experts=E), gmoe.MLPExperts(dim, 6, dim, num_experts=E)
    )
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-3)
    for _ in range(300):
        optimizer.zero_grad()
        F.mse_loss(layer(tokens), tokens).backward()
        optimizer.step()
    expert = layer.eval().router(tokens).to_dense().argmax(1).view(rows, columns)
    tint = COLORS[expert].repeat_interleave(PATCH, 0).repeat_interleave(PATCH, 1)
    return 0.55 * image + 0.45 * tint


def graph() -> tuple[Tensor, Tensor, Tensor]:
    """(N, 2) places of the digits, (N,) their experts, (2, M) their edges."""
    digits = load_digits()
    x, y = torch.from_numpy(digits.data / 16).float(), torch.from_numpy(digits.target)
    edge_index = to_undirected(from_scipy_sparse_matrix(kneighbors_graph(digits.data, 10))[0])
    train = torch.arange(len(y)) % 2 == 0
    torch.manual_seed(0)
    model = gmoe.GNNMoE(
        x.size(1),
        32,
        10,
        num_layers=3,
        conv="sage",
        router="expert_choice",
        shared_router=True,
        router_input=("node", "neighbors"),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(model(x, edge_index)[train], y[train]).backward()
        optimizer.step()
    logits, (routing,) = model.eval()(x, edge_index, return_routing=True)
    expert = routing.to_dense().argmax(1)
    accuracy = (logits.argmax(1) == y)[~train].float().mean()
    ami = adjusted_mutual_info_score(y, expert)
    print(f"digits: test accuracy {accuracy:.3f}, AMI of expert and digit {ami:.2f}")
    drawing = nx.Graph(edge_index.T.tolist())
    places = nx.spring_layout(drawing, seed=1, iterations=150)
    return torch.tensor([list(places[node]) for node in range(len(x))]), expert, edge_index


def main() -> None:
    """Draw it."""
    tinted = photo()
    places, expert, edge_index = graph()
    # No background and no words, so that one file fits light and dark pages.
    figure = Figure(figsize=(10, 3.7), dpi=110)
    left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])
    figure.subplots_adjust(left=0.005, right=0.995, top=0.99, bottom=0.01, wspace=0.03)
    left.imshow(tinted.numpy())
    right.add_collection(
        LineCollection(places[edge_index.T].tolist(), colors=("0.55", 0.5), linewidths=0.3)
    )
    right.scatter(*places.T, s=7, c=COLORS[expert].numpy(), zorder=2, linewidths=0)
    right.set_aspect("equal", "datalim")
    for axis in (left, right):
        axis.set_axis_off()
    path = Path(__file__).parent / "figures" / "hero.png"
    figure.savefig(path, transparent=True)
    Image.open(path).quantize(200, Image.Quantize.FASTOCTREE).save(path, optimize=True)
    print(f"{path.name}: {path.stat().st_size // 1024} kB")


if __name__ == "__main__":
    main()
