"""Rows that begin with what is attached, and files that end, against numbers by hand."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from spy import SyncSpy
from torch import Tensor

from lightning_modules import streams as streams_module
from lightning_modules.streams import NO_STREAM, FastState, Slots, StreamPlan, StreamState


class Sum(NamedTuple):
    total: Tensor


def one_row(**totals: float) -> Slots:
    return {slot: {"total": torch.tensor([[value]])} for slot, value in totals.items()}


def chunk(
    stream: tuple[int, ...] = (7, 8),
    index: tuple[int, ...] = (0, 0),
    first: tuple[bool, ...] | None = None,
) -> dict[str, Any]:
    first = first or tuple(i == 0 for i in index)
    plan = StreamPlan(stream, index, first)
    return {**{k: torch.tensor(v) for k, v in plan._asdict().items()}, "plan": plan}


def read(handle: FastState, add: float = 1.0, slots: tuple[str, ...] = ("a",)) -> list[float]:
    """Add to every slot; what was in the last one before."""
    before: list[float] = []
    for slot in slots:
        state = handle.read(slot, Sum)
        rows = 2 if handle.live is None else len(handle.live)
        total = torch.zeros(rows, 1) if state is None else state.total
        before = total.flatten().tolist()
        handle.write(slot, Sum(total + add))
    return before


def step(
    streams: StreamState, *chunks: dict, add: float = 1.0, adapt: bool = True, **options: Any
) -> list[list[float]]:
    """What stood in slot `a` before every chunk of a step."""
    streams.begin_step("train")
    seen = [read(streams.begin(c, adapt=adapt), add, **options) for c in chunks]
    streams.commit()
    return seen


# Attaching


def test_rows_that_begin_start_from_what_is_attached_and_others_go_on() -> None:
    streams = StreamState()
    streams.attach(one_row(a=10.0))
    assert step(streams, chunk()) == [[10.0, 10.0]]
    assert step(streams, chunk(index=(1, 1))) == [[11.0, 11.0]]
    assert step(streams, chunk((7, 9), (2, 0))) == [[12.0, 10.0]]
    plain = StreamState()
    assert step(plain, chunk()) == [[0.0, 0.0]], "nothing is attached to other streams"


def test_attaching_in_the_middle_of_files_leaves_them_alone_and_detaching_ends_it() -> None:
    streams = StreamState()
    step(streams, chunk())
    streams.attach(one_row(a=10.0))
    assert step(streams, chunk((7, 9), (1, 0))) == [[1.0, 10.0]]
    streams.attach(None)
    assert step(streams, chunk((5, 9), (0, 1))) == [[0.0, 11.0]]


def test_a_file_that_begins_inside_a_step_starts_from_it_and_gradients_go_through_the_rest() -> (
    None
):
    streams = StreamState()
    streams.attach(one_row(a=10.0))
    streams.begin_step("train")
    weight = torch.ones(2, 1, requires_grad=True)
    handle = streams.begin(chunk())
    handle.write("a", Sum(handle.read("a", Sum).total + weight))
    handle = streams.begin(chunk((7, 9), (1, 0)))
    total = handle.read("a", Sum).total
    assert total.tolist() == [[11.0], [10.0]]
    total.sum().backward()
    assert weight.grad.tolist() == [[1.0], [0.0]]


def test_slots_that_only_one_side_has_are_zero_on_the_other() -> None:
    streams = StreamState()
    step(streams, chunk(), slots=("a", "b"))
    streams.attach(one_row(a=10.0, c=30.0))
    streams.begin_step("train")
    handle = streams.begin(chunk((7, 9), (1, 0)))
    found = {slot: handle.read(slot, Sum).total.flatten().tolist() for slot in "abc"}
    assert found == {"a": [1.0, 10.0], "b": [1.0, 0.0], "c": [0.0, 30.0]}


def test_a_namespace_of_its_own_wins_and_the_common_one_counts_again_after_it() -> None:
    streams = StreamState()
    streams.attach(one_row(a=10.0))
    streams.attach(one_row(a=20.0), "train")
    assert step(streams, chunk()) == [[20.0, 20.0]]
    streams.attach(None, "train")
    assert step(streams, chunk()) == [[10.0, 10.0]]
    streams.attach(None)
    streams.attach(one_row(a=20.0), "validate")
    assert step(streams, chunk()) == [[0.0, 0.0]]


def test_streams_that_do_not_persist_begin_every_chunk_with_it() -> None:
    streams = StreamState(persistent=False)
    streams.attach(one_row(a=10.0))
    assert step(streams, chunk(), chunk(index=(1, 1))) == [[10.0, 10.0]] * 2
    assert step(streams, chunk(index=(2, 2))) == [[10.0, 10.0]]


def test_a_declared_restart_and_another_number_of_rows_begin_with_it() -> None:
    streams = StreamState()
    streams.attach(one_row(a=10.0))
    step(streams, chunk())
    streams.restart("train")
    assert step(streams, chunk(index=(5, 5))) == [[10.0, 10.0]]
    streams.begin_step("train")
    assert streams.begin(chunk((1,), (0,))).read("a", Sum).total.tolist() == [[10.0]]


def test_readers_that_do_not_adapt_begin_where_it_stands() -> None:
    streams = StreamState()
    streams.attach(one_row(a=10.0))
    assert step(streams, chunk(), adapt=False) == [[10.0, 10.0]]
    # Row 0 reads on from where its reader stands, row 1 begins; nothing was learned.
    assert step(streams, chunk((7, 9), (1, 0)), adapt=False) == [[11.0, 10.0]]
    assert streams.slots("train")["a"]["total"].tolist() == [[10.0], [10.0]]
    assert step(streams, chunk((7, 9), (2, 1))) == [[10.0, 10.0]]


def test_rows_do_not_share_memory_with_what_is_attached() -> None:
    streams, attached = StreamState(), one_row(a=10.0)
    streams.attach(attached)
    streams.begin_step("train")
    handle = streams.begin(chunk())
    handle.read("a", Sum).total[0].add_(5.0)
    assert handle.read("a", Sum).total.tolist() == [[15.0], [10.0]]
    assert attached["a"]["total"].tolist() == [[10.0]]


def test_packed_rows_are_refused_only_where_something_is_attached() -> None:
    streams = StreamState()
    packed = {**chunk(), "document_ids": torch.zeros(2, 3, dtype=torch.int64)}
    step(streams, packed)
    streams.attach(one_row(a=10.0))
    streams.begin_step("train")
    with pytest.raises(ValueError, match="rows are packed .*mode: stream"):
        streams.begin(packed)


def test_what_does_not_fit_the_state_names_slot_and_field() -> None:
    streams = StreamState()
    step(streams, chunk())
    streams.attach({"a": {"total": torch.zeros(1, 3)}})
    streams.begin_step("train")
    with pytest.raises(ValueError, match=r"fit the state of a: .* total has shape \(3,\).* \(1,\)"):
        streams.begin(chunk((7, 9), (1, 0)))
    streams.attach({"a": {"other": torch.zeros(1, 1)}})
    with pytest.raises(ValueError, match=r"a row of (total|other) has shape"):
        streams.begin(chunk((7, 9), (1, 0)))


def test_a_window_of_another_length_is_fine_where_all_rows_begin_together() -> None:
    streams = StreamState()
    step(streams, chunk())
    streams.attach({"a": {"total": torch.zeros(1, 3)}})
    streams.begin_step("train")
    assert streams.begin(chunk()).read("a", Sum).total.shape == (2, 3)


def test_more_rows_than_one_cannot_be_attached() -> None:
    with pytest.raises(ValueError, match=r"a has total of shape \(2, 1\), but one row is needed"):
        StreamState().attach({"a": {"total": torch.zeros(2, 1)}})


def test_what_is_attached_goes_to_the_device_of_the_chunks_once() -> None:
    streams, copies = StreamState(), []
    streams.attach(one_row(a=10.0))
    for c in (chunk(), chunk((7, 9), (1, 0))):
        streams.begin_step("train")
        handle = streams.begin({k: v if k == "plan" else v.to("meta") for k, v in c.items()})
        assert handle.read("a", Sum).total.device.type == "meta"
        copies.append(streams._starts[None]["a"]["total"])
        handle.write("a", handle.read("a", Sum))
        streams.commit()
    assert copies[0] is copies[1]


def test_nothing_waits_for_the_device() -> None:
    streams = StreamState()
    streams.attach(one_row(a=10.0, c=1.0))
    streams.finished.append(lambda *end: None)
    with SyncSpy() as spy:
        for c in (chunk(), chunk((7, 9), (1, 0)), chunk((5, NO_STREAM), (0, 0))):
            streams.begin_step("train")
            handle = streams.begin(c)
            handle.write("a", Sum(handle.read("a", Sum).total + 1))
            streams.commit()
        streams.finish("train")
    assert spy.events == []


# Files that end


class Ends:
    """Listener that keeps what it is told."""

    def __init__(self, streams: StreamState) -> None:
        self.told: list[tuple[int, int, float]] = []
        streams.finished.append(self)

    def __call__(self, stream_id: int, chunk_index: int, slots: Slots) -> None:
        assert slots["a"]["total"].shape == (1, 1) and not slots["a"]["total"].requires_grad
        self.told.append((stream_id, chunk_index, slots["a"]["total"].item()))


def test_every_file_is_told_once_with_its_last_chunk_and_its_state() -> None:
    streams = StreamState()
    ends = Ends(streams)
    step(streams, chunk())
    step(streams, chunk((7, 9), (1, 0)))
    assert ends.told == [(8, 0, 1.0)]
    step(streams, chunk((5, NO_STREAM), (0, 0)))
    assert ends.told[1:] == [(7, 1, 2.0), (9, 0, 1.0)]
    step(streams, chunk((5, NO_STREAM), (1, 0), (False, True)))
    assert len(ends.told) == 3, "an idle row has no file"
    streams.finish("train")
    assert ends.told[3:] == [(5, 1, 2.0)]


def test_a_file_that_ends_inside_a_step_is_told_with_the_state_after_its_last_chunk() -> None:
    streams = StreamState()
    ends = Ends(streams)
    step(streams, chunk(), chunk(index=(1, 1)), chunk((7, 9), (2, 0)), chunk((4, 9), (0, 1)))
    assert ends.told == [(8, 1, 2.0), (7, 2, 3.0)]


def test_what_a_loop_told_at_its_end_is_not_told_again_and_reading_on_is() -> None:
    streams = StreamState()
    ends = Ends(streams)
    step(streams, chunk())
    streams.finish("train")
    streams.finish("train")
    assert ends.told == [(7, 0, 1.0), (8, 0, 1.0)]
    step(streams, chunk((7, 9), (1, 0)))
    assert len(ends.told) == 2
    streams.finish("train")
    assert ends.told[2:] == [(7, 1, 2.0), (9, 0, 1.0)]


def test_another_number_of_rows_ends_all_files_and_a_cleared_loop_tells_nothing() -> None:
    streams = StreamState()
    ends = Ends(streams)
    step(streams, chunk())
    streams.begin_step("train")
    streams.begin(chunk((1,), (0,)))
    assert ends.told == [(7, 0, 1.0), (8, 0, 1.0)]
    streams.clear("train")
    streams.finish("train")
    assert len(ends.told) == 2


def test_there_is_nothing_to_tell_where_streams_do_not_persist() -> None:
    streams = StreamState(persistent=False)
    ends = Ends(streams)
    step(streams, chunk())
    step(streams, chunk())
    streams.finish("train")
    assert ends.told == []


def test_without_a_listener_no_row_is_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> None:
        raise AssertionError("a row was taken out")

    monkeypatch.setattr(streams_module, "row_of", never)
    streams = StreamState()
    step(streams, chunk())
    step(streams, chunk())
    streams.finish("train")
    step(streams, chunk())
    streams.finished.append(never)
    with pytest.raises(AssertionError, match="a row was taken out"):
        step(streams, chunk())


def test_a_row_is_found_by_its_stream_and_an_unknown_one_names_those_that_are_known() -> None:
    streams = StreamState()
    step(streams, chunk((7, 8)))
    step(streams, chunk((7, NO_STREAM), (1, 0)))
    chunk_index, slots = streams.row("train", 7)
    assert (chunk_index, slots["a"]["total"].tolist()) == (1, [[2.0]])
    with pytest.raises(ValueError, match="no row of 'train' reads stream 8; .*read there: 7. To"):
        streams.row("train", 8)
    with pytest.raises(ValueError, match="'test' reads stream 7.*none, nothing was read"):
        streams.row("test", 7)
