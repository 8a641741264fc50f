"""FastStateCache, against reading the whole sequence at once and against rows of their own."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from architecture_cases import ADAPTERS, STATEFUL, adapted_model, build_model, tokens
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from lightning_modules.adapters import inject_adapters
from lightning_modules.generation import FastStateCache
from lightning_modules.stream_memory import StreamMemory
from lightning_modules.streams import FastState, StreamState

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
"""float32 sums in another order (other matrix sizes)."""
TIGHT = {"rtol": 1e-6, "atol": 1e-6}
"""Norms and rotary angles of the stock models are float32 in float64 models too."""
LENGTH = 13


def _model(architecture: str = "llama", adapter: str = "ttt") -> PreTrainedModel:
    return adapted_model(architecture, ADAPTERS[adapter])


def _greedy(model: PreTrainedModel, ids: Tensor, cache: Any, new: int = 5, **options: Any) -> Any:
    given = {} if cache is None else {"past_key_values": cache}
    given |= {"attention_mask": torch.ones_like(ids), "max_new_tokens": new, "do_sample": False}
    return model.generate(ids, **{**given, **options})


@torch.no_grad()
def _read(model: PreTrainedModel, ids: Tensor, cache: Any, sizes: list[int]) -> Tensor:
    """Logits of ids, read in pieces of these sizes."""
    parts = ids.split(sizes, dim=1)
    return torch.cat([model(part, past_key_values=cache).logits for part in parts], dim=1)


# Decoding is reading


@pytest.mark.quick(
    "llama-ttt-*",
    "*-ttt-4-dtype1",
    "gemma3-lact-6-dtype0",
    "gemma3-nested-4-dtype1",
    "gemma3-top_1-1-dtype1",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("prompt", [1, 4, 6])
@pytest.mark.parametrize(("architecture", "adapter"), STATEFUL)
def test_prefill_and_token_by_token_decoding_equal_one_pass(
    architecture: str, adapter: str, prompt: int, dtype: torch.dtype
) -> None:
    model, ids = _model(architecture, adapter).to(dtype), tokens(2, LENGTH)
    cache, whole = FastStateCache(model.config), FastStateCache(model.config)
    decoded = _read(model, ids, cache, [prompt] + [1] * (LENGTH - prompt))
    expected = _read(model, ids, whole, [LENGTH])
    close = CLOSE if dtype == torch.float32 else TIGHT
    torch.testing.assert_close(decoded, expected, **close)
    torch.testing.assert_close(cache.slots, whole.slots, **close)
    state = FastState.transient()
    assert torch.equal(model(ids, fast_state=state, use_cache=False).logits, expected)
    torch.testing.assert_close(state.outgoing, whole.slots, rtol=0, atol=0)


def test_wrong_variant_forgetting_between_tokens_is_not_one_pass() -> None:
    model, ids = _model(), tokens(2, LENGTH)
    cache = FastStateCache(model.config)
    forgetful = []
    for token in ids.split(1, dim=1):
        forgetful.append(model(token, past_key_values=cache).logits)
        cache.fast_state = FastState()
    expected = model(ids, use_cache=False).logits
    assert not torch.allclose(torch.cat(forgetful, dim=1), expected, rtol=1e-2, atol=1e-2)


def test_a_plain_cache_is_refused_where_fast_weights_would_forget() -> None:
    model, ids = _model(), tokens(2, LENGTH)
    message = r"holds 13 tokens that the fast weights of model.layers.0.*FastStateCache\(model.conf"
    with pytest.raises(ValueError, match=message):
        _greedy(model, ids, None)
    plain = DynamicCache(config=model.config)
    _read(model, ids, plain, [LENGTH])
    with pytest.raises(ValueError, match=message):
        _read(model, ids, plain, [LENGTH])
    noop = build_model("llama")
    inject_adapters(noop, [("*", "noop", None)])
    assert _greedy(noop, ids, None).shape == (2, LENGTH + 5)


def test_sampling_with_a_cache_equals_sampling_without() -> None:
    model, ids = _model(), tokens(2, LENGTH)
    torch.manual_seed(3)
    cached = _greedy(model, ids, FastStateCache(model.config), do_sample=True)
    torch.manual_seed(3)
    assert torch.equal(cached, _greedy(model, ids, None, do_sample=True, use_cache=False))


def test_chunked_prefill_equals_prefill_at_once() -> None:
    model, ids = _model("gemma3"), tokens(2, LENGTH)
    expected = _greedy(model, ids, FastStateCache(model.config))
    cache = FastStateCache(model.config)
    assert torch.equal(_greedy(model, ids, cache, prefill_chunk_size=3), expected)


@pytest.mark.slow
def test_generating_with_a_model_compiled_in_place_equals_eager() -> None:
    model, ids = _model("gemma3"), tokens(2, LENGTH)
    expected = _greedy(model, ids, FastStateCache(model.config))
    torch.compiler.reset()
    model.compile(backend="aot_eager")
    assert torch.equal(_greedy(model, ids, FastStateCache(model.config)), expected)


# Beams and rows


@pytest.mark.quick("llama-ttt", "gemma3-lact", "gemma3-top_1")
@pytest.mark.parametrize(("architecture", "adapter"), STATEFUL)
def test_beam_search_equals_beam_search_that_reads_everything_again(
    architecture: str, adapter: str
) -> None:
    model, ids = _model(architecture, adapter), tokens(2, LENGTH)
    expected = _greedy(model, ids, None, 8, num_beams=4, use_cache=False)
    cache = FastStateCache(model.config)
    assert torch.equal(_greedy(model, ids, cache, 8, num_beams=4), expected)
    assert not torch.equal(expected, _greedy(model, ids, None, 8, use_cache=False))


class SharedBeams(FastStateCache):
    """Wrong: beams keep the fast state of the row that they happen to be in."""

    def _select(self, rows: Tensor) -> None:
        pass


def test_wrong_variant_state_that_does_not_follow_its_beam_is_found() -> None:
    model, ids = _model(), tokens(6, LENGTH)
    options = {"num_beams": 4, "output_scores": True, "return_dict_in_generate": True}
    scores = [
        _greedy(model, ids, cache, 8, **options).sequences_scores
        for cache in (FastStateCache(model.config), SharedBeams(model.config))
    ]
    assert not torch.allclose(*scores, **CLOSE)


def test_reordered_repeated_and_selected_rows_equal_rows_read_like_that() -> None:
    model, ids = _model(), tokens(3, LENGTH)
    operations = {
        "reorder_cache": (torch.tensor([2, 0, 0]), ids[[2, 0, 0]]),
        "batch_repeat_interleave": (2, ids.repeat_interleave(2, dim=0)),
        "batch_select_indices": (torch.tensor([2, 1]), ids[[2, 1]]),
    }
    for name, (argument, rows) in operations.items():
        cache, expected = FastStateCache(model.config), FastStateCache(model.config)
        _read(model, ids, cache, [LENGTH])
        getattr(cache, name)(argument)
        _read(model, rows, expected, [LENGTH])
        torch.testing.assert_close(cache.slots, expected.slots, **CLOSE)
        following = rows[:, :2]
        actual = _read(model, following, cache, [1, 1])
        torch.testing.assert_close(actual, _read(model, following, expected, [1, 1]), **CLOSE)


def test_rows_selected_by_a_bool_mask_equal_those_selected_by_index() -> None:
    model, caches = _model(), []
    for rows in (torch.tensor([True, False, True]), torch.tensor([0, 2])):
        caches.append(FastStateCache(model.config))
        _read(model, tokens(3, LENGTH), caches[-1], [LENGTH])
        caches[-1].batch_select_indices(rows)
    torch.testing.assert_close(caches[0].slots, caches[1].slots, rtol=0, atol=0)


def test_fast_state_of_another_number_of_rows_is_an_error() -> None:
    model = _model()
    donor = FastStateCache(model.config)
    _read(model, tokens(2, LENGTH), donor, [LENGTH])
    cache = FastStateCache(model.config, slots=donor.slots)
    with pytest.raises(ValueError, match=r"2 rows, but the batch has 8.*batch_repeat_interleave"):
        _greedy(model, tokens(2, LENGTH), cache, num_beams=4)
    cache.batch_repeat_interleave(4)
    assert _greedy(model, tokens(2, LENGTH), cache, num_beams=4).shape[0] == 2


# Where a sequence starts, and where it goes on


def test_generating_again_with_the_same_cache_equals_generating_once() -> None:
    model, ids = _model("gemma2"), tokens(2, LENGTH)
    once = _greedy(model, ids, FastStateCache(model.config), 9)
    cache = FastStateCache(model.config)
    first = _greedy(model, ids, cache, 4)
    assert torch.equal(_greedy(model, first, cache, 5), once)


def test_a_copied_cache_continues_without_touching_the_original() -> None:
    model, ids = _model(), tokens(2, LENGTH)
    cache = FastStateCache(model.config)
    _read(model, ids, cache, [LENGTH])
    before = copy.deepcopy(cache.slots)
    expected = _read(model, ids[:, :3], copy.deepcopy(cache), [3])
    torch.testing.assert_close(cache.slots, before, rtol=0, atol=0)
    assert torch.equal(_read(model, ids[:, :3], cache, [3]), expected)


def test_starting_from_committed_slots_equals_the_next_chunk_of_the_stream() -> None:
    model, ids = _model(), tokens(2, 2 * LENGTH)
    state = FastState.transient()
    model(ids[:, :LENGTH], fast_state=state)
    cache = FastStateCache(model.config, slots=state.outgoing)
    actual = _read(model, ids[:, LENGTH:], cache, [2] + [1] * (LENGTH - 2))
    after = state.advance()
    expected = model(ids[:, LENGTH:], fast_state=after).logits
    torch.testing.assert_close(actual, expected, **CLOSE)
    torch.testing.assert_close(cache.slots, after.outgoing, **CLOSE)
    torch.testing.assert_close(FastState(cache.slots).outgoing, cache.slots, rtol=0, atol=0)


@pytest.mark.quick("llama-ttt", "qwen3-lact")
@pytest.mark.parametrize("adapter", ["ttt", "lact"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_generating_from_a_saved_memory_equals_generating_from_the_live_state(
    architecture: str, adapter: str, tmp_path: Path
) -> None:
    model, ids = _model(architecture, adapter).double(), tokens(2, LENGTH)
    streams = StreamState()
    streams.begin_step("predict")
    chunk = {"stream_id": torch.tensor([4]), "chunk_index": torch.zeros(1, dtype=torch.int64)}
    handle = streams.begin({**chunk, "is_first": torch.tensor([True])})
    _ = model(tokens(1, 6, seed=1), fast_state=handle, use_cache=False)  # leaves 2 tokens pending
    streams.commit()
    memory = StreamMemory.of(streams, "predict", 4, model=model)
    saved = StreamMemory.load(memory.save(tmp_path / "book.safetensors"), model)
    live = {s: {n: torch.cat([v, v]) for n, v in f.items()} for s, f in handle.outgoing.items()}
    caches = (FastStateCache(model.config, slots=slots) for slots in (saved.rows(2), live, None))
    options = {"output_logits": True, "return_dict_in_generate": True}
    attached, expected, fresh = (_greedy(model, ids, cache, 8, **options) for cache in caches)
    assert torch.equal(attached.sequences, expected.sequences)
    for mine, theirs in zip(attached.logits, expected.logits, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(attached.logits[0], fresh.logits[0], rtol=1e-3, atol=1e-3)
    beams = (
        FastStateCache(model.config, slots=saved.rows(4)),
        FastStateCache(model.config, slots=live),
    )
    beams[1].batch_repeat_interleave(2)
    assert torch.equal(*(_greedy(model, ids, cache, 8, num_beams=2) for cache in beams))


def test_reset_equals_a_new_cache() -> None:
    model, ids = _model("mistral"), tokens(2, LENGTH)
    cache = FastStateCache(model.config)
    _read(model, tokens(2, LENGTH, seed=1), cache, [LENGTH])
    cache.reset()
    assert cache.slots == {}
    fresh = FastStateCache(model.config)
    assert torch.equal(_read(model, ids, cache, [LENGTH]), _read(model, ids, fresh, [LENGTH]))


def test_fast_state_beside_a_cache_wins_and_leaves_the_state_of_the_cache() -> None:
    model, ids = _model(), tokens(2, LENGTH)
    cache, state = FastStateCache(model.config), FastState.transient()
    model(ids, past_key_values=cache, fast_state=state)
    assert cache.slots == {} and cache.get_seq_length() == LENGTH
    assert list(state.outgoing) == [f"model.layers.{i}.self_attn" for i in range(2)]


def test_reading_without_adapting_leaves_what_was_learned_and_equals_one_pass() -> None:
    model, ids = _model(), tokens(2, LENGTH)
    learned = FastStateCache(model.config)
    _read(model, tokens(2, 6, seed=1), learned, [6])  # two tokens are left pending
    reader = FastStateCache(model.config, slots=learned.slots, adapt=False)
    decoded = _read(model, ids, reader, [2] + [1] * (LENGTH - 2))
    torch.testing.assert_close(reader.slots, learned.slots, rtol=0, atol=0)
    whole = FastState(learned.slots, adapt=False)
    torch.testing.assert_close(decoded, model(ids, fast_state=whole).logits, **CLOSE)


# What cannot be


def test_crop_that_drops_read_tokens_is_an_error_and_crop_of_none_is_not() -> None:
    model = _model()
    cache = FastStateCache(model.config)
    assert cache.is_croppable
    _read(model, tokens(2, LENGTH), cache, [LENGTH])
    cache.crop(0)
    assert not cache.is_croppable
    with pytest.raises(ValueError, match=r"cannot take back 3 tokens: the fast weights have read"):
        cache.crop(-3)
    assert cache.get_seq_length() == LENGTH


def test_prompt_lookup_is_an_error_with_fast_weights_and_works_without() -> None:
    ids = tokens(1, 3).repeat(1, 4)
    options = {"prompt_lookup_num_tokens": 3}
    model = _model()
    with pytest.raises(ValueError, match="Assisted decoding and prompt lookup"):
        _greedy(model, ids, FastStateCache(model.config), 8, **options)
    plain = build_model("llama")
    expected = _greedy(plain, ids, None, 8)
    inject_adapters(plain, [("*", "noop", None)])
    assert torch.equal(_greedy(plain, ids, FastStateCache(plain.config), 8, **options), expected)


def test_something_else_than_a_config_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"FastStateCache\(model.config"):
        FastStateCache(build_model("llama"))
