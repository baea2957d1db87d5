"""Small models, saved by each release, that later versions have to load.

``python -m tests.saved_models`` writes those of ``gmoe.__version__`` to ``tests/saved/VERSION``,
once, when it is released. What is there is never written again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch_geometric.nn import GCN

import gmoe

FOLDER = Path(__file__).parent / "saved"
CALL = "call.safetensors"
"""What a model of gmoe's own was called with, and what it gave."""

VIT = {
    "image_size": 8,
    "patch_size": 4,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 8,
    "mlp_dim": 8,
}

OWN: dict[str, Callable[[], Any]] = {
    "GNNMoE": lambda: gmoe.GNNMoE(4, 4, 3, 2, num_experts=2),
    "GNNMoE of GAT, shared": lambda: gmoe.GNNMoE(
        4, 4, 3, 2, conv="gat", num_experts=2, k=2, start="shared", norm="layer"
    ),
    "ViTMoE": lambda: gmoe.ViTMoE(VIT, 3, num_experts=2),
}
"""Models that know how they are built."""


def timm_vit() -> nn.Module:
    size: dict[str, Any] = {
        "img_size": 8,
        "patch_size": 4,
        "embed_dim": 8,
        "depth": 2,
        "num_heads": 2,
    }
    vit: nn.Module = timm.create_model("vit_tiny_patch16_224", num_classes=3, **size)
    return vit


def pyg_gcn() -> nn.Module:
    return GCN(4, 4, num_layers=2, out_channels=3)


BASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "timm, copies": (timm_vit, {"num_experts": 2, "start": "copies"}),
    "timm, expert choice": (timm_vit, {"num_experts": 2, "router": "expert_choice"}),
    "PyG": (pyg_gcn, {"num_experts": 2}),
}
"""Dense models, and how they get experts."""


def inputs_of(name: str) -> tuple[Tensor, ...]:
    """What a model is called with: images, or a graph."""
    if "ViT" in name or "timm" in name:
        return (torch.randn(2, 3, 8, 8),)
    return torch.randn(5, 4), torch.tensor([[0, 1, 2, 3, 4, 0], [1, 2, 3, 4, 0, 2]])


def redraw(model: nn.Module) -> None:
    """Let experts differ."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))


def save_own(name: str, folder: Path) -> None:
    model, inputs = OWN[name]().eval(), inputs_of(name)
    redraw(model)
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    call = {f"input {number}": value for number, value in enumerate(inputs)}
    with torch.no_grad():
        save_file({**call, "output": model(*inputs)}, folder / CALL)


def difference_of_own(name: str, folder: Path) -> float:
    """How far a model that is read again is from what it gave when it was saved."""
    kind = type(OWN[name]())
    call = load_file(folder / CALL)
    expected = call.pop("output")
    with torch.no_grad():
        output = kind.from_pretrained(folder).eval()(*(call[key] for key in sorted(call)))
    return float((output - expected).abs().max())


def main(folder: Path = FOLDER / gmoe.__version__) -> None:
    """Write the models of this version."""
    if folder.exists():
        raise SystemExit(f"{folder}: got models that were saved before, expected none")
    torch.manual_seed(0)
    for name in OWN:
        save_own(name, folder / name)
    for name, (build, options) in BASES.items():
        model = gmoe.moefy(build(), **options).eval()
        redraw(model)
        gmoe.save(model, folder / name, inputs_of(name))


if __name__ == "__main__":
    main()
