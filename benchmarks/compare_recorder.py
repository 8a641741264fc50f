"""What a validation leaves for `compare_adapters.py`: losses by file and position, and the memory.

A callback, so that files are read as `python cli.py validate` reads them.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from training_runs import write_json

from lightning_modules.language import IGNORED
from lightning_modules.streams import NO_STREAM

FINE = (0, 64, 256)
"""Where the cells of a first chunk begin; every later chunk is one cell."""

TOPICS = frozenset({"fast_weight", "inner_loss"})


class FileLosses(Callback):
    """Write losses by file and cell, speed, and what the fast weights do, at the end of validation.

    `PATH.npz` has `total` and `count`, `[files, cells]`: sum of the losses in nats and number of
    labels; `starts [cells]`, the position in the file where a cell begins; `names [files]`; and
    `chunk_length`. `PATH.json` has `tokens_per_second` (of labels) and `memory`: statistic -> its
    mean over layers and whole chunks, and `[chunk index, mean, chunks]` each.

    Args:
        path: of both files, without suffix.
        observe_every_n_batches: in one batch of so many the fast weights are observed; these are
            not timed.
    """

    def __init__(self, path: str, observe_every_n_batches: int = 4) -> None:
        self.path = path
        self.observe_every_n_batches = observe_every_n_batches

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        files = data.build_dataset("validate")
        self._names = [data.store.names[number] for number in files.documents]
        self._chunk_length = data.chunk_length
        fine = [start for start in FINE if start < data.chunk_length]
        later = range(1, max(files.lengths))
        self._starts = np.array([*fine, *(index * data.chunk_length for index in later)])
        self._total = np.zeros((len(files.lengths), len(self._starts)))
        self._count = np.zeros(self._total.shape, dtype=np.int64)
        self._memory: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        self._seconds, self._tokens = 0.0, 0

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        pl_module.streams.listening.add("token_loss")
        if self._observes(batch_idx):
            pl_module.streams.listening.update(TOPICS)
        self._began = time.perf_counter()

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        seconds = time.perf_counter() - self._began
        pl_module.streams.listening.difference_update(TOPICS | {"token_loss"})
        for chunk, published in zip(batch, pl_module.streams.published, strict=True):
            self._add_losses(chunk, **published["token_loss"]["model"])
            if self._observes(batch_idx):
                self._add_memory(chunk, memory_statistics(published))
            elif batch_idx > 0:  # the first one compiles and allocates
                self._seconds += seconds
                self._tokens += int((chunk["labels"] != IGNORED).sum())

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        path = Path(self.path)
        partial = path.with_suffix(".partial.npz")
        np.savez_compressed(
            partial,
            total=self._total,
            count=self._count,
            starts=self._starts,
            names=np.array(self._names),
            chunk_length=self._chunk_length,
        )
        partial.replace(path.with_suffix(".npz"))
        speed = self._tokens / self._seconds if self._seconds else None
        memory = {name: summary(values) for name, values in self._memory.items()}
        write_json(path.with_suffix(".json"), {"tokens_per_second": speed, "memory": memory})

    def _observes(self, batch_idx: int) -> bool:
        """The last of every n: a file's first chunk has nothing to remember."""
        return batch_idx % self.observe_every_n_batches == self.observe_every_n_batches - 1

    def _add_losses(self, chunk: Mapping[str, Any], loss: Tensor, position: Tensor) -> None:
        place = position.cpu().numpy()
        labelled = place >= 0
        file = np.broadcast_to(chunk["stream_id"].cpu().numpy()[:, None], place.shape)[labelled]
        cell = np.searchsorted(self._starts, place[labelled], side="right") - 1
        np.add.at(self._total, (file, cell), loss.double().cpu().numpy()[labelled])
        np.add.at(self._count, (file, cell), 1)

    def _add_memory(self, chunk: Mapping[str, Any], statistics: Mapping[str, Tensor]) -> None:
        """Rows that a file fills: padding writes nothing and has no step size."""
        whole = chunk["mask"].all(dim=1) & (chunk["stream_id"] != NO_STREAM)
        for name, values in statistics.items():
            for index, value in zip(
                chunk["chunk_index"][whole].tolist(), values[whole].tolist(), strict=True
            ):
                self._memory[name][index].append(value)


def memory_statistics(published: Mapping[str, Any]) -> dict[str, Tensor]:
    """Statistic -> its mean over the adapters of all layers, `[B]`; empty where nothing learns.

    As `FastWeightMonitor` writes them: the state norm is |dW|, the relative change |dW| / |W|.
    """
    weights = published.get("fast_weight", {}).values()
    losses = published.get("inner_loss", {}).values()
    parts = {
        "inner loss before": [fields["before"] for fields in losses],
        "inner loss after": [fields["after"] for fields in losses],
        "state norm": [fields["state_norm"] for fields in weights],
        "relative change": [f["state_norm"] / f["weight_norm"].clamp_min(1e-8) for f in weights],
        "eta": [fields["eta"].mean(dim=1) for fields in weights if "eta" in fields],
    }
    return {
        name: torch.cat([value.float().flatten(1) for value in values], dim=1).mean(dim=1)
        for name, values in parts.items()
        if values
    }


def summary(by_chunk: Mapping[int, list[float]]) -> dict[str, Any]:
    """Mean over chunks, and by chunk index in the file."""
    every = [value for values in by_chunk.values() for value in values]
    return {
        "mean": float(np.mean(every)),
        "chunks": len(every),
        "by_chunk": [[index, float(np.mean(v)), len(v)] for index, v in sorted(by_chunk.items())],
    }
