"""TTTAttentionAdapter: what each mode and gate computes, and the known mistakes of
spec/action_expert.md, a test each."""

from typing import Any

import pytest
import torch
from gemma_cases import decoder_layer, gemma_config, randomise, rotary
from torch import Tensor

from lightning_modules.adapters import TTTAttentionAdapter, create_attention_adapter
from lightning_modules.layers.decoder import AdaptiveDecoderLayer
from lightning_modules.streams import FastState

BATCH, LENGTH, HIDDEN, COND = 2, 5, 32, 4
MODES = ["after_attn", "after_residual", "parallel_attn", "replace_attn"]
GATES = ["none", "tanh", "adarms", "adarms_tanh"]
NORMS = ["adarms", "rms", "none"]
BESIDE = [mode for mode in MODES if mode != "replace_attn"]


def _adapted(seed: int = 0, cond_size: int | None = COND, **options: Any) -> AdaptiveDecoderLayer:
    """A decoder layer whose attention carries a TTT adapter; all parameters are random."""
    layer = decoder_layer(cond_size, seed=seed)
    config = {"cond_size": COND, "layer": {"num_heads": 2}, **options}
    adapter = create_attention_adapter(layer.self_attn, "ttt", config)
    for module in (adapter.ttt_input_norm, adapter.ttt, adapter.ttt_gate):
        if module is not None:
            randomise(module, seed)
    adapter.slot, layer.self_attn = "layer", adapter
    return layer


def _call(seed: int = 0, **options: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(BATCH, LENGTH, HIDDEN, generator=generator),
        "position_embeddings": rotary(gemma_config(), BATCH, LENGTH),
        "adarms_cond": torch.randn(BATCH, COND, generator=generator),
        **options,
    }


def _zero_gate(adapter: TTTAttentionAdapter) -> None:
    """Close the TTT gate, whatever it is made of."""
    with torch.no_grad():
        for name, parameter in adapter.ttt_gate.named_parameters():
            if name == "alpha" or adapter.adapter_config.ttt_gate == "adarms":
                parameter.zero_()
        norm = adapter.ttt_input_norm
        if norm is not None and norm.cond_size is not None:
            norm.dense.weight[2 * HIDDEN :] = 0
            norm.dense.bias[2 * HIDDEN :] = 0


# What each mode and gate computes


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("norm", NORMS)
def test_output_equals_its_formula(mode: str, gate: str, norm: str) -> None:
    layer = _adapted(ttt_mode=mode, ttt_gate=gate, ttt_input_norm=norm)
    adapter, call = layer.self_attn, _call()
    x, cond = torch.randn(BATCH, LENGTH, HIDDEN), call["adarms_cond"]
    gate_attn, residual = torch.randn(BATCH, 1, HIDDEN), torch.randn(BATCH, LENGTH, HIDDEN)
    rope = {"position_embeddings": call["position_embeddings"]}
    attn, _ = adapter.base_attention(x, **rope)
    source = {"after_attn": attn, "after_residual": residual + attn * gate_attn}.get(mode, x)
    chunk = None
    if norm == "adarms":
        source, chunk = adapter.ttt_input_norm(source, cond)
    elif norm == "rms":
        source, _ = adapter.ttt_input_norm(source)
    expected = adapter.ttt(source)[0]
    if gate in ("tanh", "adarms_tanh"):
        expected = expected * torch.tanh(adapter.ttt_gate.alpha)
    if gate in ("adarms", "adarms_tanh"):
        dense = adapter.ttt_gate.dense if chunk is None else None
        own = chunk if dense is None else (cond @ dense.weight.T + dense.bias).unsqueeze(1)
        expected = expected * own
    if mode != "replace_attn":
        expected = expected + attn * gate_attn
    context = {"adarms_cond": cond, "gate_attn": gate_attn, "residual": residual}
    out, _ = adapter(hidden_states=x, **rope, **context)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


def test_adarms_gate_of_the_adaptive_norm_has_no_map_of_its_own() -> None:
    names = {
        name
        for name, _ in _adapted(
            ttt_gate="adarms", ttt_input_norm="adarms"
        ).self_attn.named_parameters()
    }
    assert "ttt_input_norm.dense.weight" in names and "ttt_gate.dense.weight" not in names
    names = {
        name
        for name, _ in _adapted(
            ttt_gate="adarms", ttt_input_norm="rms"
        ).self_attn.named_parameters()
    }
    assert "ttt_gate.dense.weight" in names


@pytest.mark.parametrize("gate", ["adarms", "adarms_tanh"])
@pytest.mark.parametrize("norm", NORMS)
def test_conditional_gates_are_exactly_zero_at_initialisation(gate: str, norm: str) -> None:
    layer = _adapted(ttt_gate=gate, ttt_input_norm=norm)
    layer.self_attn.reset_parameters()
    handle = FastState.transient({"gate"})
    layer(**_call(fast_state=handle))
    published = handle.published["gate"]["layer"]["gate_ttt"]
    assert torch.equal(published, torch.zeros(BATCH, 1, HIDDEN))


