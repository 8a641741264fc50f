"""`generate()` of LaCT models, against reading everything again and against rows of their own."""

import copy
from typing import Any

import pytest
import torch
from lact_model_cases import CHUNK, UNUSUAL, VARIANTS, lact_model, token_ids
from torch import Tensor
from transformers import DynamicCache

from lightning_modules.generation import FastStateCache
from lightning_modules.models.lact import LaCTForCausalLM
from lightning_modules.streams import FastState

pytestmark = pytest.mark.filterwarnings(UNUSUAL)
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
"""float64 sums in another order, through two layers with up to five updates each."""
LENGTHS = [1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK]
"""T mod C in {0, 1, C - 1}, with and without an update."""


def _generate(model: LaCTForCausalLM, ids: Tensor, new: int = 9, **options: Any) -> Any:
    given = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": new, **options}
    return model.generate(ids, **given)


def _read(model: LaCTForCausalLM, ids: Tensor, cache: Any, sizes: list[int]) -> Tensor:
    parts = ids.split(sizes, dim=1)
    return torch.cat([model(part, past_key_values=cache).logits for part in parts], dim=1)


@pytest.fixture(autouse=True)
def _no_grad() -> Any:
    with torch.no_grad():
        yield


# Decoding is reading


@pytest.mark.quick("default-*", "muon-sizes1", "stack3-sizes3")
@pytest.mark.parametrize("sizes", [[1] * 17, [4, 4, 9], [5, 1, 1, 10], [3, 1, 13], [16, 1]])
@pytest.mark.parametrize("variant", VARIANTS)
def test_decoding_equals_prefill_however_the_tokens_are_split(
    variant: str, sizes: list[int]
) -> None:
    model, ids = lact_model(variant), token_ids(length=17)
    cache, whole = FastStateCache(model.config), FastStateCache(model.config)
    expected = _read(model, ids, whole, [17])
    torch.testing.assert_close(_read(model, ids, cache, sizes), expected, **CLOSE)
    torch.testing.assert_close(cache.slots, whole.slots, **CLOSE)
    assert cache.get_seq_length() == whole.get_seq_length() == 17


@pytest.mark.quick("default-*", "muon-4", "stack3-5")
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_decoding_equals_reading_everything_again(variant: str, length: int) -> None:
    model, ids = lact_model(variant), token_ids(3, length)
    expected = _generate(model, ids, use_cache=False)
    assert torch.equal(_generate(model, ids), expected)
    cache = FastStateCache(model.config)
    assert torch.equal(_generate(model, ids, past_key_values=cache), expected)
    assert cache.get_seq_length() == length + 8  # the last token is not read
    assert len({tuple(row) for row in expected[:, length:].tolist()}) > 1


@pytest.mark.parametrize("lost", ["pending_k", "momentum_w0", "norm_w1", "tokens_seen", "keys"])
def test_wrong_variant_that_loses_a_field_in_decoding_is_not_prefill(lost: str) -> None:
    model, ids = lact_model(), token_ids(length=17)
    expected = model(ids).logits
    cache, logits = FastStateCache(model.config), []
    for token in ids.split(1, dim=1):
        logits.append(model(token, past_key_values=cache).logits)
        slots = cache.slots
        for fields in slots.values():
            if lost in fields:
                fields[lost] = fields[lost] * 0
        cache.fast_state = FastState(slots)
    assert not torch.allclose(torch.cat(logits, dim=1), expected, rtol=1e-3, atol=1e-3)


def test_the_state_has_a_constant_size() -> None:
    model, ids = lact_model(), token_ids(length=40)
    cache, sizes = FastStateCache(model.config), []
    for part in ids.split(1, dim=1):
        model(part, past_key_values=cache)
        numbers = [value.numel() for fields in cache.slots.values() for value in fields.values()]
        sizes.append(sum(numbers))
    assert len(set(sizes)) == 1


def test_chunked_prefill_equals_prefill_at_once() -> None:
    model, ids = lact_model(), token_ids(length=13)
    expected = _generate(model, ids)
    assert torch.equal(_generate(model, ids, prefill_chunk_size=3), expected)


