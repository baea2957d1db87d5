"""OGB's own metric, in the form of torchmetrics."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from experiments.data.ogb_import import Evaluator


class OGBMetric(Metric):
    """What ``ogb.nodeproppred.Evaluator`` says: accuracy of the argmax, or the mean ROC-AUC over the tasks.

    All predictions are kept, and evaluated at once over all processes: the ROC-AUC does not follow from its parts. ogb
    leaves out a task that has one class only.

    Args:
        name: of the OGB data set.
        **kwargs: :class:`torchmetrics.Metric`'s.

    Shapes:
        - **logits:** (n, classes), or (n, tasks) for the ROC-AUC.
        - **target:** (n,) or (n, 1), or (n, tasks) for the ROC-AUC.
        - **output:** a scalar, higher is better.

    Raises:
        ValueError: an unknown name, or shapes that do not fit.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    prediction: list[Tensor] | Tensor
    target: list[Tensor] | Tensor

    def __init__(self, name: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._evaluator = Evaluator(name)
        self.add_state("prediction", default=[], dist_reduce_fx="cat")
        self.add_state("target", default=[], dist_reduce_fx="cat")

    @property
    def metric_name(self) -> str:
        """``"acc"`` or ``"rocauc"``."""
        return self._evaluator.eval_metric

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Take in the logits of some nodes."""
        by_rank = self.metric_name == "rocauc"
        target = target if by_rank else target.view(-1, 1)
        width = self._evaluator.num_tasks if by_rank else "classes"
        fits = logits.dim() == 2 and logits.size(0) == target.size(0)
        if not fits or (by_rank and logits.shape != target.shape) or (by_rank and logits.size(1) != width):
            raise ValueError(
                f"logits: got {tuple(logits.shape)} for a target of {tuple(target.shape)}, expected (n, {width})"
            )
        logits = logits.detach()
        assert isinstance(self.prediction, list)
        assert isinstance(self.target, list)
        self.prediction.append(logits.float() if by_rank else logits.argmax(dim=1, keepdim=True))
        self.target.append(target)

    def compute(self) -> Tensor:
        """The metric over everything since the last reset."""
        result = self._evaluator.eval({"y_true": dim_zero_cat(self.target), "y_pred": dim_zero_cat(self.prediction)})
        return torch.tensor(result[self.metric_name], device=self.device)
