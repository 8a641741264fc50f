"""The adapter that adds nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_modules.adapters.base import BaseAttentionAdapter
from lightning_modules.adapters.registry import register_attention_adapter


@dataclass(frozen=True)
class NoOpConfig:
    """No options."""


@register_attention_adapter("noop", NoOpConfig)
class NoOpAttentionAdapter(BaseAttentionAdapter):
    """Attention as it is (bit-exact): the control of every comparison.

    Args:
        base_attention: see `BaseAttentionAdapter`.
        config: nothing.
    """

    def __init__(self, base_attention: nn.Module, config: NoOpConfig | None = None) -> None:
        super().__init__(base_attention)

    def delta(self, attn_output: Tensor, hidden_states: Tensor, **context: Any) -> None:
        """Nothing."""

    def merge_obstacle(self) -> None:
        """There is nothing to merge."""
