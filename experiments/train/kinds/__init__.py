"""The kinds of data that a run may be about: one class each, all that differs between them.

base       What training asks of a kind.
graphs     Nodes of a graph, of one node type or of several.
molecules  OGB's molecules, a graph each.
images     Images, in a ViT.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from experiments.train.config import (
    GraphConfig,
    ImageConfig,
    MoleculeConfig,
    RunConfig,
    TypedConfig,
)
from experiments.train.user_code import load_object

if TYPE_CHECKING:
    from experiments.train.kinds.base import Kind

KINDS: dict[type[RunConfig], str] = {
    GraphConfig: "graphs:Graphs",
    TypedConfig: "graphs:TypedGraphs",
    MoleculeConfig: "molecules:MoleculeSets",
    ImageConfig: "images:Images",
}
"""By name, since each needs packages that the others do without: torchvision, ogb."""


def kind_of(config: RunConfig) -> Kind[Any]:
    """The kind of data of a run; the only place that asks."""
    kind: Kind[Any] = load_object("dataset", f"{__name__}.{KINDS[type(config)]}")(config)
    return kind
