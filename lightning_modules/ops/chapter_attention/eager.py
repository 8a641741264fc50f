"""Chapter attention by matrix products over tiles of queries that read the same chapters."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lightning_modules.ops.chapter_attention.arguments import (
    log_weights_of,
    product_dtype,
    reads_by_chapter,
    with_shared,
)
from lightning_modules.ops.chapter_attention.gathered import gathered_attention, pays
from lightning_modules.ops.chapter_attention.reading import ReadTiles
from lightning_modules.ops.chapter_attention.tiles import (
    Tiles,
    block_tiles,
    sorted_tiles,
    tile_width,
)
from lightning_modules.ops.ttt_eager import autocast_device

COMMON_WIDTH = 128
"""Tokens that gather shared chapters together, where they are not among the chosen ones."""


def eager_chapter_attention(
    q: Tensor,
    mem_k: Tensor,
    mem_v: Tensor,
    chapters: Tensor | None,
    log_weights: Tensor | None,
    *,
    block_size: int,
    shared: int,
    shared_mode: str,
    mixing: str,
    scale: float | None,
    dropout: float,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    """Chapter attention by matrix products; arguments and results of `ops.chapter_attention`.

    Tokens of a block gather the rows that they read once, and together; on a GPU, a fused kernel
    then reads them where that is faster (`gathered.pays`). Tokens that choose each on their own are
    sorted by chapter, so that those in a chapter share its rows; only if they are few (decoding)
    does each gather for itself. How a row of the batch is computed does not depend on the others.
    """
    dtype = product_dtype(q, mem_k, mem_v)
    options = (q.shape[-1] ** -0.5 if scale is None else scale, dropout)
    with torch.autocast(autocast_device(q.device), enabled=False):
        tokens, k, v = q.flatten(0, 1).to(dtype), mem_k.to(dtype), mem_v.to(dtype)

        def read(tiles: Tiles, weights: Tensor | None, mixture: bool) -> tuple[Tensor, Tensor]:
            return ReadTiles.apply(tokens, k, v, weights, *tiles, *options, mixture)

        if chapters is None:
            if not return_lse:
                return _read_all(tokens, k, v, *options).to(q.dtype).view_as(q)
            o, lse = read(_common_tiles(q, len(k), batch=1, width=len(tokens)), None, False)
        else:
            mixture, weights = mixing == "mixture", log_weights_of(q, chapters, log_weights)
            sort = reads_by_chapter(q, mem_k, chapters, block_size)
            if shared and not mixture and not sort:  # one softmax, and one gather
                (chapters, weights), shared = with_shared(chapters, weights, shared), 0
            if not (sort or mixture or return_lse) and pays(tokens, min(block_size, q.shape[1])):
                return gathered_attention(
                    tokens.view_as(q),
                    *(k, v, chapters, weights),
                    block_size=block_size,
                    scale=options[0],
                    dropout=dropout,
                ).to(q.dtype)
            tiles = _tiles(q, mem_k, chapters, block_size, sort, separate=mixture)
            weights = _by_token(weights, q.shape[1], block_size)
            o, lse = read(tiles, weights.reshape(*tiles.slots.shape, -1), mixture)
            if shared:
                each = mixture and shared_mode == "per_chapter"
                common = _common_tiles(q, shared, len(q), COMMON_WIDTH, separate=each)
                more = read(common, None, each)
                o, lse = (o + more[0], lse) if mixture else _merge(o, lse, *more)
    o = o.to(q.dtype).view_as(q)
    return (o, lse.view(q.shape[:3])) if return_lse else o


def _tiles(
    q: Tensor, mem_k: Tensor, chapters: Tensor, block_size: int, sort: bool, separate: bool
) -> Tiles:
    (_, time, heads, size), (num_chapters, rows, kv_heads, _) = q.shape, mem_k.shape
    if not sort:
        return block_tiles(chapters, time, block_size, separate)
    # The width is chosen by the pairs of one row: more rows must not change how each is computed.
    pairs = time * chapters.shape[-1]
    width = tile_width(pairs, (heads, size), (num_chapters, rows, kv_heads))
    return sorted_tiles(_by_token(chapters, time, block_size).flatten(0, 1), num_chapters, width)


def _common_tiles(
    q: Tensor, count: int, batch: int, width: int, *, separate: bool = False
) -> Tiles:
    """Tiles of so many tokens, in a batch of so many rows, that all read the first chapters."""
    time = q[..., 0, 0].numel() // batch
    chapters = torch.arange(count, device=q.device).expand(batch, -(-time // width), -1)
    return block_tiles(chapters, time, width, separate)


def _by_token(x: Tensor, time: int, block_size: int) -> Tensor:
    """What each token has of its block's, `[B, T, k]`."""
    size = min(block_size, time)
    return x.unsqueeze(2).expand(-1, -1, size, -1).flatten(1, 2)[:, :time]


def _merge(o: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """One softmax of two: each output counts as much as the weights of its rows together."""
    # logaddexp rounds an element by where it stands, which would make rows depend on each other
    total = torch.stack([lse, other_lse]).logsumexp(0)
    share = (other_lse - total).exp().unsqueeze(-1)
    return torch.lerp(o.to(share.dtype), other.to(share.dtype), share).to(o.dtype), total


def _read_all(tokens: Tensor, mem_k: Tensor, mem_v: Tensor, scale: float, dropout: float) -> Tensor:
    """Attention over the whole bank, `[tokens, H, D]`.

    Tokens of all rows are one sequence, and query heads that share a key head stand in line: the
    bank is read, and its gradient is made, once.
    """
    count, heads, size = tokens.shape
    k, v = (x.flatten(0, 1).transpose(0, 1).unsqueeze(0) for x in (mem_k, mem_v))
    q = tokens.view(count, k.shape[1], -1, size).transpose(0, 1).flatten(1, 2).unsqueeze(0)
    o = scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)
    return o.view(-1, count, heads // k.shape[1], size).transpose(0, 1).reshape(tokens.shape)
