"""Mini-batches of a graph. Imports torch_geometric."""

from gmoe.data.loader import neighbor_loader
from gmoe.data.sampler import NeighborSampler
from gmoe.data.stored import StoredGraph

__all__ = ["NeighborSampler", "StoredGraph", "neighbor_loader"]
