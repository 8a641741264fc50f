"""What all DataModules share: loaders over streams of chunks, sharded by rank, resumable."""

from __future__ import annotations

from typing import Any, Literal

import lightning.pytorch as pl
import torch

from datamodules.loader import ChunkDataset, StreamLoader
from datamodules.sampler import StreamBatchSampler

Stage = Literal["train", "validate", "test", "predict"]


class StreamDataModule(pl.LightningDataModule):
    """Loaders of the batch contract; a subclass only says what the chunks are.

    Args:
        batch_size: rows per process; every row reads its own file.
        tbptt: consecutive chunks per batch through which gradients flow.
        num_workers: worker processes per loader.
        seed: with the epoch it fixes the order of files.

    Raises:
        ValueError: a size that no batch can have.

    Attributes:
        processes_per_row: consecutive processes that read the same rows (`ContextParallel`).
    """

    def __init__(
        self, *, batch_size: int = 8, tbptt: int = 1, num_workers: int = 0, seed: int = 0
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("tbptt", tbptt, 1),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        self.batch_size = batch_size
        self.tbptt = tbptt
        self.num_workers = num_workers
        self.seed = seed
        self.processes_per_row = 1

    def build_dataset(self, stage: Stage) -> ChunkDataset:
        """The chunks of a stage; called once per loader, after `setup`."""
        raise NotImplementedError(f"{type(self).__name__} must implement build_dataset(stage)")

    @property
    def constants(self) -> dict[str, Any]:
        """Plain values that every chunk carries, so that a model knows them without waiting."""
        return {}

    def train_dataloader(self) -> StreamLoader:
        """Shuffled streams, `tbptt` chunks per batch."""
        return self._loader("train", tbptt=self.tbptt, shuffle=True)

    def val_dataloader(self) -> StreamLoader:
        """Every file once, in order, one chunk per batch."""
        return self._loader("validate")

    def test_dataloader(self) -> StreamLoader:
        """Every file once, in order, one chunk per batch."""
        return self._loader("test")

    def predict_dataloader(self) -> StreamLoader:
        """Every file once, in order, one chunk per batch."""
        return self._loader("predict")

    def _loader(self, stage: Stage, *, tbptt: int = 1, shuffle: bool = False) -> StreamLoader:
        dataset = self.build_dataset(stage)
        sampler = StreamBatchSampler(
            dataset.lengths,
            self.batch_size,
            tbptt=tbptt,
            seed=self.seed,
            shuffle=shuffle,
            rank=self.trainer.global_rank // self.processes_per_row if self.trainer else 0,
            world_size=self.trainer.world_size // self.processes_per_row if self.trainer else 1,
        )
        return StreamLoader(
            dataset,
            sampler,
            constants=self.constants,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
        )
