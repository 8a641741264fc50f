"""Fast weights in `generate()`: a key-value cache that carries the fast state beside the keys."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig

from lightning_modules.layers.deep_context import refuse_missed
from lightning_modules.streams import FastState, Slots


class FastStateCache(DynamicCache):
    """Keys and values, and what the fast weights of the same rows have learned.

    `model.generate(..., past_key_values=FastStateCache(model.config))` reads the prompt once and
    decodes token by token; adapters take their state from the cache and leave the next one there
    (see `BaseAttentionAdapter`), whatever their state is made of; a LaCT model makes such a cache
    itself, and has nothing else in it. A call of the model with both, `fast_state=` and such a
    cache, uses `fast_state` and leaves the cache's state alone.

    Generate again with the same cache and the longer sequence to continue; `copy.deepcopy` of a
    cache starts several continuations from one prompt. Beams, repeated and selected rows take
    their fast state with them. What was read cannot be unread: methods that propose tokens and
    take some back (assisted decoding, prompt lookup) end in an error, see `crop`. A row that
    finishes early reads padding until the last one does, with its fast weights as with its keys:
    do not continue such a row.

    Attributes:
        fast_state: handle with which the next call begins.
        tokens_read: length of what was read, as counted by a model without keys and values here.

    Args:
        config: of the model, or of its decoder; says which layers attend to a sliding window.
        slots: fast state with which the first row of tokens is read, slot -> field -> `[B, ...]`:
            `StreamState.slots(...)`, `slots` of another cache, or what another run has read:
            `StreamMemory.load(path, model).rows(B, model.device)`. None starts fresh.
        adapt: False reads the fast state without writing.
    """

    def __init__(
        self, config: PretrainedConfig, *, slots: Slots | None = None, adapt: bool = True
    ) -> None:
        if not isinstance(config, PretrainedConfig):
            raise TypeError(
                f"config is a {type(config).__name__}; pass the model's: "
                "FastStateCache(model.config, slots=...)"
            )
        super().__init__(config=config)
        self.fast_state = FastState(slots, adapt=adapt)
        self.tokens_read = 0
        self._constants: dict[str, Any] = {}

    def constant(self, name: str, compute: Callable[[], Any]) -> Any:
        """What depends on weights alone (keys of a memory bank): computed once for this cache."""
        if name not in self._constants:
            self._constants[name] = compute()
        return self._constants[name]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far, also by a model that leaves no keys and values here."""
        return max(super().get_seq_length(layer_idx), self.tokens_read)

    @property
    def slots(self) -> Slots:
        """What was learned so far, slot -> field -> `[B, ...]`; `FastState(slots)` goes on."""
        return self.fast_state.outgoing

    @property
    def is_croppable(self) -> bool:
        """Whether tokens can be taken back: only while no fast weights have read them."""
        return super().is_croppable and self.fast_state.rows is None

    def reset(self) -> None:
        """Forget keys, values and fast state: every row is fresh."""
        super().reset()
        self.fast_state = FastState(adapt=self.fast_state.adapt)
        self.tokens_read = 0
        self._constants.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes what row `beam_idx[i]` was; beam_idx int64 `[B]`."""
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, copies side by side (`num_beams`)."""
        super().batch_repeat_interleave(repeats)
        if (rows := self.fast_state.rows) is not None:
            self._select(torch.arange(rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows; indices int64 `[n]` or bool `[B]`."""
        super().batch_select_indices(indices)
        if (rows := self.fast_state.rows) is not None:
            self._select(torch.arange(rows, device=indices.device)[indices])

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens; 0 is always allowed.

        Raises:
            ValueError: fast weights have read the tokens. Their steps cannot be undone.
        """
        if tokens_to_remove != 0 and self.fast_state.rows is not None:
            raise ValueError(
                f"cannot take back {abs(tokens_to_remove)} tokens: the fast weights have read "
                "them, and cannot unread. Assisted decoding and prompt lookup do not work with "
                "fast state; sampling, greedy and beam search do. To go back, keep a "
                "copy.deepcopy of the cache from before"
            )
        super().crop(tokens_to_remove)

    def _select(self, rows: Tensor) -> None:
        def select(value: Tensor) -> Tensor:
            return value.index_select(0, rows.to(value.device))

        self.fast_state = self.fast_state.map(select)

    def __repr__(self) -> str:
        slots: Any = list(self.slots) or "fresh"
        return f"{type(self).__name__}(layers={self.layers}, fast_state={slots})"


def state_of(cache: Any, rows: int) -> FastState:
    """The fast state that a cache carries, for a batch of so many rows.

    Raises:
        ValueError: it is of another number of rows.
    """
    known = cache.fast_state.rows
    if known not in (None, rows):
        raise ValueError(
            f"the cache holds fast state of {known} rows, but the batch has {rows}: repeat "
            "them (cache.batch_repeat_interleave(num_beams)), select them "
            "(cache.batch_select_indices), or use another cache"
        )
    return cache.fast_state


def check_nothing_missed(cache: Any, layer: int, who: str) -> None:
    """Raise if a cache without fast state holds tokens that a memory would have to know.

    Args:
        cache: keys and values.
        layer: number of the layer in it.
        who: would have to know them, for the message.

    Raises:
        ValueError: it holds some.
    """
    refuse_missed(int(cache.get_seq_length(layer)), who)
