"""What the backends with matrix products make of the arguments first."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

MIN_BLOCK = 32
"""Blocks of fewer tokens share what they gather among too few, and are read token by token (by
training steps on a CPU: at 8 tokens 2.5 and at 16 tokens 1.6 times as fast, at 32 slower)."""


def product_dtype(q: Tensor, mem_k: Tensor, mem_v: Tensor) -> torch.dtype:
    """What matrix products take: the inputs' dtype, or autocast's unless they are float64."""
    dtype = torch.promote_types(q.dtype, torch.promote_types(mem_k.dtype, mem_v.dtype))
    device = q.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return dtype


def reads_by_chapter(q: Tensor, mem_k: Tensor, chapters: Tensor, block_size: int) -> bool:
    """Whether gathering for each block would be more than sorting its choices by chapter."""
    return min(block_size, q.shape[1]) < MIN_BLOCK and chapters[0].numel() > len(mem_k)


def log_weights_of(q: Tensor, chapters: Tensor, log_weights: Tensor | None) -> Tensor:
    """Logarithms of the weights in at least float32."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    if log_weights is None:
        return torch.zeros(chapters.shape, dtype=dtype, device=q.device)
    return log_weights.to(dtype)


def with_shared(chapters: Tensor, weights: Tensor, shared: int) -> tuple[Tensor, Tensor]:
    """Chapters and weights with the shared ones as chosen ones of weight 1."""
    common = torch.arange(shared, device=chapters.device).expand(*chapters.shape[:2], -1)
    return torch.cat([common, chapters], dim=-1), pad(weights, (shared, 0))
