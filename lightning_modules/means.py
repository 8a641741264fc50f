"""A mean over the targets of all batches and processes, for evaluation."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class TargetMean(Metric):
    """Mean over what was predicted in all batches and processes.

    torchmetrics' MeanMetric ignores weights where its check for NaN, which waits for the device,
    is switched off (1.9.0).
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "count"):
            self.add_state(name, torch.zeros(()), dist_reduce_fx="sum")

    def update(self, total: Tensor, count: Tensor) -> None:
        """Add a sum over `count` targets; both are scalars."""
        self.total += total
        self.count += count

    def compute(self) -> Tensor:
        """The mean; NaN without a target."""
        return self.total / self.count
