"""Nothing in a training step waits for the device; a flush is one transfer per monitor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from spy import OperationCount, SyncSpy
from toy_streams import ToyModule, fit, toy_batches

from callbacks import EMA, FastWeightMonitor, GateMonitor, RouterMonitor, Throughput
from callbacks.monitor import Monitor
from callbacks.statistics import RunningMoments

EVERY = 3


class Marker(pl.Callback):
    """Labels what the spy sees with the step in which it happens."""

    def __init__(self, spy: SyncSpy) -> None:
        self.spy = spy

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.spy.label = trainer.global_step + 1

    def on_train_end(self, *args: Any) -> None:
        self.spy.label = "end"


class ReadingMonitor(Monitor):
    """The mistake: it reads a number in every step."""

    topics = frozenset({"gate"})

    def observe(self, chunk: Any) -> None:
        slots, values = chunk.values("gate", "ratio_ttt")
        if values[0].mean().item() > 0:
            self.metric("ratio", slots, values[0].device, RunningMoments).update(
                [torch.stack(values)]
            )

    def write(self, results: Any, trainer: pl.Trainer, step: int) -> dict[str, float]:
        return {}


def spy_on(folder: Path, callbacks: list[pl.Callback], **options: Any) -> SyncSpy:
    with SyncSpy() as spy:
        fit(ToyModule(depth=2), toy_batches(8), folder, [Marker(spy), *callbacks], **options)
    return spy


@pytest.mark.quick("bf16-mixed-2")
@pytest.mark.parametrize(("precision", "accumulate"), [("32-true", 1), ("bf16-mixed", 2)])
def test_steps_between_flushes_never_wait_for_the_device(
    tmp_path: Path, precision: str, accumulate: int
) -> None:
    callbacks = [GateMonitor(EVERY, 1), FastWeightMonitor(EVERY, 1), Throughput(EVERY), EMA()]
    spy = spy_on(
        tmp_path, callbacks,
        precision=precision, accumulate_grad_batches=accumulate, gradient_clip_val=1.0,
    )  # fmt: skip
    for step in range(1, 8):
        if step % EVERY:
            assert spy.during(step) == [], f"step {step}"


def test_a_flush_is_one_transfer_per_monitor_histograms_and_figures_included(
    tmp_path: Path,
) -> None:
    spy = spy_on(tmp_path, [GateMonitor(EVERY, 1, EVERY), FastWeightMonitor(EVERY, 1, EVERY)])
    assert spy.during(3) == spy.during(6) == ["tolist", "tolist"]


def test_the_spy_catches_a_monitor_that_reads_a_number_every_step(tmp_path: Path) -> None:
    spy = spy_on(tmp_path, [ReadingMonitor(EVERY, 1)])
    assert spy.during(2) == ["_local_scalar_dense"] * 2  # one per chunk


class Around(pl.Callback):
    """Counts, by step, the operations in the hooks of the monitors, which it hands on to."""

    def __init__(self, monitors: list[Monitor]) -> None:
        self.monitors = monitors
        self.launches: dict[int, int] = {}

    def on_train_start(self, *args: Any) -> None:
        self._tell("on_train_start", *args)

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.step = trainer.global_step + 1
        self._tell("on_train_batch_start", trainer, *args)

    def on_train_batch_end(self, *args: Any) -> None:
        self._tell("on_train_batch_end", *args)

    def _tell(self, hook: str, *args: Any) -> None:
        with OperationCount() as count:
            for monitor in self.monitors:
                getattr(monitor, hook)(*args)
        if hook != "on_train_start":
            self.launches[self.step] = self.launches.get(self.step, 0) + count.calls


def test_monitors_launch_nothing_in_a_step_that_is_not_looked_at(tmp_path: Path) -> None:
    around = Around([GateMonitor(8, 4), FastWeightMonitor(8, 4), RouterMonitor(8, 4)])
    module = ToyModule(depth=2)
    fit(module, toy_batches(20), tmp_path, [around])
    looked = {n // 2 + 1 for n, entry in enumerate(module.history) if entry["published"]}
    assert {8, 16} < looked and len(looked) < 10
    assert {step for step, launches in around.launches.items() if launches} == looked


class ShowsItsLoss(ToyModule):
    """Lightning reads every value with `prog_bar=True` in every step, even without a bar."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss.detach(), prog_bar=True)
        return loss


def test_the_spy_catches_a_loss_in_the_progress_bar(tmp_path: Path) -> None:
    with SyncSpy() as spy:
        fit(ShowsItsLoss(), toy_batches(2), tmp_path, [Marker(spy)])
    assert spy.during(1) == ["_local_scalar_dense"]


def read(x: torch.Tensor) -> None:
    x.sum().item()


@pytest.mark.parametrize(
    "wait",
    [
        read,
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.where(x > 0),
        lambda x: x.unique(),
        lambda x: torch.unique_consecutive(x),
        lambda x: x.masked_select(x > 0),
        lambda x: torch.equal(x, x),
        lambda x: x.cpu(),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: torch.repeat_interleave(torch.tensor([1, 2])),
    ],
)
def test_the_spy_sees_each_way_to_wait(wait: Any) -> None:
    x = torch.randn(4)
    with SyncSpy() as spy:
        wait(x)
    assert spy.events


def test_the_spy_is_silent_where_nothing_waits() -> None:
    x = torch.randn(4)
    with SyncSpy() as spy:
        y = torch.where(x > 0, x, -x).clamp(max=1).scatter_add(0, torch.tensor([0, 1, 2, 3]), x)
        y[1:3].sum().add_(x.argmax())
    assert spy.events == []
