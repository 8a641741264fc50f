"""Losses by file, their differences paired by file, intervals over files, and the verdict.

The unit is the file: tokens of one file are no independent observations. A mean is that over files
of each file's mean loss per token, so that no long file decides; beside it stands the mean over all
tokens. Seeds are averaged within every file before files are resampled, so that intervals tell how
results vary with the files, not with the seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

RESAMPLES = 2000
LEAST = 16
"""A file counts in a region where it has so many tokens."""

FEWEST = 5
"""Of fewer files there is no interval: resampling them says nothing of others."""

Verdict = Literal["better", "worse", "equal"]


class Reading(NamedTuple):
    """What an evaluation measured.

    Attributes:
        total: sum of the losses in nats, `[files, cells]`.
        count: number of tokens, `[files, cells]`.
        starts: position in the file where a cell begins, `[cells]`.
        names: of the files.
        chunk_length: tokens a chunk.
    """

    total: np.ndarray
    count: np.ndarray
    starts: np.ndarray
    names: tuple[str, ...]
    chunk_length: int


class Estimate(NamedTuple):
    """A mean with its 95 % interval over files, and how many files there were."""

    mean: float
    low: float
    high: float
    files: int


def load(path: Path) -> Reading:
    """What `compare_recorder.FileLosses` wrote."""
    with np.load(path) as stored:
        sums = (stored[name] for name in ("total", "count", "starts"))
        return Reading(*sums, tuple(stored["names"].tolist()), int(stored["chunk_length"]))


def average(readings: Sequence[Reading]) -> Reading:
    """Mean over seeds, file by file and cell by cell.

    Raises:
        ValueError: they are not of the same files.
    """
    first = readings[0]
    for other in readings:
        same = other.names == first.names and np.array_equal(other.count, first.count)
        if not same or not np.array_equal(other.starts, first.starts):
            raise ValueError("results of different files or chunk lengths cannot be compared")
    return first._replace(total=np.mean([reading.total for reading in readings], axis=0))


def region(reading: Reading, low: int = 0, high: float = np.inf) -> np.ndarray:
    """Cells that begin at position `low` or behind it, and before `high`; bool `[cells]`."""
    return (reading.starts >= low) & (reading.starts < high)


def file_means(reading: Reading, cells: np.ndarray) -> np.ndarray:
    """Mean loss of every file in a region, `[files]`; NaN where it has too few tokens there."""
    count = reading.count[:, cells].sum(axis=1)
    enough = count >= LEAST
    means = reading.total[:, cells].sum(axis=1) / np.where(enough, count, 1)
    return np.where(enough, means, np.nan)


def token_mean(reading: Reading, cells: np.ndarray) -> float:
    """Mean loss over all tokens of a region."""
    return float(reading.total[:, cells].sum() / reading.count[:, cells].sum())


def level(reading: Reading, cells: np.ndarray) -> Estimate:
    """Mean loss over files."""
    return over_files(file_means(reading, cells))


def difference(a: Reading, b: Reading, cells: np.ndarray) -> Estimate:
    """Mean over files of the loss with a minus that with b, paired by file."""
    average([a, b])  # raises unless they are of the same files
    return over_files(file_means(a, cells) - file_means(b, cells))


def token_difference(a: Reading, b: Reading, cells: np.ndarray) -> Estimate:
    """The same over all tokens, so that long files weigh more; files are resampled here, too."""
    average([a, b])
    total = (a.total - b.total)[:, cells].sum(axis=1)
    count = a.count[:, cells].sum(axis=1)
    there = count > 0
    return bootstrap(total[there], count[there])


def over_files(values: np.ndarray) -> Estimate:
    """Mean of a value per file, without those that are NaN, and its interval."""
    present = values[~np.isnan(values)]
    return bootstrap(present, np.ones(len(present)))


def bootstrap(
    totals: np.ndarray,
    weights: np.ndarray,
    resamples: int = RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """`sum totals / sum weights`, and its percentile interval when files are drawn anew.

    Args:
        totals: a number per file, `[files]`.
        weights: by which the mean is taken; ones give that over files.
        resamples: how often as many files are drawn, with repetition.
        level: of the interval.
        seed: of the draws, so that equal input gives equal output.

    Returns:
        Without an interval (NaN) where files are fewer than `FEWEST`.
    """
    files = len(totals)
    mean = float(totals.sum() / weights.sum()) if files else np.nan
    if files < FEWEST:
        return Estimate(mean, np.nan, np.nan, files)
    drawn = np.random.default_rng(seed).integers(files, size=(resamples, files))
    means = totals[drawn].sum(axis=1) / weights[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(mean, float(low), float(high), files)


def verdict(estimate: Estimate) -> Verdict | None:
    """Of a difference of losses: `better` if its interval lies below 0, `worse` if above.

    Otherwise the two are `equal`; without an interval there is no verdict.
    """
    if np.isnan(estimate.low):
        return None
    if estimate.high < 0:
        return "better"
    return "worse" if estimate.low > 0 else "equal"


def decide(learning: Verdict | None, memory: Verdict | None, late: Verdict | None) -> str:
    """The decision in words; of what has no verdict (None) nothing is said.

    Args:
        learning: TTT-LoRA that remembers, against LoRA.
        memory: against TTT-LoRA that forgets after every chunk.
        late: against LoRA, on what is far from the beginning of a file.
    """
    sentences = [DECISION[learning]]
    sentences += [PERSISTENCE[memory]] if learning and memory else []
    sentences += [FAR_FROM_START[late]] if learning and late else []
    return " ".join(sentences)


DECISION: dict[Verdict | None, str] = {
    "better": "Better: TTT-LoRA beats LoRA on these files.",
    "equal": "Equal: these files do not tell TTT-LoRA and LoRA apart.",
    "worse": "Worse: LoRA beats TTT-LoRA on these files.",
    None: "Undecided: there are too few files.",
}
PERSISTENCE: dict[Verdict, str] = {
    "better": "Remembering through the file helps TTT-LoRA.",
    "equal": "Remembering through the file makes no difference to TTT-LoRA.",
    "worse": "Remembering through the file hurts TTT-LoRA.",
}
FAR_FROM_START: dict[Verdict, str] = {
    "better": "Far from the beginning of a file it beats LoRA.",
    "equal": "Far from the beginning of a file it is no different from LoRA.",
    "worse": "Far from the beginning of a file LoRA beats it.",
}


def position_bins(reading: Reading) -> list[tuple[int, float]]:
    """Bins that grow with the position: the cells of the first chunk, then 1, 2, 4, ... chunks."""
    length = reading.chunk_length
    edges = [int(start) for start in reading.starts if start < length]
    edge = length
    while edge <= reading.starts.max():
        edges.append(edge)
        edge *= 2
    return list(zip(edges, [*edges[1:], np.inf], strict=True))


def chunk_bins(reading: Reading) -> list[tuple[int, float]]:
    """A bin for every chunk index."""
    length = reading.chunk_length
    return [(start, start + length) for start in range(0, int(reading.starts.max()) + 1, length)]


def shared(a: Mapping[int, Reading], b: Mapping[int, Reading]) -> tuple[Reading, Reading, int]:
    """Both, averaged over the seeds that both have, and how many these are.

    Raises:
        ValueError: they have none in common.
    """
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        raise ValueError(f"no seed in common: {sorted(a)} and {sorted(b)}")
    return average([a[s] for s in seeds]), average([b[s] for s in seeds]), len(seeds)
