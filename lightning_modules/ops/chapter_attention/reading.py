"""Attention of tiles of queries over the rows of their chapters, with its gradient."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_modules.ops.chapter_attention.tiles import Tiles, index_by_head, rows_by_head

LOGITS_AT_ONCE = {"cpu": 1 << 18, "others": 1 << 27}
"""Logits of the tiles in one matrix product: they stay in the cache of a core (half to two thirds
of the time that all at once take), or in a bounded part of a GPU's memory."""


class ReadTiles(torch.autograd.Function):
    """What every token reads in all of its tiles, `o [tokens, H, D]` and `lse [tokens, H]`.

    With `s = scale q k^T` and, for a token, its parts j (one tile each) and their chapters c,

        joint:    a = s + log w_jc,  lse = logsumexp over j, c and rows,  o = sum exp(a - lse) v
        mixture:  o = sum_j w_j softmax_j(s) v     (one chapter in a tile; lse `[tokens, J, H]`)

    Only arguments, outputs and lse are kept for the backward pass. It gathers again and computes
    `p = exp(a - lse)` again, from which, as in Dao et al., "FlashAttention", 2022,
    arXiv:2205.14135, section 3.1,

        dv = p^T do,    da = p (do v^T - delta),    delta = <do, o> - dlse

    (in a mixture, w do for do, and delta the sum of `p (do v^T)` over the rows of the part), and
    dlog w is the sum of da (in a mixture, of delta). The gradients of a row that several tiles
    read are added in the order of the tiles.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        mem_k: Tensor,
        mem_v: Tensor,
        log_weights: Tensor | None,
        chapters: Tensor,
        parts: Tensor,
        slots: Tensor,
        filled: Tensor | None,
        scale: float,
        dropout: float,
        mixture: bool,
    ) -> tuple[Tensor, Tensor]:
        tiles, kv_heads = Tiles(chapters, parts, slots, filled), mem_k.shape[2]
        kept, outputs, logsumexps = [], [], []
        for some in tiles.split(_tiles_at_once(tiles, q, mem_k)):
            s = _logits(some, _to_tiles(some, q, kv_heads), _rows(mem_k, some.chapters), scale)
            s = _with_bias(s, some, log_weights, kv_heads)
            p = s.softmax(-1)
            # p is 1 / sum exp(s - max) where s is largest: logsumexp would exponentiate again.
            logsumexps.append(s.amax(-1, True) - p.amax(-1, True).log())
            if dropout > 0:
                kept.append(torch.rand_like(p) >= dropout)
                p = p * kept[-1] / (1 - dropout)
            outputs.append(p.to(q.dtype) @ _rows(mem_v, some.chapters))
        o = _from_tiles(tiles, torch.cat(outputs), kv_heads)
        lse = _from_tiles(tiles, torch.cat(logsumexps), kv_heads).squeeze(-1)
        if mixture:
            o = _weighted_sum(o, None if log_weights is None else log_weights.exp())
            ctx.mark_non_differentiable(lse)
        else:
            by_part = _outside(log_weights, tiles)
            lse_by_part = lse if by_part is None else lse + by_part
            lse = lse_by_part.logsumexp(1)
            single = o.shape[1] == 1
            o = _weighted_sum(o, None if single else (lse_by_part - lse.unsqueeze(1)).exp())
        ctx.save_for_backward(q, mem_k, mem_v, log_weights, *tiles, o, lse, *kept)
        ctx.options = (scale, dropout, mixture)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_o: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, mem_k, mem_v, log_weights, *rest = ctx.saved_tensors
        scale, dropout, mixture = ctx.options
        tiles, (o, lse, *kept) = Tiles(*rest[:4]), rest[4:]
        kv_heads, found = mem_k.shape[2], []
        norm, delta = _norm(tiles, lse, log_weights, mixture), None
        if not mixture:
            delta = ((grad_o.to(lse.dtype) * o).sum(-1) - grad_lse).unsqueeze(-1)
        for some, keep in zip_longest(tiles.split(_tiles_at_once(tiles, q, mem_k)), kept):
            queries, keys = _to_tiles(some, q, kv_heads), _rows(mem_k, some.chapters)
            do = _grad_to_tiles(some, grad_o, log_weights if mixture else None, kv_heads)
            p = _with_bias(_logits(some, queries, keys, scale), some, log_weights, kv_heads)
            p = p.sub_(_without_empty(some, _to_tiles(some, norm, kv_heads), kv_heads)).exp_()
            da = (do @ _rows(mem_v, some.chapters).mT).to(p.dtype)
            read = p
            if keep is not None:
                da, read = (x * keep / (1 - dropout) for x in (da, p))
            dv = read.to(q.dtype).mT @ do
            d = (p * da).sum(-1, True) if delta is None else _to_tiles(some, delta, kv_heads)
            da = da.sub_(d).mul_(p)
            dlog = _sum_by_slot(d if mixture else da, some, kv_heads)
            da = da.mul_(scale).to(q.dtype)
            found.append((da @ keys, da.mT @ queries, dv, dlog))
        dq, dk, dv, dlog = (torch.cat(x) for x in zip(*found, strict=True))
        return (
            _from_tiles(tiles, dq, kv_heads).sum(1),
            _add_rows(dk, mem_k, tiles.chapters),
            _add_rows(dv, mem_v, tiles.chapters),
            None if log_weights is None else tiles.collect(dlog.unsqueeze(1)).squeeze(2),
            *[None] * 7,
        )


def _tiles_at_once(tiles: Tiles, q: Tensor, mem_k: Tensor) -> int:
    logits = tiles.parts.shape[1] * tiles.chapters.shape[1] * q.shape[1] * mem_k.shape[1]
    return max(1, LOGITS_AT_ONCE["cpu" if q.device.type == "cpu" else "others"] // logits)


def _to_tiles(tiles: Tiles, x: Tensor, kv_heads: int) -> Tensor:
    """`[tokens, H, E]` or `[tokens, J, H, E]` as `[N Hkv, m G, E]`, G query heads side by side."""
    *lead, heads, size = x.shape
    x = x.reshape(*lead, kv_heads, heads // kv_heads * size)
    return tiles.fill(x).view(len(tiles.chapters) * kv_heads, -1, size)


def _from_tiles(tiles: Tiles, x: Tensor, kv_heads: int) -> Tensor:
    """`[N Hkv, m G, E]` as `[tokens, J, H, E]`."""
    size, (count, width) = x.shape[-1], tiles.parts.shape
    parts = tiles.collect(x.view(count, kv_heads, width, -1))
    return parts.view(*parts.shape[:2], -1, size)


def _grad_to_tiles(
    tiles: Tiles, grad_o: Tensor, log_weights: Tensor | None, kv_heads: int
) -> Tensor:
    """The gradient by what the parts read; with the logarithms of a mixture's weights or None."""
    grad = _to_tiles(tiles, grad_o, kv_heads)
    if log_weights is None:
        return grad
    weights = log_weights.exp().expand(-1, -1, grad_o.shape[1]).unsqueeze(-1)
    return (grad * _to_tiles(tiles, weights, kv_heads)).to(grad.dtype)


