"""Rotary positions: which index a token has, and how its features are turned by it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_modules.layers.documents import Known, document_starts

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
    offset = None if state is None else state.pending_count
    return _positions(like, mask, document_ids, state, offset) % mini_batch_size


def document_positions(
    like: Tensor,
    mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    state: Any | None = None,
) -> Tensor:
    """Index of every token among the real ones of its document; arguments as above.

    A masked token gets the index that the next real one would take in its place.

    Returns:
        int64 `[B, T]` or, where all rows agree, `[1, T]`.
    """
    offset = None if state is None else state.tokens_seen
    return _positions(like, mask, document_ids, state, offset)


def _positions(
    like: Tensor,
    mask: Tensor | None,
    document_ids: Tensor | None,
    state: Any | None,
    offset: Tensor | None,
) -> Tensor:
    """Number of real tokens of the document before each; `offset [B]` of them before the call."""
    rows, length = like.shape[:2]
    if mask is None and document_ids is None and offset is None:
        return torch.arange(length, device=like.device).unsqueeze(0)
    real = torch.ones(rows, length, dtype=torch.bool, device=like.device) if mask is None else mask
    count = real.long().cumsum(1) - real.long()
    if offset is not None:
        count = count + offset.unsqueeze(1)
    if document_ids is not None:
        known = None if state is None else Known(state.tokens_seen > 0, state.document_id)
        starts = document_starts(document_ids, real, known)
        count = count - torch.where(starts, count, 0).cummax(1).values
    return count


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


def rotary_table(
    positions: Tensor, size: int, theta: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`cos` and `sin` of `position * theta^(-2i/size)`, for `rotate_halves`.

    Args:
        positions: int64 `[B, T]` or `[1, T]`.
        size: of a head, even.
        theta: base of the frequencies.
        dtype: of the angles, float32 or float64.

    Returns:
        Both `[B, T, 1, size / 2]`.
    """
    index = torch.arange(0, size, 2, device=positions.device, dtype=dtype)
    angle = positions.to(dtype)[..., None, None] * theta ** (-index / size)
    return angle.cos(), angle.sin()


def rotate_halves(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the pairs (i, i + D/2) of x: `(a cos - b sin, b cos + a sin)` for its halves a, b.

    Args:
        x: `[B, T, H, D]`.
        table: from `rotary_table`.

    Returns:
        `[B, T, H, D]` in the dtype of x, computed in that of the table.
    """
    cos, sin = table
    a, b = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
