"""What the older of the allowed versions of torch cannot do, as ``docs/install.md`` says."""

import pytest
import torch

COMPILES_GRAPHS = pytest.mark.skipif(
    torch.__version__ < "2.12", reason="torch compiles layers of graphs as one graph from 2.12 on"
)
EXPORTS_GRAPHS = pytest.mark.skipif(
    torch.__version__ < "2.13", reason="torch exports layers of graphs to ONNX from 2.13 on"
)
ROUNDS_ALIKE = pytest.mark.skipif(
    torch.__version__ < "2.12", reason="before torch 2.12, steps of ViTs are rounded otherwise"
)
