"""What a run in several processes needs of Lightning, whatever made the trainer."""

from __future__ import annotations

import inspect

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

from lightning_modules.distributed.interruption import AgreedInterruption

BUFFERS, OLD_BUFFERS = "forward_sync_buffers", "broadcast_buffers"
"""Option of DDP, and what it is called before torch 2.13."""


def prepare(trainer: pl.Trainer) -> None:
    """Set up the processes of a trainer; called when they have met, before DDP wraps the module.

    Buffers are not broadcast before every step (they are constants, and equal from the beginning),
    and the processes do not ask each other before every batch whether one was interrupted.
    """
    if isinstance(trainer.strategy, DDPStrategy):
        options = trainer.strategy._ddp_kwargs
        if not options.keys() & {BUFFERS, OLD_BUFFERS}:
            known = inspect.signature(DistributedDataParallel).parameters
            options[BUFFERS if BUFFERS in known else OLD_BUFFERS] = False
    if trainer.world_size > 1:
        AgreedInterruption(trainer).install()


def seed_process(rank: int) -> None:
    """Let every process draw noise and dropout of its own; all have made the same model before.

    Lightning seeds all processes alike: the rows of all would be trained at the same times of flow
    matching, on the same noise. The first process draws as a single one does.
    """
    if rank > 0:
        torch.manual_seed((torch.initial_seed() + rank) % 2**63)
