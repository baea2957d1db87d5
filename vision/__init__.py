"""The image side of the experiments, top to bottom; README.md has the tour.

recipe      The options of a training on images, by timm's names.
datasets    Data sets, and folders of images, a folder a class.
own_images  Images that a user's function makes.
archives    Archives, unpacked or downloaded.
sources     Images in memory or in files, of any size and shape, and how models see them.
augment     Crops, flips, RandAugment, erasing; mixup and CutMix.
batches     One epoch.
models      The model of a run: gmoe's ViTs, and timm's with experts in the place of MLPs.
soft_mlp    Soft experts beside an MLP.
told_domain Experts that are told the domain of an image.
views       A low-level view of an image, to a router or as a token.
weights     Learning rates by part and by layer, frozen parts, the average of weights.
maps        Which expert takes which patch.
"""