def test_sampling_with_a_cache_equals_sampling_without() -> None:
    model, ids, found = lact_model(), token_ids(length=13), []
    for use_cache in (True, False):
        torch.manual_seed(3)
        options = {"do_sample": True, "num_return_sequences": 3, "use_cache": use_cache}
        found.append(_generate(model, ids, **options))
    assert torch.equal(*found)
    assert len({tuple(row) for row in found[0].tolist()}) > 2


def test_embeddings_as_a_prompt_equal_the_tokens() -> None:
    model, ids = lact_model(), token_ids(length=10)
    embeds = model.model.embeddings(ids)
    new = model.generate(inputs_embeds=embeds, do_sample=False, pad_token_id=0, max_new_tokens=6)
    assert torch.equal(new, _generate(model, ids, 6)[:, 10:])


def test_a_call_makes_a_cache_from_which_the_next_goes_on() -> None:
    model, ids = lact_model(), token_ids(length=13)
    first = model(ids[:, :6])
    second = model(ids[:, 6:], past_key_values=first.past_key_values)
    torch.testing.assert_close(second.logits, model(ids).logits[:, 6:], **CLOSE)
    assert model(ids, use_cache=False).past_key_values is None
    assert model.train()(ids).past_key_values is None


# Beams and rows


@pytest.mark.quick("default-4", "stack2-5")
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("variant", ["default", "low_rank", "stack2"])
def test_beam_search_equals_beam_search_that_reads_everything_again(
    variant: str, length: int
) -> None:
    model, ids = lact_model(variant), token_ids(length=length)
    options = {"num_beams": 4, "output_scores": True, "return_dict_in_generate": True}
    expected = _generate(model, ids, **options, use_cache=False)
    actual = _generate(model, ids, **options)
    assert torch.equal(actual.sequences, expected.sequences)
    torch.testing.assert_close(actual.sequences_scores, expected.sequences_scores, **CLOSE)


class SharedBeams(FastStateCache):
    """Wrong: beams keep the fast state of the row that they happen to be in."""

    def _select(self, rows: Tensor) -> None:
        pass


def test_wrong_variant_state_that_does_not_follow_its_beam_is_found() -> None:
    model, ids = lact_model(), token_ids(6, 13)
    options = {"num_beams": 4, "output_scores": True, "return_dict_in_generate": True}
    scores = [
        _generate(model, ids, past_key_values=cache(model.config), **options).sequences_scores
        for cache in (FastStateCache, SharedBeams)
    ]
    assert not torch.allclose(*scores, rtol=1e-4, atol=1e-4)


def test_reordered_repeated_and_selected_rows_equal_rows_read_like_that() -> None:
    model, ids = lact_model(), token_ids(3, 13)
    operations = {
        "reorder_cache": (torch.tensor([2, 0, 0]), ids[[2, 0, 0]]),
        "batch_repeat_interleave": (2, ids.repeat_interleave(2, dim=0)),
        "batch_select_indices": (torch.tensor([2, 1]), ids[[2, 1]]),
    }
    for name, (argument, rows) in operations.items():
        cache, expected = FastStateCache(model.config), FastStateCache(model.config)
        _read(model, ids, cache, [13])
        getattr(cache, name)(argument)
        _read(model, rows, expected, [13])
        torch.testing.assert_close(cache.slots, expected.slots, **CLOSE)
        following = rows[:, :2]
        actual = _read(model, following, cache, [1, 1])
        torch.testing.assert_close(actual, _read(model, following, expected, [1, 1]), **CLOSE)


@pytest.mark.quick("default")
@pytest.mark.parametrize("variant", ["default", "muon", "stack3"])
def test_rows_of_any_length_padded_on_the_left_equal_each_alone(variant: str) -> None:
    model, prompts = lact_model(variant), [token_ids(1, n, seed=n) for n in (1, 4, 5, 11)]
    width = 11
    ids = torch.cat([torch.nn.functional.pad(p, (width - p.shape[1], 0)) for p in prompts])
    for options in ({}, {"num_beams": 3}, {"use_cache": False}):
        out = _generate(model, ids, attention_mask=(ids != 0).long(), **options)
        for row, prompt in zip(out, prompts, strict=True):
            alone = _generate(model, prompt, **{"use_cache": True, **options})
            assert row[width:].tolist() == alone[0, prompt.shape[1] :].tolist()


