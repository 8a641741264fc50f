"""What a LaCT call begins with, and the state that it leaves, whatever the backend."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_modules.ops.lact.layout import Counts, Even, Uneven
from lightning_modules.ops.lact.memory import Memory, carried_memory, choose, state_fields
from lightning_modules.ops.lact.shared import Shared
from lightning_modules.ops.states import LaCTState

Layout = Even | Uneven | Shared


def begin(
    state: LaCTState | None, layout: Layout, learned: Memory, count: int
) -> tuple[Memory, list[Tensor] | None]:
    """The memory that the rows go on with, and the `count` kinds of tokens that wait, if any do."""
    if state is None or not layout.carries:
        return learned, None
    memory = carried_memory(state, learned)
    if layout.fresh is not None:
        memory = choose(layout.fresh, learned, memory)
    return memory, _held(state, count)


def end(
    memory: Memory,
    learned: Memory,
    layout: Layout,
    tokens: Sequence[Tensor],
    held: Sequence[Tensor] | None,
    rates: torch.Size,
    blank: bool,
) -> LaCTState:
    """The state after a call.

    Args:
        memory: after it.
        learned: with which documents begin.
        layout: of the call.
        tokens: of the call, `[B, T, H, E]` each: k, v, rates and perhaps coefficients.
        held: those that waited before it.
        rates: shape of the rates of a head.
        blank: rows that have seen nothing are zero.
    """
    dtype = memory.weights[0].dtype
    before = [None] * len(tokens) if held is None else held
    fields = state_fields(memory, learned, len(tokens[0]))
    fields += [layout.pending(x, y, dtype) for x, y in zip(tokens, before, strict=True)]
    return _state(fields, layout.counts, rates, blank)


def _held(state: LaCTState, count: int) -> list[Tensor]:
    """The tokens that a state left pending, `[B, C, H, E]` each, in the order of the call's."""
    lr, momentum = state.pending_lr.flatten(3), state.pending_momentum.unsqueeze(-1)
    return [state.pending_k, state.pending_v, lr, momentum][:count]


def _state(fields: list[Tensor], counts: Counts, rates: torch.Size, blank: bool) -> LaCTState:
    """The state of these real-valued fields; zero in rows that have seen nothing, if blank."""
    *weights, k, v, lr = fields[:15]
    momentum = fields[15] if len(fields) > 15 else k[:, :0, :, :1]
    real = [*weights, k, v, lr.unflatten(3, rates), momentum.squeeze(-1)]
    if blank:
        nothing = counts.tokens_seen == 0
        real = [x.masked_fill(nothing.view(-1, *[1] * (x.dim() - 1)), 0) for x in real]
    return LaCTState(*[*real, *counts])
