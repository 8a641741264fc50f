"""Which chunk of which file stands in which row of which batch: a pure function of (seed, epoch).

The sampler owns B queues of files. Files are shuffled by (seed, epoch), dealt out to the ranks,
and every row that is free takes the next one, so a row reads a file from its first chunk to its
last. Rows that run out of files at the end of an epoch are *idle*: they bring padding that counts
nowhere, so every file is read exactly once per epoch and every rank has the same number of
batches. Ordinary shuffled training is the special case in which every file has one chunk.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np


class ChunkRequest(NamedTuple):
    """What a dataset is asked for: chunk `index` of `file`; `idle` rows want padding."""

    file: int
    index: int
    is_first: bool
    idle: bool


IDLE = ChunkRequest(file=-1, index=0, is_first=True, idle=True)


class StreamBatchSampler:
    """Batches of `tbptt * batch_size` requests, chunk-major: all rows of chunk 0, then of chunk 1.

    Args:
        lengths: chunks per file.
        batch_size: rows per rank.
        tbptt: consecutive chunks of every row in one batch.
        seed: together with the epoch it fixes the order.
        shuffle: False reads files in their given order.
        rank: this process; files are dealt out round-robin after shuffling.
        world_size: number of processes.

    Raises:
        ValueError: no file has a chunk, or a size is not positive.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        *,
        tbptt: int = 1,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        if self.lengths.size == 0 or self.lengths.max() < 1:
            raise ValueError("the dataset has no chunks; check its files and the chunk length")
        if batch_size < 1 or tbptt < 1:
            raise ValueError(f"batch_size={batch_size} and tbptt={tbptt} must be at least 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} does not exist in a world of {world_size}")
        self.batch_size = batch_size
        self.tbptt = tbptt
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.start = 0
        self._planned: tuple[int, np.ndarray, np.ndarray] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration follows."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches of the current epoch, the same on every rank."""
        return self._plan()[0].shape[0]

    def __iter__(self) -> Iterator[list[ChunkRequest]]:
        """Batches of the current epoch from number `start` on."""
        files, indices = self._plan()
        for position in range(self.start, files.shape[0]):
            yield [
                IDLE if file < 0 else ChunkRequest(file, index, index == 0, idle=False)
                for file, index in zip(
                    files[position].ravel().tolist(),
                    indices[position].ravel().tolist(),
                    strict=True,
                )
            ]

    def _plan(self) -> tuple[np.ndarray, np.ndarray]:
        """File and chunk index of every place, `[batches, tbptt, batch_size]`; file -1 is idle."""
        if self._planned is None or self._planned[0] != self.epoch:
            self._planned = (self.epoch, *self._make_plan())
        return self._planned[1], self._planned[2]

    def _make_plan(self) -> tuple[np.ndarray, np.ndarray]:
        order = np.flatnonzero(self.lengths)
        if self.shuffle:
            order = np.random.default_rng([self.seed, self.epoch]).permutation(order)
        queues = [self._deal(order[rank :: self.world_size]) for rank in range(self.world_size)]
        longest = max(int(self.lengths[row].sum()) for rows in queues for row in rows)
        batches = -(-longest // self.tbptt)
        files = np.full((self.batch_size, batches * self.tbptt), -1, dtype=np.int64)
        indices = np.zeros_like(files)
        for row, queue in enumerate(queues[self.rank]):
            lengths = self.lengths[queue]
            total = int(lengths.sum())
            files[row, :total] = np.repeat(queue, lengths)
            starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
            indices[row, :total] = np.arange(total) - starts
        shape = (self.batch_size, batches, self.tbptt)
        return files.reshape(shape).transpose(1, 2, 0), indices.reshape(shape).transpose(1, 2, 0)

    def _deal(self, order: np.ndarray) -> list[np.ndarray]:
        """Give every file, in order, to the row that is free first (the lowest one of several)."""
        queues: list[list[int]] = [[] for _ in range(self.batch_size)]
        free = [(0, row) for row in range(self.batch_size)]
        for file in order.tolist():
            time, row = heapq.heappop(free)
            queues[row].append(file)
            heapq.heappush(free, (time + int(self.lengths[file]), row))
        return [np.asarray(queue, dtype=np.int64) for queue in queues]