def test_fast_state_of_another_number_of_rows_is_an_error() -> None:
    model = lact_model()
    cache = FastStateCache(model.config)
    _read(model, token_ids(), cache, [15])
    with pytest.raises(ValueError, match=r"2 rows, but the batch has 3.*batch_repeat_interleave"):
        model(token_ids(3), past_key_values=cache)


# Where a sequence starts, and where it goes on


@pytest.mark.parametrize("new", [3, 4, 5])
def test_generating_again_with_the_same_cache_equals_generating_once(new: int) -> None:
    model, ids = lact_model(), token_ids(length=13)
    once = _generate(model, ids, 11)
    cache = FastStateCache(model.config)
    first = _generate(model, ids, new, past_key_values=cache)
    assert torch.equal(_generate(model, first, 11 - new, past_key_values=cache), once)


def test_going_on_with_padded_rows_needs_the_mask_of_all_tokens() -> None:
    model, ids = lact_model(), token_ids(length=13)
    mask = torch.ones_like(ids)
    mask[0, :4], ids[0, :4] = 0, 0
    once = _generate(model, ids, 8, attention_mask=mask)
    cache = FastStateCache(model.config)
    first = _generate(model, ids, 4, attention_mask=mask, past_key_values=cache)
    longer = torch.cat([mask, torch.ones(2, 4, dtype=mask.dtype)], dim=1)
    again = _generate(model, first, 4, attention_mask=longer, past_key_values=cache)
    assert torch.equal(again, once)


def test_a_copied_cache_continues_without_touching_the_original() -> None:
    model, ids = lact_model(), token_ids(length=13)
    cache = FastStateCache(model.config)
    _read(model, ids, cache, [13])
    before = copy.deepcopy(cache.slots)
    expected = _read(model, ids[:, :6], copy.deepcopy(cache), [6])
    torch.testing.assert_close(cache.slots, before, rtol=0, atol=0)
    assert torch.equal(_read(model, ids[:, :6], cache, [6]), expected)


def test_starting_from_what_a_stream_learned_equals_its_next_chunk() -> None:
    model, ids = lact_model(), token_ids(length=26)
    state = FastState.transient()
    model(ids[:, :13], fast_state=state)
    cache = FastStateCache(model.config, slots=state.outgoing)
    expected = model(ids).logits[:, 13:]
    torch.testing.assert_close(_read(model, ids[:, 13:], cache, [1] * 13), expected, **CLOSE)
    reader = FastStateCache(model.config, slots=state.outgoing, adapt=False)
    decoded = _read(model, ids[:, 13:], reader, [1] * 13)
    whole = model(ids[:, 13:], fast_state=FastState(state.outgoing, adapt=False)).logits
    torch.testing.assert_close(decoded, whole, **CLOSE)
    assert not torch.allclose(decoded, expected, rtol=1e-3, atol=1e-3)


def test_reset_equals_a_new_cache() -> None:
    model, ids = lact_model(), token_ids(length=13)
    cache = FastStateCache(model.config)
    _read(model, token_ids(length=13, seed=2), cache, [13])
    cache.reset()
    assert cache.slots == {} and cache.get_seq_length() == 0
    assert torch.equal(_read(model, ids, cache, [13]), model(ids).logits)


def test_fast_state_beside_a_cache_wins_and_the_cache_counts() -> None:
    model, ids = lact_model(), token_ids(length=13)
    cache, state = FastStateCache(model.config), FastState.transient()
    model(ids, past_key_values=cache, fast_state=state)
    assert cache.slots == {} and cache.get_seq_length() == 13
    assert len(state.outgoing) == 4


# What cannot be


def test_tokens_cannot_be_taken_back() -> None:
    model, ids = lact_model(), token_ids(1)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful"):
        _generate(model, ids, prompt_lookup_num_tokens=3)
    cache = FastStateCache(model.config)
    _read(model, ids, cache, [15])
    assert not cache.is_croppable
    with pytest.raises(ValueError, match="cannot take back 3 tokens"):
        cache.crop(-3)


def test_caches_without_fast_state_are_refused() -> None:
    model, ids = lact_model(), token_ids()
    with pytest.raises(ValueError, match=r"DynamicCache, which has no place for fast weights"):
        _generate(model, ids, past_key_values=DynamicCache(config=model.config))
    with pytest.raises(ValueError, match="cache_implementation='static' has no place"):
        _generate(model, ids, cache_implementation="static")
