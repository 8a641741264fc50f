"""Which queries read which chapters together: the layout of chapter attention's matrix products.

A tile is up to m queries that read the same chapters, so that it takes one gather of rows and one
pair of matrix products. A query is in J tiles, one for each of its parts: J = 1 if the tile reads
all chapters of the query, J = k if each of its k chapters is read in another tile. All shapes
follow from the arguments' shapes, and nothing waits for the device.
"""

from __future__ import annotations

from math import sqrt
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding


class Tiles(NamedTuple):
    """N tiles of m slots each; tokens are numbered through the batch, part j of token t is t J + j.

    Attributes:
        chapters: what a tile reads, `[N, K]`.
        parts: what is in a slot, `[N, m]`; some part of another tile in an empty one.
        slots: the inverse, the slot `n m + i` of each part, `[tokens, J]`.
        filled: slots that are not empty, bool `[N, m]`; None: all.
    """

    chapters: Tensor
    parts: Tensor
    slots: Tensor
    filled: Tensor | None

    def split(self, count: int) -> list[Tiles]:
        """So many tiles at a time, with the slots of all of them."""
        return [
            Tiles(
                self.chapters[n : n + count],
                self.parts[n : n + count],
                self.slots,
                None if self.filled is None else self.filled[n : n + count],
            )
            for n in range(0, len(self.chapters), count)
        ]

    def fill(self, x: Tensor) -> Tensor:
        """What every slot holds of `[tokens, J, H, E]`, `[N, H, m, E]`; without the parts' axis,
        `[tokens, H, E]`, that of its token."""
        parts = self.parts if x.dim() == 4 else self.parts // self.slots.shape[1]
        return rows_by_head(x.reshape(-1, *x.shape[-2:]), parts)

    def collect(self, x: Tensor) -> Tensor:
        """What every part has in slots `[N, H, m, E]`, `[tokens, J, H, E]`."""
        _, heads, width, size = x.shape
        head = torch.arange(heads, device=x.device)
        tile, slot = self.slots // width, self.slots % width
        index = (tile.unsqueeze(-1) * heads + head) * width + slot.unsqueeze(-1)
        return embedding(index, x.reshape(-1, size))


def rows_by_head(x: Tensor, index: Tensor) -> Tensor:
    """Rows `[N, m]` of `[X, H, E]` with the heads outside, `[N, H, m, E]`, in one copy."""
    _, heads, size = x.shape
    return embedding(index_by_head(index, heads), x.reshape(-1, size))


def index_by_head(index: Tensor, heads: int) -> Tensor:
    """Numbers of the rows (i, h) in `[X H, E]`, `[N, H, m]`, for i in `[N, m]`."""
    head = torch.arange(heads, device=index.device)
    return index.unsqueeze(-2) * heads + head.unsqueeze(-1)


def block_tiles(chapters: Tensor, time: int, block_size: int, separate: bool) -> Tiles:
    """A tile for each block of tokens, or, if separate, for each of a block's k chapters.

    Args:
        chapters: of each block, `[B, nb, k]`.
        time: T, tokens of a row; the last block may be short.
        block_size: tokens of a block.
        separate: one chapter in a tile (J = k), not all k (J = 1).
    """
    batch, blocks, choices = chapters.shape
    width, device = min(block_size, time), chapters.device
    parts = choices if separate else 1
    row = torch.arange(batch, device=device).view(-1, 1, 1, 1)
    block = torch.arange(blocks, device=device).view(-1, 1, 1)
    part = torch.arange(parts, device=device).view(-1, 1)
    position = block * width + torch.arange(width, device=device)
    held = (row * time + position.clamp(max=time - 1)) * parts + part
    filled = None
    if time % width:
        filled = (position < time).expand_as(held).reshape(-1, width)
    t = torch.arange(time, device=device).view(-1, 1)
    tile = (row.view(-1, 1, 1) * blocks + t // width) * parts + part.view(-1)
    return Tiles(
        chapters.reshape(-1, choices // parts),
        held.view(-1, width),
        (tile * width + t % width).view(-1, parts),
        filled,
    )


def sorted_tiles(chapters: Tensor, num_chapters: int, width: int) -> Tiles:
    """Tiles of one chapter each: all (token, choice) pairs, sorted by chapter.

    A chapter that n pairs read has `ceil(n / m)` tiles, together at most `pairs // m + C`; so many
    there are, and those not needed are empty.

    Args:
        chapters: of each token, `[tokens, k]`.
        num_chapters: C.
        width: m.
    """
    pairs, device = chapters.numel(), chapters.device
    sizes = torch.arange(num_chapters, device=device)
    ordered, order = chapters.flatten().sort(stable=True)
    first = torch.searchsorted(ordered, sizes)
    count = torch.searchsorted(ordered, sizes, right=True) - first
    tiles_end = ((count + width - 1) // width).cumsum(0)
    first_tile = tiles_end - (count + width - 1) // width

    tile = torch.arange(pairs // width + min(num_chapters, pairs), device=device)
    chapter = torch.searchsorted(tiles_end, tile, right=True).clamp(max=num_chapters - 1)
    rank = (tile - first_tile[chapter]).unsqueeze(-1) * width + torch.arange(width, device=device)
    held = order[(first[chapter].unsqueeze(-1) + rank).clamp(max=pairs - 1)]

    place = torch.arange(pairs, device=device) - first[ordered]
    slots = torch.empty_like(order).scatter_(0, order, first_tile[ordered] * width + place)
    filled = rank < count[chapter].unsqueeze(-1)
    return Tiles(chapter.unsqueeze(-1), held, slots.view_as(chapters), filled)


def tile_width(pairs: int, q_size: tuple[int, int], mem_size: tuple[int, int, int]) -> int:
    """The m, a power of two up to 128, for which sorted tiles move the fewest elements.

    A wide tile shares its rows among more queries, a narrow one has fewer empty slots: with P
    pairs, `(P / m + C) 2 R Hkv D` elements of rows and `(P + C m) H (2 D + R)` of queries, outputs
    and logits are least at `m^2 = P 2 R Hkv D / (C H (2 D + R))`.

    Args:
        pairs: P.
        q_size: H, D.
        mem_size: C, R, Hkv.
    """
    (heads, size), (num_chapters, rows, kv_heads) = q_size, mem_size
    best = sqrt(pairs * 2 * rows * kv_heads * size / (num_chapters * heads * (2 * size + rows)))
    return 1 << (max(1, min(128, int(best))).bit_length() - 1)
