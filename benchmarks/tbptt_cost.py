"""What a training step costs: its time, and what it keeps for the backward pass."""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import lightning.pytorch as pl
import torch
from language_run import peak_memory
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from training_runs import write_json

MEASURED = 2
"""The batch whose saved tensors are counted; it and those before it are not timed."""


class StepCost(Callback):
    """Write `step_seconds` [10th, 50th, 90th percentile], `saved_bytes` and `peak_memory`.

    `saved_bytes` are those of the storages that autograd keeps between the forward and the backward
    pass of a step, parameters left out, each counted once.

    Args:
        path: of the JSON file.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._seconds: list[float] = []
        self._batches = 0
        self._saved: dict[int, int] = {}
        self._hooks: Any = None

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        if self._batches == MEASURED:
            own = {p.untyped_storage().data_ptr() for p in pl_module.parameters()}
            self._hooks = torch.autograd.graph.saved_tensors_hooks(
                lambda tensor: self._count(tensor, own), lambda tensor: tensor
            )
            self._hooks.__enter__()
        self._began = _now()

    def _count(self, tensor: Tensor, own: set[int]) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            self._saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # itself, it would hold on to the graph that saves it

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        if self._batches == MEASURED:
            self._hooks.__exit__()
            self._hooks = None
        elif self._batches > MEASURED:
            self._seconds.append(_now() - self._began)
        self._batches += 1

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if len(self._seconds) < 2:
            return
        tenths = quantiles(self._seconds, n=10)
        content = {
            "step_seconds": [tenths[0], median(self._seconds), tenths[-1]],
            "saved_bytes": sum(self._saved.values()),
            "peak_memory": peak_memory(),
        }
        write_json(Path(self.path), content)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()
