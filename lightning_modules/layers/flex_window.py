"""Sliding-window attention as one compiled kernel (flex_attention), on a GPU."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
"""Tokens of a block of the mask; shorter calls gain nothing from one kernel."""

MIN_HEAD = 16
"""Smallest head that the kernel takes."""


class FlexWindow:
    """Attention of token j to the columns `first[j]` to `carried + j`.

    Blocks of columns that no token of a block sees are left out, so that time is O(T Wn). The
    blocks are found from `first` alone, without a mask of all pairs.

    Args:
        first: first column that each token sees, int64 `[B, T]`; it never decreases with T.
        carried: columns before those of the tokens.
    """

    def __init__(self, first: Tensor, carried: int) -> None:
        self.block_mask = _block_mask(first, carried)

    @classmethod
    def of(cls, x: Tensor, first: Tensor, carried: int) -> FlexWindow | None:
        """The kernel for a call on x `[B, T, ...]`, or None where it does not pay or not run."""
        if x.device.type != "cuda" or x.dtype == torch.float64 or x.shape[1] < BLOCK:
            return None
        return cls(first.expand(x.shape[0], -1), carried)

    def __call__(self, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """`[B, H, T, D]` from q of that shape and keys and values `[B, H, S + T, D]`."""
        size = q.shape[-1]
        if size < MIN_HEAD:
            q, keys, values = (F.pad(x, (0, MIN_HEAD - size)) for x in (q, keys, values))
        out = _compiled()(q, keys, values, block_mask=self.block_mask, scale=size**-0.5)
        return out[..., :size]


@cache
def _compiled() -> Any:
    # Imported here: it brings torch's compiler, which takes seconds.
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _block_mask(first: Tensor, carried: int) -> BlockMask:
    """The blocks that a block of tokens sees in part, and those that it sees as a whole."""
    from torch.nn.attention.flex_attention import BlockMask

    length = first.shape[1]
    columns = carried + length
    start = torch.arange(0, length, BLOCK, device=first.device)
    end = (start + BLOCK - 1).clamp(max=length - 1)
    left = torch.arange(0, columns, BLOCK, device=first.device)
    right = left + BLOCK - 1
    low, high = first[:, start, None], first[:, end, None]
    some = (right >= low) & (left <= carried + end[:, None])
    whole = (left >= high) & (right <= carried + start[:, None])

    def visible(b: Tensor, h: Tensor, query: Tensor, column: Tensor) -> Tensor:
        return (column <= carried + query) & (column >= first[b, query])

    return BlockMask.from_kv_blocks(
        *_listed(some & ~whole),
        *_listed(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(length, columns),
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks `[B, queries, columns]` are true and, those first, which: `[B, 1, ...]`."""
    which = torch.argsort(blocks.int(), dim=-1, descending=True, stable=True)
    return blocks.sum(-1).int().unsqueeze(1), which.int().unsqueeze(1)
