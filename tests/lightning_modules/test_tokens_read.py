"""The host counts the tokens that rows have read, or says that it does not know."""

from typing import Any

import torch

from lightning_modules.streams import StreamState


def chunk(*rows: tuple[int, int], counts: tuple[int, ...] | None = (16, 16)) -> dict[str, Any]:
    """A chunk of rows (stream, chunk index), with so many tokens each."""
    ids, indices = zip(*rows, strict=True)
    made = {
        "stream_id": torch.tensor(ids),
        "chunk_index": torch.tensor(indices),
        "is_first": torch.tensor(indices) == 0,
    }
    return made if counts is None else {**made, "token_counts": counts}


def read(streams: StreamState, *chunks: dict[str, Any], **options: Any) -> list[Any]:
    """What the handles of a step say."""
    streams.begin_step("train")
    handles = [streams.begin(c, **options) for c in chunks]
    streams.commit()
    return [None if h.tokens_read is None else h.tokens_read.rows for h in handles]


def test_tokens_add_up_inside_steps_and_between_them_and_a_file_begins_at_0() -> None:
    streams = StreamState()
    assert read(streams, chunk((1, 0), (2, 0)), chunk((1, 1), (2, 1))) == [(0, 0), (16, 16)]
    assert read(streams, chunk((1, 2), (2, 2), counts=(16, 3))) == [(32, 32)]
    assert read(streams, chunk((1, 3), (3, 0))) == [(48, 0)]
    assert read(streams, chunk((1, 4), (3, 1))) == [(64, 16)]


def test_without_counts_the_host_knows_again_when_all_rows_begin_a_file() -> None:
    streams = StreamState()
    assert read(streams, chunk((1, 0), (2, 0), counts=None)) == [(0, 0)]
    assert read(streams, chunk((1, 1), (2, 1))) == [None]
    assert read(streams, chunk((1, 2), (3, 0))) == [None]
    assert read(streams, chunk((4, 0), (5, 0))) == [(0, 0)]


def test_who_only_reads_stands_where_the_host_does_not_know() -> None:
    streams = StreamState()
    read(streams, chunk((1, 0), (2, 0)))
    assert read(streams, chunk((1, 1), (2, 1)), adapt=False) == [(16, 16)]
    assert read(streams, chunk((1, 2), (2, 2))) == [None]


def test_what_is_attached_and_a_restart_are_not_counted() -> None:
    streams = StreamState()
    streams.attach({"layer": {"w": torch.ones(1, 2)}})
    assert read(streams, chunk((1, 0), (2, 0))) == [None]
    streams.attach(None)
    streams.restart("train")
    assert read(streams, chunk((1, 5), (2, 5))) == [None]


def test_a_step_that_is_begun_again_counts_once() -> None:
    streams = StreamState()
    read(streams, chunk((1, 0), (2, 0)))
    streams.begin_step("train")
    streams.begin(chunk((1, 1), (2, 1)))
    assert read(streams, chunk((1, 1), (2, 1))) == [(16, 16)]


def test_saved_counts_go_on_and_older_states_have_none() -> None:
    streams = StreamState()
    read(streams, chunk((1, 0), (2, 0)))
    saved, other = streams.state_dict(), StreamState()
    other.load_state_dict(saved)
    assert read(other, chunk((1, 1), (2, 1))) == [(16, 16)]
    del saved["tokens_read"]
    other.load_state_dict(saved)
    assert read(other, chunk((1, 1), (2, 1))) == [None]
