"""What every combination of adapters keeps: the invariances of the design, also when nested."""

import copy

import pytest
import torch
from adapter_cases import (
    KINDS,
    MODELS,
    SLOTS,
    TOKENS,
    inputs,
    make_adapter,
    open_gates,
    own_parameters,
    plan,
    tiny_model,
)
from gemma_cases import randomise
from torch import Tensor

from lightning_modules.adapters import base_state_dict, inject_adapters, remove_adapters
from lightning_modules.streams import FastState

EXACT = {"rtol": 1e-10, "atol": 1e-12}  # float64; sums are taken in another order


@pytest.mark.quick("*-True-gemma", "nested-False-qwen3")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_zero_deltas_equal_the_base_model_bit_for_bit(name: str, train: bool, kind: str) -> None:
    model = tiny_model(name).train(train)
    expected = model(TOKENS).logits
    inject_adapters(model, plan(kind))
    assert torch.equal(model(TOKENS).logits, expected)
    assert torch.equal(model(TOKENS, fast_state=FastState.transient()).logits, expected)
    assert not torch.allclose(open_gates(model)(TOKENS).logits, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_causality_outputs_before_a_changed_token_keep_every_bit(kind: str) -> None:
    adapter, (attn_output, hidden_states) = make_adapter(kind), inputs()
    expected = adapter.adapt(attn_output, hidden_states)
    for t in (1, 4, 6, 10):
        changed = [x.clone() for x in (attn_output, hidden_states)]
        for x in changed:
            x[:, t] += 1.0
        out = adapter.adapt(*changed)
        assert torch.equal(out[:, :t], expected[:, :t]), t
        assert not torch.allclose(out[:, t], expected[:, t])


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_alone_equals_the_row_in_a_batch(kind: str) -> None:
    adapter, (attn_output, hidden_states) = make_adapter(kind), inputs(batch=3)
    whole = FastState.transient()
    expected = adapter.adapt(attn_output, hidden_states, fast_state=whole)
    for row in range(3):
        one, alone = slice(row, row + 1), FastState.transient()
        out = adapter.adapt(attn_output[one], hidden_states[one], fast_state=alone)
        torch.testing.assert_close(out, expected[one], **EXACT)
        for slot, fields in whole.outgoing.items():
            for name, value in fields.items():
                torch.testing.assert_close(alone.outgoing[slot][name], value[one], **EXACT)


@pytest.mark.quick("*-cuts1", "nested-*")
@pytest.mark.parametrize("cuts", [(1,), (5,), (4, 8), (3, 4, 9), (10,)])
@pytest.mark.parametrize("kind", KINDS)
def test_streaming_split_anywhere_equals_one_pass(kind: str, cuts: tuple[int, ...]) -> None:
    adapter, (attn_output, hidden_states) = make_adapter(kind), inputs()
    handle = FastState.transient()
    expected = adapter.adapt(attn_output, hidden_states, fast_state=handle)
    assert list(handle.outgoing) == [f"layer/{name}" for name in SLOTS[kind]]
    final, parts, handle = handle.outgoing, [], FastState.transient()
    for start, end in zip((0, *cuts), (*cuts, 11), strict=True):
        piece = attn_output[:, start:end], hidden_states[:, start:end]
        parts.append(adapter.adapt(*piece, fast_state=handle))
        handle = handle.advance()
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, **EXACT)
    assert handle.outgoing.keys() == final.keys()
    for slot, fields in final.items():
        for name, value in fields.items():
            torch.testing.assert_close(handle.outgoing[slot][name], value, **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_packing_equal_separate_runs(kind: str) -> None:
    adapter = make_adapter(kind)
    (first, first_in), (second, second_in) = inputs(1, 5), inputs(1, 6, seed=2)
    alone = [adapter.adapt(first, first_in), adapter.adapt(second, second_in)]
    pad = torch.full_like(first[:, :2], 7.0)
    padded = [torch.cat([pad, x, pad], dim=1) for x in (first, first_in)]
    mask = torch.tensor([[False] * 2 + [True] * 5 + [False] * 2])
    out = adapter.adapt(*padded, mask=mask)
    torch.testing.assert_close(out[:, 2:7], alone[0], **EXACT)
    documents = torch.tensor([[0] * 5 + [1] * 6])
    packed = torch.cat([first, second], dim=1), torch.cat([first_in, second_in], dim=1)
    out = adapter.adapt(*packed, document_ids=documents)
    torch.testing.assert_close(out, torch.cat(alone, dim=1), **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_a_reset_row_equals_a_fresh_one(kind: str) -> None:
    adapter, handle = make_adapter(kind), FastState.transient()
    adapter.adapt(*inputs(seed=3), fast_state=handle)
    zeros = {
        slot: {name: torch.zeros_like(value) for name, value in fields.items()}
        for slot, fields in handle.outgoing.items()
    }
    out = adapter.adapt(*inputs(), fast_state=FastState(zeros))
    torch.testing.assert_close(out, adapter.adapt(*inputs()), **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_every_trainable_part_gets_a_gradient_and_forward_changes_none(kind: str) -> None:
    adapter = make_adapter(kind).train()
    before = {name: value.clone() for name, value in adapter.state_dict().items()}
    handle = FastState.transient()
    loss = torch.zeros((), dtype=torch.float64)
    for seed in range(2):
        loss = loss + adapter.adapt(*inputs(length=12, seed=seed), fast_state=handle).square().sum()
        handle = handle.advance()
    loss.backward()
    assert all(torch.equal(value, before[name]) for name, value in adapter.state_dict().items())
    parameters = own_parameters(adapter)
    inactive = {
        "switch": ("members.fast.", "members.low."),
        "nested": ("members.mix.members.either.members.other.",),
    }
    for name, parameter in parameters.items():
        if name.startswith(inactive.get(kind, ("-",))):
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def _two_chunks(kind: str, checkpointing: bool) -> tuple[dict[str, Tensor], list[dict]]:
    """Gradients of two chunks of a stream, router losses included, and those losses."""
    model = tiny_model()
    inject_adapters(model, plan(kind))
    open_gates(model).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    calls: list[int] = []
    model.model.layers[1].self_attn.register_forward_hook(lambda *_: calls.append(1))
    handle, handles, losses, total = FastState.transient(), [], [], torch.zeros(())
    for tokens in (TOKENS, TOKENS.flip(1)):
        total = total + model(tokens, fast_state=handle, use_cache=False).logits.square().mean()
        losses.append({slot: dict(values) for slot, values in handle.losses.items()})
        handles.append(handle)
        total = total + sum(loss for values in losses[-1].values() for loss in values.values())
        handle = handle.advance()
    total.backward()
    assert len(calls) == (4 if checkpointing else 2)
    assert [h.losses for h in handles] == losses  # the recomputation left the same values
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, losses


@pytest.mark.quick("parallel")
@pytest.mark.parametrize("kind", ["parallel", "top_1", "nested"])
def test_checkpointing_changes_no_bit_of_the_gradients_over_two_chunks(kind: str) -> None:
    expected, losses = _two_chunks(kind, checkpointing=False)
    actual, again = _two_chunks(kind, checkpointing=True)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    counts = {"parallel": 0, "top_1": 2, "nested": 3}
    for chunk, same in zip(losses, again, strict=True):
        assert sum(map(len, chunk.values())) == 3 * counts[kind]  # three layers
        assert chunk.keys() == same.keys()
        for slot, values in chunk.items():
            assert all(torch.equal(values[name], same[slot][name]) for name in values)


@pytest.mark.quick("series", "routed")
@pytest.mark.parametrize("kind", KINDS)
def test_base_checkpoints_load_into_combined_adapters_and_back(kind: str) -> None:
    model, other = tiny_model(), randomise(tiny_model(), seed=1)
    inject_adapters(model, plan(kind))
    missing, unexpected = model.load_state_dict(other.state_dict(), strict=False)
    assert not unexpected
    assert set(missing) == set(own_parameters(model))
    assert torch.equal(model(TOKENS).logits, other(TOKENS).logits)
    plain = tiny_model()
    plain.load_state_dict(base_state_dict(open_gates(model)), strict=True)
    assert torch.equal(plain(TOKENS).logits, other(TOKENS).logits)
    again = tiny_model()
    inject_adapters(again, plan(kind))
    again.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_remove_restores_the_original_modules_object_identically(kind: str) -> None:
    model = tiny_model()
    before = dict(model.named_modules())
    inject_adapters(model, plan(kind))
    remove_adapters(model)
    after = dict(model.named_modules())
    assert list(after) == list(before) and all(after[path] is before[path] for path in before)


@pytest.mark.quick("parallel", "top_1")
@pytest.mark.parametrize("kind", KINDS)
def test_copies_compute_the_same_and_share_nothing(kind: str) -> None:
    model = tiny_model()
    inject_adapters(model, plan(kind))
    twin = copy.deepcopy(open_gates(model))
    handles = FastState.transient(), FastState.transient()
    outs = [m(TOKENS, fast_state=h).logits for m, h in zip((model, twin), handles, strict=True)]
    assert torch.equal(*outs) and handles[0].outgoing.keys() == handles[1].outgoing.keys()
    randomise(twin, seed=5)
    assert torch.equal(model(TOKENS).logits, outs[0])
    assert not torch.allclose(twin(TOKENS).logits, outs[0])


@pytest.mark.quick("lora", "parallel", "top_1")
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_autocast_is_close_and_keeps_float32_state(kind: str) -> None:
    model = tiny_model()
    inject_adapters(model, plan(kind))
    open_gates(model)
    expected, handle = model(TOKENS).logits, FastState.transient()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(TOKENS, fast_state=handle).logits
    assert (out.float() - expected).abs().max() < 0.1 * expected.abs().max()
    states = [fields["dw"] for fields in handle.outgoing.values() if "dw" in fields]
    assert all(state.dtype == torch.float32 for state in states)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiles_without_graph_breaks_with_state_losses_and_statistics(kind: str) -> None:
    adapter, chunks = make_adapter(kind).train(), [inputs(seed=seed) for seed in (1, 2)]

    def two_chunks(handle: FastState) -> tuple[Tensor, Tensor, FastState]:
        first = adapter.adapt(*chunks[0], fast_state=handle)
        second = handle.advance()
        return first, adapter.adapt(*chunks[1], fast_state=second), second

    compiled = torch.compile(two_chunks, backend="eager", fullgraph=True)
    expected, actual = (f(FastState.transient({"router"})) for f in (two_chunks, compiled))
    assert all(map(torch.equal, actual[:2], expected[:2]))
    assert actual[2].outgoing.keys() == expected[2].outgoing.keys()
    assert actual[2].losses == expected[2].losses
    assert actual[2].published.keys() == expected[2].published.keys()
