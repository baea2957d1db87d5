"""
A ViT-MoE on CIFAR-10
=====================

:class:`gmoe.ViTMoE`, a small ViT with eight experts beside every second MLP, against the dense ViT
of the same width. The patches of an image, and its class token, choose among the experts.

.. code-block:: none

    pip install "gmoe[vision]" scikit-learn
    python examples/vit_cifar10.py --data-root data --epochs 1    # CIFAR-10, a 170 MB download
    python examples/vit_cifar10.py --fast                         # scikit-learn's digits

One epoch of both models takes 970 s of one core of an AMD EPYC CPU, and brings each to 39.1 % test
accuracy (on a JPEG copy of CIFAR-10). A ViT-MoE without a shared expert came to 75.6 % in 22 epochs
of ``python -m experiments.train cifar10``, by expert choice, in 5,608 s on one core.
"""

# %%
import argparse
import time

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.datasets import CIFAR10
from torchvision.transforms import v2

import gmoe

parser = argparse.ArgumentParser()
parser.add_argument("--data-root", default="data", help="where CIFAR-10 is, or is downloaded to")
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--fast", action="store_true", help="seconds, and no download")
args = parser.parse_args()
batch_size = 128
if args.fast:
    args.epochs, batch_size = 3, 32
device = "cuda" if torch.cuda.is_available() else "cpu"

# %%
# The data, as two tensors: images this small need no workers. A tenth of the training images
# validates.
if args.fast:
    digits = load_digits()
    images, labels = torch.tensor(digits.images).byte()[:, None] * 15, torch.tensor(digits.target)
    train_set, test_set = (images[:1400], labels[:1400]), (images[1400:], labels[1400:])
else:
    train_set, test_set = (
        (torch.from_numpy(part.data).permute(0, 3, 1, 2), torch.tensor(part.targets))
        for part in (CIFAR10(args.data_root, train=train, download=True) for train in (True, False))
    )
side = train_set[0].size(-1)
scale = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.25])])
augment = (
    scale
    if args.fast
    else v2.Compose([v2.RandomCrop(side, padding=4), v2.RandomHorizontalFlip(), scale])
)
order = torch.randperm(len(train_set[0]), generator=torch.Generator().manual_seed(0))
val, train = order[: len(order) // 10], order[len(order) // 10 :]


# %%
# Training: AdamW and one cycle. Crops and flips are drawn a chunk of images at a time.
@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    found = torch.cat(
        [model(scale(part).to(device)).argmax(dim=-1).cpu() for part in images.split(500)]
    )
    return 100 * (found == labels).float().mean().item()


def fit(model: nn.Module) -> nn.Module:
    images, labels = train_set
    batches = -(-len(train) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1e-3, total_steps=args.epochs * batches
    )
    for epoch in range(args.epochs):
        start = time.perf_counter()
        model.train()
        for batch in train[torch.randperm(len(train))].split(batch_size):
            x = torch.cat([augment(part) for part in images[batch].split(16)])
            optimizer.zero_grad()
            F.cross_entropy(model(x.to(device)), labels[batch].to(device)).backward()
            optimizer.step()
            schedule.step()
        found = accuracy(model, images[val], labels[val])
        print(f"  epoch {epoch}: validation {found:.1f} %, {time.perf_counter() - start:.0f} s")
    return model


# %%
# Two models that begin with the same function: a seed draws the dense parts alike.
for name, router in {"dense ViT": None, "ViT-MoE": "token_choice"}.items():
    torch.manual_seed(0)
    model = gmoe.ViTMoE(side, router=router, num_experts=8, k=1)
    print(
        f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{gmoe.active_parameters(model):,} active"
    )
    fit(model.to(device))
    print(f"  test accuracy {accuracy(model, *test_set):.1f} %")

# sphinx_gallery_thumbnail_path = "figures/examples/vit_cifar10.svg"
