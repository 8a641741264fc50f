"""TTT-LoRA and In-Place TTT in decoders, against one pass, single rows and separate runs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from architecture_cases import VOCABULARY
from torch import Tensor
from torch.nn.functional import cross_entropy, layer_norm, normalize
from transformers import DynamicCache
from ttt_lora_tuner_cases import (
    CAUSAL,
    EXACT,
    LENGTH,
    MINI_BATCH,
    adapted,
    add_ttt_lora,
    decode,
    logits,
    own_parameters,
    peft_model,
    plain_model,
    read_chunks,
    shake,
    text,
)

import lightning_modules.layers.in_place_mlp as in_place_layer
import lightning_modules.layers.ttt_lora as ttt_lora_layer
from lightning_modules.generation import FastStateCache
from lightning_modules.layers.rope import document_positions
from lightning_modules.streams import FastState, reset_rows

SPLITS = [[1] * LENGTH, [4, 4, 5], [3, 1, 1, 8]]
every_method = pytest.mark.parametrize("method", CAUSAL)


# Time


def changed_before(model: torch.nn.Module, place: int) -> float:
    """How much logits before `place` change when the token there does."""
    ids = text()
    other = ids.clone()
    other[:, place] = (other[:, place] + 1) % VOCABULARY
    difference = (logits(model, ids) - logits(model, other)).abs()
    assert difference[:, place].max() > 1e-4
    return difference[:, :place].max().item()


@pytest.mark.quick("A_ln", "in_place", "together")
@every_method
def test_logits_before_a_changed_token_stay_bit_identical(method: str) -> None:
    model = adapted(method, dtype=torch.float32)
    assert max(changed_before(model, t) for t in (1, MINI_BATCH, 6, LENGTH - 1)) == 0


def _read_updated_ttt_lora(
    projected: Tensor, eta: Tensor, base: Tensor, **options: Any
) -> tuple[Tensor, Any]:
    """Wrong: outputs from the weights that the same tokens have already changed."""
    _, after = ttt_lora_op(projected, eta, base, **options)
    group, _, d = base.shape
    q = projected[..., : 3 * group * d].unflatten(-1, (3, group, d))[:, :, 1]
    w, b = base[:, :-1] + after.dw, base[:, -1] + after.db
    o = torch.einsum("btgd,bgde->btge", normalize(q, dim=-1), w) + b.unsqueeze(1)
    return layer_norm(o, (d,)), after


def _read_updated_in_place(z: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Any]:
    """Wrong, likewise."""
    _, after = in_place_op(z, *args, **options)
    return z @ (args[1] + after.dw).mT, after


ttt_lora_op, in_place_op = ttt_lora_layer.ttt_lora_cell, in_place_layer.in_place


@every_method
def test_wrong_variant_that_reads_updated_weights_is_found(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ttt_lora_layer, "ttt_lora_cell", _read_updated_ttt_lora)
    monkeypatch.setattr(in_place_layer, "in_place", _read_updated_in_place)
    # The state that is read too early is closed by token 11 (mini-batches of 4).
    assert changed_before(adapted(method, dtype=torch.float32), 11) > 1e-4


@pytest.mark.quick("A_plain-*", "B_ln-*8]", "in_place-*8]", "together-*5]")
@pytest.mark.parametrize("sizes", SPLITS, ids=str)
@every_method
def test_any_split_equals_one_pass_in_logits_and_states(method: str, sizes: list[int]) -> None:
    model, ids = adapted(method), text()
    expected, whole = decode(model, ids, [LENGTH])
    actual, cache = decode(model, ids, sizes)
    torch.testing.assert_close(actual, expected, **EXACT)
    torch.testing.assert_close(cache.slots, whole.slots, **EXACT)
    torch.testing.assert_close(expected, logits(model, ids), **EXACT)


def test_wrong_variant_that_forgets_between_calls_is_not_one_pass() -> None:
    model, ids = adapted("A_plain"), text()
    expected, _ = decode(model, ids, [LENGTH])
    cache, parts = FastStateCache(model.config), []
    for part in ids.split([4, 9], dim=1):
        parts.append(decode(model, part, [part.shape[1]], cache)[0])
        cache.fast_state = FastState()
    assert (torch.cat(parts, dim=1) - expected)[:, 4:].abs().max() > 1e-3


@pytest.mark.quick("A_ln", "in_place", "together")
@every_method
def test_reading_without_adapting_equals_one_pass_and_keeps_what_was_learned(method: str) -> None:
    model, ids = adapted(method), text()
    _, learned = decode(model, text(seed=3, length=6), [6])
    given = {"slots": learned.slots, "adapt": False}
    expected, _ = decode(model, ids, [LENGTH], **given)
    actual, cache = decode(model, ids, [1, 5, 1, 6], **given)
    torch.testing.assert_close(actual, expected, **EXACT)
    torch.testing.assert_close(cache.slots, learned.slots, rtol=0, atol=0)
    adapting, _ = decode(model, ids, [LENGTH], slots=learned.slots)
    assert (adapting - expected).abs().max() > 1e-4


# Rows, padding, documents


@pytest.mark.quick("A_ln", "together")
@every_method
def test_a_row_alone_equals_the_row_in_a_batch(method: str) -> None:
    model, ids = adapted(method), text(3)
    together, state = read_chunks(model, ids, [6, 7])
    for row in range(3):
        alone, own = read_chunks(model, ids[row : row + 1], [6, 7])
        torch.testing.assert_close(alone[0], together[row], **EXACT)
        for slot, fields in own.outgoing.items():
            for name, value in fields.items():
                torch.testing.assert_close(value[0], state.outgoing[slot][name][row], **EXACT)


@every_method
def test_left_padding_equals_none(method: str) -> None:
    model, ids = adapted(method), text()
    padding = torch.zeros(2, 3, dtype=torch.long)
    mask = torch.cat([padding, torch.ones_like(ids)], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = torch.cat([padding, ids], dim=1)
    actual = logits(model, padded, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(actual[:, 3:], logits(model, ids), **EXACT)


@every_method
def test_packed_documents_equal_separate_runs(method: str) -> None:
    model, ids, lengths = adapted(method), text(), [5, 2, 6]
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)).expand(2, -1)
    positions = document_positions(ids, document_ids=documents)
    packed = logits(model, ids, document_ids=documents, position_ids=positions)
    separate = torch.cat([logits(model, part) for part in ids.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, separate, **EXACT)
    leaking = logits(model, ids, position_ids=positions)  # attention cut, fast weights not
    assert (leaking - separate)[:, 5:].abs().max() > 1e-4


@every_method
def test_a_reset_row_equals_a_fresh_one_and_the_other_goes_on(method: str) -> None:
    model, ids = adapted(method), text()
    _, state = read_chunks(model, text(seed=4), [LENGTH])
    slots = reset_rows(state.outgoing, torch.tensor([True, False]))
    actual = logits(model, ids, fast_state=FastState(slots))
    torch.testing.assert_close(actual[0], logits(model, ids)[0], **EXACT)
    expected = logits(model, ids, fast_state=state.advance())
    torch.testing.assert_close(actual[1], expected[1], **EXACT)
    assert (actual - logits(model, ids))[1].abs().max() > 1e-4


@every_method
def test_forward_mutates_no_parameter_or_buffer_and_modes_agree(method: str) -> None:
    model, ids = adapted(method), text()
    before = copy.deepcopy({**dict(model.named_parameters()), **dict(model.named_buffers())})
    expected = logits(model, ids)
    assert torch.equal(logits(model.train(), ids), expected)
    now = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert now.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in now.items())


def test_layers_without_adapters_are_given_state_and_masks_and_take_no_notice() -> None:
    model, ids = plain_model(dtype=torch.float64), text()
    add_ttt_lora(model, layers_to_transform=[1])
    shake(model)
    expected, whole = decode(model, ids, [LENGTH])
    torch.testing.assert_close(decode(model, ids, [6, 7])[0], expected, **EXACT)
    assert len(whole.slots) == 4 and all(".layers.1." in slot for slot in whole.slots)


# Learning


@pytest.mark.parametrize("size", [4, 8, 16])
@pytest.mark.parametrize("loss", ["plain", "ln"])
def test_inner_loss_falls_on_repeated_data(loss: str, size: int) -> None:
    model = plain_model()
    add_ttt_lora(model, f"A_{loss}", mini_batch_size=size, inner_dim=8)
    ids, state, seen = text(2, 16).repeat(1, 2), FastState(listening=["inner_loss"]), []
    for index in range(4):
        state = state.advance() if index else state
        logits(model, ids, fast_state=state)
        seen.append(state.published["inner_loss"])
    before = torch.stack([values["before"].sum(1) for values in seen[0].values()])
    first, last = (torch.stack([v["after"].sum(1) for v in s.values()]) for s in seen[::3])
    if loss == "plain":  # a step below 1 on unit keys cannot overshoot
        assert (first < before).all() and (last < 0.95 * before).all()
    # Behind a norm it can, as small weights have large gradients there: not in every layer.
    assert last.mean() < 0.95 * before.mean()
    assert (last < before).float().mean() > 0.8


def step_gradients(method: str, chunks: int, recompute: bool) -> dict[str, Tensor]:
    """Loss and gradients of all parameters over chunks whose handles advance in one backward."""
    model, ids = adapted(method).train(), text(2, 18)
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    out, _ = read_chunks(model, ids, [18 // chunks] * chunks)
    loss = cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


@pytest.mark.quick("A_ln-2", "in_place-1", "together-3")
@pytest.mark.parametrize("chunks", [1, 2, 3])
@every_method
def test_recomputed_layers_have_the_same_loss_and_gradients_bit_for_bit(
    method: str, chunks: int
) -> None:
    plain, again = (step_gradients(method, chunks, recompute) for recompute in (False, True))
    assert plain.keys() == again.keys() and len(plain) > 20
    assert not [name for name, value in plain.items() if not torch.equal(value, again[name])]


@every_method
def test_every_parameter_of_the_method_learns_from_two_mini_batches(method: str) -> None:
    model, ids = adapted(method), text(2, 2 * MINI_BATCH)
    cross_entropy(model(ids, use_cache=False).logits.flatten(0, 1), ids.flatten()).backward()
    own = own_parameters(model)
    still = {name for name, p in own.items() if p.grad is None or not p.grad.abs().max() > 0}
    assert own and not still


def test_with_too_few_tokens_nothing_that_writes_learns_in_mode_a() -> None:
    model, ids = adapted("A_plain"), text(2, MINI_BATCH)
    cross_entropy(model(ids, use_cache=False).logits.flatten(0, 1), ids.flatten()).backward()
    own = own_parameters(model).items()
    still = {n.split("default.")[1] for n, p in own if p.grad is None or not p.grad.any()}
    assert still == {"theta_k.weight", "theta_v.weight", "lr_gate"}


@pytest.mark.quick("B_ln", "together")
@every_method
def test_autocast_in_bfloat16_has_finite_gradients_and_float32_states(method: str) -> None:
    model, ids = adapted(method, dtype=torch.float32).train(), text()
    with torch.autocast("cpu", torch.bfloat16):
        out, state = read_chunks(model, ids, [6, 7])
        loss = cross_entropy(out.flatten(0, 1).float(), ids.flatten())
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    own = own_parameters(model)
    assert all(p.grad is not None for p in own.values())
    values = [v for fields in state.outgoing.values() for v in fields.values()]
    assert {v.dtype for v in values if v.is_floating_point()} == {torch.float32}
    # bfloat16 has 8 bits of mantissa: a few hundredths of logits around 1.
    assert (logits(model, ids) - read_chunks(model, ids, [LENGTH])[0]).abs().max() == 0
    assert (out - read_chunks(model, ids, [6, 7])[0]).abs().max() < 0.2


# Generation


def generate(model: torch.nn.Module, ids: Tensor, cache: Any, **options: Any) -> Tensor:
    given = {} if cache is None else {"past_key_values": cache}
    given |= {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    return model.generate(input_ids=ids, **{**given, **options})


@pytest.mark.quick("A_ln-3", "in_place-1", "together-3")
@pytest.mark.parametrize("beams", [1, 3])
@every_method
def test_decoding_equals_recomputation(method: str, beams: int) -> None:
    model, ids = adapted(method, dtype=torch.float32), text()
    expected = generate(model, ids, None, num_beams=beams, use_cache=False)
    actual = generate(model, ids, FastStateCache(model.config), num_beams=beams)
    assert torch.equal(actual, expected)


class SharedBeams(FastStateCache):
    """Wrong: beams keep the fast state of the row that they happen to be in."""

    def _select(self, rows: Tensor) -> None:
        pass


def test_beams_take_their_state_along_and_a_wrong_variant_is_found() -> None:
    model, ids = adapted("A_plain", dtype=torch.float32), text(6)
    options = {"num_beams": 4, "output_scores": True, "return_dict_in_generate": True}
    options["max_new_tokens"] = 10
    caches = [FastStateCache(model.config), SharedBeams(model.config)]
    right, wrong = (generate(model, ids, c, **options).sequences_scores for c in caches)
    expected = generate(model, ids, None, use_cache=False, **options).sequences_scores
    torch.testing.assert_close(right, expected, rtol=1e-4, atol=1e-5)  # float32 sums
    assert not torch.allclose(wrong, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.quick("A_plain", "together")
@every_method
def test_left_padded_prompts_generate_what_they_do_alone(method: str) -> None:
    model, ids = adapted(method, dtype=torch.float32), text()
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[0, :5], mask[0, :5] = 0, 0
    together = generate(model, padded, FastStateCache(model.config), attention_mask=mask)
    alone = generate(model, ids[:1, 5:], FastStateCache(model.config))
    assert torch.equal(together[0, 5:], alone[0])


@every_method
def test_a_plain_cache_is_refused(method: str) -> None:
    model, ids = adapted(method, dtype=torch.float32), text()
    with pytest.raises(ValueError, match=r"holds 13 tokens that the fast weights.*FastStateCache"):
        generate(model, ids, None)


def test_a_plain_cache_is_refused_but_not_with_the_adapter_disabled() -> None:
    model, ids = peft_model(), text()
    with pytest.raises(ValueError, match=r"holds 13 tokens .*layers.0.*FastStateCache"):
        generate(model, ids, DynamicCache(config=model.config))
    expected = generate(plain_model(), ids, None)
    with model.disable_adapter():
        assert torch.equal(generate(model, ids, None), expected)
    adapting = generate(model, ids, FastStateCache(model.config))
    assert not torch.equal(adapting, expected)
