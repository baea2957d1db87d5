"""OGB's molecules, a graph each: a GNN as OGB's examples build it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from experiments.train.config import MoleculeConfig
from experiments.train.data.molecules import molecule_task
from experiments.train.data.task import Task
from experiments.train.kinds.base import GNNKind


class MoleculeSets(GNNKind[MoleculeConfig]):
    """Labels of molecules, in a ``MoleculeGNN``."""

    def tasks(self) -> Callable[[int], Task]:
        config = self.config
        task = molecule_task(config.dataset, config.data_root)
        return lambda _: task

    def note_data(self, digest: Any) -> dict[str, Any]:
        """OGB's files, or converted by some version of RDKit."""
        folder = self.config.dataset.replace("-", "_")
        for file in sorted(self.config.data_root.glob(f"{folder}/RELEASE*.txt")):
            digest.update(file.read_bytes())
        return {}

    def model(self, task: Task) -> nn.Module:
        # ogb takes long, and a finished run that is only read has no model
        from experiments.train.molecule_gnn import MoleculeGNN, conv_of

        config = self.config
        convs = {name: conv_of(name, config.hidden) for name in config.conv}
        names = self.conv_of_experts()
        return MoleculeGNN(
            config.hidden,
            task.num_classes,
            config.layers,
            conv=convs[names] if isinstance(names, str) else [convs[name] for name in names],
            norm="batch_norm",
            residual="none",
            **self.model_options(task),
        )
