"""inject_adapters and remove_adapters on real transformers models."""

import copy
from typing import Any

import pytest
import torch
from gemma_cases import gemma_config, randomise
from torch import nn
from transformers import (
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lightning_modules.adapters import (
    AdapterSpec,
    NoOpAttentionAdapter,
    TTTAttentionAdapter,
    base_state_dict,
    inject_adapters,
    remove_adapters,
)
from lightning_modules.streams import FastState

SIZES = {
    "vocab_size": 17,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
MODELS = {
    "gemma": lambda: GemmaForCausalLM(gemma_config()),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES)),
}
TTT = {"layer": {"num_heads": 2, "causal": True, "mini_batch_size": 4}}
ZERO = {**TTT, "alpha_init": 0.0}
TOKENS = torch.arange(12).view(2, 6)


def _model(name: str = "gemma") -> PreTrainedModel:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def _paths(model: nn.Module) -> list[str]:
    return [path for path, m in model.named_modules() if isinstance(m, TTTAttentionAdapter)]


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [
        ("*", [0, 1, 2]),
        ("model.layers.*.self_attn", [0, 1, 2]),
        ("*.layers.[02].*", [0, 2]),
        (1, [1]),
        ([0, 2], [0, 2]),
    ],
)
def test_patterns_choose_layers_by_path_or_index(pattern: Any, layers: list[int]) -> None:
    model = _model()
    adapters = inject_adapters(model, [(pattern, "ttt", TTT)])
    expected = [f"model.layers.{layer}.self_attn" for layer in layers]
    assert _paths(model) == expected == list(adapters)
    assert [adapter.slot for adapter in adapters.values()] == expected


def test_layers_may_have_different_adapters() -> None:
    model = _model()
    plan = [AdapterSpec(0, "noop"), AdapterSpec([2], "ttt", TTT)]
    inject_adapters(model, plan)
    kinds = [type(layer.self_attn).__name__ for layer in model.model.layers]
    assert kinds == ["NoOpAttentionAdapter", "GemmaAttention", "TTTAttentionAdapter"]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ([("encoder.*", "ttt", TTT)], "matches no attention module; there are: model.layers.0"),
        ([(7, "ttt", TTT)], "pattern 7 matches no attention"),
        ([(0, "ttt", TTT), ("*", "noop", None)], "model.layers.0.self_attn would get two"),
        ([(0, "noop", None), (1, "nope", None)], "unknown adapter type"),
    ],
)
def test_a_plan_with_an_error_changes_nothing(plan: list[Any], message: str) -> None:
    model = _model()
    before = list(model.modules())
    with pytest.raises(ValueError, match=message):
        inject_adapters(model, plan)
    assert all(a is b for a, b in zip(before, model.modules(), strict=True))


def test_injecting_twice_is_an_error() -> None:
    model = _model()
    inject_adapters(model, [(1, "ttt", TTT)])
    with pytest.raises(ValueError, match="call remove_adapters first"):
        inject_adapters(model, [(1, "ttt", TTT)])


def test_an_index_that_exists_twice_is_an_error() -> None:
    towers = nn.ModuleDict({"vlm": _model(), "dit": _model()})
    with pytest.raises(ValueError, match=r"layer 0 exists more than once \(vlm.*dit"):
        inject_adapters(towers, [(0, "noop", None)])
    inject_adapters(towers, [("dit.*", "noop", None)])
    adapted = [p for p, m in towers.named_modules() if isinstance(m, NoOpAttentionAdapter)]
    assert len(adapted) == 3 and all(path.startswith("dit.") for path in adapted)


@pytest.mark.parametrize("name", MODELS)
def test_remove_restores_the_original_modules_object_identically(name: str) -> None:
    model = _model(name)
    before = dict(model.named_modules())
    expected = model(TOKENS).logits
    inject_adapters(model, [("*", "ttt", TTT)])
    assert not torch.allclose(model(TOKENS).logits, expected)
    assert remove_adapters(model) == [f"model.layers.{i}.self_attn" for i in range(3)]
    after = dict(model.named_modules())
    assert list(after) == list(before) and all(after[path] is before[path] for path in before)
    assert torch.equal(model(TOKENS).logits, expected)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("adapter", [("noop", None), ("ttt", ZERO)])
