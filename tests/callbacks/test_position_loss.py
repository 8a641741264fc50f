"""PositionLossMonitor equals a loop over tokens; later positions have their own bins."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from spy import SyncSpy
from torch import nn
from torch.utils.data import DataLoader
from toy_streams import read_tensorboard, same, scalar

from callbacks.file_boundary import FileBoundaryReset
from callbacks.position_loss import PositionLossMonitor
from lightning_modules.language import position_in_file
from lightning_modules.streams import NO_STREAM, StreamPlan, StreamState

ROWS, LENGTH = 3, 10


class ValidatedModule(pl.LightningModule):
    """Publishes losses that the chunk brings along."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.streams = StreamState()

    def validation_step(self, batch: list[dict[str, Any]], batch_idx: int) -> None:
        for chunk in batch:
            handle = self.streams.begin(chunk)
            if handle.listens("token_loss"):
                position = torch.where(chunk["labels"] >= 0, position_in_file(chunk), -1)
                handle.publish("token_loss", "model", loss=chunk["loss"], position=position)


def batches(steps: int) -> list[list[dict[str, Any]]]:
    """Rows 0 and 1 read files of `steps` chunks, the second ending early; row 2 has none."""
    generator = torch.Generator().manual_seed(0)
    result = []
    for index in range(steps):
        plan = StreamPlan((0, 1, NO_STREAM), (index, index, 0), (index == 0, index == 0, True))
        labels = torch.zeros(ROWS, LENGTH, dtype=torch.int64)
        labels[2] = -100
        labels[0, 3] = -100
        if index == steps - 1:
            labels[1, 4:] = -100
        loss = torch.rand(ROWS, LENGTH, generator=generator) * (labels >= 0)
        chunk = {
            "input_ids": torch.zeros(ROWS, LENGTH, dtype=torch.int64),
            "labels": labels,
            "loss": loss,
            "stream_id": torch.tensor(plan.stream_id),
            "chunk_index": torch.tensor(plan.chunk_index),
            "is_first": torch.tensor(plan.is_first),
            "plan": plan,
        }
        result.append([chunk])
    return result


def validate(folder: Path, data: list[Any], monitor: PositionLossMonitor) -> pl.Trainer:
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=TensorBoardLogger(folder, name="", version=""),
        callbacks=[FileBoundaryReset(), monitor],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(data, batch_size=None, collate_fn=same)
    trainer.validate(ValidatedModule(), loader, verbose=False)
    return trainer


def loop(data: list[Any], place: Any) -> dict[int, float]:
    values: dict[int, list[float]] = defaultdict(list)
    for (chunk,) in data:
        for row in range(ROWS):
            for t in range(LENGTH):
                if chunk["labels"][row, t] >= 0:
                    index = int(chunk["chunk_index"][row])
                    values[place(index, index * LENGTH + t)].append(float(chunk["loss"][row, t]))
    return {key: sum(v) / len(v) for key, v in values.items()}


def lower_edge(position: int) -> int:
    """Bins from 0, 8, 16 and 32 on."""
    return 0 if position < 8 else min(32, 2 ** int(math.log2(position)))


def test_curves_equal_a_loop_over_labelled_tokens(tmp_path: Path) -> None:
    data = batches(5)
    validate(tmp_path, data, PositionLossMonitor(first_bin=8, bins=4, chunk_bins=3))
    events = read_tensorboard(tmp_path)
    expected = {
        f"position_loss/from_{edge:06d}": value
        for edge, value in loop(data, lambda _, position: lower_edge(position)).items()
    }
    expected |= {
        f"chunk_loss/chunk_{index:02d}": value
        for index, value in loop(data, lambda index, _: min(index, 2)).items()
    }
    tags = [t for t in events.Tags()["scalars"] if "_loss/" in t]
    assert {tag: scalar(events, tag)[0] for tag in tags} == pytest.approx(expected, rel=1e-6)
    assert len(expected) == 4 + 3
    assert events.Tags()["images"] == ["position_loss/curve"]


def test_a_second_validation_starts_from_nothing(tmp_path: Path) -> None:
    monitor = PositionLossMonitor(first_bin=8, bins=2)
    validate(tmp_path / "first", batches(5), monitor)
    short = batches(1)
    validate(tmp_path / "second", short, monitor)
    events = read_tensorboard(tmp_path / "second")
    tags = [tag for tag in events.Tags()["scalars"] if "chunk_loss" in tag]
    assert tags == ["chunk_loss/chunk_00"]


def test_nothing_waits_for_the_device_between_start_and_end() -> None:
    monitor, module, data = PositionLossMonitor(), ValidatedModule(), batches(3)
    monitor.on_validation_start(None, module)
    with SyncSpy() as spy:
        for batch in data:
            module.streams.begin_step("validate")
            monitor.on_validation_batch_start(None, module)
            module.validation_step(batch, 0)
            module.streams.commit()
            monitor.on_validation_batch_end(None, module, None, batch)
    assert not spy.events


def test_positions_restart_with_each_document_of_a_packed_row() -> None:
    ids = torch.tensor([[4, 4, 4, 7, 7, 1], [2, 2, 2, 2, 2, 2]])
    chunk = {"input_ids": ids, "document_ids": ids, "chunk_index": torch.tensor([0, 3])}
    assert position_in_file(chunk).tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("name", ["first_bin", "bins", "chunk_bins"])
def test_sizes_below_one_are_an_error(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0"):
        PositionLossMonitor(**{name: 0})
