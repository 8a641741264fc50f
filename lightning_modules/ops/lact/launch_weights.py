"""LaCT's Triton kernels on weights, called with tensors; packed ones are `[G, 3 F D]`."""

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_modules.ops.lact.memory import EPS
from lightning_modules.ops.lact.sizes import Pair, Sizes
from lightning_modules.ops.lact.walk import Change
from lightning_modules.ops.launcher import Options, given, launcher
from lightning_modules.ops.tile_size import padded

KERNELS = "lightning_modules.ops.lact.kernels.update"


def add_momentum(
    sizes: Sizes,
    change: Change,
    pair: Pair | None,
    old: Tensor | None,
    mean: Tensor | None,
    out: Tensor,
) -> None:
    """`out = g + mean old`, packed `[G, 3 F D]`; mean `[G]`. Without old, `out = g`."""
    first, second = pair or (None, None)
    options = _options(sizes, out.is_cuda, *_features(change), MOMENTUM=old is not None)
    _launch(
        "momentum",
        sizes,
        out,
        (first, second, old, mean, out, change.restart, change.rows),
        options,
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
    first, second = by if isinstance(by, tuple) else (None, None)
    packed = by if torch.is_tensor(by) else None
    options = _options(
        sizes,
        now.is_cuda,
        *_features(change),
        EPS=EPS,
        PRENORM=prenorm,
        PACKED=packed is not None,
        HAS_RENEWED=change.renewed is not None,
    )
    weights = (first, second, packed, main_old, main, now, low)
    rows = (norms.start, norms.learned, learned, change.restart, change.renewed, change.rows)
    _launch("update", sizes, now, (*weights, *rows), options)


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
    options = _options(
        sizes,
        main.is_cuda,
        *_features(change),
        EPS=EPS,
        PRENORM=carry.main is not None,
        PACKED=dchange is not None,
        HAS_READ=read is not None,
        HAS_WRITE=write is not None,
        HAS_RENEWED=change.renewed is not None,
    )
    nothing = (None, None)
    left = (carry.weights, carry.main, *(read or nothing), *(write or nothing))
    of_rows = (norms.start, norms.learned, carry.norms.start, carry.norms.learned, carry.learned)
    flags = (change.restart, change.renewed, change.rows)
    tensors = (main, *left, old, both, dchange, *of_rows, *flags)
    _launch("update_backward", sizes, main, tensors, options)


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
    options = _options(sizes, dchange.is_cuda, *_features(change), MOMENTUM=carry is not None)
    tensors = (dchange, carry, momentum, mean, old, both, dmean, change.restart, change.rows)
    _launch("momentum_backward", sizes, dchange, tensors, options)


def _launch(
    name: str, sizes: Sizes, other: Tensor, tensors: tuple[Tensor | None, ...], options: Options
) -> None:
    """Launch a kernel on all rows; `other` stands for tensors that it does not look at."""
    grid = (sizes.groups * -(-sizes.rows // options["BR"]), 1, 1)
    launcher(KERNELS, f"{name}_kernel")(grid, given(tensors, other), (sizes.batch,), options)


def _features(change: Change) -> tuple[bool, bool, bool]:
    return change.write is not None, change.rows is not None, change.restart is not None


@cache
def _options(sizes: Sizes, compiled: bool, *features: bool, **more: Any) -> Options:
    """A program that is interpreted costs the same for many rows."""
    return Options(
        zip(("WRITES", "HAS_ROWS", "HAS_RESTART"), features, strict=True),
        F=sizes.hidden,
        D=sizes.size,
        BLOCK=padded(max(sizes.hidden, sizes.size)),
        BR=4 if compiled else 16,
        num_warps=4,
        **more,
    )
