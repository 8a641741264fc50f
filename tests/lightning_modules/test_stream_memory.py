"""Memories as files: reading on from one equals never having stopped; others are refused."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from architecture_cases import ADAPTERS, STATEFUL, adapted_model, tokens
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from lightning_modules import stream_memory
from lightning_modules.models.identity import Weights
from lightning_modules.stream_memory import StreamMemory, list_memories
from lightning_modules.streams import NO_STREAM, Slots, StreamPlan, StreamState

ADAPTER_NAMES = list(dict.fromkeys(adapter for _, adapter in STATEFUL))
SPLITS = [[6, 7], [4, 9], [1, 12], [3, 2, 8]]
"""Where the first part ends: inside a mini-batch of 4 and at the end of one."""
STREAMS = (5, 3)


def _model(adapter: str = "ttt") -> PreTrainedModel:
    return adapted_model("llama", ADAPTERS[adapter])


def _chunk(ids: Tensor, index: int, first: bool, ids_of: tuple[int, ...] = STREAMS) -> dict:
    plan = StreamPlan(ids_of, (index,) * len(ids), (first,) * len(ids))
    numbers = {name: torch.tensor(value) for name, value in plan._asdict().items()}
    return {"input_ids": ids, **numbers, "plan": plan}


@torch.no_grad()
def _read(
    model: PreTrainedModel,
    streams: StreamState,
    parts: list[Tensor],
    start: int = 0,
    **options: Any,
) -> list[Tensor]:
    """Logits of chunks that are numbered from `start` on; the first one begins files."""
    seen = []
    for number, ids in enumerate(parts):
        streams.begin_step("test")
        chunk = _chunk(ids, start + number, first=number == 0, **options)
        seen.append(model(ids, use_cache=False, fast_state=streams.begin(chunk)).logits)
        streams.commit()
    return seen


@torch.no_grad()
def _go_on(model: PreTrainedModel, streams: StreamState, ids: Tensor, index: int) -> Tensor:
    streams.begin_step("test")
    handle = streams.begin(_chunk(ids, index, first=False))
    logits = model(ids, use_cache=False, fast_state=handle).logits
    streams.commit()
    return logits


@pytest.fixture
def memory() -> StreamMemory:
    model, streams = _model(), StreamState()
    _read(model, streams, [tokens(2, 6)])
    return StreamMemory.of(streams, "test", 5, model=model, name="a book")


def _same(actual: Slots, expected: Slots) -> bool:
    assert {s: set(f) for s, f in actual.items()} == {s: set(f) for s, f in expected.items()}
    pairs = [(actual[s][f], expected[s][f]) for s in expected for f in expected[s]]
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


# Reading on


@pytest.mark.quick("ttt-*", "lact-sizes1", "routed-sizes2", "nested-sizes0")
@pytest.mark.parametrize("sizes", SPLITS)
@pytest.mark.parametrize("adapter", ADAPTER_NAMES)
def test_reading_on_from_a_file_equals_never_having_stopped_bit_for_bit(
    adapter: str, sizes: list[int], tmp_path: Path
) -> None:
    model, ids = _model(adapter), tokens(2, 13)
    *parts, rest = ids.split(sizes, dim=1)
    streams = StreamState()
    _read(model, streams, parts)
    saved = StreamMemory.of(streams, "test", 3, model=model).save(tmp_path / "m.safetensors")
    expected = _go_on(model, streams, rest, len(parts))

    loaded = StreamMemory.load(saved, model=model)
    assert (loaded.stream_id, loaded.chunk_index) == (3, len(parts) - 1)
    resumed = StreamState()
    resumed.attach(loaded.slots)
    actual = _read(model, resumed, [rest], start=9)[0]
    assert torch.equal(actual[1], expected[1])
    assert not torch.allclose(actual[0], expected[0], rtol=1e-3, atol=1e-3), "row 0 was stream 5"
    after, live = (_row_of(s.slots("test"), 1) for s in (resumed, streams))
    assert _same(after, live)
    fresh = _read(model, StreamState(), [rest])[0]
    assert not torch.allclose(fresh[1], expected[1], rtol=1e-3, atol=1e-3), "it must matter"


def _row_of(slots: Slots, row: int) -> Slots:
    return {s: {f: v[row : row + 1] for f, v in fields.items()} for s, fields in slots.items()}


def test_an_attached_row_beside_a_row_that_goes_on_leaves_that_one_bit_for_bit(
    memory: StreamMemory,
) -> None:
    model, ids, streams = _model(), tokens(2, 13, seed=4), StreamState()
    _read(model, streams, [ids[:, :6]])
    plain = copy.deepcopy(streams)
    streams.attach(memory.slots)
    results = []
    for state in (streams, plain):
        state.begin_step("test")
        chunk = _chunk(ids[:, 6:], 1, first=False, ids_of=(5, 8))
        plan = StreamPlan((5, 8), (1, 0), (False, True))
        chunk |= {"plan": plan, "is_first": torch.tensor(plan.is_first)}
        with torch.no_grad():
            results.append(model(ids[:, 6:], use_cache=False, fast_state=state.begin(chunk)).logits)
    assert torch.equal(results[0][0], results[1][0])
    assert not torch.allclose(results[0][1], results[1][1], rtol=1e-3, atol=1e-3)
    alone = StreamState()
    alone.attach(memory.slots)
    expected = _read(model, alone, [ids[:, 6:]])[0][1]
    torch.testing.assert_close(results[0][1], expected, rtol=0, atol=0)


# Files


def test_a_loaded_memory_equals_the_saved_one(memory: StreamMemory, tmp_path: Path) -> None:
    path = memory.save(tmp_path / "new" / "book.safetensors")
    loaded = StreamMemory.load(path)
    assert _same(loaded.slots, memory.slots)
    assert (loaded.stream_id, loaded.chunk_index, loaded.name) == (5, 0, "a book")
    assert repr(loaded).startswith(
        "StreamMemory('a book', stream 5 up to chunk 0, 2 slots, weights"
    )
    assert loaded.weights == memory.weights == Weights.of(_model())
    assert all(len(value) == 1 for fields in loaded.slots.values() for value in fields.values())


def test_a_memory_is_a_copy_on_which_training_can_go_on(
    memory: StreamMemory, tmp_path: Path
) -> None:
    model, streams = _model(), StreamState()
    with torch.inference_mode():
        _read(model, streams, [tokens(2, 6)])
        inside = StreamMemory.of(streams, "test", 5, model=memory.weights)
        streams.slots("test")["model.layers.0.self_attn"]["dw"].zero_()
        loaded = StreamMemory.load(inside.save(tmp_path / "book.safetensors"))
    assert _same(loaded.slots, memory.slots)
    assert _same(inside.slots, memory.slots)
    ids = tokens(2, 6)
    for one in (inside, loaded):
        values = [value for fields in one.slots.values() for value in fields.values()]
        assert not any(value.is_inference() for value in values)
        trained = StreamState()
        trained.attach(one.slots)
        trained.begin_step("train")
        handle = trained.begin(_chunk(ids, 0, first=True))
        model(ids, use_cache=False, fast_state=handle).logits.sum().backward()


def test_an_unknown_stream_names_those_that_are_there() -> None:
    model, streams = _model(), StreamState()
    _read(model, streams, [tokens(2, 6)], ids_of=(5, NO_STREAM))
    with pytest.raises(ValueError, match=r"no row of 'test' reads stream 4; .* read there: 5\."):
        StreamMemory.of(streams, "test", 4, model=model)
    with pytest.raises(ValueError, match="nothing was read there"):
        StreamMemory.of(streams, "train", 5, model=model)


def test_a_model_without_fast_weights_has_no_memory() -> None:
    model, streams = _model("noop"), StreamState()
    _read(model, streams, [tokens(2, 6)])
    with pytest.raises(ValueError, match="stream 5 has learned nothing that could be kept"):
        StreamMemory.of(streams, "test", 5, model=model)


def test_an_existing_file_is_kept_unless_told_and_names_end_alike(
    memory: StreamMemory, tmp_path: Path
) -> None:
    path = memory.save(tmp_path / "book.safetensors")
    before = path.read_bytes()
    other = StreamMemory(memory.slots, 1, 2, memory.weights, "another")
    with pytest.raises(FileExistsError, match=r"book.safetensors exists: .*overwrite=True"):
        other.save(path)
    assert path.read_bytes() == before
    other.save(path, overwrite=True)
    assert StreamMemory.load(path).name == "another"
    with pytest.raises(ValueError, match=r"must end in .safetensors"):
        memory.save(tmp_path / "book.pt")


@pytest.mark.parametrize("broken", ["save_file", "replace"])
def test_a_crash_in_the_middle_leaves_the_old_file_and_nothing_else(
    broken: str, memory: StreamMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = memory.save(tmp_path / "book.safetensors")
    before = path.read_bytes()

    def half(tensors: Any, part: Path, metadata: Any) -> None:
        Path(part).write_bytes(before[: len(before) // 2])
        raise OSError("no space left")

    def never(*args: Any) -> None:
        raise OSError("no space left")

    if broken == "save_file":
        monkeypatch.setattr(stream_memory, "save_file", half)
    else:
        monkeypatch.setattr(os, "replace", never)
    for name in ("book", "other"):
        with pytest.raises(OSError, match="no space left"):
            memory.save(tmp_path / f"{name}.safetensors", overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["book.safetensors"]
    assert path.read_bytes() == before


def test_while_it_is_written_a_memory_is_not_there(
    memory: StreamMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, write = [], stream_memory.save_file

    def look(*args: Any, **kwargs: Any) -> None:
        write(*args, **kwargs)
        seen.append((list_memories(tmp_path), (tmp_path / "book.safetensors").exists()))

    monkeypatch.setattr(stream_memory, "save_file", look)
    memory.save(tmp_path / "book.safetensors")
    assert seen == [([], False)]


# Listing


class HeaderOnly:
    """`safe_open` that hands out no tensor."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.file = stream_memory_open(*args, **kwargs)

    def __enter__(self) -> HeaderOnly:
        self.file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.file.__exit__(*error)

    def keys(self) -> list[str]:
        return self.file.keys()

    def metadata(self) -> dict[str, str]:
        return self.file.metadata()

    def get_tensor(self, key: str) -> Tensor:
        raise AssertionError(f"{key} was loaded")


