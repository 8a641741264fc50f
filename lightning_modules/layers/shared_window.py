"""Window attention over rows that processes share: each gets the keys of the window before it.

A process begins its part with the window that the tokens before it leave, so that attention is
that of a call that goes on in a row (`window_attention`). Of every part the last `Wn - 1` keys and
values are sent to all processes (without a window, all of them).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from lightning_modules.layers.token_parts import (
    TokenParts,
    find_parts,
    newest_tokens,
    only_newest,
)
from lightning_modules.layers.window_attention import (
    WindowPlan,
    WindowState,
    carried_columns,
    plan_window,
    window_attention,
)


class SharedWindow(NamedTuple):
    """What layers that read the same parts can share.

    Attributes:
        parts: where the own tokens stand.
        slots: S, columns that each part begins with.
        carried: columns of the state before the rows that are of use.
        plan: of the own tokens behind those.
    """

    parts: TokenParts
    slots: int
    carried: int
    plan: WindowPlan

    @property
    def positions(self) -> Tensor:
        """Number of every own token in its document, `[B, T]`."""
        return self.parts.positions


def plan_shared_window(
    x: Tensor,
    window: int | None,
    *,
    mask: Tensor | None,
    document_ids: Tensor | None,
    state: WindowState | None,
    group: ProcessGroup,
) -> SharedWindow:
    """As `plan_window`, for the own part of rows whose state before the first part is given."""
    rows, time = x.shape[:2]
    parts = find_parts(x, mask, document_ids, state, group)
    carried = 0 if state is None else carried_columns(state, window, rows)
    slots = carried + group.size() * time if window is None else window - 1
    rank = group.rank()
    columns = x.new_empty(rows, slots)
    before = WindowState(columns, columns, parts.seen[rank], parts.document_id[rank])
    plan = plan_window(x, window, mask=mask, document_ids=document_ids, state=before)
    return SharedWindow(parts, slots, carried, plan)


def shared_window_attention(
    q: Tensor, k: Tensor, v: Tensor, shared: SharedWindow, state: WindowState | None
) -> tuple[Tensor, WindowState]:
    """As `window_attention`, with the window after the last part on all processes.

    Args:
        q: own queries, rotated to `shared.positions`, `[B, T, H, D]`.
        k: own keys, likewise.
        v: own values, `[B, T, H, D]`.
        shared: from `plan_shared_window`, with the same state.
        state: before the rows; None starts fresh.
    """
    both = torch.cat([k, v], dim=-1)
    first = both.new_zeros(len(both), shared.slots, *both.shape[2:])
    if state is not None and shared.carried:
        held = torch.cat([state.keys, state.values], dim=-1)[:, -shared.carried :].to(both.dtype)
        first = torch.cat([first[:, shared.carried :], held], dim=1)
    before, after = newest_tokens(both, first, shared.parts)
    seen, document = shared.parts.seen, shared.parts.document_id
    begin = WindowState(*before.chunk(2, dim=-1), seen[0], document[0])
    out, _ = window_attention(q, k, v, shared.plan, begin)
    keys, values = only_newest(after, seen[-1]).chunk(2, dim=-1)
    return out, WindowState(keys, values, seen[-1], document[-1])
