"""Chapter attention by Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_modules.ops.chapter_attention.arguments import (
    log_weights_of,
    product_dtype,
    reads_by_chapter,
    with_shared,
)
from lightning_modules.ops.chapter_attention.in_graphs import in_graph
from lightning_modules.ops.chapter_attention.launch import Call, Inputs, Read

MAX_SIZE = 128
"""Largest D: a tile of rows and its gradient have to fit into one program."""

COMMON_BLOCK = 128
"""Tokens that read shared chapters together."""


def triton_obstacle(
    q: Tensor, mem_k: Tensor, mem_v: Tensor, *, whole: bool, dropout: float
) -> str | None:
    """What the kernels cannot do of a call, with the fix; None if they can do it all.

    Args:
        q: as in the op.
        mem_k: as in the op.
        mem_v: as in the op.
        whole: whether every token reads the whole bank.
        dropout: as in the op.
    """
    if whole:
        return (
            "chapters is None, which is dense attention: backend='torch' reads the whole bank by "
            "scaled_dot_product_attention"
        )
    if dropout > 0:
        return f"dropout = {dropout}: use 0, or backend='torch'"
    if q.shape[-1] > MAX_SIZE:
        return f"head size {q.shape[-1]} is over {MAX_SIZE}: use more heads, or backend='torch'"
    dtype = product_dtype(q, mem_k, mem_v)
    possible = (torch.float32, torch.bfloat16 if q.is_cuda else torch.float64)
    if dtype not in possible:
        return (
            f"products in {dtype} (of the inputs together, or of autocast): use "
            f"{' or '.join(map(str, possible))}, or backend='torch'"
        )
    return None


def triton_chapter_attention(
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
    """Chapter attention by Triton kernels; arguments and results of `ops.chapter_attention`.

    Products take their operands in the dtype of the torch backend's (float32 with three products
    of tf32 each) and accumulate in float32. Every run gives the same bits, and how a row of the
    batch is computed does not depend on the others. What `triton_obstacle` names is not done here.
    """
    assert chapters is not None and dropout == 0
    dtype, time = product_dtype(q, mem_k, mem_v), q.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    mixture, block = mixing == "mixture", min(block_size, time)
    together = mixture and shared_mode == "together" and shared > 1
    with torch.autocast(q.device.type, enabled=False):
        tokens, k, v = (x.to(dtype).contiguous() for x in (q.flatten(0, 1), mem_k, mem_v))

        def read(call: Call, chapters: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
            indices = chapters.to(torch.int32).contiguous()
            run = in_graph if torch.compiler.is_compiling() else Read.apply
            return run(call, *Inputs(tokens, k, v, weights.contiguous(), indices))

        by_block = not mixture and not reads_by_chapter(q, mem_k, chapters, block_size)
        weights = log_weights_of(q, chapters, log_weights)
        weights = weights.to(torch.promote_types(dtype, weights.dtype))
        if shared and not together:  # chosen ones of weight 1
            chapters, weights = with_shared(chapters, weights, shared)
        o, lse = read(Call(time, block, scale, mixture, by_block), chapters, weights)
        if together:
            width = min(COMMON_BLOCK, time)
            common = torch.arange(shared, device=q.device).expand(len(q), -(-time // width), -1)
            zeros = weights.new_zeros(common.shape)
            o = o + read(Call(time, width, scale, False, True), common, zeros)[0]
    o = o.to(q.dtype).view_as(q)
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return (o, lse.view(q.shape[:3]).to(lse_dtype)) if return_lse else o
