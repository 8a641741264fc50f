"""What a router decides on, one block of tokens after the other: the mean of all earlier blocks.

A row is cut into blocks of n tokens, counted from its first real token. Token t of block b is
routed by the mean over the blocks before b, as far as they are of its document: causal, the same
for a whole block, and to be continued by a running sum. Where a document begins inside a block,
each (block, document) pair has its own mean.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.layers.pooling import Pooled, RouterState
from lightning_modules.layers.window_sums import window_sums
from lightning_modules.ops.grid import MoveRows


class BlockGrid:
    """The tokens of a call in blocks: N blocks of n slots in every row.

    Args:
        like: any tensor `[B, T, ...]`.
        size: n.
        offset: slot of each row's first token, 0 to n - 1, int64 `[B]`; None: 0 in all rows, known
            without waiting for the device.
    """

    def __init__(self, like: Tensor, size: int, offset: Tensor | None) -> None:
        self.rows, self.length = like.shape[:2]
        self.size, self.offset = size, offset
        self.count = -(-(self.length + (0 if offset is None else size - 1)) // size)
        self.slots = self.count * size
        if offset is None:
            return
        row = torch.arange(self.rows, device=like.device).unsqueeze(1)
        token = torch.arange(self.slots, device=like.device) - offset.unsqueeze(1)
        self.held = (token >= 0) & (token < self.length)
        self.token = torch.where(self.held, row * self.length + token, -1).flatten()
        slot = torch.arange(self.length, device=like.device) + offset.unsqueeze(1)
        self.slot = (row * self.slots + slot).flatten()

    def arrange(self, x: Tensor) -> Tensor:
        """Tokens `[B, T, E]` as blocks `[B, N, n, E]`, empty slots 0."""
        if self.offset is None:
            x = F.pad(x, (0, 0, 0, self.slots - self.length)) if self.slots > self.length else x
        else:
            x = MoveRows.apply(x.reshape(self.rows * self.length, -1), self.token, self.slot)
        return x.reshape(self.rows, self.count, self.size, -1)

    def numbers(self, x: Tensor, empty: int) -> Tensor:
        """Integers or flags of tokens `[B, T]` as `[B, N, n]`, with `empty` in empty slots."""
        if self.offset is None:
            x = F.pad(x, (0, self.slots - self.length), value=empty)
        else:
            x = x.flatten()[self.token.clamp(min=0)].view(self.rows, -1)
            x = torch.where(self.held, x, torch.full_like(x, empty))
        return x.reshape(self.rows, self.count, self.size)

    def restore(self, x: Tensor) -> Tensor:
        """The inverse of `arrange`: `[B, T, E]`."""
        x = x.reshape(self.rows * self.slots, -1)
        if self.offset is None:
            return x.view(self.rows, self.slots, -1)[:, : self.length]
        return MoveRows.apply(x, self.slot, self.token).view(self.rows, self.length, -1)


def pool_blocks(
    x: Tensor,
    size: int,
    *,
    real: Tensor | None = None,
    document: Tensor | None = None,
    state: RouterState | None = None,
    offset: Tensor | None = None,
    per_token: bool = False,
) -> Pooled:
    """Every block: over the tokens of its document in the blocks before it.

    Args:
        x: hidden states, `[B, T, d]`.
        size: n, tokens of a block.
        real: bool `[B, T]`; None: all.
        document: number of every token's document in the call, int64 `[B, T]`; None: all
            continue the state's.
        state: what was pooled before the call; None: nothing.
        offset: where the rows stand in their grid, see `BlockGrid`.
        per_token: repeat the decision of a block for each of its tokens, as is needed where
            documents begin inside blocks or rows stand differently; else every block must be of
            one document, and `offset` None.

    Returns:
        Sums `[B, N, d + 1]`, or `[B, T, d + 1]` per token; all 0 where a prefix is empty.
    """
    grid = BlockGrid(x, size, offset)
    number = None if document is None else grid.numbers(document, -1)
    key = None if number is None else _keys(number)
    sums = _block_sums(x, grid, real, number, key)
    if state is not None:
        opened = state.recent.to(sums.dtype)
        if key is not None:
            opened = torch.where((key[:, 1] == 0)[:, None, None], opened, 0.0)
        sums = sums + F.pad(opened, (0, 0, 0, grid.count - 1))
        closed = state.total.to(sums.dtype).unsqueeze(1)
    else:
        closed = torch.zeros_like(sums[:, :1])
    running = window_sums(torch.cat([closed, sums], dim=1), key)
    before = running[:, :-1]
    if per_token:
        before = before.unsqueeze(2).expand(-1, -1, size, -1)
        if key is not None:
            before = torch.where((number == key[:, :-1, None]).unsqueeze(-1), before, 0.0)
        before = grid.restore(before)
    elif key is not None:
        before = torch.where((key[:, 1:] == key[:, :-1]).unsqueeze(-1), before, 0.0)
    return Pooled(before, *_open_block(sums, running, key, grid))


def _keys(number: Tensor) -> Tensor:
    """The document with which the state, and then every block, ends, `[B, 1 + N]`."""
    return F.pad(number.amax(2), (1, 0)).cummax(1).values


def _block_sums(
    x: Tensor, grid: BlockGrid, real: Tensor | None, number: Tensor | None, key: Tensor | None
) -> Tensor:
    """Sums over the tokens of every block that are of the document with which it ends.

    Earlier documents of a block end in it: no later block needs them.
    """
    tokens = grid.arrange(x)
    dtype = torch.promote_types(x.dtype, torch.float32)
    if real is None and number is None and grid.offset is None:
        block = torch.arange(grid.count, device=x.device) * grid.size
        count = (grid.length - block).clamp(max=grid.size).to(dtype).view(1, -1, 1)
        return torch.cat([tokens.sum(2, dtype=dtype), count.expand(grid.rows, -1, -1)], dim=-1)
    if real is None:
        real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    counts = grid.numbers(real, False)
    if number is not None and key is not None:
        counts = counts & (number == key[:, 1:, None])
    total = torch.where(counts.unsqueeze(-1), tokens, 0.0).sum(2, dtype=dtype)
    return torch.cat([total, counts.sum(2, keepdim=True).to(dtype)], dim=-1)


def _open_block(
    sums: Tensor, running: Tensor, key: Tensor | None, grid: BlockGrid
) -> tuple[Tensor, Tensor]:
    """Sum over closed blocks `[B, d + 1]` and the open one `[B, 1, d + 1]` after the call."""
    offset = 0 if grid.offset is None else grid.offset.unsqueeze(1)
    block = torch.arange(grid.count + 1, device=sums.device).unsqueeze(0)
    here = block == (offset + grid.length) // grid.size
    opened = torch.where(here.unsqueeze(-1), F.pad(sums, (0, 0, 0, 1)), 0.0)
    if key is not None:
        here = here & (key == key[:, -1:])
    closed = torch.where(here.unsqueeze(-1), running, 0.0)
    return closed.sum(1), opened.sum(1, keepdim=True)
