"""Processes that share the rows of a batch: context parallelism."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch


class ContextParallel(pl.Callback):
    """Split the tokens of every row among processes, which then hold the same fast state.

    With a strategy that averages gradients (`ddp`), P consecutive processes read the same rows,
    each its part of every chunk, and compute what one process would compute from all of it. For
    `LaCTModule` from scratch, and `TTTLoRAModule` with `method: in_place`.

    Args:
        size: P, processes that share a row; the number of all processes is a multiple of it.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"size={size} must be at least 1")
        self.size = size

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Form the groups, before any data is read.

        Raises:
            ValueError: the number of processes, the module, the DataModule or the loop does not
                fit.
        """
        self._check(trainer, pl_module, stage)
        module: Any = pl_module
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        datamodule.processes_per_row = self.size
        if self.size == 1 or module.streams.group is not None:
            return
        for first in range(0, trainer.world_size, self.size):
            ranks = list(range(first, first + self.size))
            group = torch.distributed.new_group(ranks)  # all processes make all groups
            if trainer.global_rank in ranks:
                module.share_rows(group)

    def _check(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if trainer.world_size % self.size:
            raise ValueError(
                f"ContextParallel(size={self.size}) needs a multiple of {self.size} processes, but "
                f"there are {trainer.world_size}: set trainer.devices, and strategy: ddp"
            )
        obstacle = getattr(pl_module, "sharing_obstacle", f"{type(pl_module).__name__} cannot")
        if obstacle is not None:
            raise ValueError(f"rows cannot be shared: {obstacle}; remove ContextParallel")
        if not hasattr(getattr(trainer, "datamodule", None), "processes_per_row"):
            raise ValueError(
                "ContextParallel needs a DataModule that gives all processes of a row the same "
                "files: use TextStreamDataModule"
            )
        if stage == "predict":
            raise ValueError("predictions are made row by row: remove ContextParallel")
