"""Merging against the unmerged model, with peft's own LoRA; what cannot be merged says why."""

from typing import Any

import pytest
import torch
from adapter_cases import KINDS, LORA, NOOP, PAIR, TOKENS, member, plan, tiny_model, ttt
from gemma_cases import randomise
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from lightning_modules.adapters import inject_adapters, merge_adapters, unmerge_adapters

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
NOOPS = member("parallel", members={"a": NOOP, "b": member("switch", members={"c": NOOP})})
LAYERS = [f"model.layers.{i}.self_attn" for i in range(3)]


def _with_lora(
    kind: dict[str, Any] | None = NOOP, dtype: torch.dtype = torch.float32, **options: Any
) -> nn.Module:
    """A tiny model with peft's LoRA (random A and B), and adapters on top."""
    model = tiny_model().to(dtype)
    config = LoraConfig(r=2, lora_alpha=8, **{"target_modules": TARGETS, **options})
    inject_adapter_in_model(config, model)
    lora = [p for name, p in model.named_parameters() if "lora_" in name]
    randomise(nn.ParameterList(lora))
    if kind is not None:
        inject_adapters(model, plan(kind))
    return model.to(dtype).eval()


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def _same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)


@pytest.mark.quick("*-options0", "None-options2")
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}])
@pytest.mark.parametrize("kind", [NOOP, NOOPS, None])
def test_merged_equals_unmerged_and_unmerge_restores_to_1e_5(
    kind: dict[str, Any] | None, options: dict[str, Any]
) -> None:
    model = _with_lora(kind, **options)
    before, expected = _weights(model), model(TOKENS).logits
    paths = merge_adapters(model)
    inside = "" if kind is None else ".base_attention"
    assert paths == [
        *([] if kind is None else LAYERS),
        *(f"{path}{inside}.{target}" for path in LAYERS for target in TARGETS),
    ]
    merged = _weights(model)
    changed = [name for name in before if not torch.equal(merged[name], before[name])]
    assert changed == [name for name in before if name.endswith("base_layer.weight")]
    for name, value in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            value.data.zero_()  # what is merged is in the weights alone
    torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
    model.load_state_dict(merged)
    assert unmerge_adapters(model) == paths
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-5)
    torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_comes_back_to_its_own_rounding_only() -> None:
    model = _with_lora(dtype=torch.bfloat16)
    before = _weights(model)
    merge_adapters(model)
    merged = _weights(model)
    unmerge_adapters(model)
    errors = []
    for name, value in model.state_dict().items():
        errors.append((value - before[name]).abs().max().float().item())
        largest = max(merged[name].abs().max(), before[name].abs().max()).float().item()
        assert errors[-1] <= 2**-7 * largest, name  # two roundings of 2^-9 each, and the update's
    assert max(errors) > 1e-5, "bfloat16 would restore exactly: the note in unmerge is wrong"


def test_noops_alone_merge_to_the_base_bit_for_bit() -> None:
    model = tiny_model()
    expected = model(TOKENS).logits
    inject_adapters(model, plan(NOOPS))
    before = _weights(model)
    assert merge_adapters(model) == LAYERS and _same(model, before)
    assert unmerge_adapters(model) == LAYERS and _same(model, before)
    assert torch.equal(model(TOKENS).logits, expected)


@pytest.mark.parametrize("kind", [NOOP, NOOPS, None])
def test_merging_or_unmerging_twice_is_an_error_and_changes_nothing(kind: Any) -> None:
    model = _with_lora(kind)
    with pytest.raises(ValueError, match="is not merged: call merge_adapters first"):
        unmerge_adapters(model)
    merge_adapters(model)
    before = _weights(model)
    with pytest.raises(ValueError, match="is merged already: call unmerge_adapters first"):
        merge_adapters(model)
    assert _same(model, before)
    unmerge_adapters(model)
    merge_adapters(model)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (LORA, "input of attention, but .* o_proj, whose input is another.*peft's LoRA"),
        (ttt(), "weights of TTT depend on the data"),
        (KINDS["parallel"], "member 'fast': the weights of TTT"),
        (KINDS["series"], "member 'low': its branch reads the input"),
        (member("switch", members={"no": NOOP, **PAIR}), "member 'fast': the weights of TTT"),
        (KINDS["routed"], "member 'fast': the weights of TTT"),
        (KINDS["nested"], "member 'mix': member 'chain': member 'low': its branch"),
    ],
)
def test_what_cannot_be_exact_says_why_and_nothing_is_changed(kind: Any, message: str) -> None:
    model = _with_lora(None)
    inject_adapters(model, [([0, 1], "noop", None), (2, *plan(kind)[0][1:])])
    before = _weights(model)
    with pytest.raises(ValueError, match=rf"layers\.2\.self_attn cannot .*{message}.*Nothing was"):
        merge_adapters(model)
    assert _same(model, before)
    with pytest.raises(ValueError, match="is not merged"):
        unmerge_adapters(model)


def test_layers_of_peft_that_cannot_be_exact_say_why_and_nothing_is_changed() -> None:
    cases = [
        (
            _with_lora(target_modules=["q_proj", "embed_tokens"]),
            "peft's Embedding of a Gemma.*Embedding",
        ),
        (_with_lora(lora_bias=True), "lora_bias needs a bias"),
        (_with_lora(target_modules=["lm_head"]), r"shared \(Gemma.*Embedding, Linear\)"),
        (_with_lora(), "adapters are disabled"),
    ]
    for module in cases[-1][0].modules():
        if isinstance(module, BaseTunerLayer):
            module.enable_adapters(False)
    for model, message in cases:
        before = _weights(model)
        with pytest.raises(ValueError, match=message):
            merge_adapters(model)
        assert _same(model, before)


def test_only_the_active_adapter_of_peft_is_merged() -> None:
    model = get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["q_proj"]))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj"]))
    randomise(nn.ParameterList([p for n, p in model.named_parameters() if "lora_" in n]))
    model.set_adapter("second")
    inject_adapters(model, [("*", "noop")])
    expected = model(TOKENS).logits
    paths = merge_adapters(model)
    assert sum(path.endswith("v_proj") for path in paths) == 3
    assert not any(path.endswith("q_proj") for path in paths)
    torch.testing.assert_close(model(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
    assert unmerge_adapters(model) == paths


def test_a_model_without_anything_to_merge_says_so() -> None:
    with pytest.raises(ValueError, match="nothing to merge"):
        merge_adapters(tiny_model())
    with pytest.raises(ValueError, match="nothing to unmerge"):
        unmerge_adapters(tiny_model())
