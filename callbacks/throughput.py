"""How much is trained per second, measured without waiting for the device in every step."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch.callbacks import Callback

from callbacks.flops import count_step
from callbacks.logging import log_scalars
from lightning_modules.streams import NO_STREAM, StreamPlan


@dataclass
class _Window:
    """What happened since the last flush, in this process; `waited`: for data until then."""

    start: float
    waited: float | None
    batches: int = 0
    samples: int = 0
    tokens: int = 0
    flops: float = 0.0


class Throughput(Callback):
    """Write `throughput/samples_per_sec`, `tokens_per_sec`, `batches_per_sec`, `mfu`, `data_wait`.

    A sample is a chunk of a row that has a file; a token is an input token or an action step of
    it. The rates are of all processes together, over the steps since the last flush, without the
    time spent in validation and in closed-loop evaluation, and without the first step. The share
    of the peak that is used (model FLOPs utilisation) needs the module's `flops_per_batch`
    (forward and backward of one batch) and a device whose peak is known. A module that does not
    know gets what the matrix products and attentions of the first batch are counted to be
    (`callbacks/flops.py`), in a single process without `compile_model`. `data_wait` is the share of
    the time in which this process waited for its loader: near 1, the data is the bottleneck.

    Lightning's own ThroughputMonitor waits for the device after every batch; this one does at
    flushes.

    Args:
        every_n_steps: optimizer steps between two flushes; the remainder is flushed at the end.
        peak_flops: FLOP/s of one device; None takes Lightning's table.
    """

    def __init__(self, every_n_steps: int = 50, peak_flops: float | None = None) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps} must be at least 1")
        self.every_n_steps = every_n_steps
        self.peak_flops = peak_flops
        self._window: _Window | None = None
        self._flushed = 0
        self._paused_at = 0.0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self.peak_flops is None:
            device = trainer.strategy.root_device
            self.peak_flops = get_available_flops(device, _compute_dtype(str(trainer.precision)))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._window = None
        self._flushed = trainer.global_step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._window is None and _is_countable(trainer, pl_module):
            pl_module.flops_per_batch = count_step(pl_module, batch)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        window = self._window
        if window is None:  # the first step compiles and allocates
            _wait(trainer)
            self._window = _Window(time.perf_counter(), _waited(trainer))
            return
        window.batches += 1
        window.flops += getattr(pl_module, "flops_per_batch", None) or 0.0
        for chunk, plan in zip(batch, pl_module.streams.plans, strict=True):
            samples, tokens = count(chunk, plan)
            window.samples += samples
            window.tokens += tokens
        step = trainer.global_step
        if step // self.every_n_steps > self._flushed // self.every_n_steps:
            self._flush(trainer, window)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._window is not None and self._window.batches:
            self._flush(trainer, self._window)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._pause(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._go_on()

    @contextmanager
    def paused(self, trainer: pl.Trainer) -> Iterator[None]:
        """What runs in this context does not count as training time."""
        self._pause(trainer)
        yield
        self._go_on()

    def _pause(self, trainer: pl.Trainer) -> None:
        _wait(trainer)
        self._paused_at = time.perf_counter()

    def _go_on(self) -> None:
        if self._window is not None:
            self._window.start += time.perf_counter() - self._paused_at

    def _flush(self, trainer: pl.Trainer, window: _Window) -> None:
        _wait(trainer)
        now = time.perf_counter()
        seconds, waited = now - window.start, _waited(trainer)
        scalars = rates(window, seconds, trainer.world_size, self.peak_flops)
        if waited is not None and window.waited is not None:
            scalars["throughput/data_wait"] = (waited - window.waited) / seconds
        log_scalars(trainer, scalars, trainer.global_step)
        self._window = _Window(now, waited)
        self._flushed = trainer.global_step


def _is_countable(trainer: pl.Trainer, pl_module: Any) -> bool:
    """Whether the first batch is to be counted: one process has it, in plain operations."""
    known = getattr(pl_module, "flops_per_batch", None) is not None
    return trainer.world_size == 1 and not known and not getattr(pl_module, "compile_model", False)


def count(chunk: Mapping[str, Any], plan: StreamPlan) -> tuple[int, int]:
    """Samples and tokens of a chunk: rows that have a file, times input ids or action steps."""
    samples = sum(id_ != NO_STREAM for id_ in plan.stream_id)
    lengths = [chunk[name].shape[1] for name in ("input_ids", "action") if name in chunk]
    return samples, samples * lengths[0] if lengths else 0


def rates(
    window: _Window, seconds: float, world_size: int, peak_flops: float | None
) -> dict[str, float]:
    """Scalars by tag; what is not known has none."""
    scale = world_size / seconds
    amounts = {"batches": window.batches, "samples": window.samples, "tokens": window.tokens}
    scalars = {
        f"throughput/{name}_per_sec": amount * scale for name, amount in amounts.items() if amount
    }
    if window.flops and peak_flops:
        scalars["throughput/mfu"] = window.flops / seconds / peak_flops
    return scalars


def _waited(trainer: pl.Trainer) -> float | None:
    """Seconds that the training loader has been waited for; None if it does not tell."""
    return getattr(trainer.train_dataloader, "waited", None)


def _wait(trainer: pl.Trainer) -> None:
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.synchronize(trainer.strategy.root_device)


def _compute_dtype(precision: str) -> torch.dtype:
    if precision.startswith("bf16"):
        return torch.bfloat16
    return torch.float16 if precision.startswith("16") else torch.float32
