"""Aligned rows: every document begins at a multiple, and nothing but padding is added."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities.apply_func import move_data_to_device
from text_cases import make_data, write_documents

from datamodules.sampler import IDLE, ChunkRequest
from datamodules.text_chunks import NO_LABEL, PackedDocuments

PAD = 99
Row = dict[str, torch.Tensor]

packings = st.tuples(
    st.lists(st.integers(2, 40), min_size=1, max_size=12),
    st.integers(1, 9),
    st.integers(1, 4),
)
"""Tokens of every document, the alignment, and a row's length in multiples of it."""


def make_store(lengths: list[int]) -> Any:
    """A store whose tokens are all different, so that each says where it comes from."""
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    tokens = 100 + np.arange(offsets[-1])
    return SimpleNamespace(tokens=tokens, offsets=offsets, lengths=np.asarray(lengths))


def pack(
    lengths: list[int], alignment: int, multiple: int, kind: type[PackedDocuments] = PackedDocuments
) -> list[Row]:
    documents = np.arange(len(lengths))[::-1]  # not in the order of the store
    dataset = kind(make_store(lengths), documents, alignment * multiple, PAD, alignment)
    assert dataset.num_labels == sum(lengths) - len(lengths)
    return [dataset[ChunkRequest(row, 0, True, False)] for row in range(len(dataset.lengths))]


def expected_pairs(lengths: list[int]) -> list[tuple[int, int]]:
    """(token, next token) of all documents in the order of packing."""
    store = make_store(lengths)
    ranges = zip(store.offsets[:-1], store.offsets[1:], strict=True)
    return [(t, t + 1) for a, b in reversed(list(ranges)) for t in store.tokens[a : b - 1].tolist()]


def check_starts(rows: list[Row], lengths: list[int], alignment: int) -> None:
    first = set((make_store(lengths).offsets[:-1] + 100).tolist())
    for row in rows:
        ids, inputs = row["document_ids"], row["input_ids"].tolist()
        for place in range(len(ids)):
            begins = place == 0 or ids[place] != ids[place - 1]
            assert begins == (place == 0 or inputs[place] in first)
            assert not begins or place % alignment == 0
            assert not begins or row["mask"][place], "padding begins no document"


@given(packings)
def test_every_token_is_a_label_once_and_in_order(packing: tuple) -> None:
    rows, found = pack(*packing), []
    for row in rows:
        mask = row["mask"]
        assert mask.equal(row["labels"] != NO_LABEL) and mask.any()
        assert row["input_ids"][~mask].eq(PAD).all()
        pairs = (row[name][mask].tolist() for name in ("input_ids", "labels"))
        found += zip(*pairs, strict=True)
    assert found == expected_pairs(packing[0])


@given(packings)
def test_documents_begin_at_multiples_and_padding_has_the_id_of_the_document_before(
    packing: tuple,
) -> None:
    lengths, alignment, _ = packing
    rows = pack(*packing)
    check_starts(rows, lengths, alignment)
    ids = [row["document_ids"].tolist() for row in rows]
    flat = [i for row in ids for i in row]
    assert flat == sorted(flat) and set(flat) == set(range(flat[-1] + 1))
    assert all(a[-1] != b[0] for a, b in pairwise(ids)), "rows share no id"


