"""The image side of the experiments beside timm, top to bottom.

recipe      The options of a training on images, by timm's names.
data        Data sets, and folders of images, a folder a class.
transforms  timm's transforms and its mixup, as a recipe says.
batches     One epoch.
models      gmoe's ViTs, and timm's with experts in the place of MLPs.
soft_mlp    Soft experts beside an MLP.
maps        Which expert takes which patch.
"""
