"""Steps of the streams while Lightning's tuner has taken the callbacks away."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from lightning_modules.streams import StreamState

SEARCH = "search"
"""Prefix of the namespaces in which a tuner reads: nothing of them reaches training."""


class TunableStreams(pl.LightningModule):
    """Opens and commits steps where `streams.driver` would, but is not among the callbacks.

    The finders of learning rates and batch sizes train for a few steps with `trainer.callbacks`
    exchanged, so that the callback which drives the streams is not called. Their steps are taken
    in namespaces of their own, which begin afresh with every loop. Without a driver nothing is
    opened, and the first chunk says that the callback is missing.
    """

    streams: StreamState

    def on_train_start(self) -> None:
        self._forget("train")

    def on_validation_start(self) -> None:
        self._forget("validate")

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._open("train")

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._close()

    def on_validation_batch_start(
        self, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._open("validate")

    def on_validation_batch_end(
        self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._close()

    @property
    def _is_searching(self) -> bool:
        driver = self.streams.driver
        return driver is not None and driver not in self.trainer.callbacks

    def _forget(self, stage: str) -> None:
        if self._is_searching:
            self.streams.clear(f"{SEARCH} {stage}")

    def _open(self, stage: str) -> None:
        if self._is_searching:
            self.streams.begin_step(f"{SEARCH} {stage}")

    def _close(self) -> None:
        if self._is_searching:
            self.streams.commit()
