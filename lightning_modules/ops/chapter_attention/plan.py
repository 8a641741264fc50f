"""Tiles of chapter attention's kernels: how many queries and rows a program holds at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tile(NamedTuple):
    """Of one kernel: queries and rows at once, warps, stages of loads."""

    queries: int
    rows: int
    warps: int
    stages: int


class Plan(NamedTuple):
    """Tiles of all kernels of a call; `rows` is of those that go over queries only."""

    read_blocks: Tile
    read_pairs: Tile
    query_gradient: Tile
    bank_gradient: Tile
    rows: Tile


def plan_of(q: Tensor, mem_k: Tensor, block: int) -> Plan:
    """Tiles for queries `[tokens, H, D]`, a bank `[C, R, Hkv, D]` and blocks of so many tokens.

    They depend neither on the number of tokens, which must not compile anything again, nor on the
    batch, whose rows are to be computed alike.
    """
    rows, size = padded(mem_k.shape[1]), padded(q.shape[-1])
    wide, exact = size > 64, q.dtype != torch.bfloat16
    most = 32 if exact and wide else 64 if exact or wide else 128
    held = min(rows, most)
    by_block = min(padded(block), 64 if exact else 128)
    by_chapter = 32 if exact and wide else 64
    return Plan(
        read_blocks=Tile(by_block, min(held, 64), 8 if by_block == 128 else 4, 2),
        read_pairs=Tile(by_chapter, held, 4, 2),
        query_gradient=Tile(min(by_block, 64), min(held, 64), 4, 2),
        bank_gradient=Tile(by_chapter, held, 8, 2),
        rows=Tile(32, 0, 4, 1),
    )


def padded(size: int) -> int:
    """The power of two that holds a size, at least what a matrix product needs."""
    return max(16, 1 << (size - 1).bit_length())
