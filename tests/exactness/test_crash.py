"""The process is killed, and a new one goes on from the last good checkpoint, as if nothing was."""

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from fsspec.implementations.local import LocalFileOpener
from variant_cases import STEPS, VARIANTS, Trace, assert_same, every_variant, make_trainer, train

pytestmark = pytest.mark.slow

AT = 5
"""The batch in which the process is killed."""


class KillInStep(pl.Callback):
    """SIGKILL between backward and the optimizer's step."""

    def on_before_optimizer_step(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == AT:
            os.kill(os.getpid(), signal.SIGKILL)


class KillInSave(pl.Callback):
    """SIGKILL when half of a checkpoint is on the disk."""

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == AT:
            write = LocalFileOpener.write

            def half(opener: LocalFileOpener, data: bytes) -> int:
                write(opener, data[: len(data) // 2])
                opener.flush()
                os.kill(os.getpid(), signal.SIGKILL)
                raise AssertionError

            LocalFileOpener.write = half


KILLS = {"step": KillInStep, "save": KillInSave}


def saver(folder: Path) -> pl.callbacks.ModelCheckpoint:
    """After every step, the last one only."""
    return pl.callbacks.ModelCheckpoint(
        folder / "saved", every_n_train_steps=1, save_top_k=0, save_last=True
    )


def doomed(name: str, folder: Path, kill: str) -> None:
    """A run in a process of its own."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    trainer = make_trainer(folder, STEPS, KILLS[kill](), saver(folder))
    trainer.fit(VARIANTS[name].module(), VARIANTS[name].data(folder))


@every_variant
@pytest.mark.parametrize("kill", KILLS)
def test_killed_and_resumed_equals_never_stopped(kill: str, name: str, tmp_path: Path) -> None:
    module, losses = train(name, tmp_path)
    process = multiprocessing.get_context("spawn").Process(
        target=doomed, args=(name, tmp_path, kill)
    )
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL
    last = tmp_path / "saved" / "last.ckpt"
    done = torch.load(last, weights_only=True)["global_step"]
    assert done == AT, "the half of a checkpoint has replaced the last good one"
    torch.manual_seed(99)
    trace, again = Trace(), VARIANTS[name].module()
    trainer = make_trainer(tmp_path, STEPS, trace, saver(tmp_path))
    trainer.fit(again, VARIANTS[name].data(tmp_path), ckpt_path=last)
    rest = {batch: loss for batch, loss in losses.items() if batch >= done}
    assert_same((again, trace.losses), (module, rest))
