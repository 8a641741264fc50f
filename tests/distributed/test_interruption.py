"""SIGTERM in one of two processes ends both at the same batch; nobody asks before every batch."""

import os
import signal
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from process_cases import join_processes
from two_processes import in_two_processes
from variant_cases import VARIANTS, make_trainer

from lightning_modules.distributed.interruption import AgreedInterruption

pytestmark = pytest.mark.slow

EVERY, AFTER = 3, 4
"""Batches between two questions, and the batch behind which rank 1 is told to end."""


class Watch(pl.Callback):
    """Counts batches, and the broadcasts of tensors between two of them; may send a signal."""

    def __init__(self, terminated: bool) -> None:
        self.terminated, self.batches, self.broadcasts = terminated, 0, 0

    def on_train_start(self, *args: Any) -> None:
        broadcast = torch.distributed.broadcast

        def counted(*given: Any, **options: Any) -> Any:
            self.broadcasts += 1
            return broadcast(*given, **options)

        torch.distributed.broadcast = counted

    def on_train_batch_end(self, *args: Any) -> None:
        self.batches += 1
        if self.terminated and self.batches == AFTER:
            os.kill(os.getpid(), signal.SIGTERM)


def train(folder: Path, watch: Watch, steps: int, **options: Any) -> None:
    trainer = make_trainer(folder, steps, watch, log_every_n_steps=EVERY, **options)
    trainer.fit(VARIANTS["in_place"].module(), VARIANTS["in_place"].data(folder))


def in_process(rank: int, folder: Path) -> None:
    options, broadcast = join_processes(rank), torch.distributed.broadcast
    counts = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AgreedInterruption, "install", lambda self: None)
        watch = Watch(False)
        train(folder, watch, 5, **options)
        counts["lightning"] = watch.broadcasts
    torch.distributed.broadcast = broadcast
    watch = Watch(False)
    train(folder, watch, 5, **options)
    counts["ours"] = watch.broadcasts
    torch.distributed.broadcast = broadcast
    watch = Watch(rank == 1)
    with pytest.raises(SIGTERMException):
        train(folder, watch, 20, **options)
    torch.save({**counts, "batches": watch.batches}, folder / f"{rank}.pt")


def test_both_end_at_the_batch_on_which_they_agree(tmp_path: Path) -> None:
    VARIANTS["in_place"].data(tmp_path).prepare_data()
    in_two_processes(in_process, tmp_path)
    for rank in (0, 1):
        result = torch.load(tmp_path / f"{rank}.pt")
        assert result["batches"] == 5  # the question before the sixth is the first behind it
        assert result["ours"] == 0
        assert result["lightning"] == 5, "power: Lightning asks before every batch"
