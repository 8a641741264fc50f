"""Attention adapters: what a wrapper around an attention module adds to its output.

A new adapter is one file: a frozen dataclass of options and a subclass of `BaseAttentionAdapter`
under `@register_attention_adapter("name")`, imported here.
"""

from lightning_modules.adapters.base import BaseAttentionAdapter
from lightning_modules.adapters.inject import (
    AdapterSpec,
    base_state_dict,
    inject_adapters,
    remove_adapters,
)
from lightning_modules.adapters.noop import NoOpAttentionAdapter, NoOpConfig
from lightning_modules.adapters.registry import (
    create_attention_adapter,
    register_attention_adapter,
)
from lightning_modules.adapters.ttt import TTTAdapterConfig, TTTAttentionAdapter

__all__ = [
    "AdapterSpec",
    "BaseAttentionAdapter",
    "NoOpAttentionAdapter",
    "NoOpConfig",
    "TTTAdapterConfig",
    "TTTAttentionAdapter",
    "base_state_dict",
    "create_attention_adapter",
    "inject_adapters",
    "register_attention_adapter",
    "remove_adapters",
]
