"""Stand-in for the rounding of rows, until the real one is merged."""

from __future__ import annotations

import torch
from torch import Tensor


def quantize_rows(bank: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes (int8 `[N, d]`, or two to a byte `[N, d / 2]`) and scales `[N]`."""
    largest = 2 ** (bits - 1) - 1
    scale = (bank.abs().amax(-1) / largest).clamp(min=1e-8)
    codes = (bank / scale[:, None]).round().clamp(-largest, largest).to(torch.int8)
    if bits == 4:
        codes = (codes[:, 0::2] & 15) | (codes[:, 1::2] << 4)
    return codes, scale


def dequantize_rows(codes: Tensor, scale: Tensor, rows: Tensor | None, bits: int) -> Tensor:
    """Rows `[n, d]`; None for all."""
    if rows is not None:
        codes, scale = codes[rows], scale[rows]
    if bits == 4:
        codes = torch.stack([(codes << 4) >> 4, codes >> 4], -1).flatten(-2)
    return codes * scale.unsqueeze(-1)
