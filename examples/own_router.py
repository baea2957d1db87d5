"""
Your own router
===============

A router is a module with two methods, ``route`` and ``reset_parameters``. This one is the noisy
top-K gating of `Shazeer et al. (2017) <https://arxiv.org/abs/1701.06538>`_: noise of a learned
width lets experts take turns, and two losses, CV² of the importance and of the expected load, keep
them evenly used. Every layer of gmoe takes its class where it takes the name of a built-in router.

.. code-block:: none

    pip install "gmoe[graph]" scikit-learn
    python examples/own_router.py            # handwritten digits as a graph of nearest neighbors
    python examples/own_router.py --fast

Three seeds of each take 18 s of one core of an AMD EPYC CPU. On a graph this easy, the router does
not matter::

    token_choice test accuracy 96.2 ± 0.4 %
    NoisyTopK    test accuracy 96.2 ± 0.3 %
    random       test accuracy 96.1 ± 0.2 %
"""

# %%
import argparse
import statistics
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import kneighbors_graph
from torch import Tensor, nn
from torch.nn import functional as F
from torch_geometric import transforms as T
from torch_geometric.data import Data
from torch_geometric.utils import from_scipy_sparse_matrix

import gmoe
from gmoe.routers import RouterLike

parser = argparse.ArgumentParser()
parser.add_argument("--seeds", type=int, default=3)
parser.add_argument("--epochs", type=int, default=100)
parser.add_argument("--fast", action="store_true", help="one seed, 20 epochs")
args = parser.parse_args()
if args.fast:
    args.seeds, args.epochs = 1, 20


# %%
# The router. ``route`` gets flat tokens in float32, with autocast off. Its losses are in the
# ``Routing``, and ``gmoe.aux_loss`` adds them up. ``summed`` gives sums over the tokens of all
# processes.
def cv_squared(value_E: Tensor) -> Tensor:
    """Squared coefficient of variation: 0 if all experts have as much."""
    return value_E.var(unbiased=False) / value_E.mean().square()


class NoisyTopK(gmoe.Router):
    """Noisy top-K gating, with losses on importance and load; K < E."""

    # In evaluation each token decides alone, and its K >= 2 weights sum to 1.
    by_token, sums_to_one = True, True

    def __init__(self, dim: int, *, num_experts: int, k: int = 2, loss_coef: float = 0.01) -> None:
        super().__init__(dim, num_experts=num_experts, k=k, weight="normalized")
        self.loss_coef = loss_coef
        self.gate = nn.Linear(dim, num_experts, bias=False)
        self.noise = nn.Linear(dim, num_experts, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.gate.reset_parameters()
        nn.init.zeros_(self.noise.weight)

    def route(self, x_TD: Tensor, group: Tensor | int, edge_index: Tensor | None) -> gmoe.Routing:
        clean_TE = F.linear(x_TD, self.gate.weight.to(x_TD.dtype))
        std_TE = F.softplus(F.linear(x_TD, self.noise.weight.to(x_TD.dtype))) + 0.01
        drawn_TE = torch.randn_like(clean_TE) if self.training else torch.zeros_like(clean_TE)
        noisy_TE = clean_TE + std_TE * drawn_TE

        # The K best by the noisy logits, and the next one.
        best_TK, expert_TK = noisy_TE.topk(self.k + 1, dim=-1)
        weight_TK = best_TK[:, : self.k].softmax(dim=-1)

        # The load that noise drawn anew would give, which has a gradient: an expert is taken if it
        # beats the K-th best of the others.
        is_taken_TE = noisy_TE >= best_TK[:, -2:-1]
        to_beat_TE = torch.where(is_taken_TE, best_TK[:, -1:], best_TK[:, -2:-1])
        chance_TE = torch.special.ndtr((clean_TE - to_beat_TE) / std_TE)
        probs_TE = noisy_TE.softmax(dim=-1)
        importance_E, load_E = self.summed(probs_TE.sum(dim=0), chance_TE.sum(dim=0))
        return gmoe.Routing.from_choices(
            expert_TK[:, : self.k],
            weight_TK,
            num_experts=self.num_experts,
            scores=probs_TE,
            losses={
                "importance": gmoe.AuxLoss(cv_squared(importance_E), self.loss_coef),
                "load": gmoe.AuxLoss(cv_squared(load_E), self.loss_coef),
            },
        )


# %%
# The data: 1,797 digits, each with its eight nearest neighbors; 10 labels a class train.
digits = load_digits()
neighbors, _ = from_scipy_sparse_matrix(kneighbors_graph(digits.data, n_neighbors=8))
data = Data(
    x=torch.tensor(digits.data).float() / 16, y=torch.tensor(digits.target), edge_index=neighbors
)
torch.manual_seed(0)
data = T.Compose(
    [T.ToUndirected(), T.RandomNodeSplit("test_rest", num_train_per_class=10, num_val=300)]
)(data)
graph = gmoe.Graph(data.edge_index, data.num_nodes)  # sorted once, not in every forward


# %%
# The same model with a built-in router, with this one, and with random experts. Classes of your own
# start beside a shared expert, gmoe's may start as copies, so that the start is said here.
def train(router: RouterLike) -> tuple[float, gmoe.Routing]:
    options: Any = {"start": "shared", "shared_router": False, "num_experts": 8, "k": 2}
    model = gmoe.GNNMoE(64, 32, 10, conv="sage", router=router, dropout=0.5, **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, weight_decay=5e-4, fused=True)
    best_val, test = 0.0, 0.0
    for _ in range(args.epochs):
        optimizer.zero_grad()
        out, routings = model.train()(data.x, graph, return_routing=True)
        loss = F.cross_entropy(out[data.train_mask], data.y[data.train_mask])
        (loss + gmoe.aux_loss(routings)).backward()
        optimizer.step()
        with torch.no_grad():
            out, routings = model.eval()(data.x, graph, return_routing=True)
        right = (out.argmax(dim=-1) == data.y).float()
        if (val := right[data.val_mask].mean().item()) > best_val:
            best_val, test = val, right[data.test_mask].mean().item()
    return 100 * test, routings[0]


routers: dict[str, RouterLike] = {
    "token_choice": "token_choice",
    "NoisyTopK": NoisyTopK,
    "random": "random",
}
for name, router in routers.items():
    found = []
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        accuracy, routing = train(router)
        found.append(accuracy)
    spread = f" ± {statistics.stdev(found):.1f}" if len(found) > 1 else ""
    load = routing.load.tolist()
    print(f"{name:12} test accuracy {statistics.fmean(found):.1f}{spread} %, load {load}")

# sphinx_gallery_thumbnail_path = "figures/examples/own_router.svg"
