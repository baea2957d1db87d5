"""
Swap one class of a PyG model
=============================

The GAT of PyG's own example on Cora, with :class:`gmoe.MoEConv` in place of its first ``GATConv``.
It has eight experts, of which each node runs one. The first forward of the new layer is that of the
dense one; nothing else changes.

.. code-block:: none

    pip install "gmoe[graph]" scikit-learn
    python examples/swap_pyg_conv.py --data-root data   # Cora, downloaded unless it is there
    python examples/swap_pyg_conv.py --fast             # a graph of scikit-learn's digits

On Cora, three seeds of both take 240 s of one core of an AMD EPYC CPU in all, and print::

    GATConv           test accuracy 83.0 ± 0.6 %
    MoEConv(GATConv)  test accuracy 82.1 ± 0.6 %

Cora has 140 labels, from which eight experts learn little. The page "When does it help?" tells
where they learn more.
"""

# %%
# The data: Cora with its public split, or handwritten digits with their nearest neighbors and 10
# labels a class.
import argparse
import statistics
import time

import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import kneighbors_graph
from torch import nn
from torch.nn import functional as F
from torch_geometric import transforms as T
from torch_geometric.data import Data
from torch_geometric.datasets import Planetoid
from torch_geometric.nn import GATConv
from torch_geometric.utils import from_scipy_sparse_matrix

from gmoe import MoEConv

parser = argparse.ArgumentParser()
parser.add_argument("--data-root", default="data", help="where Cora is, or is downloaded to")
parser.add_argument("--seeds", type=int, default=3)
parser.add_argument("--epochs", type=int, default=200)
parser.add_argument("--fast", action="store_true", help="seconds, and no download")
args = parser.parse_args()

if args.fast:
    args.seeds, args.epochs = 1, 20
    digits = load_digits()
    x, y = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
    neighbors, _ = from_scipy_sparse_matrix(kneighbors_graph(digits.data, n_neighbors=8))
    split = T.RandomNodeSplit("test_rest", num_train_per_class=10, num_val=300)
    torch.manual_seed(0)
    data = T.Compose([T.ToUndirected(), split])(Data(x=x, y=y, edge_index=neighbors))
else:
    data = Planetoid(args.data_root, "Cora", transform=T.NormalizeFeatures())[0]
num_classes = int(data.y.max()) + 1


# %%
# The model: ``conv1`` is swapped. ``MoEConv`` takes the class, and then whatever ``GATConv`` takes.
class GAT(nn.Module):
    """PyG's example: two layers, eight heads of eight."""

    def __init__(self, conv1: nn.Module) -> None:
        super().__init__()
        self.conv1 = conv1
        self.conv2 = GATConv(8 * 8, num_classes, heads=1, concat=False, dropout=0.6)

    def forward(self, x: torch.Tensor, edge_index: torch.Tensor) -> torch.Tensor:
        x = F.dropout(x, p=0.6, training=self.training)
        x = F.elu(self.conv1(x, edge_index))
        x = F.dropout(x, p=0.6, training=self.training)
        return self.conv2(x, edge_index)


layers = {
    "GATConv": lambda: GATConv(data.num_features, 8, heads=8, dropout=0.6),
    "MoEConv(GATConv)": lambda: MoEConv(
        GATConv, data.num_features, 8, heads=8, dropout=0.6, num_experts=8, k=1
    ),
}


# %%
# Training as in PyG's example. Validation selects the epoch; the test nodes are read once.
def train(model: nn.Module) -> float:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.005, weight_decay=5e-4, fused=True)
    best_val, test = 0.0, 0.0
    for _ in range(args.epochs):
        model.train()
        optimizer.zero_grad()
        out = model(data.x, data.edge_index)
        F.cross_entropy(out[data.train_mask], data.y[data.train_mask]).backward()
        optimizer.step()
        with torch.no_grad():
            right = model.eval()(data.x, data.edge_index).argmax(dim=-1) == data.y
        if (val := right[data.val_mask].float().mean().item()) > best_val:
            best_val, test = val, right[data.test_mask].float().mean().item()
    return 100 * test


for name, layer in layers.items():
    start, found = time.perf_counter(), []
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        found.append(train(GAT(layer())))
    spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
    seconds = (time.perf_counter() - start) / len(found)
    print(
        f"{name:17} test accuracy {statistics.fmean(found):.1f}{spread} %, {seconds:.0f} s a seed"
    )

# sphinx_gallery_thumbnail_path = "figures/examples/swap_pyg_conv.svg"