def _row_numbers(mem: Tensor, chapters: Tensor) -> Tensor:
    """Of the rows of a tile's chapters, `[N, K R]`."""
    row = torch.arange(mem.shape[1], device=mem.device)
    return (chapters.unsqueeze(-1) * len(row) + row).flatten(1)


def _rows(mem: Tensor, chapters: Tensor) -> Tensor:
    """The rows that a tile reads, `[N Hkv, K R, D]`."""
    return rows_by_head(mem.flatten(0, 1), _row_numbers(mem, chapters)).flatten(0, 1)


def _add_rows(grad: Tensor, mem: Tensor, chapters: Tensor) -> Tensor:
    """The transpose of `_rows`, without atomic additions, which would come in any order."""
    index = index_by_head(_row_numbers(mem, chapters), mem.shape[2])
    rows = grad.view(*index.shape, -1)
    total = torch.ops.aten.embedding_dense_backward(rows, index, mem[..., 0].numel(), -1, False)
    return total.view(mem.shape)


def _logits(tiles: Tiles, queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """`scale q k^T` in at least float32, `[N Hkv, m G, K R]`, a new tensor."""
    s = torch.baddbmm(queries.new_zeros(()), queries, keys.mT, beta=0, alpha=scale)
    return s.to(torch.promote_types(s.dtype, torch.float32))


def _outside(log_weights: Tensor | None, tiles: Tiles) -> Tensor | None:
    """Weights of parts with one chapter, `[tokens, J, 1]`: the logits of such a part need no bias,
    since its weight only moves its lse."""
    return log_weights if tiles.chapters.shape[1] == 1 else None


def _with_bias(s: Tensor, tiles: Tiles, log_weights: Tensor | None, kv_heads: int) -> Tensor:
    """The logits plus the logarithms of their chapters' weights, if a tile has several."""
    choices = tiles.chapters.shape[1]
    if log_weights is None or choices == 1:
        return s
    count, width = tiles.parts.shape
    bias = tiles.fill(log_weights.unsqueeze(2)).view(count, 1, width, 1, choices, 1)
    s.view(count, kv_heads, width, -1, choices, s.shape[-1] // choices).add_(bias)
    return s


def _norm(tiles: Tiles, lse: Tensor, log_weights: Tensor | None, mixture: bool) -> Tensor:
    """What the logits less this are the logarithm of, `[tokens, J, H, 1]`."""
    if not mixture:
        by_part = _outside(log_weights, tiles)
        lse = lse.unsqueeze(1) if by_part is None else lse.unsqueeze(1) - by_part
    return lse.expand(-1, tiles.slots.shape[1], -1).unsqueeze(-1)


def _without_empty(tiles: Tiles, norm: Tensor, kv_heads: int) -> Tensor:
    """Infinite in empty slots, so that no weight is left there, `[N Hkv, m G, 1]`."""
    if tiles.filled is None:
        return norm
    count, width = tiles.parts.shape
    by_slot = norm.view(count, kv_heads, width, -1)
    return by_slot.masked_fill(~tiles.filled.view(count, 1, width, 1), torch.inf).view_as(norm)


def _sum_by_slot(x: Tensor, tiles: Tiles, kv_heads: int) -> Tensor:
    """Sum over heads and rows of `[N Hkv, m G, K R]`, `[N, m, K]`."""
    (count, width), choices = tiles.parts.shape, tiles.chapters.shape[1]
    return x.view(count, kv_heads, width, -1, choices, x.shape[-1] // choices).sum((1, 3, 5))


def _weighted_sum(o: Tensor, weights: Tensor | None) -> Tensor:
    """`sum_j w_j o_j`, `[tokens, H, D]`, of a new tensor `[tokens, J, H, D]`; None: ones."""
    if weights is None:
        return o.sum(1)
    return o.to(weights.dtype).mul_(weights.unsqueeze(-1)).sum(1).to(o.dtype)
