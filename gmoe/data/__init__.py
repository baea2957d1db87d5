"""Mini-batches of a graph. Imports torch_geometric."""

from gmoe.data.loader import neighbor_loader
from gmoe.data.sampler import NeighborSampler

__all__ = ["NeighborSampler", "neighbor_loader"]
