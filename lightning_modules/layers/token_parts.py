"""Rows of tokens that processes share: where the own part stands, and what its neighbours leave.

Every process of a group has the p-th of P parts of each row, all of T tokens. What a part needs of
earlier ones is what a later call needs of earlier calls: the newest tokens. So each process tells
the others its last ones, and begins its part with the state that the tokens before it leave.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from lightning_modules.layers.documents import last_document
from lightning_modules.layers.rope import document_positions
from lightning_modules.ops.processes import gather_flags, gather_from, own_part


class TokenParts(NamedTuple):
    """The own part of every row among the parts of the others.

    Attributes:
        positions: number of every own token in its document, `[B, T]`.
        real: real tokens of each part, `[P, B]`.
        newest: own real tokens, the last one last, as indices `[B, T]` (the first T minus their
            number arbitrary); None: all are real.
        seen: real tokens of the document before each part and after the last, `[P + 1, B]`.
        document_id: of that document, likewise.
        group: the processes.
    """

    positions: Tensor
    real: Tensor
    newest: Tensor | None
    seen: Tensor
    document_id: Tensor
    group: ProcessGroup


def find_parts(
    x: Tensor,
    mask: Tensor | None,
    document_ids: Tensor | None,
    state: Any | None,
    group: ProcessGroup,
) -> TokenParts:
    """Place the own tokens in their rows; mask and documents are exchanged.

    Args:
        x: own tokens, `[B, T, ...]`.
        mask: real ones, bool `[B, T]`; None on all processes: all.
        document_ids: `[B, T]`; None on all processes: one document.
        state: before the rows, with `tokens_seen` and `document_id` `[B]`; None: nothing was read.
        group: the processes.
    """
    (rows, time), world = x.shape[:2], group.size()
    whole_mask, ids = gather_flags(mask, document_ids, group)
    row = x.new_empty(rows, world * time)
    positions = document_positions(row, whole_mask, ids, state).expand(rows, -1)
    real = torch.ones_like(row, dtype=torch.bool) if whole_mask is None else whole_mask
    after = positions + real
    begun = positions.new_zeros(rows) if state is None else state.tokens_seen
    seen = [begun, *after[:, time - 1 :: time].unbind(1)]
    known = last_document(x, None, None, state)
    documents = [known, *(_document(row, real, ids, state, time * n) for n in range(1, world + 1))]
    return TokenParts(
        positions=positions[:, own_part(time, group)],
        real=real.unflatten(1, (world, time)).sum(2).T,
        newest=None if mask is None else torch.argsort(mask.byte(), dim=1, stable=True),
        seen=torch.stack(seen),
        document_id=torch.stack(documents),
        group=group,
    )


def _document(
    row: Tensor, real: Tensor, ids: Tensor | None, state: Any | None, length: int
) -> Tensor:
    own = None if ids is None else ids[:, :length]
    return last_document(row[:, :length], real[:, :length], own, state)


def newest_tokens(x: Tensor, before: Tensor, parts: TokenParts) -> tuple[Tensor, Tensor]:
    """The newest S real tokens before the own part, and after all parts, `[B, S, ...]` each.

    Args:
        x: own tokens, `[B, T, ...]`.
        before: the newest S before the rows, the last one last, `[B, S, ...]`.
        parts: where they are.
    """
    slots = before.shape[1]
    if not slots:
        return before, before
    count = min(slots, x.shape[1])
    if parts.newest is not None:
        x = _pick(x, parts.newest)
    tails = gather_from(x[:, x.shape[1] - count :].to(before.dtype), parts.group)
    found = [before, *_appended(before, tails, parts.real.clamp(max=count))]
    # Chosen from the stack: all processes answer the same message in the backward pass.
    return torch.stack(found)[parts.group.rank()], found[-1]


def _appended(before: Tensor, tails: Tensor, counts: Tensor) -> Iterator[Tensor]:
    """What remains of the newest S after the last `counts [P, B]` of each tail `[P, B, K, ...]`."""
    slots, place = before.shape[1], torch.arange(before.shape[1], device=before.device)
    for tail, count in zip(tails, counts, strict=True):
        is_new = place >= slots - count.unsqueeze(1)
        column = torch.where(is_new, tail.shape[1] + place, place + count.unsqueeze(1))
        before = _pick(torch.cat([before, tail], dim=1), column)
        yield before


def _pick(x: Tensor, columns: Tensor) -> Tensor:
    """The tokens `columns [B, N]` of x `[B, T, ...]`, `[B, N, ...]`."""
    index = columns.view(*columns.shape, *[1] * (x.dim() - 2))
    return x.gather(1, index.expand(-1, -1, *x.shape[2:]))


def only_newest(x: Tensor, count: Tensor) -> Tensor:
    """x `[B, S, ...]`, 0 but for the last `count [B]`."""
    place = torch.arange(x.shape[1], device=x.device)
    absent = place < x.shape[1] - count.unsqueeze(1)
    return x.masked_fill(absent.view(*absent.shape, *[1] * (x.dim() - 2)), 0)
