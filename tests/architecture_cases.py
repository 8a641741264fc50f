"""Tiny random models of every architecture, and the adapters that go into each of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from adapter_cases import KINDS, SLOTS, own_parameters
from gemma_cases import randomise
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lightning_modules.adapters import inject_adapters

VOCABULARY, WINDOW = 41, 5
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
"""float32 sums in another order (other matrix sizes) through two layers: about 50 ulp of 1."""

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": None,  # random models must not stop early
    "pad_token_id": 0,
}
WINDOWS = {
    "sliding_window": WINDOW,  # shorter than every sequence of the tests
    "layer_types": ["sliding_attention", "full_attention"],
}

ARCHITECTURES: dict[str, Callable[[], PreTrainedModel]] = {
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SIZES)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, **WINDOWS, query_pre_attn_scalar=16, attn_logit_softcapping=50.0)
    ),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**SIZES, **WINDOWS, query_pre_attn_scalar=16)
    ),
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZES, tie_word_embeddings=True)  # as its small sizes do
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, tie_word_embeddings=True)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False)),
    "mistral": lambda: MistralForCausalLM(
        MistralConfig(**SIZES, sliding_window=WINDOW, tie_word_embeddings=False)
    ),
}


class AdapterCase(NamedTuple):
    """An adapter as every architecture gets it in all layers.

    Attributes:
        adapter_type: registered name.
        options: what `create_attention_adapter` takes.
        zero: options with which it adds exactly nothing; None if it starts like that anyway.
        carries_state: whether it has fast weights.
        idle: shell patterns of parameters that take no part, e.g. of members not switched on.
        causal: whether it can only be causal, which the action expert of pi0 is not.
        one_graph: whether `torch.compile` sees all of it; LaCT's loop over chunks it leaves alone.
    """

    adapter_type: str
    options: dict[str, Any] | None = None
    zero: dict[str, Any] | None = None
    carries_state: bool = False
    idle: tuple[str, ...] = ()
    causal: bool = False
    one_graph: bool = True


MINI_BATCH = 4
IDLE = {
    "switch": ("*.members.fast.*", "*.members.low.*"),
    "nested": ("*.either.members.other.*",),
}
"""Members of `adapter_cases.KINDS` that are switched off."""
_LACT = {
    "memory": {"num_lact_heads": 2, "r": 2, "residual_ttt": True},
    "update": {"lact_chunk_size": MINI_BATCH},
}
_LAYER = {"num_heads": 2, "causal": True, "mini_batch_size": MINI_BATCH}

ADAPTERS: dict[str, AdapterCase] = {
    "noop": AdapterCase("noop"),
    "ttt": AdapterCase("ttt", {"layer": _LAYER}, {"layer": _LAYER, "alpha_init": 0.0}, True),
    "ttt_mlp": AdapterCase(
        "ttt",
        {"ttt_mode": "parallel_attn", "layer": {**_LAYER, "kind": "mlp"}},
        {"ttt_mode": "parallel_attn", "layer": {**_LAYER, "kind": "mlp"}, "alpha_init": 0.0},
        True,
    ),
    "lact": AdapterCase(
        "lact", _LACT, {**_LACT, "alpha_init": 0.0}, True, causal=True, one_graph=False
    ),
    **{
        kind: AdapterCase(
            spec["adapter_type"],
            spec["adapter_config"],
            carries_state=bool(SLOTS[kind]),
            idle=IDLE.get(kind, ()),
        )
        for kind, spec in KINDS.items()
    },
}

STATEFUL = [(architecture, "ttt") for architecture in ARCHITECTURES] + [
    ("gemma3", name) for name, case in ADAPTERS.items() if case.carries_state and name != "ttt"
]
"""(architecture, adapter): every architecture once, every adapter with fast weights once."""


def build_model(architecture: str, attention: str = "sdpa", seed: int = 0) -> PreTrainedModel:
    """A random model without adapters, eval mode, float32, nothing at a special value."""
    torch.manual_seed(seed)
    model = randomise(ARCHITECTURES[architecture](), seed, scale=0.1)
    model.tie_weights()
    if model._supports_sdpa:  # Gemma2 (soft-capped logits) has eager and flex attention only
        model.set_attn_implementation(attention)
    return model.eval()


def adapt_model(model: PreTrainedModel, case: AdapterCase, seed: int = 1) -> PreTrainedModel:
    """Put the adapter into every layer, its parameters random: it does something."""
    torch.manual_seed(seed)
    disturb(inject_adapters(model, [("*", case.adapter_type, case.options)]), seed)
    return model


@torch.no_grad()
def disturb(adapters: Mapping[str, nn.Module], seed: int = 1) -> None:
    """Add noise to every parameter that belongs to the adapters."""
    generator = torch.Generator().manual_seed(seed)
    for adapter in adapters.values():
        for parameter in own_parameters(adapter).values():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.2 * noise.to(parameter))


def adapted_model(architecture: str, case: AdapterCase, attention: str = "sdpa") -> PreTrainedModel:
    """`build_model` and `adapt_model`."""
    return adapt_model(build_model(architecture, attention), case)


def assert_every_parameter_learns(model: nn.Module, case: AdapterCase) -> None:
    """After a backward: gradients in all the adapter added, but for what is switched off."""
    own = own_parameters(model)
    assert bool(own) == (case.adapter_type != "noop")
    still = {name for name, p in own.items() if p.grad is None or not p.grad.abs().max() > 0}
    idle = {name for name in own if any(fnmatchcase(name, pattern) for pattern in case.idle)}
    assert still == idle, f"no gradient: {still - idle}; a gradient where none was meant: {idle}"
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    """Random token ids `[rows, length]`, without padding and special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (rows, length), generator=generator)
