"""Padding and packing in language models, against every row or document read alone."""

import copy
from typing import Any

import pytest
import torch
from architecture_cases import ADAPTERS, ARCHITECTURES, STATEFUL, adapted_model, build_model, tokens
from torch import Tensor, nn
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
    SiglipVisionConfig,
)

from lightning_modules.adapters import inject_adapters, remove_adapters
from lightning_modules.adapters.token_mask import TokenMaskHook
from lightning_modules.generation import FastStateCache
from lightning_modules.streams import FastState

LENGTHS = (11, 4, 7)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
"""float32 sums in another order (other matrix sizes); float64 below is tight."""
TIGHT = {"rtol": 1e-6, "atol": 1e-6}
"""Norms and rotary angles of the stock models are float32 in float64 models too."""


def _left_padded(lengths: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor]:
    ids, size = tokens(len(lengths), max(lengths)), max(lengths)
    mask = torch.arange(size) >= size - torch.tensor(lengths).unsqueeze(1)
    return ids.masked_fill(~mask, 0), mask.long()


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


def _hooks(model: nn.Module) -> list[str]:
    return [
        path
        for path, module in model.named_modules()
        if any(isinstance(hook, TokenMaskHook) for hook in module._forward_pre_hooks.values())
    ]


@pytest.mark.quick("*-llama-ttt", "dtype0-gemma3-lact", "dtype1-gemma3-routed", "dtype1-gemma2-ttt")
@pytest.mark.parametrize(("architecture", "adapter"), STATEFUL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_of_left_padded_rows_equal_those_of_each_row_alone(
    architecture: str, adapter: str, dtype: torch.dtype
) -> None:
    model = adapted_model(architecture, ADAPTERS[adapter]).to(dtype)
    if dtype == torch.float64 and not model._supports_sdpa:
        pytest.skip("stock eager attention in float64 gives NaN for padding (a softmax in float32)")
    ids, mask = _left_padded()
    state = FastState.transient()
    together = model(
        ids, attention_mask=mask, position_ids=_positions(mask), fast_state=state
    ).logits
    for row, length in enumerate(LENGTHS):
        own = FastState.transient()
        alone = model(ids[row : row + 1, -length:], fast_state=own).logits
        close = CLOSE if dtype == torch.float32 else TIGHT
        torch.testing.assert_close(together[row : row + 1, -length:], alone, **close)
        for slot, fields in own.outgoing.items():
            for name, value in fields.items():
                torch.testing.assert_close(
                    state.outgoing[slot][name][row : row + 1], value, **close
                )


@pytest.mark.quick("llama-ttt", "gemma3-lact", "gemma3-top_1")
@pytest.mark.parametrize(("architecture", "adapter"), STATEFUL)
def test_tokens_generated_from_left_padded_rows_equal_those_of_each_row_alone(
    architecture: str, adapter: str
) -> None:
    model = adapted_model(architecture, ADAPTERS[adapter])
    ids, mask = _left_padded()
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    cache = FastStateCache(model.config)
    together = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
    for row, length in enumerate(LENGTHS):
        prompt = ids[row : row + 1, -length:]
        alone = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=FastStateCache(model.config),
            **options,
        )
        assert torch.equal(together[row, -6:], alone[0, -6:])


def test_wrong_variant_without_the_mask_padding_is_learned() -> None:
    model = adapted_model("llama", ADAPTERS["ttt"])
    ids, mask = _left_padded()
    options = {"attention_mask": mask, "position_ids": _positions(mask)}
    right = model(ids, **options).logits
    wrong = model(ids, **options, mask=torch.ones_like(mask).bool()).logits
    assert not torch.allclose(wrong[1, -4:], right[1, -4:], rtol=1e-2, atol=1e-2)


