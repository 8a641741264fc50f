"""Sizes of a LaCT call, and how the weights of a head lie for kernels and products."""

from typing import NamedTuple

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]
"""`[G, 2 F, D]` and `[G, D, F]`."""


class Sizes(NamedTuple):
    """Rows, heads, hidden channels and channels of a call, and what its products read."""

    batch: int
    heads: int
    hidden: int
    size: int
    low: torch.dtype

    @property
    def groups(self) -> int:
        """G, matrices of a kind."""
        return self.batch * self.heads

    @property
    def packed(self) -> int:
        """Numbers of a head's weights."""
        return 3 * self.hidden * self.size

    @property
    def rows(self) -> int:
        """Rows of a head's weights."""
        return 2 * self.hidden + self.size

    def pair(self, packed: Tensor) -> Pair:
        """Packed weights `[..., 3 F D]` as a pair (views)."""
        first, second = packed.split([2 * self.hidden * self.size, self.hidden * self.size], dim=-1)
        return first.unflatten(-1, (-1, self.size)), second.unflatten(-1, (self.size, -1))

    def operands(self, both: Tensor) -> Pair:
        """Weights beside gradients, `[G, 6 F D]`, as `[G, 4 F, D]` and `[G, D, 2 F]` (views)."""
        cut = 4 * self.hidden * self.size
        first, second = both[:, :cut], both[:, cut:]
        return first.unflatten(1, (-1, self.size)), second.unflatten(1, (self.size, -1))
