"""Chapter attention of blocks by one gather and `scaled_dot_product_attention`, on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding, pad, scaled_dot_product_attention

MIN_BLOCK = 64
"""Blocks of so many tokens keep fewer gathered rows for the backward pass than they have logits: on
an H200 a training step on tiles takes 2.2 to 4.9 times as long there, and 1.5 to 2.4 times the
memory (`benchmarks/ops_chapter_attention.py`)."""


def pays(tokens: Tensor, block_size: int) -> bool:
    """Whether blocks of such queries are read faster by a fused kernel than as tiles.

    The kernel adds gradients in any order where a tile has few queries, so not if deterministic
    algorithms are asked for; of float64 there is none.
    """
    fused = tokens.is_cuda and tokens.dtype != torch.float64
    return fused and block_size >= MIN_BLOCK and not torch.are_deterministic_algorithms_enabled()


def gathered_attention(
    q: Tensor,
    mem_k: Tensor,
    mem_v: Tensor,
    chapters: Tensor,
    log_weights: Tensor,
    *,
    block_size: int,
    scale: float,
    dropout: float,
) -> Tensor:
    """One softmax over the rows of a block's chapters, `[B, T, H, D]`.

    The query heads of a key head stand behind each other as queries, so that a block is a batch
    entry with a head for each key head.

    Args:
        q: `[B, T, H, D]`, of the dtype of the bank.
        mem_k: `[C, R, Hkv, D]`.
        mem_v: of the same shape.
        chapters: of each block, `[B, nb, k]`.
        log_weights: of the same shape.
        block_size: tokens of a block.
        scale: of the logits.
        dropout: of attention weights.
    """
    (batch, time, heads, size), (_, rows, kv_heads, _) = q.shape, mem_k.shape
    blocks, width = chapters.shape[1], min(block_size, time)
    group = heads // kv_heads
    keys, values = (
        embedding(chapters.flatten(0, 1), mem.flatten(1))
        .view(batch * blocks, -1, kv_heads, size)
        .transpose(1, 2)
        for mem in (mem_k, mem_v)
    )
    queries = (
        pad(q, (0, 0, 0, 0, 0, blocks * width - time))
        .view(batch * blocks, width, kv_heads, group, size)
        .permute(0, 2, 3, 1, 4)
        .flatten(2, 3)
    )
    # a softmax does not see the shift, and small numbers lose less in 16 bits
    shifted = (log_weights - log_weights.detach().amax(-1, keepdim=True)).to(q.dtype)
    bias = shifted.unsqueeze(-1).expand(-1, -1, -1, rows).reshape(batch * blocks, 1, 1, -1)
    o = scaled_dot_product_attention(
        queries, keys, values, attn_mask=bias, dropout_p=dropout, scale=scale
    )
    by_token = o.unflatten(2, (group, width)).permute(0, 3, 1, 2, 4)
    return by_token.reshape(batch, blocks * width, heads, size)[:, :time]