def _run(model: PreTrainedModel, form: str) -> Tensor:
    """The same padded batch, handed over in different ways."""
    ids, mask = _left_padded()
    real = mask.bool()
    given: dict[str, Any] = {"position_ids": _positions(mask)}
    if form == "given":
        given |= {"attention_mask": mask, "mask": real}
    elif form == "4d":
        causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        seen = causal & real[:, None, None, :]
        given |= {"attention_mask": seen, "mask": real}
    elif form == "embeddings":
        given |= {"attention_mask": mask, "inputs_embeds": model.get_input_embeddings()(ids)}
        return model(**given).logits[real]
    elif form == "positional":
        return model.lm_head(model.model(ids, mask, **given).last_hidden_state)[real]
    elif form == "bool":
        given["attention_mask"] = real
    elif form == "checkpointed":
        model.gradient_checkpointing_enable()
        return model.train()(ids, attention_mask=mask, **given).logits[real]
    return model(ids, **given).logits[real]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("form", ["4d", "embeddings", "positional", "bool", "checkpointed"])
def test_every_way_to_hand_over_the_mask_equals_giving_it(form: str) -> None:
    expected = _run(adapted_model("llama", ADAPTERS["ttt"]), "given")
    actual = _run(adapted_model("llama", ADAPTERS["ttt"]), form)
    torch.testing.assert_close(actual, expected, **CLOSE)


def test_packed_documents_equal_each_document_alone() -> None:
    model = adapted_model("llama", ADAPTERS["ttt"]).double()
    ids, lengths = tokens(1, 14), (6, 1, 7)
    documents = torch.repeat_interleave(torch.tensor([5, 3, 9]), torch.tensor(lengths)).unsqueeze(0)
    block = documents[:, None, :, None] == documents[:, None, None, :]
    positions = torch.cat([torch.arange(length) for length in lengths]).unsqueeze(0)
    packed = model(
        ids,
        attention_mask=block & torch.ones(14, 14, dtype=torch.bool).tril(),
        position_ids=positions,
        document_ids=documents,
    ).logits
    alone = [model(part).logits for part in ids.split(lengths, dim=1)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), **TIGHT)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_hook_on_the_decoder_while_adapters_are_in_and_none_after(
    architecture: str,
) -> None:
    model = build_model(architecture)
    inject_adapters(model, [(0, "noop", None)])
    inject_adapters(model, [(1, "noop", None)])
    twin = copy.deepcopy(model)
    for adapted in (model, twin):
        assert _hooks(adapted) == ["model"]
        remove_adapters(adapted)
        assert not _hooks(adapted) and not adapted.model._forward_pre_hooks_with_kwargs


def test_left_padded_rows_of_a_model_for_images_and_text_equal_each_row_alone() -> None:
    torch.manual_seed(0)
    text = ARCHITECTURES["gemma3"]().config
    sizes = {"hidden_size": 16, "intermediate_size": 16, "image_size": 8, "patch_size": 4}
    vision = SiglipVisionConfig(**sizes, num_hidden_layers=1, num_attention_heads=1)
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = Gemma3ForConditionalGeneration(config).eval()
    options = {**ADAPTERS["ttt"].options, "alpha_init": 2.0}
    inject_adapters(model, [("model.language_model.*", "ttt", options)])
    assert _hooks(model) == ["", "model", "model.language_model"]
    ids, mask = _left_padded()
    given = {"attention_mask": mask, "position_ids": _positions(mask)}
    together = model(ids, **given).logits
    model._forward_pre_hooks.clear()
    model.model._forward_pre_hooks.clear()  # the decoder alone sees a 4D mask: the wrong variant
    assert not torch.allclose(model(ids, **given).logits[1, -4:], together[1, -4:], **CLOSE)
    for row, length in enumerate(LENGTHS):
        alone = model(ids[row : row + 1, -length:]).logits
        torch.testing.assert_close(together[row : row + 1, -length:], alone, **CLOSE)


class Closed(nn.Module):
    """A decoder that takes a mask and no further keywords, and passes none down."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.layers, self.rotary_emb = model.model.layers, model.model.rotary_emb

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        positions = torch.arange(inputs_embeds.shape[1]).unsqueeze(0)
        rotary = self.rotary_emb(inputs_embeds, positions)
        for layer in self.layers:
            inputs_embeds = layer(inputs_embeds, position_embeddings=rotary)
        return inputs_embeds


def test_a_decoder_without_further_keywords_runs_as_before() -> None:
    model, x = Closed(build_model("llama")), torch.randn(2, 5, 32)
    expected = model(x, torch.ones(2, 5))
    inject_adapters(model, [("*", "noop", None)])
    assert not _hooks(model)
    assert torch.equal(model(x, torch.ones(2, 5)), expected)
