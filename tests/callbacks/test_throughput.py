"""Throughput equals counts by hand over a clock that the test moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from toy_streams import ToyModule, fit, read_tensorboard, scalar, toy_batches

import callbacks.throughput
from callbacks import Throughput
from callbacks.throughput import count
from lightning_modules.streams import NO_STREAM, StreamPlan


class Clock(pl.Callback):
    """Every step takes 0.5 s, of which 0.25 s are spent in validation in step 4."""

    def __init__(self, throughput: Throughput, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.throughput = throughput
        monkeypatch.setattr(callbacks.throughput.time, "perf_counter", lambda: self.now)

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        self.now += 10.0 if trainer.global_step == 0 else 0.5
        if trainer.global_step == 3:
            with self.throughput.paused(trainer):
                self.now += 7.0


def with_actions(batches: list[Any]) -> list[Any]:
    for chunk in (chunk for batch in batches for chunk in batch):
        chunk["action"] = torch.zeros(4, 6, 2)
    return batches


def test_rates_equal_counts_by_hand_without_first_step_and_pauses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    throughput = Throughput(every_n_steps=3, peak_flops=1e6)
    module = ToyModule()
    module.flops_per_batch = 1e5
    batches = with_actions(toy_batches(7, idle_row=2))
    fit(module, batches, tmp_path, [Clock(throughput, monkeypatch), throughput])
    events = read_tensorboard(tmp_path)
    expected = {"batches": 2.0, "samples": 2.0 * 2 * 3, "tokens": 2.0 * 2 * 3 * 6}
    for name, number in expected.items():
        written = scalar(events, f"throughput/{name}_per_sec")
        assert written == {step: pytest.approx(number) for step in (3, 6, 7)}, name
    assert scalar(events, "throughput/mfu")[6] == pytest.approx(2e5 / 1e6)


def test_data_wait_is_the_loaders_share_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    throughput = Throughput(every_n_steps=3)
    clock = Clock(throughput, monkeypatch)

    class Waits(pl.Callback):
        """Of the 0.5 s of every step, 0.2 s are waited for data."""

        def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
            loader = trainer.train_dataloader
            loader.waited = getattr(loader, "waited", 0.0) + 0.2

    fit(ToyModule(), toy_batches(7), tmp_path, [clock, Waits(), throughput])
    written = scalar(read_tensorboard(tmp_path), "throughput/data_wait")
    assert written == {step: pytest.approx(0.4) for step in (3, 6, 7)}


def test_no_mfu_where_the_peak_or_the_flops_are_unknown(tmp_path: Path) -> None:
    fit(ToyModule(), toy_batches(3), tmp_path, [Throughput(every_n_steps=2)])
    tags = read_tensorboard(tmp_path).Tags()["scalars"]
    assert "throughput/samples_per_sec" in tags
    assert "throughput/mfu" not in tags
    assert "throughput/tokens_per_sec" not in tags
    assert "throughput/data_wait" not in tags  # a loader that does not tell


def test_count_leaves_out_rows_without_a_file() -> None:
    plan = StreamPlan((4, NO_STREAM, 5), (0, 0, 1), (True, True, False))
    assert count({"input_ids": torch.zeros(3, 7)}, plan) == (2, 14)
    assert count({"action": torch.zeros(3, 8, 2)}, plan) == (2, 16)


def test_zero_steps_between_flushes_is_an_error() -> None:
    with pytest.raises(ValueError, match="every_n_steps=0"):
        Throughput(every_n_steps=0)