def test_zero_gate_equals_the_base_model_bit_for_bit(name: str, train: bool, adapter: Any) -> None:
    model = _model(name).train(train)
    expected = model(TOKENS).logits
    inject_adapters(model, [("*", *adapter)])
    assert model.model.layers[0].self_attn.training == train
    assert torch.equal(model(TOKENS).logits, expected)


def test_adapters_take_device_dtype_and_mode_of_the_base() -> None:
    model = _model().bfloat16()
    adapters = inject_adapters(model, [("*", "ttt", TTT)])
    for adapter in adapters.values():
        assert {p.dtype for p in adapter.parameters()} == {torch.bfloat16}
        assert not adapter.ttt.training
    assert model(TOKENS).logits.isfinite().all()


def test_base_checkpoints_load_into_the_adapted_model_and_back() -> None:
    model, other = _model(), randomise(_model(), seed=1)
    inject_adapters(model, [([0, 2], "ttt", ZERO)])
    missing, unexpected = model.load_state_dict(other.state_dict(), strict=False)
    assert not unexpected
    assert missing and all(".ttt" in name for name in missing)
    assert torch.equal(model(TOKENS).logits, other(TOKENS).logits)
    plain = _model()
    plain.load_state_dict(base_state_dict(model), strict=True)
    assert torch.equal(plain(TOKENS).logits, other(TOKENS).logits)
    again = _model()
    inject_adapters(again, [([0, 2], "ttt", TTT)])
    again.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(again(TOKENS).logits, other(TOKENS).logits)


def test_nested_adapters_load_base_checkpoints_and_are_removed_together() -> None:
    model, other = _model(), randomise(_model(), seed=1)
    originals = [layer.self_attn for layer in model.model.layers]
    inject_adapters(model, [("*", "ttt", ZERO)])
    for layer in model.model.layers:
        layer.self_attn = NoOpAttentionAdapter(layer.self_attn)
    model.load_state_dict(other.state_dict(), strict=False)
    plain = _model()
    plain.load_state_dict(base_state_dict(model), strict=True)
    assert torch.equal(plain(TOKENS).logits, other(TOKENS).logits)
    remove_adapters(model)
    assert [layer.self_attn for layer in model.model.layers] == originals
    assert torch.equal(model(TOKENS).logits, other(TOKENS).logits)


def test_adapted_models_can_be_copied() -> None:
    model = _model()
    inject_adapters(model, [("*", "ttt", TTT)])
    twin = copy.deepcopy(model)
    assert torch.equal(twin(TOKENS).logits, model(TOKENS).logits)
    assert twin.model.layers[0].self_attn.base_attention is not (
        model.model.layers[0].self_attn.base_attention
    )


def test_fast_state_reaches_the_adapters_of_a_stock_model_and_keeps_layers_apart() -> None:
    model = _model()
    inject_adapters(model, [("*", "ttt", TTT)])
    handle = FastState.transient()
    model(TOKENS, fast_state=handle)
    slots = handle.outgoing
    assert list(slots) == [f"model.layers.{i}.self_attn" for i in range(3)]
    assert not torch.allclose(
        slots["model.layers.0.self_attn"]["dw"], slots["model.layers.1.self_attn"]["dw"]
    )
    carried = model(TOKENS, fast_state=handle.advance()).logits
    assert not torch.allclose(carried, model(TOKENS).logits)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_weights_and_hidden_states_of_the_base_stay_available(
    implementation: str,
) -> None:
    model = _model()
    model.set_attn_implementation(implementation)
    options = {"output_hidden_states": True, "output_attentions": implementation == "eager"}
    expected = model(TOKENS, **options)
    inject_adapters(model, [("*", "ttt", ZERO)])
    actual = model(TOKENS, **options)
    assert all(map(torch.equal, actual.hidden_states, expected.hidden_states))
    if implementation == "eager":
        assert len(actual.attentions) == 3
        assert all(map(torch.equal, actual.attentions, expected.attentions))
