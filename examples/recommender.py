"""
A recommender: users and items, links by time
=============================================

Which item does a user take next? :class:`gmoe.HeteroGNNMoE` on users and items, trained on links in
order of time: :func:`gmoe.link_neighbor_loader` gives each link the latest of what happened before
it, and a negative item. It needs no pyg-lib.

.. code-block:: none

    pip install "gmoe[graph]"
    python examples/recommender.py
    python examples/recommender.py --fast   # one seed, fewer users, items and links

Three seeds of both take 42 minutes of a core beside many other jobs, so do not compare the times.
Experts gain nothing here::

    RelationalConv test accuracy 78.8 ± 0.2 %, 241 s a seed
    HeteroMoEConv  test accuracy 78.2 ± 1.1 %, 598 s a seed
"""

# %%
# The data, made here. Items have a genre, which their features tell through noise. Users like two
# genres, and leave one of them for another at some time. Nine of ten links go to a genre that the
# user likes at that time. Users have no features: what they took tells what they like.
import argparse
import copy
import time
from typing import Any

import torch
from torch.nn import functional as F
from torch_geometric.data import HeteroData
from torch_geometric.loader import LinkLoader

import gmoe

parser = argparse.ArgumentParser()
parser.add_argument("--fast", action="store_true", help="seconds")
is_fast, genres = parser.parse_args().fast, 10
users, items, links = (200, 100, 4_000) if is_fast else (1_000, 500, 20_000)
seeds, epochs = (1, 4) if is_fast else (3, 6)

drawn = torch.Generator().manual_seed(0)
genre = torch.arange(items) % genres
liked = torch.rand(users, genres, generator=drawn).argsort(dim=1)[:, :3]
leaves = torch.randint(links, (users,), generator=drawn)

when = torch.arange(links)  # the order of the links is their time
user = torch.randint(users, (links,), generator=drawn)
wanted = liked[user, torch.randint(2, (links,), generator=drawn) + (when > leaves[user])]
is_noise = torch.rand(links, generator=drawn) < 0.1
wanted[is_noise] = torch.randint(genres, (int(is_noise.sum()),), generator=drawn)
item = torch.randint(items // genres, (links,), generator=drawn) * genres + wanted

data, takes = HeteroData(), ("user", "takes", "item")
data["user"].x = torch.ones(users, 1)
data["item"].x = F.one_hot(genre, genres) + 0.3 * torch.randn(items, genres, generator=drawn)
data[takes].edge_index = torch.stack([user, item])
data["item", "taken by", "user"].edge_index = torch.stack([item, user])
data[takes].time = data["item", "taken by", "user"].time = when


# %%
# The loaders: the first eight tenths of the links are for training, then one for validation and one
# for the test. A link has the time before its own, or else it would see itself.
def loader(start: float, end: float, shuffle: bool = False) -> LinkLoader:
    part = slice(int(start * links), int(end * links))
    options: Any = {"time_attr": "time", "temporal_strategy": "last", "neg_sampling": "triplet"}
    options |= {"edge_label_time": when[part] - 1, "batch_size": 256, "shuffle": shuffle}
    label_index = (takes, data[takes].edge_index[:, part])
    return gmoe.link_neighbor_loader(data, [10, 5], label_index, **options)


# %%
# A user and an item have a vector each, whose product is the score. The loss asks that the item of
# a link scores higher than the negative one; the accuracy says how often it does.
def margins(model: gmoe.HeteroGNNMoE, batch: HeteroData) -> tuple[torch.Tensor, list]:
    h, routings = model(batch.x_dict, batch.edge_index_dict, return_routing=True)
    taken, other = h["item"][batch["item"].dst_pos_index], h["item"][batch["item"].dst_neg_index]
    return (h["user"][batch["user"].src_index] * (taken - other)).sum(dim=1), routings


@torch.no_grad()
def accuracy(model: gmoe.HeteroGNNMoE, start: float, end: float) -> float:
    model.eval()
    margin = torch.cat([margins(model, batch)[0] for batch in loader(start, end)])
    return 100 * (margin > 0).float().mean().item()


def train(seed: int, **kwargs: Any) -> gmoe.HeteroGNNMoE:
    torch.manual_seed(seed)
    model = gmoe.HeteroGNNMoE({"user": 1, "item": genres}, 32, 32, data.metadata(), **kwargs)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, fused=True)
    best_val, best = 0.0, model
    for _ in range(epochs):
        model.train()
        for batch in loader(0, 0.8, shuffle=True):
            optimizer.zero_grad()
            margin, routings = margins(model, batch)
            (F.softplus(-margin).mean() + gmoe.aux_loss(routings)).backward()
            optimizer.step()
        if (val := accuracy(model, 0.8, 0.9)) > best_val:  # validation selects the epoch
            best_val, best = val, copy.deepcopy(model)
    return best


asked: dict[str, Any] = {"RelationalConv": {"router": None}, "HeteroMoEConv": {"num_experts": 4}}
for name, kwargs in asked.items():
    start, models = time.perf_counter(), [train(seed, **kwargs) for seed in range(seeds)]
    seconds = (time.perf_counter() - start) / seeds
    found = torch.tensor([accuracy(model, 0.9, 1) for model in models])
    std = found.std() if seeds > 1 else 0.0
    print(f"{name:14} test accuracy {found.mean():.1f} ± {std:.1f} %, {seconds:.0f} s a seed")

# %%
# To serve: the vectors of all users and items, layer by layer, and the items of a user.
vectors = models[0].inference(data)
best = (vectors["item"] @ vectors["user"][0]).topk(5).indices
print("user 0 likes genres", liked[0, 1:].tolist(), "and gets", genre[best].tolist())

# sphinx_gallery_thumbnail_path = "figures/examples/recommender.svg"
