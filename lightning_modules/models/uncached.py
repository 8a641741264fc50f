"""A key-value cache that keeps nothing: what training passes instead of none."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import DynamicCache


class Uncached(DynamicCache):
    """Says that nothing stands before the rows, and returns keys and values as they came.

    Without a cache, transformers compares the positions of every call on the device to find out
    whether rows are packed, and the host waits for the answer.
    """

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The keys and values of this call alone."""
        return key_states, value_states


def recomputes(model: nn.Module) -> bool:
    """Whether layers are under activation checkpointing, which takes a cache away and warns."""
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
