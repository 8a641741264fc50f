"""parallel and series against their formulas, members by name, and messages."""

from typing import Any

import pytest
import torch
from adapter_cases import HIDDEN, KINDS, LORA, NOOP, PAIR, inputs, make_adapter, member, ttt
from gemma_cases import gemma_config, randomise, rotary
from jsonargparse import ArgumentParser
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaAttention

from lightning_modules.adapters import (
    BaseAttentionAdapter,
    CompositeConfig,
    MemberSpec,
    NoOpConfig,
    RoutedConfig,
    SwitchConfig,
    TTTAdapterConfig,
    create_attention_adapter,
    registry,
)
from lightning_modules.streams import FastState

REPLACE = member("ttt", ttt_mode="replace_attn", layer={"num_heads": 2})
COMPOSITES = ["parallel", "series", "switch", "routed"]


def _composite(kind: str, members: dict[str, Any], **options: Any) -> Any:
    return make_adapter(member(kind, members=members, **options))


def _alone(composite: Any, name: str, spec: dict[str, Any]) -> BaseAttentionAdapter:
    """The member `name` by itself around the same attention, with the same weights."""
    adapter = create_attention_adapter(
        composite.base_attention, spec["adapter_type"], spec["adapter_config"]
    ).double()
    adapter.load_state_dict(composite.members[name].state_dict(), strict=False)
    adapter.slot = f"layer/{name}"
    return adapter.eval()


