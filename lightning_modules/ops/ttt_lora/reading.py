"""What the tokens of a call read, once the scan knows the weights of every mini-batch.

Queries are read in blocks of m tokens that share their weights, all in one product. Without a mask
a block is a mini-batch. Masked tokens read without having a slot in a mini-batch, any number of
them: then a row is cut anew, wherever the weights change and after m tokens at the latest.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_modules.ops.grid import Grid, MoveRows, arrange, inverse, restore
from lightning_modules.ops.ttt_lora.scan import restarted


class Writes(NamedTuple):
    """What mode B reads beside the weights: the writes of the own mini-batch up to oneself.

    Attributes:
        keys: `k~`, `[N, G, B, m, d + 1]`.
        step: `-eta/m`, also in mini-batches that are not full, `[N, G, B, m, 1]`.
        errors: `[N, G, B, m, d]`.
    """

    keys: Tensor
    step: Tensor
    errors: Tensor


class _Blocks(NamedTuple):
    """R blocks of m places for the queries of a call.

    Attributes:
        slot: place `(block * B + row) * m + i` of each token, `[B * T]`.
        token: the inverse, -1 if a place is empty, `[R * B * m]`.
        source: which of the N + 1 changes a block reads, `[R, B]`.
        fresh: blocks that read the learned weights instead, `[R, B]`; None: none does.
        seen: tokens of its mini-batch up to the one in a place, `[R, B, m]`.
    """

    slot: Tensor
    token: Tensor
    source: Tensor
    fresh: Tensor | None
    seen: Tensor


def read_slots(
    q: Tensor, states: Tensor, writes: Writes | None, size: int, grid: Grid | None
) -> Tensor:
    """What tokens read that all have a slot, without the learned weights, `[B, T, G, d]`.

    Args:
        q: `[q, 1]` of the call's tokens, `[B, T, G, d + 1]`.
        states: changes of the weights, `[N + 1, G, B, d + 1, d]`.
        writes: None in mode A.
        size: m.
        grid: None if all rows are cut alike.
    """
    time = q.shape[1]
    if grid is not None:
        pending = grid.slot.shape[0] // q.shape[0] - time
        q = pad(q, (0, 0, 0, 0, pending, 0))
    blocks = arrange(q, size, grid).contiguous()
    o = blocks @ restarted(states[:-1], None if grid is None else grid.restart)
    if writes is not None:
        mix = (blocks @ writes.keys.mT) * writes.step.mT
        o = o + mix.tril() @ writes.errors
    return restore(o, time, grid)


def read_rows(q: Tensor, states: Tensor, writes: Writes | None, size: int, grid: Grid) -> Tensor:
    """As `read_slots`, for tokens of which some have no slot."""
    batch, time, group, inner = q.shape
    blocks = _cut(grid, batch, time)
    moved = MoveRows.apply(q.reshape(batch * time, -1), blocks.token, blocks.slot)
    queries = moved.view(-1, batch, size, group, inner).transpose(2, 3)
    rows = torch.arange(batch, device=q.device)
    changes = states[blocks.source, :, rows]
    if blocks.fresh is not None:
        changes = changes.masked_fill(blocks.fresh[..., None, None, None], 0)
    o = queries @ changes
    if writes is not None:
        source = blocks.source.clamp(max=len(writes.keys) - 1)
        keys, step, errors = (x[source, :, rows] for x in writes)
        place = torch.arange(size, device=q.device)
        visible = (place < blocks.seen.unsqueeze(-1)).unsqueeze(2)
        mix = ((queries @ keys.mT) * step.mT).masked_fill(~visible, 0)
        o = o + mix @ errors
    flat = o.transpose(2, 3).reshape(-1, group * (inner - 1))
    return MoveRows.apply(flat, blocks.slot, blocks.token).view(batch, time, group, inner - 1)


def _cut(grid: Grid, batch: int, time: int) -> _Blocks:
    """The blocks of a call; their number depends on that of the mini-batches alone."""
    count, size = len(grid.fill), grid.size
    source, fresh, seen = _positions(grid, batch, time)
    place = torch.arange(time, device=source.device)
    changes = torch.ones_like(fresh)
    changes[:, 1:] = (source[:, 1:] != source[:, :-1]) | (fresh[:, 1:] != fresh[:, :-1])
    inside = (place - torch.where(changes, place, 0).cummax(1).values) % size
    index = (inside == 0).cumsum(1) - 1
    row = torch.arange(batch, device=source.device).unsqueeze(1)
    slot = ((index * batch + row) * size + inside).flatten()
    runs = count if grid.restart is None else 2 * count + 1
    total = min(time, runs + time // size)
    token = inverse(slot, total * batch * size)
    held, found = (token >= 0).view(total, batch, size), token.clamp(min=0)
    first = found.view(total, batch, size)[..., 0]
    return _Blocks(
        slot=slot,
        token=token,
        source=source.flatten()[first],
        fresh=None if grid.restart is None else fresh.flatten()[first],
        seen=torch.where(held, seen.flatten()[found].view_as(held), 0),
    )


def _positions(grid: Grid, batch: int, time: int) -> tuple[Tensor, Tensor, Tensor]:
    """`source`, `fresh`, `seen` of `_Blocks` for each token of the call, `[B, T]` each.

    A masked token reads as the last token before it that has a slot, or, if that one filled its
    mini-batch, what is then the change of the weights, also where another document comes next.
    """
    slot = grid.slot.view(batch, -1)
    place = torch.arange(slot.shape[1], device=slot.device)
    latest = torch.where(slot >= 0, place, -1).cummax(1).values
    own = torch.where(latest >= 0, slot.gather(1, latest.clamp(min=0)), -1)
    own, is_token = own[:, -time:], slot[:, -time:] >= 0
    index = torch.where(own >= 0, own.div(batch * grid.size, rounding_mode="floor"), 0)
    seen = torch.where(own >= 0, own % grid.size + 1, 0)
    filled = (seen == grid.size) & ~is_token
    fresh = torch.zeros_like(is_token)
    if grid.restart is not None:
        begins = grid.restart.mT.gather(1, index)
        fresh = begins & (own >= 0) & ~filled
    return index + filled, fresh, torch.where(filled, 0, seen)
