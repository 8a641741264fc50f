"""Tiles of chapter attention's kernels: how many queries and rows a program holds at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_modules.ops.tile_size import padded


class Tile(NamedTuple):
    """Of one kernel: queries and rows at once (0: none), warps, stages of loads."""

    queries: int
    rows: int
    warps: int
    stages: int


class Plan(NamedTuple):
    """Tiles of all kernels of a call; `merge` is of those that go over queries only."""

    read_blocks: Tile
    read_pairs: Tile
    query_gradient: Tile
    pair_gradient: Tile
    bank_gradient: Tile
    merge: Tile


LARGEST = {
    # bfloat16, D up to 64 or over 64
    (True, False): Plan(
        read_blocks=Tile(64, 128, 4, 2),
        read_pairs=Tile(64, 128, 4, 1),
        query_gradient=Tile(64, 64, 4, 3),
        pair_gradient=Tile(64, 64, 4, 2),
        bank_gradient=Tile(32, 128, 4, 2),
        merge=Tile(32, 0, 4, 1),
    ),
    (True, True): Plan(
        read_blocks=Tile(128, 64, 8, 2),
        read_pairs=Tile(64, 128, 8, 2),
        query_gradient=Tile(64, 64, 4, 2),
        pair_gradient=Tile(64, 32, 4, 2),
        bank_gradient=Tile(32, 128, 8, 2),
        merge=Tile(32, 0, 4, 1),
    ),
    # other dtypes
    (False, False): Plan(
        read_blocks=Tile(64, 64, 4, 2),
        read_pairs=Tile(32, 64, 4, 2),
        query_gradient=Tile(64, 32, 4, 2),
        pair_gradient=Tile(32, 32, 4, 2),
        bank_gradient=Tile(32, 64, 8, 2),
        merge=Tile(32, 0, 4, 1),
    ),
    (False, True): Plan(
        read_blocks=Tile(64, 32, 8, 2),
        read_pairs=Tile(16, 32, 4, 2),
        query_gradient=Tile(16, 32, 4, 2),
        pair_gradient=Tile(16, 32, 4, 2),
        bank_gradient=Tile(32, 32, 8, 1),
        merge=Tile(32, 0, 4, 1),
    ),
}
"""Those that took least on an H200 (bfloat16, D up to 64: `ops_chapter_attention.py --sweep`), else
the largest that compile for sm_90 without, or almost without, spilling registers."""


def plan_of(q: Tensor, mem_k: Tensor, block: int) -> Plan:
    """Tiles for queries `[tokens, H, D]`, a bank `[C, R, Hkv, D]` and blocks of so many tokens.

    They depend neither on the number of tokens, which must not compile anything again, nor on the
    batch, whose rows are to be computed alike.
    """
    largest = LARGEST[q.dtype == torch.bfloat16, q.shape[-1] > 64]
    rows = padded(mem_k.shape[1])
    held = Plan(*(x._replace(rows=min(x.rows, rows)) for x in largest))
    return held._replace(
        read_blocks=_of_block(held.read_blocks, block),
        query_gradient=_of_block(held.query_gradient, block),
    )


def _of_block(tile: Tile, block: int) -> Tile:
    """No more queries than a block has, and no more warps than they need."""
    queries = min(tile.queries, padded(block))
    return tile._replace(queries=queries, warps=tile.warps if queries == tile.queries else 4)
