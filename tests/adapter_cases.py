"""Adapters of every kind that combines others, and tiny decoders that carry them."""

from typing import Any

import torch
from gemma_cases import gemma_config, randomise
from torch import Tensor, nn
from transformers import GemmaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaAttention

from lightning_modules.adapters import BaseAttentionAdapter, create_attention_adapter

HIDDEN = 32
TOKENS = torch.arange(24).view(2, 12) % 17
QWEN3 = Qwen3Config(
    vocab_size=17,
    hidden_size=HIDDEN,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
)
MODELS = {
    "gemma": lambda: GemmaForCausalLM(gemma_config()),
    "qwen3": lambda: Qwen3ForCausalLM(QWEN3),
}


def member(adapter_type: str, **options: Any) -> dict[str, Any]:
    return {"adapter_type": adapter_type, "adapter_config": options}


def ttt(alpha_init: float = 0.0, kind: str = "linear", **options: Any) -> dict[str, Any]:
    """A causal TTT member; its gate is closed unless `alpha_init` says otherwise."""
    layer = {"kind": kind, "num_heads": 2, "causal": True, "mini_batch_size": 4}
    return member("ttt", alpha_init=alpha_init, layer=layer, **options)


LORA, NOOP = member("lora", rank=3), member("noop")
PAIR = {"fast": ttt(), "other": ttt(kind="mlp")}
KINDS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "parallel": member("parallel", members={**PAIR, "low": LORA, "nothing": NOOP}),
    "series": member("series", members={"low": LORA, **PAIR}),
    "switch": member("switch", members={**PAIR, "low": LORA}, active="other"),
    "routed": member("routed", members={**PAIR, "low": LORA, "nothing": NOOP}),
    "top_1": member("routed", members=PAIR, top_k=1, balance_coefficient=0.1, z_coefficient=0.1),
    "nested": member(
        "parallel",
        members={
            "mix": member(
                "routed",
                members={
                    "chain": member("series", members={"low": LORA, "fast": ttt()}),
                    "inner": member("routed", members=PAIR, balance_coefficient=0.2),
                    "either": member("switch", members=PAIR, active="fast"),
                },
                top_k=2,
                balance_coefficient=0.3,
                z_coefficient=0.1,
            ),
            "chain": member("series", members=PAIR),
        },
    ),
}
SLOTS = {
    "lora": [],
    "parallel": ["fast", "other"],
    "series": ["fast", "other"],
    "switch": ["other"],
    "routed": ["fast", "other"],
    "top_1": ["fast", "other"],
    "nested": [
        "mix/chain/fast",
        "mix/inner/fast",
        "mix/inner/other",
        "mix/either/fast",
        "chain/fast",
        "chain/other",
    ],
}
"""Members that carry state, by kind."""


def plan(kind: str | dict[str, Any]) -> list[tuple[Any, ...]]:
    """A plan that puts one kind around every attention module."""
    spec = KINDS[kind] if isinstance(kind, str) else kind
    return [("*", spec["adapter_type"], spec["adapter_config"])]


def tiny_model(name: str = "gemma") -> PreTrainedModel:
    torch.manual_seed(0)
    return MODELS[name]().eval()


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that belong to adapters, by name."""
    adapters = [(path, m) for path, m in module.named_modules() if _is_site(m)]
    return {
        f"{path}.{name}" if path else name: parameter
        for path, adapter in adapters
        for name, parameter in adapter.named_parameters()
        if not name.startswith("base_attention.")
    }


def _is_site(module: nn.Module) -> bool:
    return isinstance(module, BaseAttentionAdapter) and "base_attention" in module._modules


def open_gates(module: nn.Module, seed: int = 0) -> nn.Module:
    """Add noise to what the adapters added, so that nothing is at a special value."""
    randomise(nn.ParameterList(own_parameters(module).values()), seed)
    return module


def make_adapter(
    kind: str | dict[str, Any], seed: int = 0, dtype: torch.dtype = torch.float64
) -> BaseAttentionAdapter:
    """An adapter of a kind around a Gemma attention, everything random, with a slot."""
    spec = KINDS[kind] if isinstance(kind, str) else kind
    torch.manual_seed(seed)
    attention = GemmaAttention(gemma_config(), layer_idx=0)
    adapter = create_attention_adapter(attention, spec["adapter_type"], spec["adapter_config"])
    open_gates(adapter, seed)
    adapter.slot = "layer"
    return adapter.to(dtype).eval()


def inputs(batch: int = 2, length: int = 11, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Attention output and input of attention, float64 `[B, T, hidden]`."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, batch, length, HIDDEN)
    attn_output, hidden_states = torch.randn(shape, generator=generator, dtype=torch.float64)
    return attn_output, hidden_states