stream_memory_open = stream_memory.safe_open


def test_listing_reads_headers_and_names_what_is_broken(
    memory: StreamMemory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = memory.save(tmp_path / "b.safetensors")
    (tmp_path / "a.safetensors").write_bytes(path.read_bytes()[:-10])
    (tmp_path / "c.safetensors").write_bytes(b"")
    save_file({"w": torch.zeros(2)}, tmp_path / "d.safetensors")
    save_file({"w": torch.zeros(2)}, tmp_path / "e.safetensors", {"format": stream_memory.FORMAT})
    (tmp_path / "notes.txt").write_text("no memory")
    monkeypatch.setattr(stream_memory, "safe_open", HeaderOnly)
    with pytest.raises(AssertionError, match="was loaded"):
        StreamMemory.load(path)
    a, b, c, d, e = list_memories(tmp_path)
    assert [file.error is None for file in (a, b, c, d, e)] == [False, True, False, False, False]
    assert "a.safetensors is broken" in str(a) and "c.safetensors is broken" in str(c)
    assert "d.safetensors is no stream memory" in str(d) and "e.safetensors is no" in str(e)
    assert (b.path, b.name, b.stream_id, b.chunk_index) == (path, "a book", 5, 0)
    assert (b.slots, b.size, b.fingerprint) == (2, path.stat().st_size, memory.fingerprint)
    assert str(b).startswith("b.safetensors: a book, stream 5 up to chunk 0, 2 slots, ")


def test_what_is_broken_or_missing_says_so(memory: StreamMemory, tmp_path: Path) -> None:
    path = memory.save(tmp_path / "book.safetensors")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="book.safetensors is broken"):
        StreamMemory.load(path)
    with pytest.raises(FileNotFoundError, match="there is no memory"):
        StreamMemory.load(tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match="is no folder"):
        list_memories(tmp_path / "nowhere")


