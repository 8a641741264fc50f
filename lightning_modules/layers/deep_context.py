"""What a call of a decoder layer tells the modules deep inside, which get no keywords."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from lightning_modules.streams import FastState


class DeepContext:
    """Fast state, mask and documents of the call that a decoder layer is in.

    A layer hands keywords to its attention alone; its linear maps and its MLP are called with
    their input and nothing else. A hook on attention, which comes first in the layer and runs
    again when activation checkpointing recomputes the layer, fills this in; the modules of the
    same layer look here.

    Attributes:
        fast_state: handle of the chunk; None: the call belongs to no stream.
        mask: tokens that exist, bool `[B, T]`; None: all.
        document_ids: `[B, T]`; None: one document.
        missed: tokens in a key-value cache that carries no fast state.
        computed: what modules leave for others in the call, by name. No counter of calls: each
            would be a reason for `torch.compile` to compile again.
    """

    def __init__(self) -> None:
        self.clear()

    def enter(
        self,
        fast_state: FastState | None = None,
        mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        missed: int = 0,
    ) -> None:
        """Begin a call of the layer."""
        self.fast_state, self.mask, self.document_ids = fast_state, mask, document_ids
        self.missed = missed
        self.computed = {}

    def clear(self) -> None:
        """Let go of the tensors of the last call."""
        self.fast_state: FastState | None = None
        self.mask: Tensor | None = None
        self.document_ids: Tensor | None = None
        self.missed = 0
        self.computed: dict[str, Any] = {}

    def __reduce__(self) -> tuple[type[DeepContext], tuple[()]]:
        """Copied and pickled models take nothing of a call along: its tensors have a graph."""
        return DeepContext, ()

    def state_for(self, who: str) -> FastState | None:
        """The fast state, for a module whose output depends on what was read before.

        Args:
            who: the module, for the message.

        Raises:
            ValueError: it has not read what is in the cache of keys and values.
        """
        refuse_missed(self.missed, f"the fast weights of {who}")
        return self.fast_state


class InDeepContext:
    """Marks modules that look into the context of their layer, and so need its hooks."""


def looks_into_context(model: nn.Module) -> bool:
    """Whether a model has such modules."""
    return any(isinstance(module, InDeepContext) for module in model.modules())


def refuse_missed(missed: int, who: str) -> None:
    """Raise ValueError if a cache without fast state holds tokens that a memory has not read.

    Args:
        missed: how many.
        who: would have to know them, for the message.
    """
    if missed > 0:
        raise ValueError(
            f"the key-value cache holds {missed} tokens that {who} would not know: generate "
            "with past_key_values=FastStateCache(model.config) from lightning_modules.generation, "
            "or pass fast_state="
        )
