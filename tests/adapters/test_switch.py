"""Switching adapters: each name equals that member alone, and what is inactive stays as it is."""

from typing import Any

import pytest
import torch
from adapter_cases import (
    KINDS,
    LORA,
    PAIR,
    TOKENS,
    inputs,
    make_adapter,
    member,
    open_gates,
    own_parameters,
    plan,
    tiny_model,
    ttt,
)
from torch import Tensor, nn

from lightning_modules.adapters import (
    SwitchAdapter,
    active_adapter,
    inject_adapters,
    remove_adapters,
    set_active,
)
from lightning_modules.streams import FastState

SWITCH = member("switch", members={**PAIR, "low": LORA})
REPLACE = ttt(ttt_mode="replace_attn")


def _model(kind: dict[str, Any] = SWITCH) -> nn.Module:
    model = tiny_model()
    inject_adapters(model, plan(kind))
    return open_gates(model)


def _active(model: nn.Module) -> list[str | None]:
    return [module.active for module in model.modules() if isinstance(module, SwitchAdapter)]


# What is computed


@pytest.mark.parametrize("name", [*PAIR, "low"])
def test_the_active_member_equals_the_same_adapter_alone_bit_for_bit(name: str) -> None:
    model, alone = _model(), tiny_model()
    inject_adapters(alone, plan({**PAIR, "low": LORA}[name]))
    state = {key.replace(f"members.{name}.", ""): v for key, v in model.state_dict().items()}
    alone.load_state_dict({key: v for key, v in state.items() if "members." not in key})
    assert set_active(model, name) == [f"model.layers.{i}.self_attn" for i in range(3)]
    assert torch.equal(model(TOKENS).logits, alone(TOKENS).logits)


def test_without_an_active_member_the_model_is_its_base_bit_for_bit() -> None:
    expected, model = tiny_model()(TOKENS).logits, _model()
    assert _active(model) == [None] * 3
    assert torch.equal(model(TOKENS).logits, expected)
    set_active(model, "fast")
    assert not torch.allclose(model(TOKENS).logits, expected)
    set_active(model, None)
    assert torch.equal(model(TOKENS).logits, expected)


def test_the_gate_of_attention_applies_to_every_choice() -> None:
    adapter, (attn_output, x) = make_adapter(SWITCH), inputs()
    gate = torch.randn_like(x)
    assert torch.equal(adapter.adapt(attn_output, x, gate_attn=gate), attn_output * gate)
    adapter.active = "low"
    expected = attn_output * gate + adapter.members["low"].delta(attn_output, x)
    assert torch.equal(adapter.adapt(attn_output, x, gate_attn=gate), expected)


def test_attention_does_not_run_only_while_a_replacement_is_active() -> None:
    model, calls = _model(member("switch", members={"new": REPLACE, "low": LORA})), []
    base = model.model.layers[0].self_attn.base_attention
    base.register_forward_hook(lambda *_: calls.append(1))
    for name, runs in (("new", 0), ("low", 1), (None, 1)):
        calls.clear()
        set_active(model, name)
        model(TOKENS, use_cache=False)
        assert len(calls) == runs, name


@pytest.mark.slow
def test_switching_a_compiled_model_computes_what_the_eager_one_does() -> None:
    model = _model()
    compiled = torch.compile(model.forward, backend="eager", fullgraph=True)
    for name in ("fast", "low", None, "other", "fast"):
        set_active(model, name)
        expected = model(TOKENS, use_cache=False).logits
        assert torch.equal(compiled(TOKENS, use_cache=False).logits, expected), name


# What is inactive


def _read(model: nn.Module, name: str | None, handle: FastState) -> tuple[Tensor, FastState]:
    set_active(model, name)
    out = model(TOKENS, fast_state=handle).logits
    return out, handle.advance()


def test_the_state_of_inactive_members_is_frozen_and_goes_on_where_it_was() -> None:
    model = _model()
    _, first = _read(model, "fast", FastState.transient())
    before = first.outgoing
    expected, alone = _read(model, "fast", FastState(before))
    handle = first
    for name in ("low", "other", None, "other"):
        _, handle = _read(model, name, handle)
    frozen = handle.outgoing
    for slot, fields in before.items():
        assert slot.endswith("/fast")
        assert all(torch.equal(frozen[slot][key], value) for key, value in fields.items())
    assert sum(slot.endswith("/other") for slot in frozen) == 3
    out, after = _read(model, "fast", handle)
    assert torch.equal(out, expected)
    for slot, fields in alone.outgoing.items():
        assert all(torch.equal(after.outgoing[slot][key], v) for key, v in fields.items())
    fresh, _ = _read(model, "fast", FastState.transient())
    assert not torch.allclose(out, fresh)


def test_inactive_members_get_no_gradient_and_an_optimizer_leaves_them_alone() -> None:
    model = _model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    set_active(model, "low")
    model(TOKENS).logits.square().mean().backward()
    optimizer.step()
    for name in own_parameters(model):
        parameter = model.get_parameter(name)
        if ".members.low." in name:
            assert parameter.grad is not None and not torch.equal(parameter, before[name]), name
        else:
            assert parameter.grad is None and torch.equal(parameter, before[name]), name


# Where


def test_unknown_names_list_the_known_ones_and_switch_nothing() -> None:
    model = _model()
    remove_adapters(model)
    spec = member("switch", members={"low": LORA})
    inject_adapters(
        model, [(0, "switch", SWITCH["adapter_config"]), (2, "switch", spec["adapter_config"])]
    )
    with pytest.raises(
        ValueError, match=r"layers\.2\.self_attn has no adapter 'fast'; .* low, and"
    ):
        set_active(model, "fast")
    assert _active(model) == [None, None]
    assert set_active(model, "fast", "*.0.*") == ["model.layers.0.self_attn"]
    assert _active(model) == ["fast", None]
    set_active(model, "low")
    assert _active(model) == ["low", "low"]
    with pytest.raises(ValueError, match=r"'encoder\.\*' matches no switch.*layers\.0\.self_attn"):
        set_active(model, "low", "encoder.*")


def test_a_model_without_switches_says_so() -> None:
    with pytest.raises(ValueError, match="there are: none: inject adapters of type 'switch'"):
        set_active(tiny_model(), "fast")
    with pytest.raises(ValueError, match="none"), active_adapter(tiny_model(), None):
        pass


def test_switches_inside_other_adapters_are_switched_too() -> None:
    model = _model(KINDS["nested"])
    paths = set_active(model, "other")
    assert paths == [f"model.layers.{i}.self_attn.members.mix.members.either" for i in range(3)]
    assert _active(model) == ["other"] * 3


# Contexts


def test_a_context_restores_what_was_active_also_after_an_exception_and_nested() -> None:
    model = _model()
    set_active(model, "fast", "*.1.*")
    with active_adapter(model, "low"):
        assert _active(model) == ["low"] * 3
        with active_adapter(model, None, "*.0.*"):
            assert _active(model) == [None, "low", "low"]
        assert _active(model) == ["low"] * 3
    assert _active(model) == [None, "fast", None]
    with pytest.raises(RuntimeError, match="inside"), active_adapter(model, "other"):
        set_active(model, "low")
        raise RuntimeError("inside")
    assert _active(model) == [None, "fast", None]
    with pytest.raises(ValueError, match="no adapter 'slow'"), active_adapter(model, "slow"):
        pass
    assert _active(model) == [None, "fast", None]
