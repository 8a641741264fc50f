"""Where every token of a batch goes: rows of tokens cut into mini-batches, and back.

Tokens come as `[B, S, H, E]` and are worked on as `[N, H, B, m, E]`: N mini-batches one after the
other, each of them one contiguous block of `H * B` small matrices. Two layouts share the functions
below. Without a `Grid`, all rows are cut alike (a reshape; the last mini-batch is filled up with
zeros). With a `Grid`, each row is cut on its own: masked tokens take no slot, a document starts a
mini-batch, and the tokens that a state left pending come first. The chunks of LaCT are
mini-batches in this file.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad


class Grid(NamedTuple):
    """Slots of the tokens of each row; the first `pending` tokens of a row are the state's.

    Attributes:
        slot: slot `(n * B + row) * m + i` of each token, -1 if it has none, `[B * S]`.
        token: the inverse, the token in each slot, -1 if it is empty, `[N * B * m]`.
        size: m, slots of a mini-batch.
        fill: tokens in each mini-batch, `[N, B]`.
        last: index of each row's last mini-batch, -1 if it has none, `[B]`.
        restart: mini-batches that begin another document than the one before, `[N, B]`;
            None without documents.
    """

    slot: Tensor
    token: Tensor
    size: int
    fill: Tensor
    last: Tensor
    restart: Tensor | None


class Progress(NamedTuple):
    """How far each row has come: the integer fields of the states, `[B]` each."""

    pending_count: Tensor
    tokens_seen: Tensor
    document_id: Tensor

    @classmethod
    def of(cls, state: Any | None, like: Tensor) -> "Progress":
        """The progress in a state, or that of rows that have seen nothing."""
        if state is not None:
            return cls(state.pending_count, state.tokens_seen, state.document_id)
        return cls(*(torch.zeros(like.shape[0], dtype=torch.int64, device=like.device),) * 3)


class MoveRows(torch.autograd.Function):
    """`out[i] = rows[index[i]]`, 0 where the index is -1; `inverse[index[i]] = i`.

    No row is read twice, so that the gradient moves rows back instead of adding them up: this is
    faster than the gradient of `index_select` and the same in every run.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(index, inverse)
        moved = rows.index_select(0, index.clamp(min=0))
        return moved.masked_fill_((index < 0).unsqueeze(-1), 0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        index, inverse = ctx.saved_tensors
        return MoveRows.apply(grad, inverse, index), None, None


def arrange(x: Tensor, size: int, grid: Grid | None) -> Tensor:
    """Tokens `[B, S, H, E]` as mini-batches `[N, H, B, m, E]` (a view), empty slots 0."""
    batch, time, *inner = x.shape
    if grid is not None:
        rows = MoveRows.apply(x.reshape(batch * time, -1), grid.token, grid.slot)
        return rows.view(-1, batch, size, *inner).permute(0, 3, 1, 2, 4)
    if time % size:
        x = pad(x, (0, 0, 0, 0, 0, -time % size))
    return x.reshape(batch, -1, size, *inner).permute(1, 3, 0, 2, 4)


def restore(x: Tensor, time: int, grid: Grid | None) -> Tensor:
    """The inverse of `arrange`: `[N, H, B, m, E]` as the last `time` tokens of each row."""
    _, heads, batch, _, inner = x.shape
    if grid is None:
        return x.permute(2, 0, 3, 1, 4).flatten(1, 2)[:, :time]
    rows = MoveRows.apply(
        x.permute(0, 2, 3, 1, 4).reshape(-1, heads * inner), grid.slot, grid.token
    )
    return rows.view(batch, -1, heads, inner)[:, -time:]


def plan_grid(
    like: Tensor,
    mask: Tensor | None,
    document_ids: Tensor | None,
    progress: Progress,
    size: int | None,
    pending: int,
    lazy: bool = False,
    keep: bool = False,
) -> tuple[Grid, Progress]:
    """Give each token its slot. Synchronises with the device once, only if there are documents.

    Args:
        like: a tensor `[B, T, ...]` on the device of the others.
        mask: tokens that count, `[B, T]`; None: all.
        document_ids: `[B, T]`; None: one document that never ends.
        progress: of the state.
        size: mini-batch size; None: a document is one mini-batch.
        pending: tokens of each row that come from the state before those of the call (some of
            them empty): the mini-batch size if the state is to be continued inside one, else 0.
        lazy: a mini-batch may wait until it is full; else its last token closes it. Rows that hold
            nothing then begin in step with those that hold a full one.
        keep: the state's tokens have slots also where the call begins another document at once
            (masked tokens before it may read them).

    Returns:
        The grid, and the progress after the call with a `pending_count` that is the fill of the
        last mini-batch.
    """
    batch, time = like.shape[:2]
    row = torch.arange(batch, device=like.device).unsqueeze(1)
    valid = like.new_ones((batch, time), dtype=torch.bool) if mask is None else mask
    rank = valid.cumsum(1) - 1
    waiting = progress.pending_count if pending else torch.zeros_like(progress.pending_count)
    starts, progress = document_starts(valid, rank, document_ids, progress)
    position = rank - torch.where(starts, rank, -waiting.unsqueeze(1)).cummax(1).values
    inside = position if size is None else position % size
    opens = valid & (inside == 0)
    dropped = (starts & (rank == 0)).any(1) & (not keep)
    kept = (waiting > 0) & ~dropped
    begun = kept | (lazy and pending > 0)
    index = opens.cumsum(1) - 1 + begun.unsqueeze(1)
    last = index[:, -1]
    longest = time + (pending if lazy else max(pending - 1, 0))
    count, size = _extent(last, torch.where(valid, position, 0), size, longest, document_ids)

    slot = torch.where(valid, (index * batch + row) * size + inside, -1)
    if pending:
        place = torch.arange(pending, device=like.device)
        held = kept.unsqueeze(1) & (place < waiting.unsqueeze(1))
        slot = torch.cat([torch.where(held, row * size + place, -1), slot], dim=1)
    first = None if document_ids is None else torch.where(starts, index * batch + row, -1)
    grid = _grid(slot, first, last, (count, batch, size))
    filled = grid.fill.gather(0, last.clamp(min=0).unsqueeze(0)).squeeze(0)
    return grid, progress._replace(pending_count=torch.where(last >= 0, filled, 0))


def _grid(slot: Tensor, first: Tensor | None, last: Tensor, shape: tuple[int, int, int]) -> Grid:
    """The grid of N, B, m = shape with these slots `[B, S]`, -1 for none.

    `first` holds the mini-batch `n * B + row` that a token opens with a new document, else -1.
    """
    count, batch, size = shape
    token = inverse(slot.flatten(), count * batch * size)
    fill = (token >= 0).view(shape).sum(-1)
    restart = None
    if first is not None:
        restart = (inverse(first.flatten(), count * batch) >= 0).view(count, batch)
    return Grid(slot.flatten(), token, size, fill, last, restart)


def document_starts(
    valid: Tensor, rank: Tensor, document_ids: Tensor | None, progress: Progress
) -> tuple[Tensor, Progress]:
    """Tokens whose id is not that of the token before them, `[B, T]`, and the next progress."""
    total = rank[:, -1] + 1
    if document_ids is None:
        starts = torch.zeros_like(valid)
        return starts, progress._replace(tokens_seen=progress.tokens_seen + total)
    seen, document = progress.tokens_seen.unsqueeze(1), progress.document_id.unsqueeze(1)
    place = torch.arange(valid.shape[1], device=valid.device)
    latest = torch.where(valid, place, -1).cummax(1).values
    ids = torch.where(latest >= 0, document_ids.gather(1, latest.clamp(min=0)), document)
    before = torch.cat([document, ids[:, :-1]], dim=1)
    starts = valid & (document_ids != before) & ((rank > 0) | (seen > 0))
    began = torch.where(starts, rank, -seen).cummax(1).values[:, -1]
    return starts, progress._replace(tokens_seen=total - began, document_id=ids[:, -1])


def _extent(
    last: Tensor,
    position: Tensor,
    size: int | None,
    longest: int,
    document_ids: Tensor | None,
) -> tuple[int, int]:
    """Number and size of the mini-batches: bounds without documents, else read from the device."""
    if document_ids is None and size is not None:
        return -(-longest // size), size
    index, longest = torch.stack([last.max(), position.max()]).tolist()
    return max(index, 0) + 1, longest + 1 if size is None else size


def open_mini_batch(
    tokens: tuple[Tensor, ...], time: int, grid: Grid | None, progress: Progress
) -> tuple[tuple[Tensor, ...], Tensor]:
    """What stays pending of `[N, H, B, m, E]`: `[B, m, H, E]`, 0 in empty slots, and the count.

    Args:
        tokens: arranged in mini-batches.
        time: tokens of each row; only if there is no grid.
        grid: None if all rows are cut alike.
        progress: after the call.
    """
    size = tokens[0].shape[3]
    if grid is None:
        count = torch.full_like(progress.pending_count, time % size)
        # Copies: a view would keep all tokens alive as long as the state.
        last = tuple(x[-1].permute(1, 2, 0, 3).clone() for x in tokens)
        return last if time % size else tuple(torch.zeros_like(x) for x in last), count
    count = progress.pending_count % size
    row = torch.arange(len(count), device=count.device)
    index, closed = grid.last.clamp(min=0), (count == 0)[:, None, None, None]
    found = (x.permute(0, 2, 3, 1, 4)[index, row] for x in tokens)
    return tuple(x.masked_fill(closed, 0) for x in found), count


def inverse(index: Tensor, length: int) -> Tensor:
    """`inverse[index[i]] = i` for the indices that are not -1, -1 elsewhere, `[length]`."""
    inverse = index.new_full((length + 1,), -1)
    place = torch.arange(index.shape[0], device=index.device)
    return inverse.scatter_(0, torch.where(index < 0, length, index), place)[:-1]


def integers_on(values: Sequence[int], device: torch.device) -> Tensor:
    """Integers on a device, which is not waited for."""
    host = torch.tensor(values)
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)
