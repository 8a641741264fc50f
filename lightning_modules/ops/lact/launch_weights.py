"""LaCT's Triton kernels on weights, called with tensors; packed ones are `[G, 3 F D]`."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_modules.ops.lact.memory import EPS
from lightning_modules.ops.lact.sizes import Pair, Sizes
from lightning_modules.ops.lact.walk import Change
from lightning_modules.ops.tile_size import padded


def add_momentum(
    sizes: Sizes,
    change: Change,
    pair: Pair | None,
    old: Tensor | None,
    mean: Tensor | None,
    out: Tensor,
) -> None:
    """`out = g + mean old`, packed `[G, 3 F D]`; mean `[G]`. Without old, `out = g`."""
    from lightning_modules.ops.lact.kernels.update import momentum_kernel

    first, second = pair or (None, None)
    options = _change_options(sizes, change, out)
    momentum_kernel[_row_grid(options, sizes)](
        first=first,
        second=second,
        old=old,
        mean=mean,
        out=out,
        MOMENTUM=old is not None,
        **options,
    )


class Norms(NamedTuple):
    """Row norms `[G, 2 F + D]`: at the beginning, and of the learned weights (with documents)."""

    start: Tensor
    learned: Tensor | None


def update(
    sizes: Sizes,
    change: Change,
    by: Pair | Tensor | None,
    main_old: Tensor,
    main: Tensor,
    now: Tensor,
    low: Tensor,
    norms: Norms,
    learned: Tensor | None,
    prenorm: bool,
) -> None:
    """The next version, packed: main, W (now, in place), W for products (low).

    Args:
        sizes: of the call.
        change: which rows.
        by: what is added.
        main_old: main of the version before.
        main: gets the new one.
        now: W.
        low: gets the new W, rounded.
        norms: of the rows.
        learned: weights with which documents begin.
        prenorm: add to main, not to W.
    """
    from lightning_modules.ops.lact.kernels.update import update_kernel

    first, second = by if isinstance(by, tuple) else (None, None)
    options = _change_options(sizes, change, now)
    update_kernel[_row_grid(options, sizes)](
        first=first,
        second=second,
        packed=by if torch.is_tensor(by) else None,
        main_old=main_old,
        main=main,
        now=now,
        low=low,
        start_norm=norms.start,
        learned_norm=norms.learned,
        learned=learned,
        renewed=change.renewed,
        EPS=EPS,
        PRENORM=prenorm,
        PACKED=torch.is_tensor(by),
        HAS_RENEWED=change.renewed is not None,
        **options,
    )


class Carry(NamedTuple):
    """Gradients of one block that the way back through the versions adds up, in place.

    Attributes:
        weights: at W, packed `[G, 3 F D]`.
        main: at main, with pre-norm.
        momentum: at M, with momentum.
        norms: of the row norms.
        learned: of the weights with which documents begin.
    """

    weights: Tensor
    main: Tensor | None
    momentum: Tensor | None
    norms: Norms
    learned: Tensor | None


def update_backward(
    sizes: Sizes,
    change: Change,
    carry: Carry,
    read: Pair | None,
    write: Pair | None,
    main: Tensor,
    old: Tensor,
    both: Tensor,
    dchange: Tensor | None,
    norms: Norms,
) -> None:
    """Carry the gradients of a version to the one before; see `update_backward_kernel`."""
    from lightning_modules.ops.lact.kernels.update import update_backward_kernel

    read_first, read_second = read or (None, None)
    write_first, write_second = write or (None, None)
    options = _change_options(sizes, change, main)
    update_backward_kernel[_row_grid(options, sizes)](
        main=main,
        carry=carry.weights,
        carry_main=carry.main,
        read_first=read_first,
        read_second=read_second,
        write_first=write_first,
        write_second=write_second,
        old=old,
        both=both,
        dchange=dchange,
        start_norm=norms.start,
        learned_norm=norms.learned,
        dstart_norm=carry.norms.start,
        dlearned_norm=carry.norms.learned,
        dlearned=carry.learned,
        renewed=change.renewed,
        EPS=EPS,
        PRENORM=carry.main is not None,
        PACKED=dchange is not None,
        HAS_READ=read is not None,
        HAS_WRITE=write is not None,
        HAS_RENEWED=change.renewed is not None,
        **options,
    )


def momentum_backward(
    sizes: Sizes,
    change: Change,
    dchange: Tensor,
    carry: Tensor | None,
    momentum: Tensor,
    mean: Tensor | None,
    old: Tensor,
    both: Tensor,
    dmean: Tensor | None,
) -> None:
    """From dchange to both, by way of momentum; see `momentum_backward_kernel`."""
    from lightning_modules.ops.lact.kernels.update import momentum_backward_kernel

    options = _change_options(sizes, change, dchange)
    momentum_backward_kernel[_row_grid(options, sizes)](
        dchange=dchange,
        carry=carry,
        momentum=momentum,
        mean=mean,
        old=old,
        both=both,
        dmean=dmean,
        MOMENTUM=carry is not None,
        **options,
    )


def _row_grid(options: dict[str, Any], sizes: Sizes) -> tuple[int]:
    return (sizes.groups * -(-sizes.rows // options["BR"]),)


def _change_options(sizes: Sizes, change: Change, like: Tensor) -> dict[str, Any]:
    return {
        "restart": change.restart,
        "rows": change.rows,
        "B": sizes.batch,
        "F": sizes.hidden,
        "D": sizes.size,
        "BLOCK": padded(max(sizes.hidden, sizes.size)),
        "WRITES": change.write is not None,
        "HAS_ROWS": change.rows is not None,
        "HAS_RESTART": change.restart is not None,
        "BR": _tile(like, 4, 16),
        "num_warps": 4,
    }


def _tile(x: Tensor, compiled: int, interpreted: int) -> int:
    """Rows of a program; a program that is interpreted costs the same for many."""
    return compiled if x.is_cuda else interpreted
