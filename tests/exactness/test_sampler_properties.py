"""Sampler and loader for any files, rows, ranks, interruptions: nothing is lost or read twice."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from datamodules.loader import StreamLoader
from datamodules.sampler import ChunkRequest, StreamBatchSampler
from datamodules.text_chunks import DocumentStreams
from lightning_modules.streams import NO_STREAM

EPOCHS = 2


@dataclass(frozen=True)
class Files:
    """Lengths of the files in tokens, and how they are read."""

    tokens: tuple[int, ...]
    chunk_length: int
    batch_size: int
    tbptt: int
    seed: int
    world_size: int = 1

    def sampler(self, rank: int = 0) -> StreamBatchSampler:
        return StreamBatchSampler(
            self.dataset().lengths,
            self.batch_size,
            tbptt=self.tbptt,
            seed=self.seed,
            rank=rank,
            world_size=self.world_size,
        )

    def dataset(self) -> DocumentStreams:
        """No token occurs twice: file and place follow from its number."""
        return DocumentStreams(
            Store(self.tokens), np.arange(len(self.tokens)), self.chunk_length, pad_id=0
        )

    def loader(self, rank: int = 0) -> StreamLoader:
        return StreamLoader(self.dataset(), self.sampler(rank))


class Store:
    """Tokens of all files, counted from 1."""

    def __init__(self, lengths: tuple[int, ...]) -> None:
        self.lengths = np.asarray(lengths)
        self.tokens = np.arange(1, self.lengths.sum() + 1)
        self._ends = np.cumsum(self.lengths)

    def document(self, number: int) -> np.ndarray:
        return self.tokens[self._ends[number] - self.lengths[number] : self._ends[number]]


sizes = st.integers(1, 4)
files = st.builds(
    Files,
    tokens=st.lists(st.integers(2, 30), min_size=1, max_size=9).map(tuple),
    chunk_length=st.integers(1, 9),
    batch_size=sizes,
    tbptt=st.integers(1, 3),
    seed=st.integers(0, 99),
    world_size=st.integers(1, 3),
)


def streams_of(batches: list[list[dict[str, Any]]]) -> dict[int, list[tuple[int, int]]]:
    """(input, label) of every place of every file, as it is read; rows must be in order."""
    places: dict[int, list[tuple[int, int]]] = defaultdict(list)
    rows: dict[int, tuple[int, int]] = {}
    for chunk in (chunk for batch in batches for chunk in batch):
        for row, (stream, index, first) in enumerate(zip(*chunk["plan"], strict=True)):
            assert first == (index == 0)
            assert first or rows[row] == (stream, index - 1), "a row left its file"
            rows[row] = (stream, index)
            mask = chunk["mask"][row]
            assert bool(mask.any()) == (stream != NO_STREAM)
            found = (chunk[name][row][mask].tolist() for name in ("input_ids", "labels"))
            places[stream] += zip(*found, strict=True)
    places.pop(NO_STREAM, None)
    return places


few = settings(max_examples=40)


@few
@given(files)
def test_every_token_of_every_file_is_read_once_by_one_row_of_one_rank(case: Files) -> None:
    ranks = [list(case.loader(rank)) for rank in range(case.world_size)]
    assert len({len(batches) for batches in ranks}) == 1
    found = [streams_of(batches) for batches in ranks]
    assert sum(len(places) for places in found) == len(case.tokens), "a file has two readers"
    merged = {stream: read for places in found for stream, read in places.items()}
    store = Store(case.tokens)
    for number in range(len(case.tokens)):
        tokens = store.document(number).tolist()
        assert merged[number] == list(pairwise(tokens))


def order(sampler: StreamBatchSampler, epoch: int) -> list[list[ChunkRequest]]:
    sampler.set_epoch(epoch)
    return list(sampler)


@few
@given(files, st.lists(st.integers(0, 5), max_size=4), st.integers(0, 5))
def test_order_is_a_function_of_seed_and_epoch_whatever_was_read_before(
    case: Files, before: list[int], epoch: int
) -> None:
    used = case.sampler()
    for other in before:
        order(used, other)
    assert order(used, epoch) == order(case.sampler(), epoch)


def plain(batches: list[list[dict[str, Any]]]) -> list[Any]:
    """Batches as values that can be compared."""
    return [
        [
            {k: v.tolist() if isinstance(v, Tensor) else v for k, v in chunk.items()}
            for chunk in batch
        ]
        for batch in batches
    ]


def epochs(case: Files) -> list[list[Any]]:
    """What is read if nothing interrupts."""
    loader = case.loader()
    read = []
    for epoch in range(EPOCHS):
        loader.sampler.set_epoch(epoch)
        read.append(plain(list(loader)))
    return read


interruptions = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 3)), max_size=5)
"""Batches between a start and a checkpoint, and batches that are lost behind that checkpoint."""


def interrupted(case: Files, stops: list[tuple[int, int]], forget: bool = False) -> list[list[Any]]:
    """What is read if the process is lost again and again, a new one every time.

    Args:
        case: what is read.
        stops: when the process saves, and how much later it is lost.
        forget: wrong: start every time at the beginning of the epoch.
    """
    loader, epoch, left, read = case.loader(), 0, list(stops), [[] for _ in range(EPOCHS)]
    while epoch < EPOCHS:
        loader.sampler.set_epoch(epoch)
        batches = iter(loader)
        until, lost = left.pop(0) if left else (10**6, 0)
        part = plain(list(islice(batches, until)))
        state = loader.state_dict()
        read[epoch] += part
        list(islice(batches, lost))
        if len(part) < until:
            epoch += 1
            continue
        loader = case.loader()
        if not forget:
            loader.load_state_dict(state)
    return read


@few
@given(files, interruptions)
def test_interruptions_never_change_what_is_read(case: Files, stops: list[tuple[int, int]]) -> None:
    assert interrupted(case, stops) == epochs(case)


def test_power_a_loader_without_its_position_reads_twice() -> None:
    case = Files((30, 20, 10), chunk_length=4, batch_size=2, tbptt=1, seed=0)
    assert interrupted(case, [(3, 1)]) == epochs(case)
    assert interrupted(case, [(3, 1)], forget=True) != epochs(case)


@few
@given(files, sizes, st.integers(1, 3), st.integers(0, 8))
def test_other_rows_are_refused_inside_an_epoch_and_welcome_between_two(
    case: Files, batch_size: int, tbptt: int, position: int
) -> None:
    first = case.loader()
    read = len(list(islice(iter(first), position)))
    other = replace(case, batch_size=batch_size, tbptt=tbptt).loader()
    other.load_state_dict(first.state_dict())
    if read and (batch_size, tbptt) != (case.batch_size, case.tbptt):
        with pytest.raises(ValueError, match="resume with data.init_args"):
            next(iter(other))
        other.load_state_dict(first.state_dict())
    else:
        assert len(list(other)) == len(other) - read
        other.load_state_dict(first.state_dict())
    other.sampler.set_epoch(1)
    assert len(list(other)) == len(other)


@few
@given(files, st.integers(1, 3), st.integers(0, 8))
def test_another_world_goes_on_behind_as_many_batches(
    case: Files, world_size: int, position: int
) -> None:
    """The streams of its rows start afresh, of which `StreamStateCheckpoint` warns."""
    first = case.loader()
    read = len(list(islice(iter(first), position)))
    other = replace(case, world_size=world_size).loader()
    other.load_state_dict(first.state_dict())
    assert len(list(other)) == max(0, len(other) - read)
