"""Stand-in for the op, until the real one is merged: slow, and gathers a copy per block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
) -> Tensor:
    """Read chosen chapters of a projected bank, `[B, T, H, D]`."""
    groups = q.shape[2] // mem_k.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if chapters is None:
        chapters = torch.arange(mem_k.shape[0], device=q.device).expand(*q.shape[:2], -1)
        block_size, shared, log_weights = 1, 0, None
    if log_weights is None:
        log_weights = torch.zeros_like(chapters, dtype=q.dtype)
    chapters, log_weights = (
        i.repeat_interleave(block_size, 1)[:, : q.shape[1]] for i in (chapters, log_weights)
    )
    always = torch.arange(shared, device=q.device).expand(*q.shape[:2], -1)
    chapters = torch.cat([always, chapters], -1)
    log_weights = F.pad(log_weights, (shared, 0)).to(q.dtype)
    k, v = (
        i.flatten(1)[chapters].unflatten(-1, i.shape[1:]).repeat_interleave(groups, -2)
        for i in (mem_k, mem_v)
    )  # [B, T, c, R, H, D]
    logits = torch.einsum("bthd,btcrhd->bthcr", q, k) * scale
    if mixing == "joint":
        logits = logits + log_weights[:, :, None, :, None]
        weights = logits.flatten(-2).softmax(-1).view_as(logits)
    else:
        together = [logits[..., :shared, :].softmax(-1)]
        if shared_mode == "together" and shared:
            together = [logits[..., :shared, :].flatten(-2).softmax(-1).unflatten(-1, (shared, -1))]
        together.append(logits[..., shared:, :].softmax(-1))
        weights = torch.cat(together, -2) * log_weights.exp()[:, :, None, :, None]
    return torch.einsum("bthcr,btcrhd->bthd", F.dropout(weights, dropout), v)
