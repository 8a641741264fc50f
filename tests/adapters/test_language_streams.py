"""Causal adapters in language models over streams, against one pass and against full backward."""

from typing import Any

import pytest
import torch
from architecture_cases import (
    ADAPTERS,
    MINI_BATCH,
    STATEFUL,
    adapted_model,
    own_parameters,
    tokens,
)
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from lightning_modules.streams import FastState, StreamPlan, StreamState

CAUSAL = list(dict.fromkeys(adapter for _, adapter in STATEFUL))
LENGTH = 13
SPLITS = [[1, 12], [3, 5, 5], [4, 4, 5], [2, 2, 2, 7], [1] * LENGTH]
"""At mini-batch ends, inside mini-batches, several times inside one (mini-batches of 4)."""

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
"""float32 sums in another order (other matrix sizes)."""
TIGHT = {"rtol": 1e-6, "atol": 1e-6}
"""Norms and rotary angles of the stock models are float32 in float64 models too."""


def _model(adapter: str, architecture: str = "llama") -> PreTrainedModel:
    return adapted_model(architecture, ADAPTERS[adapter]).double()


def _stream(model: PreTrainedModel, ids: Tensor, sizes: list[int], **options: Any) -> Any:
    """Logits of ids read in pieces, keys and values in a plain cache, and the last handle."""
    cache, state, logits = DynamicCache(config=model.config), FastState(**options), []
    for index, part in enumerate(ids.split(sizes, dim=1)):
        state = state.advance() if index else state
        logits.append(model(part, past_key_values=cache, fast_state=state).logits)
    return torch.cat(logits, dim=1), state


@pytest.mark.quick(
    "llama-ttt-*",
    "gemma2-ttt-sizes1",
    "gemma3-ttt_mlp-sizes2",
    "gemma3-lact-sizes2",
    "gemma3-top_1-sizes1",
    "gemma3-nested-sizes1",
)
@pytest.mark.parametrize("sizes", SPLITS)
@pytest.mark.parametrize(("architecture", "adapter"), STATEFUL)
def test_stream_split_anywhere_equals_one_pass(
    architecture: str, adapter: str, sizes: list[int]
) -> None:
    ids = tokens(2, LENGTH)
    with torch.no_grad():
        for model, close in (
            (_model(adapter, architecture), TIGHT),
            (adapted_model(architecture, ADAPTERS[adapter]), CLOSE),
        ):
            expected, whole = _stream(model, ids, [LENGTH])
            actual, state = _stream(model, ids, sizes)
            torch.testing.assert_close(actual, expected, **close)
            torch.testing.assert_close(state.outgoing, whole.outgoing, **close)


def test_wrong_variant_without_the_pending_mini_batch_is_not_one_pass() -> None:
    model, ids = _model("ttt"), tokens(2, LENGTH)
    expected, _ = _stream(model, ids, [LENGTH])
    _, state = _stream(model, ids[:, :6], [6])
    lost = {
        slot: {name: value * (not name.startswith("pending")) for name, value in fields.items()}
        for slot, fields in state.outgoing.items()
    }
    cache = DynamicCache(config=model.config)
    model(ids[:, :6], past_key_values=cache, fast_state=FastState.transient())
    actual = model(ids[:, 6:], past_key_values=cache, fast_state=FastState(lost)).logits
    assert not torch.allclose(actual, expected[:, 6:], rtol=1e-3, atol=1e-3)


@pytest.mark.quick("llama-ttt", "gemma2-ttt", "gemma3-lact", "gemma3-top_1", "gemma3-nested")
@pytest.mark.parametrize(("architecture", "adapter"), STATEFUL)
def test_logits_before_a_changed_token_stay_bit_identical(architecture: str, adapter: str) -> None:
    model, ids = adapted_model(architecture, ADAPTERS[adapter]), tokens(2, LENGTH)
    with torch.no_grad():
        before = model(ids).logits
        for changed in (2, MINI_BATCH, 9):
            other = ids.clone()
            other[:, changed] = (other[:, changed] + 1) % 40
            after = model(other).logits
            assert torch.equal(after[:, :changed], before[:, :changed])
            assert not torch.equal(after[:, changed], before[:, changed])


