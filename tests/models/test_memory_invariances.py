"""What a memory must not do: read the future, other rows, padding, other documents."""

import copy
from typing import Any

import pytest
import torch
from architecture_cases import build_model, tokens
from memory_cases import BLOCK, CAUSAL, add_memory, logits, memory_model, memory_options
from torch import Tensor

from lightning_modules.generation import FastStateCache
from lightning_modules.layers.rope import document_positions
from lightning_modules.models.memory_files import quantize_memory
from lightning_modules.streams import FastState

EXACT = {"rtol": 0, "atol": 1e-10}
"""float64 sums in another order."""
LENGTH = 14
EVERY = [*CAUSAL, "unrouted", "shared", "mixture", "quantized"]


def make(kind: str, **changes: Any) -> torch.nn.Module:
    routers = {
        "shared": {"shared": 1},
        "mixture": {"shared": 2, "mixing": "mixture", "shared_mode": "per_chapter"},
    }
    strategies = {"unrouted": None, "shared": "block", "mixture": "token", "quantized": "block"}
    strategy = strategies.get(kind, kind)
    model = memory_model(strategy, router=routers.get(kind, {}), **changes)
    if kind == "quantized":
        quantize_memory(model, 8)
    return model


def changed_before(model: torch.nn.Module, place: int) -> float:
    """How much logits before `place` change when the token there does."""
    ids = tokens(2, LENGTH)
    other = ids.clone()
    other[:, place] = (other[:, place] + 1) % 40
    difference = (logits(model, ids) - logits(model, other)).abs()
    assert difference[:, place].max() > 1e-4
    return difference[:, :place].max().item()


@pytest.mark.quick("B-*", "A-rolling")
@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("variant", ["A", "B"])
def test_no_logit_depends_on_a_later_token(kind: str, variant: str) -> None:
    model = make(kind, memory={"variant": variant})
    assert max(changed_before(model, place) for place in (3, BLOCK, 9, LENGTH - 1)) == 0


def test_routing_by_the_whole_sequence_reads_the_future() -> None:
    assert changed_before(memory_model("sequence"), LENGTH - 1) > 1e-3


@pytest.mark.parametrize("kind", [*EVERY, "sequence"])
def test_rows_do_not_influence_each_other(kind: str) -> None:
    model, ids = make(kind), tokens(3, LENGTH)
    alone = torch.cat([logits(model, row[None]) for row in ids])
    torch.testing.assert_close(logits(model, ids), alone, **EXACT)


def decode(model: torch.nn.Module, ids: Tensor, calls: list[int], **context: Any) -> Tensor:
    """Logits of one sequence given in several calls with a cache."""
    cache, parts = FastStateCache(model.config), []
    with torch.no_grad():
        for piece in ids.split(calls, dim=1):
            options = {"past_key_values": cache, "use_cache": True, **context}
            parts.append(model(input_ids=piece, **options).logits)
    return torch.cat(parts, dim=1)


@pytest.mark.quick("*-calls1", "rolling-*", "mixture-calls3")
@pytest.mark.parametrize("calls", [[1] * LENGTH, [5, 1, 1, 7], [BLOCK, BLOCK, 6], [9, 5]])
@pytest.mark.parametrize("kind", [k for k in EVERY if k != "prompt"])
def test_decoding_equals_one_pass(kind: str, calls: list[int]) -> None:
    model, ids = make(kind), tokens(2, LENGTH)
    torch.testing.assert_close(decode(model, ids, calls), logits(model, ids), **EXACT)


def test_an_answer_is_decoded_as_it_was_trained() -> None:
    model, ids = make("prompt"), tokens(2, LENGTH)
    prompt = (torch.arange(LENGTH) < 6).expand(2, -1)
    expected = logits(model, ids, prompt_mask=prompt)
    torch.testing.assert_close(decode(model, ids, [6, *[1] * 8]), expected, **EXACT)
    everything = logits(model, ids, prompt_mask=torch.ones_like(prompt))
    assert (expected - everything)[:, 6:].abs().max() > 1e-3


@pytest.mark.parametrize("kind", [k for k in EVERY if k != "quantized"])
def test_keys_of_the_bank_are_computed_once_per_cache(kind: str) -> None:
    model, ids = make(kind), tokens(2, 6)
    calls: list[str] = []
    for layer in model.model.layers:
        layer.memory.reader.attention.key.register_forward_hook(lambda *_: calls.append("key"))
    decode(model, ids, [3, 1, 1, 1])
    assert len(calls) == 2  # once in each of two layers