def test_static_gate_starts_at_tanh_of_alpha_init() -> None:
    layer = _adapted(alpha_init=0.3)
    layer.self_attn.reset_parameters()
    torch.testing.assert_close(layer.self_attn.ttt_gate.static(), torch.full((HIDDEN,), 0.3).tanh())


# With the gate at 0: the base model, bit for bit


@pytest.mark.quick("sdpa-4-*", "eager-None-adarms_tanh-*")
@pytest.mark.parametrize("mode", BESIDE)
@pytest.mark.parametrize("gate", ["tanh", "adarms", "adarms_tanh"])
@pytest.mark.parametrize("cond_size", [COND, None])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_zero_gate_equals_the_base_layer_bit_for_bit(
    mode: str, gate: str, cond_size: int | None, implementation: str
) -> None:
    layer = _adapted(cond_size=cond_size, ttt_mode=mode, ttt_gate=gate)
    base = decoder_layer(cond_size, seed=0)
    _zero_gate(layer.self_attn)
    for attention in (layer.self_attn.base_attention, base.self_attn):
        attention.config._attn_implementation = implementation
    for train in (True, False):
        for seed in range(3):
            call = _call(seed)
            actual, expected = layer.train(train)(**call), base.train(train)(**call)
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("mode", BESIDE)
def test_zero_gate_equals_the_base_layer_bit_for_bit_under_autocast(mode: str) -> None:
    layer, base = _adapted(ttt_mode=mode), decoder_layer(COND, seed=0)
    _zero_gate(layer.self_attn)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(**_call()), base(**_call()))


def test_replacing_attention_at_gate_zero_is_not_the_base_layer() -> None:
    layer = _adapted(ttt_mode="replace_attn", ttt_gate="tanh")
    _zero_gate(layer.self_attn)
    assert not torch.allclose(layer(**_call()), decoder_layer(COND, seed=0)(**_call()))


# Known mistakes of the public versions


@pytest.mark.parametrize("gate", ["tanh", "adarms", "adarms_tanh"])
def test_mistake_gate_computed_and_never_used(gate: str) -> None:
    layer = _adapted(ttt_gate=gate)
    out = layer(**_call())
    out.square().sum().backward()
    for name, parameter in layer.self_attn.ttt_gate.named_parameters():
        assert parameter.grad.abs().min() > 0, name
        before = parameter.detach().clone()
        with torch.no_grad():
            parameter.add_(1.0)
        assert not torch.allclose(layer(**_call()), out), name
        parameter.data.copy_(before)


@pytest.mark.parametrize("mode", BESIDE)
def test_mistake_attention_output_lost(mode: str) -> None:
    layer, call = _adapted(ttt_mode=mode), _call()
    adapter = layer.self_attn
    adapter.ttt.register_forward_hook(lambda _m, _a, out: (torch.zeros_like(out[0]), out[1]))
    assert torch.equal(layer(**call), decoder_layer(COND, seed=0)(**call))


def test_replace_attn_does_not_run_attention_unless_a_cache_counts_on_it() -> None:
    layer, calls = _adapted(ttt_mode="replace_attn"), []
    adapter = layer.self_attn
    adapter.base_attention.register_forward_pre_hook(lambda *_: calls.append(1))
    expected = layer(**_call())
    assert calls == []

    class Cache:
        def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
            return key, value

    assert torch.equal(layer(**_call(past_key_values=Cache())), expected)
    assert calls == [1]


@pytest.mark.parametrize("norm", ["adarms", "rms"])
def test_mistake_condition_accepted_and_ignored(norm: str) -> None:
    layer = _adapted(cond_size=None, ttt_gate="adarms", ttt_input_norm=norm)
    outs = [layer(**_call(adarms_cond=cond)) for cond in torch.randn(2, BATCH, COND)]
    assert not torch.allclose(*outs)
    with pytest.raises(ValueError, match="adarms_cond"):
        layer(**_call(adarms_cond=None))


def test_mistake_inner_learning_rate_never_passed_on() -> None:
    states = []
    for base_lr in (0.5, 1.0):
        layer = _adapted(layer={"num_heads": 2, "base_lr": base_lr})
        handle = FastState.transient()
        layer(**_call(fast_state=handle))
        states.append(handle.outgoing["layer"]["dw"])
    torch.testing.assert_close(states[1], 2 * states[0])


@pytest.mark.parametrize("length", [1, 5, 16, 21])
def test_mistake_stateful_only_when_the_length_equals_the_head_size(length: int) -> None:
    layer = _adapted()
    assert HIDDEN // 2 == 16
    call = _call(position_embeddings=rotary(gemma_config(), BATCH, length))
    call["hidden_states"] = torch.randn(BATCH, length, HIDDEN)
    first = FastState.transient()
    fresh = layer(**call, fast_state=first)
    second = first.advance()
    carried = layer(**call, fast_state=second)
    assert not torch.allclose(fresh, carried)
    assert second.outgoing["layer"]["dw"].shape == (BATCH, 2, 16, 16)
    assert second.outgoing["layer"]["tokens_seen"].tolist() == [2 * length] * BATCH


