"""Sample and infer a mapped graph with little memory beside its files.

``python -m tests.helpers.bounded FOLDER CONV MEGABYTES`` fails if more is needed. Mapped files are
not counted by the limit, as they are by one on the address space.
"""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path

import torch
from torch_geometric.data import Data

from gmoe import GNNMoE, neighbor_loader
from tests.helpers.mapped import create_mapped, open_mapped

HIDDEN, OUT = 64, 4


def limit_memory(megabytes: int) -> None:
    """Refuse the process that much more anonymous memory than it has."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmData:\s+(\d+)", status)
    assert found is not None
    limit = (int(found[1]) << 10) + (megabytes << 20)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


def main(folder: Path, conv: str, megabytes: int) -> None:
    """Limit the memory, and use the graph in the folder."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    x, edge_index = (open_mapped(folder / f"{name}.npy") for name in ("x", "edge_index"))
    data = Data(x=x, edge_index=edge_index)
    model = GNNMoE(x.size(1), HIDDEN, OUT, conv=conv, num_experts=4).eval()
    limit_memory(megabytes)
    try:
        x.clone()
    except RuntimeError:
        pass
    else:
        raise AssertionError("the limit does not keep the features out of memory")
    seeds = torch.arange(0, len(x), 100)
    for batch in neighbor_loader(data, [5, 5], seeds, batch_size=256):
        model(batch.x, batch.edge_index)
    model.inference(data, batch_size=256, out=create_mapped(folder / "out.npy", (len(x), OUT)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