@pytest.mark.parametrize("kind", [k for k in EVERY if k != "prompt"])
def test_left_padding_changes_nothing(kind: str) -> None:
    model, ids = make(kind), tokens(2, LENGTH)
    padding = torch.zeros(2, 3, dtype=torch.long)
    mask = torch.cat([padding, torch.ones_like(ids)], dim=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    padded = logits(
        model, torch.cat([padding, ids], dim=1), attention_mask=mask, position_ids=positions
    )
    torch.testing.assert_close(padded[:, 3:], logits(model, ids), **EXACT)


@pytest.mark.parametrize("lengths", [[8, 8, 4], [5, 9, 6]], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("kind", [k for k in EVERY if k not in ("prompt", "shared", "quantized")])
def test_packed_documents_equal_separate_ones(kind: str, lengths: list[int]) -> None:
    model, ids = make(kind), tokens(2, sum(lengths))
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)).expand(2, -1)
    aligned = {"document_alignment": BLOCK} if lengths[0] == 8 else {}
    packed = logits(
        model,
        ids,
        document_ids=documents,
        position_ids=document_positions(ids, document_ids=documents),
        **aligned,
    )
    # The grid of blocks goes on through the row: a document alone starts where it stands in it.
    starts = [0, lengths[0], lengths[0] + lengths[1]]
    parts = zip(ids.split(lengths, dim=1), starts, strict=True)
    if lengths[0] == 8 or kind != "block":
        separate = torch.cat([logits(model, part) for part, _ in parts], dim=1)
        torch.testing.assert_close(packed, separate, **EXACT)
    else:
        other = ids.clone()
        other[:, : lengths[0]] = (other[:, : lengths[0]] + 3) % 40
        again = logits(
            model,
            other,
            document_ids=documents,
            position_ids=document_positions(ids, document_ids=documents),
        )
        assert torch.equal(packed[:, lengths[0] :], again[:, lengths[0] :])


@pytest.mark.parametrize("kind", ["block", "rolling"])
@pytest.mark.parametrize("split", [3, BLOCK, 9])
def test_a_router_goes_on_through_the_chunks_of_a_file(kind: str, split: int) -> None:
    model, ids = make(kind), tokens(2, LENGTH)
    chosen: list[Tensor] = []
    for layer in model.model.layers[:1]:
        layer.memory.reader.router.register_forward_hook(
            lambda m, a, out: chosen.append(out.chapters.repeat_interleave(out.block_size, dim=1))
        )
    # Attention of a plain model starts afresh in every chunk: it is silent here.
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data.zero_()
    logits(model, ids)
    state = FastState()
    for piece in ids.split([split, LENGTH - split], dim=1):
        logits(model, piece, fast_state=state)
        state = state.advance()
    places = (LENGTH, split, LENGTH - split)
    whole, first, second = (c[:, :n] for c, n in zip(chosen, places, strict=True))
    assert torch.equal(torch.cat([first, second], dim=1), whole)


@pytest.mark.parametrize("kind", ["block", "rolling", "prompt"])
def test_a_cache_without_state_is_refused_instead_of_routing_on_one_token(kind: str) -> None:
    model = make(kind)
    with pytest.raises(ValueError, match="router of model.layers.0.memory would not know"):
        model.generate(tokens(1, 5), max_new_tokens=3, do_sample=False)


@pytest.mark.parametrize("kind", EVERY)
def test_generate_continues_as_full_passes_do(kind: str) -> None:
    model, ids = make(kind), tokens(2, 6)
    out = model.generate(
        ids, past_key_values=FastStateCache(model.config), max_new_tokens=5, do_sample=False
    )
    expected = ids
    prompt = torch.arange(11) < 6
    for length in range(6, 11):
        mask = {"prompt_mask": prompt[:length].expand(2, -1)} if kind == "prompt" else {}
        expected = torch.cat([expected, logits(model, expected, **mask)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(out, expected)
    beams = model.generate(
        ids, past_key_values=FastStateCache(model.config), max_new_tokens=4, num_beams=3
    )
    assert beams.shape == (2, 10)


@pytest.mark.parametrize("kind", ["token", "block", "mixture"])
def test_recomputed_layers_give_the_same_gradients_over_two_chunks(kind: str) -> None:
    ids = tokens(2, 2 * BLOCK + 3)
    found = []
    for recompute in (False, True):
        model = make(kind).train()
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        state, losses = FastState(), []
        for piece in ids.split([6, 5], dim=1):
            out = model(input_ids=piece, use_cache=False, fast_state=state)
            auxiliary = [value for losses in state.losses.values() for value in losses.values()]
            losses.append(out.logits.square().mean() + sum(auxiliary))
            state = state.advance()
        sum(losses).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert (gradient is None) == (found[1][name] is None)
        assert gradient is None or torch.equal(gradient, found[1][name]), name


def test_a_forward_pass_changes_no_parameter_and_modes_agree() -> None:
    model, ids = make("block"), tokens(2, LENGTH)
    before = copy.deepcopy(model.state_dict())
    evaluated = logits(model.eval(), ids)
    assert torch.equal(logits(model.train(), ids), evaluated)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_dropout_acts_in_training_only() -> None:
    options = memory_options(attention={"dropout": 0.5})
    model, ids = add_memory(build_model("llama"), options), tokens(2, LENGTH)
    assert torch.equal(logits(model.eval(), ids), logits(model.eval(), ids))
    assert not torch.equal(logits(model.train(), ids), logits(model.train(), ids))
