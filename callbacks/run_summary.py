"""What a run is and how it ended, for readers of its TensorBoard."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from callbacks.logging import ScalarListener, log_layout, log_text, tensorboards
from callbacks.run_hparams import FinalRun
from callbacks.run_page import StepSize, run_page
from callbacks.run_settings import Value, settings
from callbacks.tags import families_of, layout, table

FINAL = {
    "val/loss": "final/val_loss",
    "train/loss": "final/train_loss",
    "closed_loop/success": "final/success",
    "throughput/tokens_per_sec": "final/tokens_per_sec",
    "throughput/samples_per_sec": "final/samples_per_sec",
}
"""What is compared between runs: tag in the run -> name at its end."""


class RunSummary(Callback, ScalarListener):
    """Write what a run is into TensorBoard, so that it explains itself; no other logger has cost.

    TEXT has `run/summary` (variant, parameters by group, bytes of fast state per stream, data,
    options), written after the first step, `run/tags` (what each curve means) and, if the run
    fails, `run/stopped` (when and why). HPARAMS compares runs by their options and by their last
    and best validation loss, success rate and tokens per second, also of runs that were
    interrupted; that is in the subfolder `final` of the run. CUSTOM SCALARS shows related curves
    in one chart.

    The command line always adds it.
    """

    def __init__(self) -> None:
        self._best: Tensor | None = None
        self._scalars: dict[str, float] = {}
        self._charted: set[str] = set()
        self._first_step: StepSize | None = None
        self._has_page = False
        self._options: dict[str, Value] = {}
        self._final: list[FinalRun] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._scalars, self._charted = {}, set()
        self._first_step, self._has_page = None, False
        folders = [writer.log_dir for writer in tensorboards(trainer)]
        if folders:
            self._options = settings(trainer, pl_module)
        self._final = [FinalRun(os.path.join(folder, "final"), self._options) for folder in folders]

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        # Only now is the step before committed, and what monitors wrote behind it known.
        self._write_pages(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._first_step is None:
            self._first_step = StepSize.of(batch, pl_module.streams.plans)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        loss = trainer.callback_metrics.get("val/loss") if self._final else None
        if loss is None or trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        # A tensor of the device: nobody waits for it.
        self._best = loss.clone() if self._best is None else torch.minimum(self._best, loss)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._finish(trainer, pl_module, succeeded=True)

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        if not self._final:
            return
        reason = f"{type(exception).__name__}: {exception}".strip().removesuffix(":")
        page = f"Stopped at step {trainer.global_step}. {reason}"
        log_text(trainer, "run/stopped", page, trainer.global_step)
        # What a broken device holds cannot be read; the error that broke it shall come out.
        with suppress(RuntimeError):
            self._finish(trainer, pl_module, succeeded=False)

    def on_scalars(self, scalars: Mapping[str, float]) -> None:
        self._scalars.update(scalars)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._best = state_dict["best"]

    def _write_pages(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """The run's page once, layout and explanations again whenever there are new tags."""
        if not self._final:
            return
        if self._first_step is not None and not self._has_page:
            self._has_page = True
            page = run_page(trainer, pl_module, self._first_step, self._options)
            log_text(trainer, "run/summary", page, trainer.global_step)
        if self._scalars.keys() <= self._charted:
            return
        self._charted = set(self._scalars)
        tags = {*self._scalars, *trainer.logged_metrics, *_learning_rates(trainer)}
        log_layout(trainer, layout(tags))
        log_text(trainer, "run/tags", table(families_of(tags)), trainer.global_step)

    def _finish(self, trainer: pl.Trainer, pl_module: Any, succeeded: bool) -> None:
        if not self._final:
            return
        self._write_pages(trainer, pl_module)
        last = {**_logged(trainer), **self._scalars}
        metrics = {name: last[tag] for tag, name in FINAL.items() if tag in last}
        if self._best is not None:
            metrics["final/best_val_loss"] = float(self._best)
        for final in self._final:
            final.end(metrics, trainer.global_step, succeeded)
        self._final = []


def _learning_rates(trainer: Any) -> list[str]:
    monitors = [c for c in trainer.callbacks if isinstance(c, LearningRateMonitor)]
    return [tag for monitor in monitors for tag in monitor.lrs]


def _logged(trainer: pl.Trainer) -> dict[str, float]:
    return {
        tag: float(trainer.callback_metrics[tag])
        for tag in FINAL
        if tag in trainer.callback_metrics
    }