@given(packings)
def test_less_than_one_multiple_of_padding_stands_behind_a_document(packing: tuple) -> None:
    lengths, alignment, multiple = packing
    rows = pack(*packing)
    padding = ~torch.cat([row["mask"] for row in rows])
    used = sum(-(-(length - 1) // alignment) * alignment for length in lengths)
    assert len(rows) == -(-used // (alignment * multiple))
    assert int(padding[:used].sum()) == used - sum(lengths) + len(lengths)


class Unaligned(PackedDocuments):
    """The mistake: the alignment is promised, but documents follow each other directly."""

    def __init__(self, store: Any, documents: Any, length: int, pad: int, alignment: int) -> None:
        super().__init__(store, documents, length, pad)


def test_rows_that_only_promise_an_alignment_are_caught() -> None:
    lengths = [7, 12, 5]
    check_starts(pack(lengths, 4, 2), lengths, 4)
    with pytest.raises(AssertionError):
        check_starts(pack(lengths, 4, 2, Unaligned), lengths, 4)


def one_behind_the_other(lengths: list[int], length: int) -> list[Row]:
    """Rows without alignment, as a loop over all places."""
    pairs = expected_pairs(lengths)
    starts = {p for p in range(len(pairs)) if p == 0 or pairs[p - 1][1] != pairs[p][0]}
    rows, document = [], -1
    for first in range(0, len(pairs), length):
        part = pairs[first : first + length]
        fill = length - len(part)
        ids = []
        for place in range(first, first + length):
            document += place == first or place in starts
            ids.append(document)
        columns = {
            "input_ids": [a for a, _ in part] + [PAD] * fill,
            "labels": [b for _, b in part] + [NO_LABEL] * fill,
            "document_ids": ids,
        }
        row = {name: torch.tensor(values) for name, values in columns.items()}
        rows.append(row | {"mask": torch.arange(length) < len(part)})
    return rows


@given(packings)
def test_an_alignment_of_one_equals_unaligned_packing_bit_for_bit(packing: tuple) -> None:
    lengths, alignment, multiple = packing
    rows = pack(lengths, 1, alignment * multiple)
    expected = one_behind_the_other(lengths, alignment * multiple)
    assert len(rows) == len(expected)
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        assert all(row[name].equal(other[name]) for name in other)
        assert {value.dtype for value in row.values()} == {torch.int64, torch.bool}


# --- in batches ---


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_documents(tmp_path / "corpus")


@pytest.mark.parametrize("workers", [0, 1])
def test_chunks_carry_the_alignment_as_a_number_that_stays_on_the_host(
    folder: Path, workers: int
) -> None:
    data = make_data(folder, mode="packed", packing_alignment=8, num_workers=workers)
    batch = next(iter(data.train_dataloader()))
    chunk = move_data_to_device(batch, torch.device("meta"))[0]
    assert chunk["input_ids"].is_meta
    assert chunk["document_alignment"] == 8 and type(chunk["document_alignment"]) is int
    assert data.features["packing_alignment"] == 8
    assert "document_alignment" not in next(iter(make_data(folder).train_dataloader()))[0]
    unaligned = make_data(folder, mode="packed")
    assert next(iter(unaligned.val_dataloader()))[0]["document_alignment"] == 1


def test_padding_between_documents_is_reported_by_padded(folder: Path) -> None:
    data = make_data(folder, mode="packed", packing_alignment=8, chunk_length=64, batch_size=1)
    chunks = [batch[0] for batch in data.train_dataloader()]
    inside = [bool((~c["mask"][0, : int(c["mask"][0].nonzero().max())]).any()) for c in chunks]
    assert any(inside)
    assert all(chunk["padded"] for chunk, hole in zip(chunks, inside, strict=True) if hole)


def test_idle_rows_are_padding(folder: Path) -> None:
    data = make_data(folder, mode="packed", packing_alignment=8)
    idle = data.build_dataset("train")[IDLE]
    assert idle["labels"].eq(NO_LABEL).all() and not idle["mask"].any()
    assert idle["input_ids"].eq(data.tokenizer.pad_id).all()


def test_a_loader_over_aligned_rows_resumes_at_the_exact_batch(folder: Path) -> None:
    def read(loader: Any) -> list[Any]:
        names = ("input_ids", "labels", "document_ids", "stream_id")
        return [[batch[0][name].tolist() for name in names] for batch in loader]

    data = make_data(folder, mode="packed", packing_alignment=4, seed=3)
    expected = read(data.train_dataloader())
    first, second = data.train_dataloader(), data.train_dataloader()
    batches = iter(first)
    seen = read([next(batches) for _ in range(len(expected) // 2)])
    second.load_state_dict(first.state_dict())
    assert 0 < len(seen) < len(expected) and seen + read(second) == expected
