"""A graph of the layout of ogbn-mag, and models of it.

Papers have features and labels; three node types have no features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch_geometric import transforms as T
from torch_geometric.data import HeteroData

from gmoe.models.hetero_gnn import HeteroGNNMoE
from tests.helpers.masked import features, random_graph

IN = 4
HIDDEN = 6
OUT = 5
EXPERTS = 3
COUNTS = {"paper": 12, "author": 9, "institution": 4, "field_of_study": 5}

RELATIONS = [
    ("author", "affiliated_with", "institution"),
    ("author", "writes", "paper"),
    ("paper", "cites", "paper"),
    ("paper", "has_topic", "field_of_study"),
]


def mag(counts: dict[str, int] = COUNTS, seed: int = 0) -> HeteroData:
    """ogbn-mag, small, with the reverse relations."""
    data = HeteroData()
    for name, count in counts.items():
        data[name].num_nodes = count
        data[name].n_id = torch.arange(count)
    data["paper"].x = features(counts["paper"], IN, seed=seed)
    data["paper"].y = torch.arange(counts["paper"]) % OUT
    for i, relation in enumerate(RELATIONS):
        num_src, num_dst = counts[relation[0]], counts[relation[-1]]
        data[relation].edge_index = random_graph(num_src, num_dst, 2 * num_src, seed=seed + i)
    return T.ToUndirected(merge=False)(data)


DATA = mag()


def model(data: HeteroData = DATA, **kwargs: Any) -> HeteroGNNMoE:
    torch.manual_seed(0)
    options = {
        "num_experts": EXPERTS,
        "num_nodes_dict": data.num_nodes_dict,
        "target": "paper",
        **kwargs,
    }
    # Noise would differ from call to call
    if options.get("router", "token_choice") == "token_choice":
        options.setdefault("router_kwargs", {"balance": None})
    return HeteroGNNMoE(
        {"paper": IN}, options.pop("hidden_channels", HIDDEN), OUT, data.metadata(), **options
    ).double()


def call(gnn: HeteroGNNMoE, data: HeteroData = DATA, **kwargs: Any) -> Any:
    return gnn(data.x_dict, data.edge_index_dict, **kwargs)