# Whose it is


def test_only_the_weights_that_read_the_stream_may_use_it(
    memory: StreamMemory, tmp_path: Path
) -> None:
    path, model = memory.save(tmp_path / "book.safetensors"), _model()
    StreamMemory.load(path, model=model.requires_grad_(False).eval())
    with torch.no_grad():
        model.model.layers[1].self_attn.ttt.W1[0, 0, 0] += 1e-3
    message = (
        r"stream 5 \(a book\) belongs to other weights than this LlamaForCausalLM has: 1 of 51"
    )
    with pytest.raises(ValueError, match=message + ".*the adapter.*--ckpt_path"):
        StreamMemory.load(path, model=model)
    StreamMemory.load(path)


def test_other_options_of_the_same_weights_are_found_by_the_first_chunk(
    memory: StreamMemory,
) -> None:
    options = copy.deepcopy(ADAPTERS["ttt"].options)
    options["layer"]["mini_batch_size"] = 8
    other, streams = (
        adapted_model("llama", ADAPTERS["ttt"]._replace(options=options)),
        StreamState(),
    )
    streams.attach(memory.slots)
    with pytest.raises(ValueError, match="mini_batch|shape"):
        _read(other, streams, [tokens(2, 6)])


def test_rows_are_equal_and_do_not_share_memory(memory: StreamMemory) -> None:
    rows = memory.rows(3)
    for slot, fields in rows.items():
        for name, value in fields.items():
            expected = memory.slots[slot][name]
            assert value.shape == (3, *expected.shape[1:]) and value.dtype == expected.dtype
            assert all(torch.equal(row, expected[0]) for row in value)
    rows["model.layers.0.self_attn"]["dw"][0].zero_()
    assert rows["model.layers.0.self_attn"]["dw"][1].abs().max() > 0
    assert memory.slots["model.layers.0.self_attn"]["dw"].abs().max() > 0
    with pytest.raises(ValueError, match="n=0 must be at least 1"):
        memory.rows(0)
