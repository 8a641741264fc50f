"""Sums over the last W elements of a document, by doubling."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def window_sums(
    values: Tensor, document: Tensor | None = None, window: int | None = None
) -> Tensor:
    """`out[t] = sum of values[s]` over the last W elements s <= t of the same document.

    Sums over 1, 2, 4, ... elements are made of each other, in log2(W) steps. The order in which a
    sum is taken depends on nothing but the elements of its document, so that a later element, or
    another document in the row, changes no bit of it. A cumulative sum and a difference would lose
    digits to what came before, and on a GPU `cumsum` may differ from run to run.

    Args:
        values: `[B, L, E]`.
        document: number of every element's document, int64 `[B, L]`, the same in one run of
            elements only; None: all are of one.
        window: W; None: all elements of the document so far.

    Returns:
        `[B, L, E]`.
    """
    length = values.shape[1]
    if window is None or window >= length:
        window = 1 << max(length - 1, 0).bit_length()  # reaches as far, in fewer steps
    total, span = None, 1
    while True:
        if window & span:
            total = values if total is None else values + _earlier(total, document, span)
        if 2 * span > window:
            assert total is not None
            return total
        values = values + _earlier(values, document, span)
        span *= 2


def _earlier(values: Tensor, document: Tensor | None, span: int) -> Tensor:
    """`values[t - span]`, 0 where that is another document's or before the first."""
    shifted = values[:, :-span]
    if document is not None:
        same = document[:, span:] == document[:, :-span]
        shifted = torch.where(same.unsqueeze(-1), shifted, 0.0)
    return F.pad(shifted, (0, 0, span, 0))
