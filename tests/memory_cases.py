"""Tiny models with a memory bank that does something, under every routing strategy."""

from __future__ import annotations

from typing import Any

import torch
from architecture_cases import build_model
from torch import Tensor
from transformers import PreTrainedModel

from lightning_modules.adapters import as_config
from lightning_modules.models.memory import BANKS, inject_memory, memory_layers
from lightning_modules.models.memory_options import MemoryOptions

CAUSAL = ("token", "block", "rolling", "prompt")
ROWS, CHAPTERS, BLOCK = 24, 6, 4


def memory_options(strategy: str | None = "block", **changes: Any) -> MemoryOptions:
    """A bank of 24 rows for both layers; `router`, `bank`, `attention` change parts of it."""
    router = {
        "num_chapters": CHAPTERS,
        "top_k": 2,
        "strategy": strategy,
        "block_size": BLOCK,
        "window": 3,
        "allow_non_causal": True,
        **changes.pop("router", {}),
    }
    memory = {
        "bank": {"num_rows": ROWS, **changes.pop("bank", {})},
        "attention": {"num_heads": 2, **changes.pop("attention", {})},
        "router": None if strategy is None else router,
        **changes.pop("memory", {}),
    }
    return as_config(MemoryOptions, {"memory": memory, **changes}, "memory")


def add_memory(model: PreTrainedModel, options: MemoryOptions, seed: int = 1) -> PreTrainedModel:
    """Inject, and leave no parameter at a special value."""
    inject_memory(model, options)
    generator = torch.Generator().manual_seed(seed)
    for parameter in memory_parameters(model):
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data += 0.5 * noise.to(parameter.dtype)
    return model


def memory_parameters(model: PreTrainedModel) -> list[torch.nn.Parameter]:
    modules = [*getattr(model, BANKS, ()), *(layer.memory for _, layer in memory_layers(model))]
    return list({id(p): p for module in modules for p in module.parameters()}.values())


def memory_model(
    strategy: str | None = "block", architecture: str = "llama", **changes: Any
) -> PreTrainedModel:
    """A float64 model whose memory does something, eval mode."""
    model = build_model(architecture).double()
    return add_memory(model, memory_options(strategy, **changes)).eval()


def logits(model: PreTrainedModel, ids: Tensor, **context: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, **context).logits
