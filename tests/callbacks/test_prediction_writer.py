"""The parquet file holds what predict_step returned, or is not there at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from toy import LENGTHS, ToyData, ToyModule, ToyState

from callbacks import FileBoundaryReset, PredictionWriter
from callbacks.prediction_writer import to_table
from lightning_modules.base import Chunk
from lightning_modules.streams import FastState

BATCH = 3


class PredictingModule(ToyModule):
    """Predicts how many chunks of its file a row has seen, from its fast state."""

    fail_at: int | None = None

    def predict_chunk(
        self, chunk: Chunk, fast_state: FastState, generator: torch.Generator | None
    ) -> dict[str, Tensor]:
        state = fast_state.read("toy", ToyState)
        seen = torch.zeros(len(chunk["x"]), 1, 1) if state is None else state.dw
        fast_state.write("toy", ToyState(seen + 1))
        return {
            "file": chunk["stream_id"],
            "chunk": chunk["chunk_index"],
            "seen": seen[:, 0, 0].long(),
            "values": chunk["x"],
            "noise": torch.randn(len(seen), generator=generator),
        }

    def predict_step(self, batch: list[Chunk], batch_idx: int) -> dict[str, Tensor]:
        if batch_idx == self.fail_at:
            raise RuntimeError("stopped")
        return super().predict_step(batch, batch_idx)


def predict(
    folder: Path, module: pl.LightningModule, *callbacks: pl.Callback, **options: Any
) -> pl.Trainer:
    trainer = pl.Trainer(
        default_root_dir=folder, accelerator="cpu", enable_progress_bar=False,
        callbacks=[FileBoundaryReset(), *callbacks], **{"logger": False, **options},
    )  # fmt: skip
    trainer.predict(module, ToyData(batch_size=BATCH), return_predictions=False)
    return trainer


def by_place(table: pa.Table) -> dict[tuple[int, int], dict[str, Any]]:
    return {(row["file"], row["chunk"]): row for row in table.to_pylist()}


def test_every_chunk_of_every_file_stands_there_once_and_idle_rows_do_not(tmp_path: Path) -> None:
    torch.manual_seed(0)
    predict(tmp_path, PredictingModule(), PredictionWriter())
    table = pq.read_table(tmp_path / "predictions.parquet")
    rows = by_place(table)
    assert len(table) == len(rows) == sum(LENGTHS)
    assert set(rows) == {(f, c) for f, length in enumerate(LENGTHS) for c in range(length)}
    dataset = ToyData().build_dataset("predict")
    from datamodules.sampler import ChunkRequest

    for (file, chunk), row in rows.items():
        expected = dataset[ChunkRequest(file, chunk, chunk == 0, idle=False)]["x"]
        assert torch.equal(torch.tensor(row["values"]), expected)
        assert row["seen"] == chunk, "fast state goes from chunk to chunk and no further"


def test_the_chunks_of_a_batch_come_one_after_the_other() -> None:
    module, data = PredictingModule(), ToyData(batch_size=BATCH, tbptt=2)
    module.streams.begin_step("predict")
    batch = next(iter(data.train_dataloader()))
    prediction = module.predict_step(batch, 0)
    chunks = [chunk["x"][chunk["stream_id"] >= 0] for chunk in batch]
    assert torch.equal(prediction["values"], torch.cat(chunks))


def test_predictions_are_the_same_in_every_run_and_leave_global_randomness_alone(
    tmp_path: Path,
) -> None:
    tables = []
    for name in ("a", "b"):
        torch.manual_seed(len(tables))
        module = PredictingModule()
        before = torch.get_rng_state()
        predict(tmp_path / name, module, PredictionWriter())
        assert torch.equal(torch.get_rng_state(), before)
        tables.append(pq.read_table(tmp_path / name / "predictions.parquet"))
    assert tables[0].equals(tables[1])
    assert len(set(tables[0]["noise"].to_pylist())) == sum(LENGTHS)


def test_a_row_group_is_written_per_batch(tmp_path: Path) -> None:
    class Watch(pl.Callback):
        sizes: list[int]

        def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.sizes = []

        def on_predict_batch_end(self, *args: Any) -> None:
            self.sizes.append((tmp_path / "predictions.parquet.part").stat().st_size)

    watch = Watch()
    predict(tmp_path, PredictingModule(), PredictionWriter(), watch)
    file = pq.ParquetFile(tmp_path / "predictions.parquet")
    assert file.metadata.num_row_groups == len(watch.sizes) > 3
    assert watch.sizes[-1] > watch.sizes[0], "nothing is held back until the end"


def test_the_file_lies_with_the_logger_and_its_place_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = CSVLogger(tmp_path, name="run", version=3)
    predict(tmp_path, PredictingModule(), PredictionWriter(), logger=logger)
    path = tmp_path / "run" / "version_3" / "predictions.parquet"
    assert path.exists()
    assert f"predictions: {sum(LENGTHS)} rows in {path}" in capsys.readouterr().out


def test_a_given_path_is_used_and_its_file_replaced(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "mine.parquet"
    for _ in range(2):
        predict(tmp_path, PredictingModule(), PredictionWriter(str(path)))
    assert [p.name for p in path.parent.iterdir()] == ["mine.parquet"]
    assert len(pq.read_table(path)) == sum(LENGTHS)


def test_lines_of_json_hold_the_rows_of_the_parquet_file(tmp_path: Path) -> None:
    for name in ("a.parquet", "a.jsonl"):
        predict(tmp_path, PredictingModule(), PredictionWriter(str(tmp_path / name)))
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    # float32 to decimal digits and back is exact.
    assert [json.loads(line) for line in lines] == pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert len(lines) == sum(LENGTHS) and len(list(tmp_path.iterdir())) == 2
    with pytest.raises(ValueError, match=r"'a.csv' must end in .parquet or .jsonl"):
        PredictionWriter("a.csv")


@pytest.mark.parametrize("fail_at", [0, 2])
def test_a_run_that_stops_keeps_the_earlier_file_and_leaves_no_other(
    tmp_path: Path, fail_at: int, capsys: pytest.CaptureFixture[str]
) -> None:
    writer, path = PredictionWriter(), tmp_path / "predictions.parquet"
    path.write_bytes(b"earlier")
    module = PredictingModule()
    module.fail_at = fail_at
    with pytest.raises(RuntimeError, match="stopped"):
        predict(tmp_path, module, writer)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.read_bytes() == b"earlier"
    module.fail_at = None
    predict(tmp_path, module, writer)
    assert len(pq.read_table(path)) == sum(LENGTHS)
    assert f"predictions: {sum(LENGTHS)} rows" in capsys.readouterr().out


def test_two_processes_write_a_file_each_that_together_hold_every_chunk(tmp_path: Path) -> None:
    class Rank:
        world_size, log_dir = 2, str(tmp_path)

        def __init__(self, global_rank: int) -> None:
            self.global_rank = global_rank

    class Quiet:
        def print(self, line: str) -> None:
            pass

    for rank in (0, 1):
        writer, trainer = PredictionWriter(), Rank(rank)
        writer.on_predict_start(trainer, Quiet())
        writer.on_predict_batch_end(trainer, Quiet(), {"row": torch.tensor([rank])}, None, 0)
        writer.on_predict_end(trainer, Quiet())
    names = [f"predictions-0000{rank}-of-00002.parquet" for rank in (0, 1)]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert pq.read_table(tmp_path)["row"].to_pylist() == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("shape", [(2,), (2, 3), (2, 3, 4), (0, 3, 4)])
def test_columns_equal_the_tensors(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    values = (10 * torch.randn(shape)).to(dtype).requires_grad_(dtype.is_floating_point)
    table = to_table({"x": values, "flag": values > 0})
    assert len(table) == shape[0]
    assert table["x"].to_pylist() == values.tolist()
    assert table["flag"].to_pylist() == (values > 0).tolist()


def test_a_module_without_predictions_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match="ToyModule has no predict_chunk.*implement it"):
        predict(tmp_path, ToyModule(), PredictionWriter())


@pytest.mark.parametrize("wrong", [torch.zeros(2), {"a": [1, 2]}, None])
def test_other_outputs_are_an_error(wrong: Any) -> None:
    with pytest.raises(TypeError, match="needs a dict of tensors"):
        to_table(wrong)
