"""Keys and values of the prefix (images and instruction), computed once and read many times.

transformers' own cache is changed by every call: the action expert appends its tokens, which the
sampler crops again after each Euler step, and which a recomputed layer would append twice. These
two never change what they hold once it is there, so layers may be recomputed and a prefix reused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer


class _RecordedLayer(DynamicLayer):
    """Keeps the first keys and values that it sees, and gives back those of the call."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
        return key_states, value_states


class _PrefixLayer(DynamicLayer):
    """Gives back its keys and values with those of the call behind them, and keeps its own."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        keys = torch.cat([self.keys.to(key_states.dtype), key_states], dim=-2)
        values = torch.cat([self.values.to(value_states.dtype), value_states], dim=-2)
        return keys, values


class PrefixRecorder(Cache):
    """Cache for the pass over the prefix: it only records."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=_RecordedLayer)

    def prefix(self) -> PrefixCache:
        """What was recorded, to be read.

        Raises:
            RuntimeError: nothing was: the model did not use the cache.
        """
        if self.get_seq_length() == 0:
            raise RuntimeError(
                "the vision-language model kept nothing in its cache, so actions would not see "
                "the images: this version of transformers drops the cache under gradient "
                "checkpointing; set pi0.gradient_checkpointing to false"
            )
        return PrefixCache(self)


class PrefixCache(Cache):
    """Cache for the action expert: it only reads, and can be read any number of times."""

    def __init__(self, recorded: PrefixRecorder) -> None:
        super().__init__(
            layers=[_PrefixLayer(layer.keys, layer.values) for layer in recorded.layers]
        )