@pytest.mark.quick("llama-ttt", "gemma2-ttt", "gemma3-lact", "gemma3-top_1", "gemma3-nested")
@pytest.mark.parametrize(("architecture", "adapter"), STATEFUL)
def test_a_row_among_other_rows_stays_bit_identical(architecture: str, adapter: str) -> None:
    model, ids = adapted_model(architecture, ADAPTERS[adapter]), tokens(3, LENGTH)
    other = torch.cat([ids[:1], tokens(2, LENGTH, seed=5)])
    with torch.no_grad():
        (logits, state), (expected, known) = (_stream(model, x, [6, 7]) for x in (other, ids))
    assert torch.equal(logits[0], expected[0]) and not torch.equal(logits[1], expected[1])
    for slot, fields in state.outgoing.items():
        for name, value in fields.items():
            assert torch.equal(value[0], known.outgoing[slot][name][0]), name


def _chunk(ids: Tensor, index: int, first: tuple[bool, ...]) -> dict[str, Any]:
    streams = tuple(range(len(ids)))
    plan = StreamPlan(streams, (index,) * len(ids), first)
    return {
        "input_ids": ids,
        "stream_id": torch.tensor(streams),
        "chunk_index": torch.full((len(ids),), index),
        "is_first": torch.tensor(first),
        "plan": plan,
    }


def _loss(logits: Tensor, ids: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="sum")


@pytest.mark.quick("ttt-*", "lact-sizes0", "top_1-sizes1")
@pytest.mark.parametrize("sizes", [[6, 7], [4, 3, 6]])
@pytest.mark.parametrize("adapter", CAUSAL)
def test_chunks_of_a_step_have_the_gradients_of_one_pass_whose_attention_is_cut_alike(
    adapter: str, sizes: list[int]
) -> None:
    model, ids = _model(adapter).train(), tokens(2, LENGTH)
    part = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    cut = (part[:, None] == part[None, :]) & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    positions = torch.cat([torch.arange(size) for size in sizes]).unsqueeze(0)
    attention = {"attention_mask": cut.expand(2, 1, -1, -1), "position_ids": positions}
    _loss(model(ids, use_cache=False, **attention).logits, ids).backward()
    used = {name: p for name, p in model.named_parameters() if p.grad is not None}
    expected = {name: p.grad.clone() for name, p in used.items()}
    model.zero_grad()

    streams = StreamState()
    streams.begin_step("train")
    losses = []
    for index, chunk in enumerate(ids.split(sizes, dim=1)):
        handle = streams.begin(_chunk(chunk, index, (index == 0,) * 2))
        losses.append(_loss(model(chunk, use_cache=False, fast_state=handle).logits, chunk))
    torch.stack(losses).sum().backward()
    for name, parameter in used.items():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-5, atol=1e-6)
    assert own_parameters(model).keys() & used.keys()


@pytest.mark.quick("ttt", "lact", "top_1", "nested")
@pytest.mark.parametrize("adapter", CAUSAL)
def test_steps_that_commit_equal_handles_that_advance_and_a_first_chunk_equals_fresh(
    adapter: str,
) -> None:
    model, ids = _model(adapter), tokens(2, LENGTH)
    streams, state, seen = StreamState(), FastState.transient(), []
    with torch.no_grad():
        for index, chunk in enumerate(ids.split([6, 7], dim=1)):
            streams.begin_step("train")
            handle = streams.begin(_chunk(chunk, index, (index == 0,) * 2))
            seen.append(model(chunk, use_cache=False, fast_state=handle).logits)
            streams.commit()
            assert torch.equal(seen[-1], model(chunk, use_cache=False, fast_state=state).logits)
            state = state.advance()
        streams.begin_step("train")
        chunk = {**_chunk(ids, 2, (True, False)), "chunk_index": torch.tensor([0, 2])}
        chunk["plan"] = StreamPlan((0, 1), (0, 2), (True, False))
        out = model(ids, use_cache=False, fast_state=streams.begin(chunk)).logits
        fresh = model(ids, use_cache=False).logits
        torch.testing.assert_close(out[:1], fresh[:1], **TIGHT)
        assert not torch.allclose(out[1], fresh[1], rtol=1e-3, atol=1e-3)


