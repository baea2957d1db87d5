"""
Make a trained model smaller, save it, and load it again
========================================================

A small ViT of timm whose MLPs became copies, trained on handwritten digits. Then: ``prune``
removes the experts that nobody chose, ``keep`` all but the busiest ones, ``unstack`` lets dynamic
quantization see the experts, and ``save`` and ``load`` bring the model back. Each step prints size,
test accuracy, and how far the logits moved.

.. code-block:: none

    pip install "gmoe[hub]" timm scikit-learn
    python examples/shrink_and_save.py            # nothing leaves the machine
    python examples/shrink_and_save.py --fast

It takes 35 s of one core. The trained model, in which no expert is idle, has 5,080 kB and a test
accuracy of 86.1 %; with the busiest four of eight experts a layer 2,964 kB and 85.9 %; with two
1,905 kB and 77.3 %, before any training of what is left; quantized 4,885 kB, since the experts are
passed over, and once unstacked 1,293 kB and 85.9 %.
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
    print("2 epochs: the accuracies are near chance, 10%, and say only that it runs")

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
# Fewer experts, by what the validation images choose: those that nobody chose go without a loss.
with torch.no_grad(), gmoe.record_routing(model) as routings:
    model(images[val])
pruned = copy.deepcopy(model)
kept = gmoe.prune(pruned, routings)
report(f"pruned to {[len(ids) for ids in kept.values()]}", pruned)

# %%
# Of the others, the busiest; their tokens go to the next best expert.
for number in (4, 2, 1):
    smaller = copy.deepcopy(model)
    layers = [part for part in smaller.modules() if isinstance(part, gmoe.MoE)]
    for layer, routing in zip(layers, routings, strict=True):
        layer.keep(sorted(routing.load.topk(number).indices.tolist()))
    report(f"the busiest {number} of each layer", smaller)

# %%
# Weights of one byte: the experts' too, once each has linear layers of its own.
report("quantized", quantize_dynamic(copy.deepcopy(model), {nn.Linear}))
unstacked = gmoe.unstack(copy.deepcopy(model))
report("unstacked", unstacked)
report("unstacked and quantized", quantize_dynamic(unstacked, {nn.Linear}))

# %%
# Save a smaller one, and load it into a new dense model.
with tempfile.TemporaryDirectory() as folder:
    gmoe.save(smaller, folder)
    loaded = gmoe.load(folder, base=build())
with torch.no_grad():
    moved = float((loaded(images[test]) - smaller(images[test])).abs().max())
print(f"largest difference of the loaded model from the saved one: {moved}")

# sphinx_gallery_thumbnail_path = "figures/examples/shrink_and_save.svg"
