"""Rows of a bank as 8 or 4 bit integers, with one scale for each row."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_modules.ops.checks import check_shape

LARGEST = {8: 127, 4: 7}
SCALE_FLOOR = 1e-8


def quantize_rows(bank: Tensor, bits: Literal[4, 8]) -> tuple[Tensor, Tensor]:
    """Round every row to multiples of its own scale.

        scale_i = max(max_j |M_ij| / c, 1e-8),    code_ij = clamp(round(M_ij / scale_i), -c, c)

    with c = 127 (8 bits) or 7 (4 bits); halves are rounded to even. The error is at most
    `scale / 2`, and quantising what the codes stand for gives the same codes.

    Args:
        bank: M, `[N, d]`; d even if bits is 4.
        bits: 8, or 4.

    Returns:
        Codes, int8 `[N, d]`, or with 4 bits `[N, d / 2]`: two codes in a byte, in two's complement,
        that of the even column in the low half. And scales `[N]`, in float32 (float64 if the bank
        is). Neither has a gradient.

    Raises:
        ValueError: if the bank is not a real-valued matrix, bits is neither 8 nor 4, or the columns
            of 4 bits do not pair up.
    """
    largest = _largest(bits)
    if bank.dim() != 2 or not bank.is_floating_point():
        raise ValueError(
            f"bank must be floating point [N, d], but is {bank.dtype} {list(bank.shape)}"
        )
    if bits == 4 and bank.shape[1] % 2:
        raise ValueError(
            f"bank has {bank.shape[1]} columns, but 4 bits pack two of them into a byte: use an "
            "even number of them, or bits=8"
        )
    bank = bank.detach().to(torch.promote_types(bank.dtype, torch.float32))
    scale = (bank.abs().amax(1) / largest).clamp(min=SCALE_FLOOR)
    codes = (bank / scale.unsqueeze(1)).round().clamp(-largest, largest).to(torch.int8)
    if bits == 4:
        codes = (codes[:, ::2] & 15) | (codes[:, 1::2] << 4)
    return codes, scale


def dequantize_rows(
    codes: Tensor, scale: Tensor, rows: Tensor | None, bits: Literal[4, 8]
) -> Tensor:
    """What rows of codes stand for, `scale_i code_ij`, in the dtype of the scales.

    Args:
        codes: as `quantize_rows` returns them, `[N, d]` or (4 bits) `[N, d / 2]`.
        scale: `[N]`.
        rows: numbers of the rows to read, integers of any shape; no others are touched. None: all.
        bits: 8, or 4, as when they were made.

    Returns:
        `[*rows.shape, d]`, or `[N, d]`.

    Raises:
        ValueError: if bits is neither 8 nor 4, or codes and scales are not `quantize_rows`'s.
    """
    _largest(bits)
    if codes.dim() != 2 or codes.dtype != torch.int8:
        raise ValueError(f"codes must be int8 [N, d], but are {codes.dtype} {list(codes.shape)}")
    check_shape("scale", scale, (len(codes),))
    if rows is not None:
        codes, scale = codes[rows], scale[rows]
    if bits == 4:
        # Shifting left and back again extends the sign of the low half.
        codes = torch.stack([(codes << 4) >> 4, codes >> 4], dim=-1).flatten(-2)
    return codes.to(scale.dtype) * scale.unsqueeze(-1)


def _largest(bits: int) -> int:
    if bits not in LARGEST:
        raise ValueError(f"bits={bits}: choose 8 or 4")
    return LARGEST[bits]
