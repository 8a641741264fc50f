"""Chapter attention by matrix products over tiles of queries that read the same chapters."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lightning_modules.ops.chapter_attention.reading import ReadTiles
from lightning_modules.ops.chapter_attention.tiles import (
    Tiles,
    block_tiles,
    sorted_tiles,
    tile_width,
)

MIN_BLOCK = 16
"""Blocks of fewer tokens share what they gather among too few, and are read token by token."""


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

    A block of tokens that reads the same chapters gathers their rows once. Tokens that choose each
    on their own are sorted by chapter, so that those in a chapter share its rows; only a few
    (decoding) gather rows for themselves. Chapters that all tokens read are not gathered for each
    of them. How a row of the batch is computed does not depend on the others.
    """
    dtype, device = _product_dtype(q, mem_k, mem_v), q.device.type
    options = (q.shape[-1] ** -0.5 if scale is None else scale, dropout)
    with torch.autocast("cpu" if device == "meta" else device, enabled=False):
        tokens, k, v = (x.to(dtype) for x in (q.flatten(0, 1), mem_k, mem_v))
        if chapters is None and not return_lse:
            return _read_all(tokens, k, v, *options).to(q.dtype).view_as(q)
        if chapters is None:
            o, lse = ReadTiles.apply(
                tokens, k, v, None, *_common_tiles(tokens, len(k), separate=False), *options, False
            )
        else:
            mixture = mixing == "mixture"
            tiles = _tiles(q, mem_k, chapters, block_size, mixture)
            weights = _weights(q, tiles, log_weights, block_size)
            o, lse = ReadTiles.apply(tokens, k, v, weights, *tiles, *options, mixture)
            if shared > 0:
                separate = mixture and shared_mode == "per_chapter"
                common = _common_tiles(tokens, shared, separate)
                more = ReadTiles.apply(tokens, k, v, None, *common, *options, separate)
                o, lse = (o + more[0], lse) if mixture else _merge(o, lse, *more)
    o = o.to(q.dtype).view_as(q)
    return (o, lse.view(q.shape[:3])) if return_lse else o


def _product_dtype(q: Tensor, mem_k: Tensor, mem_v: Tensor) -> torch.dtype:
    """What matrix products take: the inputs' dtype, or autocast's unless they are float64."""
    dtype = torch.promote_types(q.dtype, torch.promote_types(mem_k.dtype, mem_v.dtype))
    device = q.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return dtype


def _tiles(q: Tensor, mem_k: Tensor, chapters: Tensor, block_size: int, mixture: bool) -> Tiles:
    """By block where the tokens of one are many, or there are too few choices to sort."""
    (_, time, heads, size), (num_chapters, rows, kv_heads, _) = q.shape, mem_k.shape
    choices = chapters.shape[-1]
    if min(block_size, time) >= MIN_BLOCK or chapters.shape[1] * choices <= num_chapters:
        return block_tiles(chapters, time, block_size, separate=mixture)
    # The width is chosen by the pairs of one row: more rows must not change how each is computed.
    width = tile_width(time * choices, (heads, size), (num_chapters, rows, kv_heads))
    by_token = _by_token(chapters, time, block_size).flatten(0, 1)
    return sorted_tiles(by_token, num_chapters, width)


def _weights(q: Tensor, tiles: Tiles, log_weights: Tensor | None, block_size: int) -> Tensor | None:
    """Logarithms of the weights in at least float32, `[tokens, J, K]`."""
    if log_weights is None:
        return None
    log_weights = log_weights.to(torch.promote_types(q.dtype, torch.float32))
    by_token = _by_token(log_weights, q.shape[1], block_size)
    return by_token.reshape(*tiles.slots.shape, tiles.chapters.shape[1])


def _by_token(x: Tensor, time: int, block_size: int) -> Tensor:
    """What each token has of its block's, `[B, T, k]`."""
    size = min(block_size, time)
    return x.unsqueeze(2).expand(-1, -1, size, -1).flatten(1, 2)[:, :time]


def _common_tiles(tokens: Tensor, count: int, separate: bool) -> Tiles:
    """The first chapters, read by all tokens."""
    chapters = torch.arange(count, device=tokens.device).view(1, 1, -1)
    return block_tiles(chapters, len(tokens), len(tokens), separate)


def _merge(o: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """One softmax of two: each output counts as much as its rows' weights did together."""
    total = torch.logaddexp(lse, other_lse)
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
