"""CUDA itself says whether a training step waits for the device."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch

EVERY = 4
"""Steps from one flush of a monitor to the next."""


class Forbid(pl.Callback):
    """Waiting is an error between the flushes; the first step may still load kernels."""

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        step = trainer.global_step + 1
        torch.cuda.set_sync_debug_mode("error" if step > 1 and step % EVERY else "default")

    def on_train_end(self, *args: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")
