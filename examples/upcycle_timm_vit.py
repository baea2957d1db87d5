"""
Upcycle a timm ViT
==================

:func:`gmoe.moefy` puts experts beside the MLP of every second block of a trained ViT. The MLP stays
as the shared expert. The experts start as copies of its first layer, and their last layers start at
zero: the first forward is the dense model's. Both are then fine-tuned for the same number of
epochs.

.. code-block:: none

    pip install gmoe timm scikit-learn
    python examples/upcycle_timm_vit.py                 # scikit-learn's digits, 32 x 32 pixels
    python examples/upcycle_timm_vit.py --pretrained    # downloads timm's ImageNet weights
    python examples/upcycle_timm_vit.py --fast

Ten epochs of each take 220 s of one core of an Intel Xeon CPU that does other work too. Other seeds
turn the order of the last two around: this shows how it is done, not which is better::

    dense, 10 epochs: test accuracy 88.7 %
    dense, fine-tuned: test accuracy 95.7 %
    upcycled, fine-tuned: test accuracy 91.8 %
"""

# %%
# The data: 1,797 digits, of which 1,000 train; enlarged, as a model for photographs wants them.
import argparse
import copy
import time
from typing import Any

import timm
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import gmoe

parser = argparse.ArgumentParser()
parser.add_argument("--pretrained", action="store_true", help="download timm's weights")
parser.add_argument(
    "--epochs", type=int, default=10, help="of the dense model, and of fine-tuning each"
)
parser.add_argument("--fast", action="store_true", help="seconds, and no download")
args = parser.parse_args()
if args.fast:
    args.epochs, args.pretrained = 2, False

torch.manual_seed(0)
digits = load_digits()
images = F.interpolate(
    torch.tensor(digits.images).float()[:, None] / 8 - 1, size=32, mode="bilinear"
)
order = torch.randperm(len(images))
images, labels = images[order], torch.tensor(digits.target)[order]

# %%
# A small ViT of timm's: 16 patches of 8 x 8 pixels and the class token.
size: dict[str, Any] = {"depth": 2, "embed_dim": 96} if args.fast else {"depth": 6}
vit = timm.create_model(
    "vit_tiny_patch16_224",
    pretrained=args.pretrained,
    img_size=32,
    patch_size=8,
    in_chans=1,
    num_classes=10,
    **size,
)


# %%
# One training function for all of them. The default router balances the experts without a loss.
def train(model: nn.Module, epochs: int, lr: float) -> float:
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05, fused=True)
    for _ in range(epochs):
        model.train()
        for batch in torch.randperm(1000).split(50):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        return (
            100
            * (model.eval()(images[1000:]).argmax(dim=-1) == labels[1000:]).float().mean().item()
        )


print(f"dense, {args.epochs} epochs: test accuracy {train(vit, args.epochs, 5e-4):.1f} %")

# %%
# The upcycled model gives what the dense one gives.
moe = gmoe.moefy(copy.deepcopy(vit), every=2, num_experts=8, k=1, router="token_choice")
with torch.no_grad():
    print(
        "largest difference of the first forward:",
        (moe.eval()(images[:100]) - vit(images[:100])).abs().max().item(),
    )

# %%
# Fine-tune both, with the same batches.
for name, model in {"dense, fine-tuned": vit, "upcycled, fine-tuned": moe}.items():
    start = time.perf_counter()
    accuracy = train(model, args.epochs, 2e-4)
    active = gmoe.active_parameters(model)
    seconds = time.perf_counter() - start
    print(
        f"{name}: test accuracy {accuracy:.1f} % in {seconds:.0f} s, {active:,} active parameters"
    )

# %%
# What the experts took of the test images, block by block.
with torch.no_grad(), gmoe.record_routing(moe) as routings:
    moe(images[1000:])
for routing in routings:
    print(routing)

# sphinx_gallery_thumbnail_path = "figures/examples/upcycle_timm_vit.svg"
