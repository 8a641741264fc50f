"""Invariances of every causal variant for any length, split, rows, documents and padding."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from memory_cases import BLOCK
from torch import Tensor
from variant_cases import VARIANTS
from window_cases import add_noise, use_float64

from lightning_modules.base import AdapterModule
from lightning_modules.generation import FastStateCache
from lightning_modules.layers.rope import document_positions
from lightning_modules.streams import FastState, StreamState

pytestmark = pytest.mark.slow

CAUSAL = [name for name in VARIANTS if name != "action_expert"]
"""The action expert attends to all tokens of a call."""

EXACT = {"rtol": 0, "atol": 1e-8}
"""float64 sums in another order; LaCT makes up to ten updates of differences that grow."""

LENGTH, VOCABULARY = 40, 259
FEATURES = {"vocab_size": VOCABULARY, "chunk_length": 16, "tbptt": 2, "mode": "stream"}
every_causal = pytest.mark.parametrize("name", CAUSAL)
few = settings(max_examples=15)


@pytest.fixture(autouse=True, scope="module")
def _float64() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_float64(monkeypatch)
        yield


@cache
def make(name: str) -> AdapterModule:
    """The variant, in which every parameter does something."""
    torch.manual_seed(0)
    module = VARIANTS[name].module()
    module.build(FEATURES)
    return add_noise(module).double().eval()


texts = st.builds(
    lambda rows, length, seed: torch.randint(
        2, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed)
    ),
    rows=st.integers(1, 3),
    length=st.integers(2, LENGTH),
    seed=st.integers(0, 99),
)


def pieces(data: st.DataObject, length: int) -> list[int]:
    """Any sizes that sum to the length."""
    cuts = data.draw(st.sets(st.integers(1, length - 1)))
    edges = [0, *sorted(cuts), length]
    return [b - a for a, b in pairwise(edges)]


@torch.no_grad()
def read(module: AdapterModule, ids: Tensor, **context: Any) -> tuple[Tensor, FastState]:
    """Logits of one call, and the handle behind it."""
    handle = context.pop("fast_state", None) or FastState.transient()
    out = module.model(input_ids=ids, use_cache=False, fast_state=handle, **context)
    return out.logits, handle


@torch.no_grad()
def decode(module: AdapterModule, ids: Tensor, sizes: list[int]) -> tuple[Tensor, FastStateCache]:
    """Logits of calls that go on with keys, values and fast state."""
    cache = FastStateCache(module.model.config)
    parts = [module.model(part, past_key_values=cache).logits for part in ids.split(sizes, 1)]
    return torch.cat(parts, 1), cache


@every_causal
@few
@given(ids=texts, data=st.data())
def test_any_pieces_and_decoding_equal_one_pass(
    name: str, ids: Tensor, data: st.DataObject
) -> None:
    module = make(name)
    expected, whole = decode(module, ids, [ids.shape[1]])
    torch.testing.assert_close(read(module, ids)[0], expected, **EXACT)
    for sizes in (pieces(data, ids.shape[1]), [1] * ids.shape[1]):
        actual, cache = decode(module, ids, sizes)
        torch.testing.assert_close(actual, expected, **EXACT)
        torch.testing.assert_close(cache.slots, whole.slots, **EXACT)


@every_causal
@few
@given(ids=texts, data=st.data())
def test_no_logit_depends_on_a_later_token(name: str, ids: Tensor, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, ids.shape[1] - 1))
    other = ids.clone()
    other[:, place] = (other[:, place] + 1) % VOCABULARY
    module = make(name)
    one, two = read(module, ids)[0], read(module, other)[0]
    assert torch.equal(one[:, :place], two[:, :place])
    assert not torch.equal(one[:, place], two[:, place])


@every_causal
@few
@given(ids=texts, data=st.data())
def test_rows_do_not_know_each_other(name: str, ids: Tensor, data: st.DataObject) -> None:
    module, (together, handle) = make(name), read(make(name), ids)
    row = data.draw(st.integers(0, len(ids) - 1))
    alone, own = read(module, ids[row : row + 1])
    torch.testing.assert_close(alone[0], together[row], **EXACT)
    assert_row(own, handle, row)


def assert_row(alone: FastState, together: FastState, row: int) -> None:
    """The state of a row alone is that of the row among others."""
    for slot, fields in alone.outgoing.items():
        for field, value in fields.items():
            torch.testing.assert_close(value[0], together.outgoing[slot][field][row], **EXACT)


def chunk(ids: Tensor, index: list[int], stream: list[int]) -> dict[str, Any]:
    """The keys of a chunk that streams look at."""
    return {
        "input_ids": ids,
        "stream_id": torch.tensor(stream),
        "chunk_index": torch.tensor(index),
        "is_first": torch.tensor(index) == 0,
    }


@every_causal
@few
@given(ids=texts, data=st.data())
def test_rows_that_begin_a_file_are_fresh_and_the_others_go_on(
    name: str, ids: Tensor, data: st.DataObject
) -> None:
    module, streams, rows = make(name), StreamState(), len(ids)
    begins = data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows))
    streams.begin_step("train")
    read(module, ids, fast_state=streams.begin(chunk(ids, [0] * rows, list(range(rows)))))
    streams.commit()
    going_on = FastState(streams.slots("train"))
    streams.begin_step("train")
    index = [int(not first) for first in begins]
    stream = [row + 10 * first for row, first in enumerate(begins)]
    handle = streams.begin(chunk(ids, index, stream))
    mixed = read(module, ids, fast_state=handle)[0]
    fresh, carried = read(module, ids)[0], read(module, ids, fast_state=going_on)[0]
    for row, first in enumerate(begins):
        expected = fresh if first else carried
        torch.testing.assert_close(mixed[row], expected[row], **EXACT)


@every_causal
@few
@given(ids=texts, data=st.data())
def test_padding_behind_a_row_changes_neither_its_logits_nor_its_state(
    name: str, ids: Tensor, data: st.DataObject
) -> None:
    rows, length = ids.shape
    real = data.draw(st.lists(st.integers(1, length), min_size=rows, max_size=rows))
    mask = torch.arange(length) < torch.tensor(real)[:, None]
    module = make(name)
    padded, together = read(module, ids, mask=mask)
    for row, count in enumerate(real):
        alone, own = read(module, ids[row : row + 1, :count])
        torch.testing.assert_close(padded[row, :count], alone[0], **EXACT)
        if name != "memory_bank":  # where a router stands depends on where its grid of blocks does
            assert_row(own, together, row)


@every_causal
@few
@given(lengths=st.lists(st.integers(1, 5), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_packed_documents_equal_documents_alone(name: str, lengths: list[int], seed: int) -> None:
    """Documents of a memory bank begin with a block of its router."""
    unit = BLOCK if name == "memory_bank" else 3
    lengths = [unit * length - (0 if name == "memory_bank" else length % 2) for length in lengths]
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCABULARY, (2, sum(lengths)), generator=generator)
    documents = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)).expand(2, -1)
    context: dict[str, Any] = {"document_ids": documents}
    if name != "lact":
        context["position_ids"] = document_positions(ids, document_ids=documents)
    if name == "memory_bank":
        context["document_alignment"] = BLOCK
    module = make(name)
    packed = read(module, ids, **context)[0]
    parts = [read(module, part)[0] for part in ids.split(lengths, 1)]
    torch.testing.assert_close(packed, torch.cat(parts, 1), **EXACT)


@pytest.mark.parametrize("name", [name for name in CAUSAL if name != "memory_bank"])
def test_power_what_was_read_before_matters(name: str) -> None:
    """Reading on afresh, and documents that are not told apart, are found."""
    module = make(name)
    ids = torch.randint(2, VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    first, second = ids.split(LENGTH // 2, 1)
    whole = read(module, ids)[0]
    fresh = torch.cat([read(module, first)[0], read(module, second)[0]], 1)
    assert (whole - fresh)[:, LENGTH // 2 :].abs().max() > 1e-3
    learned = read(module, first)[1].advance()
    carried = read(module, second, fast_state=learned)[0]
    assert (carried - read(module, second)[0]).abs().max() > 1e-5
