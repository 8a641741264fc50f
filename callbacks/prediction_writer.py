"""What `predict` computes, in a parquet file or as lines of JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Protocol

import lightning.pytorch as pl
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor


class _Writer(Protocol):
    """What of a `ParquetWriter` is needed."""

    def write_table(self, table: pa.Table) -> None: ...

    def close(self) -> None: ...


class _LinesWriter:
    """A JSON object per row; numbers that JSON does not know are written as NaN and Infinity."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", encoding="utf-8")

    def write_table(self, table: pa.Table) -> None:
        self._file.writelines(f"{json.dumps(row)}\n" for row in table.to_pylist())

    def close(self) -> None:
        self._file.close()


# Not Lightning's BasePredictionWriter: that one needs the indices of its own kind of sampler.
class PredictionWriter(Callback):
    """Write the dict of tensors `[N, ...]` that `predict_step` returns, one row per entry of N.

    Every name becomes a column; what follows the first dimension becomes (nested) lists of fixed
    size. Batches are written as they come, one row group each, into a temporary file that takes
    its name when all are there: a run that is stopped leaves no file that looks complete. With
    several processes each writes its own, `predictions-00001-of-00004.parquet`.

    Args:
        path: the file, which replaces an earlier one: parquet, or a JSON object per line where it
            ends in `.jsonl`; None is `predictions.parquet` in the directory of the logger.

    Raises:
        TypeError: `predict_step` returns something else.
        ValueError: a path with another ending.
    """

    def __init__(self, path: str | None = None) -> None:
        if path is not None and Path(path).suffix not in (".parquet", ".jsonl"):
            raise ValueError(
                f"path={path!r} must end in .parquet or .jsonl: the ending chooses the format"
            )
        self.path = path
        self._target = Path()
        self._writer: _Writer | None = None
        self._rows = 0

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        path = Path(self.path or Path(trainer.log_dir or ".") / "predictions.parquet")
        if trainer.world_size > 1:
            part = f"{trainer.global_rank:05d}-of-{trainer.world_size:05d}"
            path = path.with_name(f"{path.stem}-{part}{path.suffix}")
        self._target, self._rows = path, 0

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        table = to_table(outputs)
        if self._writer is None:
            self._target.parent.mkdir(parents=True, exist_ok=True)
            self._writer = self._open(table.schema)
        self._writer.write_table(table)
        self._rows += len(table)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._writer is None:
            return
        self._close()
        os.replace(self._temporary, self._target)
        pl_module.print(f"predictions: {self._rows} rows in {self._target}")

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        if self._writer is not None:
            self._close()
            self._temporary.unlink()

    def _open(self, schema: pa.Schema) -> _Writer:
        if self._target.suffix == ".jsonl":
            return _LinesWriter(self._temporary)
        return pq.ParquetWriter(self._temporary, schema)

    @property
    def _temporary(self) -> Path:
        return self._target.with_name(f"{self._target.name}.part")

    def _close(self) -> None:
        assert self._writer is not None
        self._writer.close()
        self._writer = None


def to_table(predictions: Any) -> pa.Table:
    """Columns of tensors `[N, ...]`, name by name.

    Raises:
        TypeError: this is not a dict of tensors.
    """
    if not isinstance(predictions, dict) or not all(
        isinstance(values, Tensor) for values in predictions.values()
    ):
        raise TypeError(
            f"predict_step returned {type(predictions).__name__}: PredictionWriter needs a dict of "
            "tensors [N, ...]; return one, or remove PredictionWriter from trainer.callbacks"
        )
    return pa.table({name: _column(values) for name, values in predictions.items()})


def _column(values: Tensor) -> pa.Array:
    values = values.detach().cpu()
    if values.dtype == torch.bfloat16:  # which numpy does not know
        values = values.float()
    array = pa.array(values.reshape(-1).numpy())
    for size in reversed(values.shape[1:]):
        array = pa.FixedSizeListArray.from_arrays(array, size)
    return array
