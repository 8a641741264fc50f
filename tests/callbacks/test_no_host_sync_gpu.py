"""On a GPU CUDA itself says whether a step waits for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from cuda_waits import EVERY, Forbid
from toy_streams import ToyModule, fit, read_tensorboard, scalar, toy_batches

from callbacks import EMA, FastWeightMonitor, GateMonitor, Throughput

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


class Reader(pl.Callback):
    """The mistake that must be caught."""

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        pl_module.alpha.sum().item()


@pytest.fixture(autouse=True)
def waiting_is_allowed_afterwards() -> Any:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_no_step_between_flushes_waits_for_the_gpu(tmp_path: Path, precision: str) -> None:
    monitors = [GateMonitor(EVERY, 1), FastWeightMonitor(EVERY, 1), Throughput(EVERY), EMA()]
    batches = toy_batches(10, idle_row=2)
    fit(
        ToyModule(), batches, tmp_path, [Forbid(), *monitors],
        accelerator="gpu", devices=1, precision=precision, gradient_clip_val=1.0,
    )  # fmt: skip
    events = read_tensorboard(tmp_path)
    for tag in ("gate/ttt/mean/layer_01", "fast_weight/inner_loss_after/layer_01"):
        assert list(scalar(events, tag))[:2] == [4, 8]


def test_cuda_catches_a_callback_that_reads_a_number(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
        fit(
            ToyModule(), toy_batches(4), tmp_path, [Forbid(), Reader()],
            accelerator="gpu", devices=1,
        )  # fmt: skip
