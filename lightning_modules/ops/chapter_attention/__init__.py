"""Chapter attention: cross-attention to those chapters of a bank that a router has chosen."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from lightning_modules.ops.chapter_attention.checks import check_chapter_attention
from lightning_modules.ops.chapter_attention.eager import eager_chapter_attention
from lightning_modules.ops.chapter_attention.fused import (
    triton_chapter_attention,
    triton_obstacle,
)
from lightning_modules.ops.chapter_attention.naive import naive_chapter_attention
from lightning_modules.ops.triton_backend import dispatch

BACKENDS = {
    "torch": eager_chapter_attention,
    "naive": naive_chapter_attention,
    "triton": triton_chapter_attention,
}

__all__ = ["chapter_attention"]


def chapter_attention(
    q: Tensor,
    mem_k: Tensor,
    mem_v: Tensor,
    chapters: Tensor | None = None,
    log_weights: Tensor | None = None,
    *,
    block_size: int = 1,
    shared: int = 0,
    shared_mode: str = "together",
    mixing: str = "joint",
    scale: float | None = None,
    dropout: float = 0.0,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Read a bank of C chapters of R rows each: every token those that were chosen for it.

    With w_c the weights of the chosen chapters, K_c and V_c the rows of a chapter,

        joint:    o = softmax over the rows of shared and chosen chapters of
                  (scale q K_c^T + log w_c) V_c,    w_c = 1 for shared ones
        mixture:  o = sum_c w_c softmax(scale q K_c^T) V_c + softmax(scale q K_s^T) V_s

    where K_s, V_s are the rows of all shared chapters, or, with shared_mode `per_chapter`, a sum
    over shared chapters stands in their place. Joint mixing equals the outputs of single chapters
    recombined by `softmax_c(lse_c + log w_c)`. Every token of the batch reads the same bank, and
    positions play no part.

    Args:
        q: queries, `[B, T, H, D]`.
        mem_k: keys, `[C, R, Hkv, D]`; H is a multiple of Hkv, and key head g belongs to query heads
            `g H / Hkv` to `(g + 1) H / Hkv - 1`.
        mem_v: values, `[C, R, Hkv, D]`.
        chapters: numbers of the chosen chapters, int64 `[B, ceil(T / block_size), k]`: at least
            `shared`, less than C, none twice for a token (which is not checked: it would wait for
            the device). None: every token reads the whole bank.
        log_weights: logarithms of their weights, of the same shape; a factor of all weights (the
            router's `routed_scaling`) belongs into them. Very negative ones switch a chapter off.
            None: zeros.
        block_size: token t reads what was chosen for block `t // block_size`; the last block may
            be short.
        shared: S, the first chapters, which every token reads.
        shared_mode: of a mixture: one softmax over all shared rows (`together`), or one for each
            shared chapter (`per_chapter`).
        mixing: `joint`, one softmax, or `mixture`, a weighted sum of softmaxes.
        scale: of the logits; None: `D ** -0.5`.
        dropout: probability with which an attention weight becomes 0 and the others grow; pass 0
            outside training.
        return_lse: also return the logsumexp of the logits (joint only).
        backend: "torch" (matrix products), "triton" (kernels for CUDA, D up to 128, chosen
            chapters, no dropout), "naive" (a loop over tokens that defines the result), or "auto":
            "triton" on a GPU where it can, else "torch"; a line in the log says why, once.

    Returns:
        Outputs `[B, T, H, D]` in the dtype of q, and if asked for lse `[B, T, H]`, float32
        (float64 if q is). The matrix products of "torch" and "triton" take the inputs' dtype (under
        autocast: its dtype), their softmax float32 at least. Gradients are of first order.

    Raises:
        ValueError: if shapes, dtypes or options do not fit together, or not the backend.
        RuntimeError: backend "triton" without a GPU, or without triton.
    """
    options: dict[str, Any] = {
        "block_size": block_size,
        "shared": shared,
        "shared_mode": shared_mode,
        "mixing": mixing,
        "scale": scale,
        "dropout": dropout,
        "return_lse": return_lse,
    }
    check_chapter_attention(q, mem_k, mem_v, chapters, log_weights, **options)
    obstacle = partial(triton_obstacle, q, mem_k, mem_v, whole=chapters is None, dropout=dropout)
    run = dispatch("chapter_attention", backend, BACKENDS, q, obstacle, in_graphs=True)
    return run(q, mem_k, mem_v, chapters, log_weights, **options)