@pytest.mark.parametrize("mode", MODES)
def test_mistake_training_and_evaluation_take_different_paths(mode: str) -> None:
    layer = _adapted(ttt_mode=mode, ttt_gate="adarms_tanh")
    assert torch.equal(layer.train()(**_call()), layer.eval()(**_call()))


def test_after_residual_needs_the_residual() -> None:
    adapter, call = _adapted(ttt_mode="after_residual").self_attn, _call()
    with pytest.raises(ValueError, match="pass residual="):
        adapter(call["hidden_states"], position_embeddings=call["position_embeddings"])


# Condition per token: what observation tokens write must not see noise or time


def test_segments_with_a_zero_row_shield_the_observation_tokens() -> None:
    layer = _adapted(ttt_gate="adarms", ttt_input_norm="adarms")
    segments = torch.tensor([0, 0, 1, 1, 1])
    writes = (segments == 0).expand(BATCH, -1)
    mask = (segments[None, :] <= segments[:, None]).expand(BATCH, 1, -1, -1)
    states, outs = [], []
    for seed in (1, 2):
        call = _call()
        noise = torch.randn(BATCH, 3, HIDDEN, generator=torch.Generator().manual_seed(seed))
        time = torch.randn(BATCH, COND, generator=torch.Generator().manual_seed(seed))
        call["hidden_states"][:, 2:] = noise
        call["adarms_cond"] = torch.stack([torch.zeros_like(time), time], dim=1)
        call |= {"segments": segments, "write_mask": writes, "attention_mask": mask}
        handle = FastState.transient()
        outs.append(layer(**call, fast_state=handle))
        states.append(handle.outgoing["layer"])
    for name in states[0]:
        assert torch.equal(states[0][name], states[1][name]), name
    assert torch.equal(outs[0][:, :2], outs[1][:, :2])
    assert not torch.allclose(outs[0][:, 2:], outs[1][:, 2:])


# State and statistics


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["after_attn", "replace_attn"])
def test_compiles_without_graph_breaks_with_its_state(mode: str) -> None:
    layer = _adapted(ttt_mode=mode, ttt_gate="adarms")

    def two_chunks(call: dict[str, Any], handle: FastState) -> tuple[Tensor, Tensor]:
        first = layer(**call, fast_state=handle)
        return first, layer(**call, fast_state=handle.advance())

    compiled = torch.compile(two_chunks, backend="eager", fullgraph=True)
    expected = two_chunks(_call(), FastState.transient())
    assert all(map(torch.equal, compiled(_call(), FastState.transient()), expected))


def test_state_needs_a_slot() -> None:
    layer = _adapted()
    layer.self_attn.slot = ""
    with pytest.raises(ValueError, match="no slot"):
        layer(**_call(fast_state=FastState.transient()))


def test_without_adaptation_the_carried_state_is_read_and_stays() -> None:
    layer = _adapted()
    first = FastState.transient()
    layer(**_call(1, fast_state=first))
    frozen = FastState(first.outgoing, adapt=False)
    out = layer(**_call(2, fast_state=frozen))
    assert frozen.outgoing == first.outgoing
    assert not torch.allclose(out, layer(**_call(2, fast_state=FastState(adapt=False))))


def test_forward_never_mutates_parameters() -> None:
    layer = _adapted(ttt_gate="adarms_tanh")
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    handle = FastState.transient()
    for _ in range(2):
        layer(**_call(fast_state=handle))
        handle = handle.advance()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_published_gates_and_ratios_are_those_that_were_applied() -> None:
    layer, call = _adapted(ttt_gate="adarms_tanh", ttt_input_norm="rms"), _call()
    adapter, handle = layer.self_attn, FastState.transient({"gate"})
    parts: dict[str, Tensor] = {}
    adapter.base_attention.register_forward_hook(
        lambda _m, _a, out: parts.update(attn=out[0].detach())
    )
    adapter.ttt.register_forward_hook(lambda _m, _a, out: parts.update(ttt=out[0].detach()))
    layer(**call, fast_state=handle)
    values = handle.published["gate"]["layer"]
    assert set(values) == {"gate_attn", "gate_ttt", "alpha", "ratio_attn", "ratio_ttt"}
    _, gate_attn = layer.input_layernorm(call["hidden_states"], call["adarms_cond"])
    torch.testing.assert_close(values["gate_attn"], gate_attn.detach())
    torch.testing.assert_close(values["alpha"], adapter.ttt_gate.alpha.tanh().detach())
    for row in range(BATCH):
        residual = call["hidden_states"][row].norm()
        for name in ("attn", "ttt"):
            branch = (parts[name] * values[f"gate_{name}"])[row].norm()
            torch.testing.assert_close(values[f"ratio_{name}"][row], branch / residual)
    assert not any(value.requires_grad for value in values.values())


def test_gates_that_do_not_exist_are_not_published() -> None:
    layer = _adapted(cond_size=None, ttt_gate="none", ttt_mode="replace_attn")
    handle = FastState.transient({"gate"})
    layer(**_call(fast_state=handle))
    assert set(handle.published["gate"]["layer"]) == {"ratio_ttt"}
