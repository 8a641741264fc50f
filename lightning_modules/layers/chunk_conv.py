"""Depthwise convolution over time whose taps end where a chunk ends."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad


class ChunkConv(nn.Module):
    """`y_t = sum_j w_j x_{t + j - past}` for each channel, over tokens of the chunk of t alone.

    The taps reach `kernel_size - 1` tokens into the past (causal), or half as many into the past
    and into the future (symmetric, as the release of In-Place TTT has it). Neighbours in another
    chunk count as zero. The weight is zero at the start.

    Args:
        channels: D.
        kernel_size: K, taps of each channel.
        symmetric: see tokens of the chunk that come later.
    """

    def __init__(self, channels: int, kernel_size: int = 5, symmetric: bool = False) -> None:
        super().__init__()
        if kernel_size < 1:
            raise ValueError(f"kernel_size={kernel_size} must be at least 1")
        if symmetric and kernel_size % 2 == 0:
            raise ValueError(
                f"kernel_size={kernel_size} has no middle for symmetric=True: take an odd one, "
                f"e.g. {kernel_size + 1}, or symmetric=False"
            )
        self.kernel_size, self.symmetric = kernel_size, symmetric
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero: the convolution starts with no output."""
        nn.init.zeros_(self.weight)

    @property
    def past(self) -> int:
        """Tokens before t that `y_t` reads."""
        return self.kernel_size - 1 - self.future

    @property
    def future(self) -> int:
        """Tokens after t that `y_t` reads."""
        return self.kernel_size // 2 if self.symmetric else 0

    def forward(self, x: Tensor, chunk: Tensor) -> Tensor:
        """Convolve rows of tokens.

        Args:
            x: `[B, T, D]`.
            chunk: number of the chunk of each token, integers `[B, T]`, each chunk in one piece.

        Returns:
            `[B, T, D]`.
        """
        time = x.shape[1]
        padded = pad(x, (0, 0, self.past, self.future))
        numbers = pad(chunk, (self.past, self.future), value=-1)
        y = torch.zeros_like(x)
        for tap, weight in enumerate(self.weight.squeeze(1).unbind(1)):
            here = slice(tap, tap + time)
            neighbour = padded[:, here]
            if tap != self.past:
                same = numbers[:, here] == chunk
                neighbour = neighbour.masked_fill(~same.unsqueeze(-1), 0)
            y = y + weight * neighbour
        return y

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        kind = "symmetric" if self.symmetric else "causal"
        return f"{len(self.weight)}, kernel_size={self.kernel_size}, {kind}"
