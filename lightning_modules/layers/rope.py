"""Rotary positions inside a mini-batch, as the causal TTT layer uses them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ROPE_THETA = 10_000.0


def mini_batch_positions(
    like: Tensor,
    mini_batch_size: int,
    mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    state: Any | None = None,
) -> Tensor:
    """Index of every token in its mini-batch.

    Masked tokens take no index, and a document starts at 0.

    Args:
        like: any tensor `[B, T, ...]` on the device of the result.
        mini_batch_size: m.
        mask: real tokens, bool `[B, T]`; None: all are real.
        document_ids: document of each token, int64 `[B, T]`; None: all continue the state's.
        state: TTT state before the call; None: nothing was read yet.

    Returns:
        int64 `[B, T]` or, where all rows agree, `[1, T]`.
    """
    rows, length = like.shape[:2]
    time = torch.arange(length, device=like.device)
    if mask is None and document_ids is None and state is None:
        return (time % mini_batch_size).unsqueeze(0)
    real = torch.ones(rows, length, dtype=torch.bool, device=like.device) if mask is None else mask
    count = real.long().cumsum(1) - real.long()
    if state is not None:
        count = count + state.pending_count.unsqueeze(1)
    if document_ids is not None:
        starts = _document_starts(document_ids, real, state)
        count = count - torch.where(starts, count, 0).cummax(1).values
    return count % mini_batch_size


def _document_starts(document_ids: Tensor, real: Tensor, state: Any | None) -> Tensor:
    """Real tokens whose document differs from that of the real token before, bool `[B, T]`."""
    time = torch.arange(real.shape[1], device=real.device)
    last = torch.where(real, time, -1).cummax(1).values
    last = torch.cat([torch.full_like(last[:, :1], -1), last[:, :-1]], dim=1)
    changes = document_ids != document_ids.gather(1, last.clamp(min=0))
    if state is None:
        return real & changes & (last >= 0)
    begun = (state.tokens_seen > 0).unsqueeze(1)
    changes_here = begun & (document_ids != state.document_id.unsqueeze(1))
    return real & torch.where(last < 0, changes_here, changes)


def rotate_interleaved(x: Tensor, positions: Tensor, theta: float = ROPE_THETA) -> Tensor:
    """Rotate the pairs (2i, 2i+1) of x by `position * theta^(-2i/D)`.

    Args:
        x: `[B, T, H, D]`, D even.
        positions: int64 `[B, T]` or `[1, T]`.
        theta: base of the frequencies.

    Returns:
        `[B, T, H, D]` in the dtype of x; angles in float32 (float64 for float64).
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    index = torch.arange(0, x.shape[-1], 2, device=x.device, dtype=dtype)
    angle = positions.to(dtype)[..., None, None] * theta ** (-index / x.shape[-1])
    cos, sin = angle.cos(), angle.sin()
    even, odd = x[..., 0::2].to(dtype), x[..., 1::2].to(dtype)
    rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return rotated.flatten(-2).to(x.dtype)
