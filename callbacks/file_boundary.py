"""Opens and commits the fast state of every step; rows that start a file start afresh."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from callbacks.logging import log_scalars


class FileBoundaryReset(Callback):
    """Drive `pl_module.streams`: one `begin_step` before and one `commit` after every step.

    Between the two the module begins each chunk, which zeroes the rows whose `is_first` is true:
    a file boundary resets a stream, nothing else does. Every loop (train, validate, test,
    predict) has a namespace of its own, and evaluation loops start from nothing each time, so a
    validation run in the middle of a file leaves training untouched. Counts of resets and
    continuations go to the logger as `streams/resets` and `streams/continuations`; a gap in a
    stream stops the run with a `StreamGapError`.
    """

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        pl_module.streams.driver = self

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        pl_module.streams.driver = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        pl_module.streams.begin_step("train")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        pl_module.streams.commit()
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.global_step % every == 0:
            counts = pl_module.streams.counts("train")._asdict()
            scalars = {f"streams/{name}": float(count) for name, count in counts.items()}
            log_scalars(trainer, scalars, trainer.global_step)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.streams.clear("validate")

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        pl_module.streams.begin_step("validate")

    def on_validation_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        pl_module.streams.commit()

    def on_test_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.streams.clear("test")

    def on_test_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        pl_module.streams.begin_step("test")

    def on_test_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        pl_module.streams.commit()

    def on_predict_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        pl_module.streams.clear("predict")

    def on_predict_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        pl_module.streams.begin_step("predict")

    def on_predict_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        pl_module.streams.commit()
