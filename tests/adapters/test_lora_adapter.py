"""LoRAAttentionAdapter against its formula and against peft; decoding with a cache."""

import math
from typing import Any

import pytest
import torch
from adapter_cases import HIDDEN, inputs, make_adapter, member, open_gates, plan, tiny_model
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from lightning_modules.adapters import create_attention_adapter, inject_adapters
from lightning_modules.adapters.lora import LoRAAdapterConfig


def _lora(**options: Any) -> Any:
    return make_adapter(member("lora", **options))


@pytest.mark.parametrize("use_rslora", [False, True])
def test_output_equals_the_formula_entry_by_entry(use_rslora: bool) -> None:
    adapter = _lora(rank=3, alpha=5.0, use_rslora=use_rslora)
    attn_output, x = inputs(2, 3)
    gate = torch.randn(HIDDEN, dtype=torch.float64)
    out = adapter.adapt(attn_output, x, gate_attn=gate)
    a, b = adapter.lora_A.weight, adapter.lora_B.weight
    scaling = 5.0 / (math.sqrt(3) if use_rslora else 3)
    for row, t, i in [(0, 0, 0), (1, 2, 31), (0, 1, 17)]:
        inner = [sum(a[r, j] * x[row, t, j] for j in range(HIDDEN)) for r in range(3)]
        branch = scaling * sum(b[i, r] * inner[r] for r in range(3))
        expected = gate[i] * attn_output[row, t, i] + branch
        torch.testing.assert_close(out[row, t, i], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_branch_equals_pefts_lora_of_a_linear_layer_that_is_zero(use_rslora: bool) -> None:
    adapter = _lora(rank=4, alpha=6.0, use_rslora=use_rslora)
    linear = nn.ModuleDict({"q": nn.Linear(HIDDEN, HIDDEN, bias=False)}).double()
    nn.init.zeros_(linear["q"].weight)
    config = LoraConfig(r=4, lora_alpha=6.0, use_rslora=use_rslora, target_modules=["q"])
    theirs = inject_adapter_in_model(config, linear)["q"].double()
    theirs.lora_A["default"].weight.data.copy_(adapter.lora_A.weight)
    theirs.lora_B["default"].weight.data.copy_(adapter.lora_B.weight)
    attn_output, x = inputs()
    expected = theirs(x)
    torch.testing.assert_close(adapter.delta(attn_output, x), expected, rtol=1e-12, atol=1e-12)


def test_b_starts_at_zero_and_a_as_in_peft() -> None:
    adapter = _lora(rank=16)
    adapter.reset_parameters()
    assert torch.equal(adapter.lora_B.weight, torch.zeros(HIDDEN, 16, dtype=torch.float64))
    limit = 1 / math.sqrt(HIDDEN)
    assert 0.9 * limit < adapter.lora_A.weight.abs().max() <= limit


def test_dropout_acts_on_the_input_in_training_only() -> None:
    adapter, (attn_output, x) = _lora(dropout=0.5), inputs()
    expected = adapter.delta(attn_output, x)
    adapter.train()
    torch.manual_seed(0)
    out = adapter.delta(attn_output, x)
    torch.manual_seed(0)
    kept = torch.nn.functional.dropout(x, 0.5)
    torch.testing.assert_close(out, adapter.eval().delta(attn_output, kept))
    assert not torch.allclose(out, expected)


def test_the_branch_reads_the_input_of_attention_and_not_its_output() -> None:
    adapter, (attn_output, x) = _lora(), inputs()
    assert torch.equal(adapter.delta(attn_output, x), adapter.delta(attn_output + 1, x))
    assert not torch.allclose(adapter.delta(attn_output, x), adapter.delta(attn_output, x + 1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank=0 must be at least 1"),
        ({"alpha": 0.0}, "alpha=0.0 must be positive"),
        ({"dropout": 1.0}, "dropout=1.0 must be at least 0 and below 1"),
        ({"rnk": 4}, "lora: unknown option 'rnk'; did you mean 'rank'"),
    ],
)
def test_wrong_options_name_the_right_ones(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_attention_adapter(make_adapter("lora").base_attention, "lora", options)
    assert LoRAAdapterConfig().scaling == 2.0


def test_decoding_with_a_cache_equals_whole_passes() -> None:
    model = tiny_model()
    inject_adapters(model, plan("lora"))
    open_gates(model)
    prompt = torch.tensor([[1, 5, 3]])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    tokens = model.generate(prompt, use_cache=True, **options)
    assert torch.equal(tokens, model.generate(prompt, use_cache=False, **options))
    assert tokens.shape == (1, 9)
