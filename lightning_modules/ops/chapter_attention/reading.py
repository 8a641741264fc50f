"""Attention of tiles of queries over the rows of their chapters, with its gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_modules.ops.chapter_attention.tiles import Tiles, index_by_head, rows_by_head


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
        s = _logits(tiles, _to_tiles(tiles, q, kv_heads), _rows(mem_k, chapters), scale)
        s = _with_bias(s, tiles, log_weights, kv_heads)
        p = s.softmax(-1)
        # p is 1 / sum exp(s - max) where s is largest: logsumexp would exponentiate again.
        lse = _from_tiles(tiles, s.amax(-1, True) - p.amax(-1, True).log(), kv_heads).squeeze(-1)
        keep = torch.rand_like(p) >= dropout if dropout else None
        if keep is not None:
            p = p * keep / (1 - dropout)
        o = _from_tiles(tiles, p.to(q.dtype) @ _rows(mem_v, chapters), kv_heads)
        if mixture:
            o = _weighted_sum(o, None if log_weights is None else log_weights.exp())
            ctx.mark_non_differentiable(lse)
        else:
            by_part = _outside(log_weights, tiles)
            lse_by_part = lse if by_part is None else lse + by_part
            lse = lse_by_part.logsumexp(1)
            single = o.shape[1] == 1
            o = _weighted_sum(o, None if single else (lse_by_part - lse.unsqueeze(1)).exp())
        ctx.save_for_backward(q, mem_k, mem_v, log_weights, *tiles, o, lse, keep)
        ctx.options = (scale, dropout, mixture)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_o: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, mem_k, mem_v, log_weights, *layout, o, lse, keep = ctx.saved_tensors
        scale, dropout, mixture = ctx.options
        tiles, kv_heads = Tiles(*layout), mem_k.shape[2]
        queries, keys = _to_tiles(tiles, q, kv_heads), _rows(mem_k, tiles.chapters)
        do = _to_tiles(tiles, grad_o, kv_heads)
        p = _with_bias(_logits(tiles, queries, keys, scale), tiles, log_weights, kv_heads)
        p = p.sub_(_norm(tiles, lse, log_weights, mixture, kv_heads)).exp_()
        if mixture and log_weights is not None:
            weights = log_weights.exp().expand(-1, -1, q.shape[1]).unsqueeze(-1)
            do = (do * _to_tiles(tiles, weights, kv_heads)).to(do.dtype)
        da = (do @ _rows(mem_v, tiles.chapters).mT).to(p.dtype)
        read = p
        if keep is not None:
            factor = keep / (1 - dropout)
            da, read = da * factor, p * factor
        grad_v = _add_rows(read.to(q.dtype).mT @ do, mem_v, tiles.chapters)
        if mixture:
            delta = (p * da).sum(-1, keepdim=True)
            da = da.sub_(delta).mul_(p)
        else:
            delta = (grad_o * o).sum(-1, dtype=lse.dtype) - grad_lse
            da = da.sub_(_to_tiles(tiles, delta.unsqueeze(-1), kv_heads)).mul_(p)
        grad_log = None
        if log_weights is not None:
            grad_log = _sum_by_part(delta if mixture else da, tiles, kv_heads)
        da = da.mul_(scale).to(q.dtype)
        grad_q = _from_tiles(tiles, da @ keys, kv_heads).sum(1)
        grad_k = _add_rows(da.mT @ queries, mem_k, tiles.chapters)
        return grad_q, grad_k, grad_v, grad_log, *[None] * 7


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


def _norm(
    tiles: Tiles, lse: Tensor, log_weights: Tensor | None, mixture: bool, kv_heads: int
) -> Tensor:
    """What the logits less this are the logarithm of, `[N Hkv, m G, 1]`: no weight if empty."""
    if not mixture:
        by_part = _outside(log_weights, tiles)
        lse = lse.unsqueeze(1) if by_part is None else lse.unsqueeze(1) - by_part
        lse = lse.expand(-1, tiles.slots.shape[1], -1)
    norm = _to_tiles(tiles, lse.unsqueeze(-1), kv_heads)
    if tiles.filled is not None:
        count, width = tiles.parts.shape
        empty = ~tiles.filled.view(count, 1, width, 1)
        norm = norm.view(count, kv_heads, width, -1).masked_fill(empty, torch.inf).view_as(norm)
    return norm


def _sum_by_part(x: Tensor, tiles: Tiles, kv_heads: int) -> Tensor:
    """Sum over heads and rows of `[N Hkv, m G, K R]`, `[tokens, J, K]`."""
    (count, width), choices = tiles.parts.shape, tiles.chapters.shape[1]
    by_slot = x.view(count, kv_heads, width, -1, choices, x.shape[-1] // choices).sum((1, 3, 5))
    return tiles.collect(by_slot.unsqueeze(1)).squeeze(2)


def _weighted_sum(o: Tensor, weights: Tensor | None) -> Tensor:
    """`sum_j w_j o_j`, `[tokens, H, D]`, of a new tensor `[tokens, J, H, D]`; None: ones."""
    if weights is None:
        return o.sum(1)
    return o.to(weights.dtype).mul_(weights.unsqueeze(-1)).sum(1).to(o.dtype)
