"""Writing a chunk in few launches, where the host, not the products, is what a call waits for.

As `stack.write` and `stack.write_backward` of blocks that hand nothing to each other (one, or
greedy ones): two launches forward instead of five, three backward instead of seven.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

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


def write(blocks: Sequence[Pair], k: Tensor, v: Tensor, rates: Tensor) -> list[Pair]:
    """The change of each block: sums over the tokens `[G, C, D]`, wide."""
    return [_write_one(*pair, k, v, rates) for pair in blocks]


def _write_one(w02: Tensor, w1: Tensor, k: Tensor, v: Tensor, rates: Tensor) -> Pair:
    groups, length, size = k.shape
    hidden_size = w1.shape[-1]
    scaled = k.new_empty(groups, length, 2 * hidden_size)
    hidden = k.new_empty(groups, length, hidden_size)
    options = _gate_options(k.dtype, hidden_size, size, rates.shape[-1], 128, GROUP=w02.stride(0))
    grid = _gate_grid(groups, length, options)
    launcher(KERNELS, "operands_kernel")(
        grid, (k, v, w02, w1, rates, scaled, hidden), (length,), options
    )
    return _changes(scaled, k, v, hidden, hidden_size)


def write_backward(
    blocks: Sequence[Pair], k: Tensor, v: Tensor, rates: Tensor, drates: Tensor
) -> list[Pair]:
    """Gradients of the weights; those of k, v take the place of k, v, those of rates go to drates.

    Args:
        blocks: weights beside the gradients of their changes, `[G, 4 F, D]` and `[G, D, 2 F]`.
        k: `[G, C, D]`.
        v: `[G, C, D]`.
        rates: `[G, C, R]`, R is 3 or 4.
        drates: sums of parts, `[rate_parts, G, C, R]`.
    """
    changes, after = [], []
    parts = drates.chunk(len(blocks)) if len(blocks) > 1 else (drates,)  # a view is 8 us
    for pair, sums in zip(blocks, parts, strict=True):
        hidden_size = pair[1].shape[-1] // 2
        pa, ud = _operands_backward(*pair, k, v, rates, sums)
        changes.append(_changes(pa, k, v, ud, hidden_size))
        after.append((pa, ud))
    for j, (pair, gradients) in enumerate(zip(blocks, after, strict=True)):
        _token_gradients(*gradients, *pair, k, v, add=j > 0)
    return changes


def _operands_backward(
    first: Tensor, second: Tensor, k: Tensor, v: Tensor, rates: Tensor, drates: Tensor
) -> tuple[Tensor, Tensor]:
    """`dp | dh | lr0 a | lr2 u g` and `du | lr1 g h`, `[G, C, 4 F]` and `[G, C, 2 F]`."""
    groups, length, size = k.shape
    hidden_size = second.shape[-1] // 2
    pa = k.new_empty(groups, length, 4 * hidden_size)
    ud = k.new_empty(groups, length, 2 * hidden_size)
    options = _gate_options(k.dtype, hidden_size, size, rates.shape[-1], 64)
    tensors = (k, v, first, second, rates, pa, ud, drates)
    launcher(KERNELS, "operands_backward_kernel")(
        _gate_grid(groups, length, options), tensors, (length,), options
    )
    return pa, ud


def _changes(scaled: Tensor, x: Tensor, d: Tensor, hidden: Tensor, hidden_size: int) -> Pair:
    """`scaled^T x` and `d^T hidden`, of their first 2 F and F channels; wide."""
    groups, length, size = x.shape
    exact = torch.promote_types(x.dtype, torch.float32)
    of_w02 = x.new_empty(groups, 2 * hidden_size, size, dtype=exact)
    of_w1 = x.new_empty(groups, size, hidden_size, dtype=exact)
    widths = {"WIDTH": scaled.shape[-1], "HIDDEN": hidden.shape[-1]}
    options = _product_options(x.dtype, hidden_size, size, **widths)
    tiles = _tiles(2 * hidden_size, size, options) + _tiles(size, hidden_size, options)
    tensors = (scaled, x, d, hidden, of_w02, of_w1)
    launcher(KERNELS, "changes_kernel")((tiles, groups, 1), tensors, (length,), options)
    return of_w02, of_w1


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
