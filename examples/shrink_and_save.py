"""
Make a trained model smaller, save it, and load it again
========================================================

A small ViT of timm whose MLPs became copies, trained on handwritten digits. Then: ``prune``
removes dead and weak experts, ``densify`` makes layers of one expert dense, ``unstack`` lets
dynamic quantization see the experts, and ``save`` and ``load`` bring the model back. Each step
prints size, test accuracy, and how far the logits moved.

.. code-block:: none

    pip install "gmoe[hub]" timm scikit-learn
    python examples/shrink_and_save.py            # nothing leaves the machine
    python examples/shrink_and_save.py --fast

It takes 35 s of one core. The trained model, in which no expert is dead, has 5,083 kB and a test
accuracy of 81.1 %; with half of its experts, uneven by layer, 2,961 kB and 80.4 %; with a quarter
1,900 kB and 80.9 %; with one a layer, as a dense model, 829 kB and 77.1 %; quantized 4,888 kB,
since the experts are passed over, and once unstacked 1,293 kB and 80.9 %.
"""

# %%
import argparse
import copy
import io
import tempfile

import timm
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.ao.quantization import quantize_dynamic
from torch.nn import functional as F

import gmoe

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=30)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--fast", action="store_true", help="2 epochs")
args = parser.parse_args()
if args.fast:
    args.epochs = 2

digits = load_digits()
images = torch.tensor(digits.images).float()[:, None] / 8 - 1
labels = torch.tensor(digits.target)
train, val, test = torch.arange(len(labels)).split([1200, 200, 397])


def build() -> nn.Module:
    """The dense model, as anyone would build it."""
    return timm.models.VisionTransformer(
        img_size=8, patch_size=2, in_chans=1, embed_dim=64, depth=4, num_heads=4, num_classes=10
    )


# %%
# Train it.
torch.manual_seed(args.seed)
model = gmoe.moefy(build(), start="copies", every=1, num_experts=8)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, fused=True)
for _ in range(args.epochs):
    for batch in train[torch.randperm(len(train))].split(64):
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
model.eval()


# %%
# How large, how good, and how far from the trained model?
@torch.no_grad()
def report(name: str, changed: nn.Module) -> None:
    file = io.BytesIO()
    torch.save(changed.state_dict(), file)
    logits = changed.eval()(images[test])
    error = (logits - trained).norm() / trained.norm()
    right = (logits.argmax(1) == labels[test]).float().mean()
    size = file.tell() / 1000
    print(f"{name:34} {size:6,.0f} kB, test accuracy {right:.1%}, logits off by {error:.1%}")


with torch.no_grad():
    trained = model(images[test])
report("trained", model)

# %%
# Fewer experts. What is measured is measured on the validation images.
for keep in (None, 0.5, 0.25):
    pruned = gmoe.prune(copy.deepcopy(model), images[val], keep=keep)
    numbers = [len(layer.kept) for layer in pruned.layers]
    report(f"pruned, keep={keep}: {numbers}", pruned.model)

# %%
# A layer of one expert is a dense layer: the ViT of timm comes back, without a router.
single = gmoe.prune(copy.deepcopy(model), images[val], keep=1)
report("pruned to one expert a layer", single.model)
folded = gmoe.densify(single.model)
print(folded)
report("folded to dense layers", folded.model)

# %%
# Weights of one byte: the experts' too, once each has linear layers of its own.
report("quantized", quantize_dynamic(copy.deepcopy(model), {nn.Linear}))
unstacked = gmoe.unstack(copy.deepcopy(model))
report("unstacked", unstacked)
report("unstacked and quantized", quantize_dynamic(unstacked, {nn.Linear}))

# %%
# Save what was pruned last, and load it into a new dense model.
with tempfile.TemporaryDirectory() as folder:
    gmoe.save(pruned.model, folder)
    loaded = gmoe.load(folder, base=build())
with torch.no_grad():
    moved = float((loaded(images[test]) - pruned.model(images[test])).abs().max())
print(f"largest difference of the loaded model from the saved one: {moved}")

# sphinx_gallery_thumbnail_path = "figures/examples/shrink_and_save.svg"
