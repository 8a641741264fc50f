"""Writing a chunk in few launches, where the host, not the products, is what a call waits for.

As `stack.write` and `stack.write_backward` of blocks that hand nothing to each other (one, or
greedy ones): two launches forward instead of five, three backward instead of seven.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_modules.ops.lact.sizes import Pair
from lightning_modules.ops.launcher import Options, launcher, wide
from lightning_modules.ops.tile_size import padded

KERNELS = "lightning_modules.ops.lact.kernels.few"

ROWS = 2**14
"""Most tokens of a chunk, times heads and rows of the batch, of a call that is small."""

CHANNELS = 64
"""Hidden channels of a program that ends in gates."""


def rate_parts(hidden_size: int, blocks: int) -> int:
    """Sums in which the gradients of the rates come."""
    return blocks * -(-hidden_size // min(CHANNELS, padded(hidden_size)))


class Room(NamedTuple):
    """Where a block's chunks put what they compute, one after the other, in the same place.

    Attributes:
        wide: of W0 and W2: `lr0 a | lr2 u g`, `[G, C, 2 F]`; backward `[G, C, 4 F]`.
        narrow: of W1: `lr1 g h`, `[G, C, F]`; backward `[G, C, 2 F]`.
        changes: of the weights, or gradients at them, until the next chunk.
    """

    wide: Tensor
    narrow: Tensor
    changes: Pair


def rooms(blocks: int, k: Tensor, hidden_size: int, *, backward: bool) -> list[Room]:
    """Of each block, for chunks such as k, `[G, C, D]`: an allocation is 4 to 9 us of the host."""
    groups, length, size = k.shape
    channels = hidden_size * (2 if backward else 1)
    exact = torch.promote_types(k.dtype, torch.float32)
    return [
        Room(
            k.new_empty(groups, length, 2 * channels),
            k.new_empty(groups, length, channels),
            (
                k.new_empty(groups, 2 * hidden_size, size, dtype=exact),
                k.new_empty(groups, size, hidden_size, dtype=exact),
            ),
        )
        for _ in range(blocks)
    ]


def write(
    blocks: Sequence[Pair], k: Tensor, v: Tensor, rates: Tensor, rooms: Sequence[Room]
) -> list[Pair]:
    """The change of each block: sums over the tokens `[G, C, D]`, wide; they lie in its room."""
    _, length, size = k.shape
    for (w02, w1), room in zip(blocks, rooms, strict=True):
        options = _gate_options(
            k.dtype, w1.shape[-1], size, rates.shape[-1], 128, GROUP=w02.stride(0)
        )
        tensors = (k, v, w02, w1, rates, room.wide, room.narrow)
        launcher(KERNELS, "operands_kernel")(
            _gate_grid(len(k), length, options), tensors, (length,), options
        )
        _changes(room, k, v)
    return [room.changes for room in rooms]


def write_backward(
    blocks: Sequence[Pair],
    k: Tensor,
    v: Tensor,
    rates: Tensor,
    drates: Tensor,
    rooms: Sequence[Room],
) -> list[Pair]:
    """Gradients of the weights; those of k, v take the place of k, v, those of rates go to drates.

    Args:
        blocks: weights beside the gradients of their changes, `[G, 4 F, D]` and `[G, D, 2 F]`.
        k: `[G, C, D]`.
        v: `[G, C, D]`.
        rates: `[G, C, R]`, R is 3 or 4.
        drates: sums of parts, `[rate_parts, G, C, R]`.
        rooms: of the blocks; what is returned lies in them.
    """
    _, length, size = k.shape
    parts = drates.chunk(len(blocks)) if len(blocks) > 1 else (drates,)  # a view is 8 us
    for pair, sums, room in zip(blocks, parts, rooms, strict=True):
        options = _gate_options(k.dtype, room.changes[1].shape[-1], size, rates.shape[-1], 64)
        tensors = (k, v, *pair, rates, room.wide, room.narrow, sums)
        launcher(KERNELS, "operands_backward_kernel")(
            _gate_grid(len(k), length, options), tensors, (length,), options
        )
        _changes(room, k, v)
    for j, (pair, room) in enumerate(zip(blocks, rooms, strict=True)):
        _token_gradients(room.wide, room.narrow, *pair, k, v, add=j > 0)
    return [room.changes for room in rooms]


def _changes(room: Room, x: Tensor, d: Tensor) -> None:
    """`wide^T x` and `d^T narrow`, of their first 2 F and F channels."""
    groups, length, size = x.shape
    hidden_size = room.changes[1].shape[-1]
    widths = {"WIDTH": room.wide.shape[-1], "HIDDEN": room.narrow.shape[-1]}
    options = _product_options(x.dtype, hidden_size, size, **widths)
    tiles = _tiles(2 * hidden_size, size, options) + _tiles(size, hidden_size, options)
    tensors = (room.wide, x, d, room.narrow, *room.changes)
    launcher(KERNELS, "changes_kernel")((tiles, groups, 1), tensors, (length,), options)


def _token_gradients(
    pa: Tensor, ud: Tensor, first: Tensor, second: Tensor, dk: Tensor, dv: Tensor, *, add: bool
) -> None:
    """`pa first` and `ud second^T` into dk and dv, or added to them."""
    groups, length, size = dk.shape
    more = {"WIDE": wide(dk.dtype), "ADD": add}
    options = _product_options(dk.dtype, second.shape[-1] // 2, size, **more)
    grid = (2 * _tiles(length, size, options), groups, 1)
    launcher(KERNELS, "tokens_kernel")(grid, (pa, ud, first, second, dk, dv), (length,), options)


def _tiles(rows: int, columns: int, options: Options) -> int:
    return -(-rows // options["BM"]) * -(-columns // options["BN"])


def _gate_grid(groups: int, length: int, options: Options) -> tuple[int, int, int]:
    return -(-options["F"] // options["BF"]), -(-length // options["BT"]), groups


@cache
def _gate_options(
    dtype: torch.dtype, hidden_size: int, size: int, rates: int, tokens: int, **more: int
) -> Options:
    """Of kernels that end in gates, for tiles of so many tokens."""
    own = {"R": rates, "WIDE": wide(dtype), "BF": min(CHANNELS, padded(hidden_size))}
    return Options(
        own, BT=tokens, BK=_depth(dtype, size), **_common(dtype, hidden_size, size), **more
    )


@cache
def _product_options(dtype: torch.dtype, hidden_size: int, size: int, **more: Any) -> Options:
    """Of kernels that are two products."""
    tile = {"BM": 128, "BN": 128, "BK": _depth(dtype, 64)}
    return Options(tile, **_common(dtype, hidden_size, size), **more)


def _common(dtype: torch.dtype, hidden_size: int, size: int) -> dict[str, Any]:
    precision = "tf32x3" if dtype == torch.float32 else "ieee"
    sizes = {"F": hidden_size, "D": size, "PRECISION": precision}
    return sizes | {"num_warps": 8, "num_stages": 3}


def _depth(dtype: torch.dtype, size: int) -> int:
    """Of a step of a sum: 128 bytes."""
    return min(128 // dtype.itemsize, padded(size))