def _gate() -> Tensor:
    return torch.randn(HIDDEN, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


# Formulas


def test_parallel_is_gated_attention_plus_what_every_member_adds_to_it() -> None:
    members = {**PAIR, "low": LORA, "nothing": NOOP}
    composite, (attn_output, x), gate = _composite("parallel", members), inputs(), _gate()
    expected = gate * attn_output
    for name, spec in members.items():
        alone = _alone(composite, name, spec).adapt(attn_output, x, gate_attn=gate)
        expected = expected + (alone - gate * attn_output)
    out = composite.adapt(attn_output, x, gate_attn=gate)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("first", ["noop", "lora", "replaces"])
def test_series_chains_the_outputs_and_only_the_first_sees_the_gate(first: str) -> None:
    spec = {"noop": NOOP, "lora": LORA, "replaces": REPLACE}[first]
    members = {"first": spec, **PAIR}
    composite, (attn_output, x), gate = _composite("series", members), inputs(), _gate()
    out = _alone(composite, "first", spec).adapt(attn_output, x, gate_attn=gate)
    for name in PAIR:
        out = _alone(composite, name, PAIR[name]).adapt(out, x)
    assert torch.equal(composite.adapt(attn_output, x, gate_attn=gate), out)
    backwards = _composite("series", dict(reversed(members.items()))) if first == "lora" else None
    if backwards is not None:
        backwards.load_state_dict(composite.state_dict())
        assert not torch.allclose(backwards.adapt(attn_output, x, gate_attn=gate), out)


def test_what_a_series_adds_is_its_output_minus_gated_attention() -> None:
    composite, (attn_output, x) = _composite("series", {"none": NOOP, **PAIR}), inputs()
    gate = _gate()
    expected = composite.adapt(attn_output, x, gate_attn=gate) - gate * attn_output
    actual = composite.delta(attn_output, x, gate_attn=gate)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", COMPOSITES)
@pytest.mark.parametrize("name", ["lora", "ttt", "noop"])
def test_a_single_member_equals_the_member_alone_bit_for_bit(kind: str, name: str) -> None:
    spec = {"lora": LORA, "ttt": ttt(), "noop": NOOP}[name]
    options = {"active": "only"} if kind == "switch" else {}
    composite = _composite(kind, {"only": spec}, **options)
    alone, gate = _alone(composite, "only", spec), _gate()
    handles = FastState.transient(), FastState.transient()
    for seed in (1, 2):
        outs = [
            adapter.adapt(*inputs(seed=seed), gate_attn=gate, fast_state=handle)
            for adapter, handle in zip((composite, alone), handles, strict=True)
        ]
        assert torch.equal(*outs)
        handles = handles[0].advance(), handles[1].advance()


def test_members_get_the_context_of_the_layer() -> None:
    spec = ttt(ttt_mode="after_residual", ttt_gate="adarms", cond_size=4)
    composite, (attn_output, x) = _composite("parallel", {"low": LORA, "fast": spec}), inputs()
    cond, residual = torch.randn(2, 2, 4, dtype=torch.float64), torch.randn_like(x)
    alone = _alone(composite, "fast", spec)
    context = {"residual": residual, "adarms_cond": cond[0], "gate_attn": _gate()}
    delta = composite.members["fast"].delta(attn_output, x, **context)
    assert torch.equal(delta, alone.delta(attn_output, x, **context))
    assert not torch.allclose(
        composite.adapt(attn_output, x, **context),
        composite.adapt(attn_output, x, **{**context, "adarms_cond": cond[1]}),
    )


def test_a_series_that_starts_with_a_replacement_does_not_run_attention() -> None:
    composite, calls = _composite("series", {"new": REPLACE, "low": LORA}).float(), []
    composite.base_attention.register_forward_pre_hook(lambda *_: calls.append(1))
    call = {"position_embeddings": rotary(gemma_config(), 2, 5), "attention_mask": None}
    composite(torch.randn(2, 5, HIDDEN), **call)
    assert calls == []


# Names, slots, options


def test_slots_of_members_follow_the_composite_at_any_depth() -> None:
    composite = make_adapter("nested")
    composite.slot = "model.layers.7.self_attn"
    slots = {
        module.slot.removeprefix("model.layers.7.self_attn")
        for module in composite.modules()
        if isinstance(module, BaseAttentionAdapter)
    }
    assert {"", "/mix", "/mix/chain/fast", "/mix/inner/other", "/chain", "/chain/fast"} <= slots
    assert len(slots) == 14
    composite.slot = ""
    with pytest.raises(ValueError, match="no slot"):
        composite.adapt(*inputs(), fast_state=FastState.transient())


def test_only_the_composite_owns_the_base_and_reads_its_attributes() -> None:
    composite = make_adapter("nested")
    owners = [m for m in composite.modules() if "base_attention" in m._modules]
    assert owners == [composite]
    assert composite.layer_idx == 0 and composite.q_proj is composite.base_attention.q_proj
    with pytest.raises(AttributeError, match="layer_idx"):
        composite.members["chain"].layer_idx  # noqa: B018


def test_mistake_a_slot_that_members_share_mixes_their_states() -> None:
    members = {"fast": ttt(), "twin": ttt()}
    composite = _composite("parallel", members)
    expected, handle = [], FastState.transient()
    for seed in (1, 2):
        expected.append(composite.adapt(*inputs(seed=seed), fast_state=handle))
        handle = handle.advance()
    for adapter in composite.members.values():
        adapter.slot = "layer"
    actual, handle = [], FastState.transient()
    for seed in (1, 2):
        actual.append(composite.adapt(*inputs(seed=seed), fast_state=handle))
        handle = handle.advance()
    assert torch.equal(actual[0], expected[0]) and not torch.allclose(actual[1], expected[1])


@pytest.mark.parametrize("kind", COMPOSITES)
def test_options_may_be_dicts_specs_or_dataclasses(kind: str) -> None:
    given = KINDS[kind]["adapter_config"]
    config_class = {"switch": SwitchConfig, "routed": RoutedConfig}.get(kind, CompositeConfig)
    specs = {name: MemberSpec(**spec) for name, spec in given["members"].items()}
    rest = {name: value for name, value in given.items() if name != "members"}
    attention = GemmaAttention(gemma_config(), layer_idx=0)
    for options in (given, {**given, "members": specs}, config_class(specs, **rest)):
        adapter = create_attention_adapter(attention, kind, options)
        assert list(adapter.members) == list(specs)
        assert adapter.adapter_config.members == specs
    with pytest.raises(ValueError, match="expected a dict or a"):
        create_attention_adapter(attention, kind, TTTAdapterConfig())


@pytest.mark.parametrize("config_class", [CompositeConfig, SwitchConfig, RoutedConfig])
def test_members_can_be_written_in_yaml(config_class: type) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--adapter", type=config_class)
    text = """
    members:
      fast: {adapter_type: ttt, adapter_config: {alpha_init: 0.5, layer: {num_heads: 2}}}
      both:
        adapter_type: parallel
        adapter_config: {members: {low: {adapter_type: lora, adapter_config: {rank: 2}}}}
    """
    config = parser.instantiate(parser.parse_args([f"--adapter={text}"])).adapter
    assert isinstance(config, config_class) and isinstance(config.members["fast"], MemberSpec)
    kind = {SwitchConfig: "switch", RoutedConfig: "routed"}.get(config_class, "series")
    adapter = create_attention_adapter(GemmaAttention(gemma_config(), layer_idx=0), kind, config)
    assert adapter.members["fast"].adapter_config.alpha_init == 0.5
    assert adapter.members["both"].members["low"].lora_A.weight.shape == (2, HIDDEN)


class _Doubles(BaseAttentionAdapter):
    def __init__(self, base_attention: nn.Module, config: NoOpConfig) -> None:
        super().__init__(base_attention)

    def adapt(self, attn_output: Tensor, hidden_states: Tensor, **context: Any) -> Tensor:
        return 2 * attn_output


DEEP = {"chain": member("series", members={"low": member("lora", rnk=2)})}
TYPO = {"low": {"adapter_typ": "lora"}}


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("parallel", None, "parallel: the option 'members' is missing"),
        ("series", {"members": {}}, "give at least one, as {name: {adapter_type"),
        ("series", {"members": [LORA]}, "give at least one, as {name: {adapter_type"),
        ("series", {"member": PAIR}, "series: unknown option 'member'; did you mean 'members'"),
        ("series", {"members": TYPO}, r"members\.low: unknown option .*'adapter_type'\?"),
        ("series", {"members": {"low": {}}}, r"members\.low: the option 'adapter_type' is missing"),
        ("series", {"members": {"low": 3}}, r"members\.low: options are a int"),
        ("series", {"members": {"x": member("lorra")}}, "member 'x': unknown adapter type 'lorra'"),
        ("routed", {"members": DEEP}, "member 'chain': member 'low': lora: unknown .*'rank'"),
        ("parallel", {"members": {"a.b": LORA}}, "'a.b' cannot name a member"),
        ("parallel", {"members": {"a/b": LORA}}, "'a/b' cannot name a member"),
        ("parallel", {"members": {"self_attn": LORA}}, "'self_attn' cannot name a member"),
        ("parallel", {"members": {"train": LORA}}, "'train' cannot name a member"),
        ("parallel", {"members": {"training": LORA}}, "'training' cannot name a member"),
        ("parallel", {"members": {1: LORA}}, "1 cannot name a member"),
        ("parallel", {"members": {"a": REPLACE}}, "parallel: member 'a' replaces attention"),
        ("routed", {"members": {"b": LORA, "a": REPLACE}}, "routed: member 'a' replaces attention"),
        ("series", {"members": {"b": LORA, "a": REPLACE}}, "member 'a' replaces .*put it first"),
        ("switch", {"members": PAIR, "active": "slow"}, "active='slow' is no member; .* fast, oth"),
    ],
)
def test_mistakes_are_errors_that_name_the_fix(kind: str, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_attention_adapter(GemmaAttention(gemma_config(), layer_idx=0), kind, options)


@pytest.mark.parametrize("kind", ["parallel", "routed"])
def test_replacements_are_found_inside_switches_and_series(kind: str) -> None:
    for inner in (
        member("switch", members={"b": LORA, "a": REPLACE}),
        member("series", members={"a": REPLACE, "b": LORA}),
    ):
        with pytest.raises(ValueError, match=f"{kind}: member 'inner' replaces attention"):
            _composite(kind, {"inner": inner})


def test_an_adapter_without_delta_works_in_a_series_and_not_in_a_sum(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registry, "_ADAPTERS", dict(registry._ADAPTERS))
    registry.register_attention_adapter("doubles", NoOpConfig)(_Doubles)
    members = {"twice": member("doubles"), "low": LORA}
    composite, (attn_output, x) = _composite("series", members), inputs()
    expected = 2 * attn_output + composite.members["low"].delta(attn_output, x)
    torch.testing.assert_close(composite.adapt(attn_output, x), expected)
    with pytest.raises(ValueError, match="_Doubles, which does not say what it adds"):
        _composite("parallel", members)


def test_randomised_members_do_not_share_weights() -> None:
    composite = _composite("parallel", {"fast": ttt(), "twin": ttt()})
    before = composite.members["twin"].state_dict()
    before = {name: value.clone() for name, value in before.items()}
    randomise(composite.members["fast"])
    after = composite.members["twin"].state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
