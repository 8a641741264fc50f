"""Writing a chunk in few launches, where the host, not the products, is what a call waits for.

As `stack.write` and `stack.write_backward` of blocks that hand nothing to each other (one, or
greedy ones): two launches forward instead of five, three backward instead of seven.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_modules.ops.lact.sizes import Pair
from lightning_modules.ops.tile_size import padded

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
    from lightning_modules.ops.lact.kernels.few import operands_kernel

    hidden_size, lead = w1.shape[-1], k.shape[:-1]
    scaled = k.new_empty(*lead, 2 * hidden_size)
    hidden = k.new_empty(*lead, hidden_size)
    options = _gate_options(k, rates, hidden_size, tokens=128)
    operands_kernel[_gate_grid(k, options)](
        k=k,
        v=v,
        w02=w02,
        w1=w1,
        rates=rates,
        scaled=scaled,
        hidden=hidden,
        GROUP=w02.stride(0),
        **options,
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
    for pair, parts in zip(blocks, drates.chunk(len(blocks)), strict=True):
        hidden_size = pair[1].shape[-1] // 2
        pa, ud = _operands_backward(*pair, k, v, rates, parts)
        changes.append(_changes(pa, k, v, ud, hidden_size))
        after.append((pa, ud))
    for j, (pair, gradients) in enumerate(zip(blocks, after, strict=True)):
        _token_gradients(*gradients, *pair, k, v, add=j > 0)
    return changes


def _operands_backward(
    first: Tensor, second: Tensor, k: Tensor, v: Tensor, rates: Tensor, drates: Tensor
) -> tuple[Tensor, Tensor]:
    """`dp | dh | lr0 a | lr2 u g` and `du | lr1 g h`, `[G, C, 4 F]` and `[G, C, 2 F]`."""
    from lightning_modules.ops.lact.kernels.few import operands_backward_kernel

    hidden_size, lead = second.shape[-1] // 2, k.shape[:-1]
    pa, ud = k.new_empty(*lead, 4 * hidden_size), k.new_empty(*lead, 2 * hidden_size)
    options = _gate_options(k, rates, hidden_size, tokens=64)
    operands_backward_kernel[_gate_grid(k, options)](
        k=k,
        v=v,
        first=first,
        second=second,
        rates=rates,
        pa=pa,
        ud=ud,
        drates=drates,
        **options,
    )
    return pa, ud


def _changes(scaled: Tensor, x: Tensor, d: Tensor, hidden: Tensor, hidden_size: int) -> Pair:
    """`scaled^T x` and `d^T hidden`, of their first 2 F and F channels; wide."""
    from lightning_modules.ops.lact.kernels.few import changes_kernel

    groups, size = len(x), x.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32)
    of_w02 = x.new_empty(groups, 2 * hidden_size, size, dtype=wide)
    of_w1 = x.new_empty(groups, size, hidden_size, dtype=wide)
    options = _product_options(x, hidden_size)
    tiles = _tiles(2 * hidden_size, size, options) + _tiles(size, hidden_size, options)
    changes_kernel[tiles, groups](
        scaled=scaled,
        x=x,
        d=d,
        hidden=hidden,
        of_w02=of_w02,
        of_w1=of_w1,
        WIDTH=scaled.shape[-1],
        HIDDEN=hidden.shape[-1],
        **options,
    )
    return of_w02, of_w1


def _token_gradients(
    pa: Tensor, ud: Tensor, first: Tensor, second: Tensor, dk: Tensor, dv: Tensor, *, add: bool
) -> None:
    """`pa first` and `ud second^T` into dk and dv, or added to them."""
    from lightning_modules.ops.lact.kernels.few import tokens_kernel

    groups, length, size = dk.shape
    options = _product_options(dk, second.shape[-1] // 2)
    tokens_kernel[2 * _tiles(length, size, options), groups](
        pa=pa,
        ud=ud,
        first=first,
        second=second,
        dk=dk,
        dv=dv,
        WIDE=_wide(dk),
        ADD=add,
        **options,
    )


def _tiles(rows: int, columns: int, options: dict[str, Any]) -> int:
    return -(-rows // options["BM"]) * -(-columns // options["BN"])


def _gate_grid(k: Tensor, options: dict[str, Any]) -> tuple[int, int, int]:
    return -(-options["F"] // options["BF"]), -(-k.shape[1] // options["BT"]), len(k)


def _gate_options(k: Tensor, rates: Tensor, hidden_size: int, tokens: int) -> dict[str, Any]:
    _, length, size = k.shape
    return {
        "C": length,
        "F": hidden_size,
        "D": size,
        "R": rates.shape[-1],
        "WIDE": _wide(k),
        "PRECISION": _precision(k),
        "BT": tokens,
        "BF": min(CHANNELS, padded(hidden_size)),
        "BK": _depth(k, size),
        "num_warps": 8,
        "num_stages": 3,
    }


def _product_options(k: Tensor, hidden_size: int) -> dict[str, Any]:
    _, length, size = k.shape
    return {
        "C": length,
        "F": hidden_size,
        "D": size,
        "PRECISION": _precision(k),
        "BM": 128,
        "BN": 128,
        "BK": _depth(k, 64),
        "num_warps": 8,
        "num_stages": 3,
    }


def _depth(x: Tensor, size: int) -> int:
    """Of a step of a sum: 128 bytes."""
    return min(128 // x.element_size(), padded(size))


def _wide(x: Tensor) -> Any:
    """The dtype in which a kernel computes."""
    import triton.language as tl

    return tl.float64 if x.dtype == torch.float64 else tl.float32


def _precision(x: Tensor) -> str:
    return "tf32x3" if x.dtype == torch.float32 else "ieee"