# Reading without adapting


@pytest.mark.slow
@pytest.mark.parametrize("sizes", SPLITS)
@pytest.mark.parametrize("adapter", CAUSAL)
def test_reading_without_adapting_split_anywhere_equals_one_pass(
    adapter: str, sizes: list[int]
) -> None:
    model, ids = _model(adapter), tokens(2, LENGTH)
    with torch.no_grad():
        _, learned = _stream(model, tokens(2, 6, seed=2), [6])  # leaves 2 of 4 tokens pending
        options = {"incoming": learned.outgoing, "adapt": False}
        expected, whole = _stream(model, ids, [LENGTH], **options)
        actual, state = _stream(model, ids, sizes, **options)
    torch.testing.assert_close(actual, expected, **TIGHT)
    torch.testing.assert_close(state.reading, whole.reading, **TIGHT)
    torch.testing.assert_close(state.outgoing, learned.outgoing, rtol=0, atol=0)


def test_reading_without_adapting_equals_adapting_with_nothing_allowed_to_write() -> None:
    model, ids = _model("ttt"), tokens(2, LENGTH)
    _, learned = _stream(model, tokens(2, 6, seed=2), [6])
    frozen = FastState(learned.outgoing, adapt=False)
    silent = FastState(learned.outgoing)
    expected = model(ids, fast_state=silent, write_mask=torch.zeros(2, LENGTH).bool()).logits
    assert torch.equal(model(ids, fast_state=frozen).logits, expected)
    torch.testing.assert_close(frozen.reading, silent.outgoing, rtol=0, atol=0)
    assert not torch.allclose(
        model(ids, fast_state=FastState(learned.outgoing)).logits, expected, rtol=1e-3, atol=1e-3
    )


def test_a_stream_read_without_adapting_in_steps_equals_one_pass_and_keeps_what_it_learned() -> (
    None
):
    model, ids = _model("ttt"), tokens(2, LENGTH)
    streams, cache, seen = StreamState(), DynamicCache(config=model.config), []
    with torch.no_grad():
        streams.begin_step("test")
        first = tokens(2, 6, seed=2)
        model(first, fast_state=streams.begin(_chunk(first, 0, (True, True))))
        streams.commit()
        learned = streams.slots("test")
        for index, part in enumerate(ids.split([3, 5, 5], dim=1)):
            streams.begin_step("test")
            handle = streams.begin(_chunk(part, index + 1, (False, False)), adapt=False)
            seen.append(model(part, past_key_values=cache, fast_state=handle).logits)
            streams.commit()
            if index == 0:  # saved and restored in the middle
                saved, streams = streams.state_dict("test"), StreamState()
                streams.load_state_dict(saved, "test")
        expected, _ = _stream(model, ids, [LENGTH], incoming=learned, adapt=False)
        torch.testing.assert_close(torch.cat(seen, dim=1), expected, **TIGHT)
        torch.testing.assert_close(streams.slots("test"), learned, rtol=0, atol=0)
        streams.begin_step("test")  # learning goes on where it was, whatever was read since
        handle = streams.begin(_chunk(ids, 4, (False, False)))
        actual = model(ids, use_cache=False, fast_state=handle).logits
        expected = model(ids, use_cache=False, fast_state=FastState(learned)).logits
        assert torch.equal(actual, expected)
