"""Statistics of recorded features: the numbers that normalisation is made of."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

Statistics = dict[str, np.ndarray]
"""`mean std min max q01 q10 q50 q90 q99`, each `[D]` float64, and `count` `[1]` int64."""

QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}


class RunningStatistics:
    """Statistics of rows that arrive in blocks, in constant memory.

    Mean and variance are merged block by block (Chan, Golub and LeVeque 1983): with
    `delta = mean_b - mean_a` and `n = n_a + n_b`,
    `mean = mean_a + delta n_b / n` and `M2 = M2_a + M2_b + delta^2 n_a n_b / n`.
    Quantiles are those of every k-th row, where k doubles whenever the sample is full: exact up
    to `sample_rows` rows, and the same however the rows are cut into blocks.

    Args:
        sample_rows: rows kept for the quantiles.
    """

    def __init__(self, sample_rows: int = 1_000_000) -> None:
        self.sample_rows = sample_rows
        self.count = 0
        self._mean = self._squares = self._min = self._max = np.zeros(0)
        self._sample: list[np.ndarray] = []
        self._sampled = 0
        self._step = 1

    def update(self, values: np.ndarray) -> None:
        """Take in rows `[N, D]`."""
        if len(values) == 0:
            return
        self._update_sample(values)
        block = np.asarray(values, dtype=np.float64)
        mean, low, high = block.mean(0), block.min(0), block.max(0)
        squares = np.square(block - mean).sum(0)
        if self.count == 0:
            self._mean, self._squares, self._min, self._max = mean, squares, low, high
        else:
            total, delta = self.count + len(block), mean - self._mean
            self._mean = self._mean + delta * len(block) / total
            self._squares += squares + np.square(delta) * self.count * len(block) / total
            self._min, self._max = np.minimum(self._min, low), np.maximum(self._max, high)
        self.count += len(block)

    def _update_sample(self, values: np.ndarray) -> None:
        rows = np.array(values[-self.count % self._step :: self._step])
        self._sample.append(rows)
        self._sampled += len(rows)
        while self._sampled > self.sample_rows:
            self._sample = [np.concatenate(self._sample)[::2].copy()]
            self._sampled = len(self._sample[0])
            self._step *= 2

    def result(self) -> Statistics:
        """The statistics of all rows so far.

        Raises:
            ValueError: there were none.
        """
        if self.count == 0:
            raise ValueError("statistics of no rows: no training episode has a frame")
        rows = np.concatenate(self._sample).astype(np.float64)
        quantiles = np.quantile(rows, list(QUANTILES.values()), axis=0)
        return {
            "min": self._min,
            "max": self._max,
            "mean": self._mean,
            "std": np.sqrt(self._squares / self.count),
            "count": np.array([self.count]),
            **dict(zip(QUANTILES, quantiles, strict=True)),
        }


def feature_statistics(blocks: Iterable[np.ndarray]) -> Statistics:
    """Statistics over the rows of all blocks, `[N_i, D]` each.

    Raises:
        ValueError: there are no rows.
    """
    running = RunningStatistics()
    for block in blocks:
        running.update(block)
    return running.result()
