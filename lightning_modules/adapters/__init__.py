"""Attention adapters: what a wrapper around an attention module adds to its output.

A new adapter is one file: a frozen dataclass of options and a subclass of `BaseAttentionAdapter`
under `@register_attention_adapter("name")`, imported here.
"""

from lightning_modules.adapters.base import BaseAttentionAdapter
from lightning_modules.adapters.compose import (
    CompositeAdapter,
    CompositeConfig,
    MemberSpec,
    ParallelAdapter,
    SeriesAdapter,
)
from lightning_modules.adapters.inject import (
    AdapterSpec,
    base_state_dict,
    inject_adapters,
    parameter_group,
    remove_adapters,
)
from lightning_modules.adapters.lact import LaCTAdapterConfig, LaCTAttentionAdapter
from lightning_modules.adapters.lora import LoRAAdapterConfig, LoRAAttentionAdapter
from lightning_modules.adapters.merge import merge_adapters, unmerge_adapters
from lightning_modules.adapters.noop import NoOpAttentionAdapter, NoOpConfig
from lightning_modules.adapters.plan import complete_spec, lay_out, read_plan, store_plan
from lightning_modules.adapters.registry import (
    as_config,
    create_attention_adapter,
    register_attention_adapter,
)
from lightning_modules.adapters.routed import RoutedAdapter, RoutedConfig
from lightning_modules.adapters.switch import (
    SwitchAdapter,
    SwitchConfig,
    active_adapter,
    set_active,
)
from lightning_modules.adapters.ttt import TTTAdapterConfig, TTTAttentionAdapter

__all__ = [
    "AdapterSpec",
    "BaseAttentionAdapter",
    "CompositeAdapter",
    "CompositeConfig",
    "LaCTAdapterConfig",
    "LaCTAttentionAdapter",
    "LoRAAdapterConfig",
    "LoRAAttentionAdapter",
    "MemberSpec",
    "NoOpAttentionAdapter",
    "NoOpConfig",
    "ParallelAdapter",
    "RoutedAdapter",
    "RoutedConfig",
    "SeriesAdapter",
    "SwitchAdapter",
    "SwitchConfig",
    "TTTAdapterConfig",
    "TTTAttentionAdapter",
    "active_adapter",
    "as_config",
    "base_state_dict",
    "complete_spec",
    "create_attention_adapter",
    "inject_adapters",
    "lay_out",
    "merge_adapters",
    "parameter_group",
    "read_plan",
    "register_attention_adapter",
    "remove_adapters",
    "set_active",
    "store_plan",
    "unmerge_adapters",
]
