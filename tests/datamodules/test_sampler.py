"""Which chunk stands where: every file once, in order, in one row, for any number of ranks."""

import time

import numpy as np
import pytest

from datamodules.loader import StreamLoader, collate_chunks
from datamodules.sampler import IDLE, ChunkRequest, StreamBatchSampler
from lightning_modules.streams import NO_STREAM, StreamPlan

LENGTHS = [3, 1, 7, 2, 5, 5, 1, 4, 6]


def rows_of(sampler: StreamBatchSampler) -> list[list[ChunkRequest]]:
    """Requests of every row in the order in which the row reads them."""
    rows: list[list[ChunkRequest]] = [[] for _ in range(sampler.batch_size)]
    for batch in sampler:
        for place, request in enumerate(batch):
            rows[place % sampler.batch_size].append(request)
    return rows


@pytest.mark.parametrize("batch_size", [1, 2, 4, 12])
@pytest.mark.parametrize("tbptt", [1, 2, 3])
def test_every_chunk_once_and_files_in_order_in_one_row(batch_size: int, tbptt: int) -> None:
    sampler = StreamBatchSampler(LENGTHS, batch_size, tbptt=tbptt, seed=3)
    seen = []
    for row in rows_of(sampler):
        expected = None
        for request in row:
            if request.idle:
                assert expected is None, "a row went idle in the middle of a file"
                continue
            assert (request.index == 0) == request.is_first
            if expected is not None:
                assert (request.file, request.index) == expected
            else:
                assert request.is_first
            last = request.index == LENGTHS[request.file] - 1
            expected = None if last else (request.file, request.index + 1)
            seen.append((request.file, request.index))
    assert sorted(seen) == [(f, c) for f, n in enumerate(LENGTHS) for c in range(n)]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_share_files_and_have_equally_many_batches(world_size: int) -> None:
    samplers = [
        StreamBatchSampler(LENGTHS, 2, seed=1, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert len({len(sampler) for sampler in samplers}) == 1
    files = [{r.file for row in rows_of(s) for r in row if not r.idle} for s in samplers]
    assert sorted(f for owned in files for f in owned) == list(range(len(LENGTHS)))


def test_order_is_a_function_of_seed_and_epoch() -> None:
    def order(seed: int, epoch: int) -> list[list[ChunkRequest]]:
        sampler = StreamBatchSampler(LENGTHS, 3, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(0, 2)
    assert order(0, 1) != order(1, 1)


def test_without_shuffling_files_come_in_their_order() -> None:
    requests = [batch[0] for batch in StreamBatchSampler([2, 1], 1, shuffle=False)]
    assert [(r.file, r.index) for r in requests] == [(0, 0), (0, 1), (1, 0)]


def test_empty_files_are_left_out_and_rows_without_files_are_idle() -> None:
    batches = list(StreamBatchSampler([0, 2, 0], 2, shuffle=False))
    assert batches == [
        [ChunkRequest(1, 0, True, False), IDLE],
        [ChunkRequest(1, 1, False, False), IDLE],
    ]


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        ([], {}, "no chunks"),
        ([0, 0], {}, "no chunks"),
        ([1], {"batch_size": 0}, "batch_size=0"),
        ([1], {"tbptt": 0}, "tbptt=0"),
        ([1], {"rank": 2, "world_size": 2}, "rank 2"),
    ],
)
def test_bad_sizes_are_named(lengths: list[int], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StreamBatchSampler(lengths, **{"batch_size": 1, **options})


class Numbers:
    """A dataset whose sample is its own request."""

    lengths = LENGTHS

    def __getitem__(self, request: ChunkRequest) -> dict[str, np.ndarray]:
        return {"value": np.asarray([request.file, request.index])}


def test_collate_gives_stream_keys_and_a_plan_of_python_values() -> None:
    requests = [ChunkRequest(4, 0, True, False), IDLE, ChunkRequest(4, 1, False, False), IDLE]
    first, second = collate_chunks([(r, Numbers()[r]) for r in requests], tbptt=2)
    assert first["plan"] == StreamPlan((4, NO_STREAM), (0, 0), (True, True))
    assert second["plan"] == StreamPlan((4, NO_STREAM), (1, 0), (False, True))
    assert second["stream_id"].tolist() == [4, NO_STREAM]
    assert second["is_first"].tolist() == [False, True]
    assert second["value"].shape == (2, 2)


def values(batches: list) -> list:
    return [[chunk["value"].tolist() for chunk in batch] for batch in batches]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_resumes_at_the_exact_batch_and_then_starts_epochs_anew(workers: int) -> None:
    def loader() -> StreamLoader:
        sampler = StreamBatchSampler(LENGTHS, 3, tbptt=2, seed=5)
        return StreamLoader(Numbers(), sampler, num_workers=workers)

    whole = loader()
    whole.sampler.set_epoch(2)
    expected = values(list(whole))
    whole.sampler.set_epoch(3)
    next_epoch = values(list(whole))

    for stop in (1, len(expected) - 1, len(expected)):
        first = loader()
        first.sampler.set_epoch(2)
        batches = iter(first)
        seen = values([next(batches) for _ in range(stop)])
        state = first.state_dict()
        second = loader()
        second.load_state_dict(state)
        second.sampler.set_epoch(2)
        assert seen + values(list(second)) == expected
        second.sampler.set_epoch(3)
        assert values(list(second)) == next_epoch


def test_a_state_taken_before_the_first_batch_is_where_that_batch_stands() -> None:
    first = StreamLoader(Numbers(), StreamBatchSampler(LENGTHS, 3))
    batches = iter(first)
    next(batches), next(batches)
    state = first.state_dict()
    second = StreamLoader(Numbers(), StreamBatchSampler(LENGTHS, 3))
    second.load_state_dict(state)
    assert second.state_dict() == state, "resumed and interrupted again: the position is lost"
    list(batches)
    first.sampler.set_epoch(1)
    assert first.state_dict() == {**state, "epoch": 1, "position": 0}, "an epoch would be skipped"


def test_iterating_does_not_draw_from_the_global_generator() -> None:
    import torch

    before = torch.get_rng_state()
    list(StreamLoader(Numbers(), StreamBatchSampler(LENGTHS, 2)))
    assert torch.equal(before, torch.get_rng_state())


def test_a_loader_tells_how_long_it_was_waited_for_and_not_how_long_it_waited() -> None:
    class Slow(Numbers):
        def __getitem__(self, request: ChunkRequest) -> dict:
            time.sleep(0.02)
            return super().__getitem__(request)

    loader = StreamLoader(Slow(), StreamBatchSampler(LENGTHS, 2))
    batches = iter(loader)
    next(batches)
    first = loader.waited
    assert first >= 2 * 0.02
    time.sleep(0.3)
    next(batches)
    assert first + 2 * 0.02 <= loader.waited < first + 0.3


def test_a_place_in_an_epoch_is_of_its_rows_and_between_epochs_they_may_change() -> None:
    def loader(batch_size: int = 3, tbptt: int = 2, world_size: int = 1) -> StreamLoader:
        sampler = StreamBatchSampler(LENGTHS, batch_size, tbptt=tbptt, world_size=world_size)
        return StreamLoader(Numbers(), sampler)

    first = loader()
    assert next(iter(first))
    for other, name in ((loader(batch_size=2), "batch_size=3"), (loader(tbptt=1), "tbptt=2")):
        other.load_state_dict(first.state_dict())
        with pytest.raises(ValueError, match=f"resume with data.init_args.{name}"):
            next(iter(other))
        other.load_state_dict(first.state_dict())
        other.sampler.set_epoch(1)
        assert len(list(other)) == len(other)
    fewer = loader(batch_size=1, world_size=2)  # of which the streams' checkpoint warns
    fewer.load_state_dict(first.state_dict())
    assert len(list(fewer)) == len(fewer) - 1
