"""Which backend a call of TTT-as-LoRA takes, and why."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_modules.ops import triton_backend
from lightning_modules.ops.tile_size import padded
from lightning_modules.ops.ttt_lora.eager import eager_ttt_lora
from lightning_modules.ops.ttt_lora.fused import triton_ttt_lora
from lightning_modules.ops.ttt_lora.naive import naive_ttt_lora

BACKENDS = {"torch": eager_ttt_lora, "triton": triton_ttt_lora, "naive": naive_ttt_lora}

LARGEST = 64
"""d up to which the change of the weights fits the registers of a program."""

LARGEST_TILE = 4096
"""Numbers in the tile of a mini-batch's keys, both sizes rounded up to powers of two."""


def choose_backend(backend: str, q: Tensor, d: int, mini_batch_size: int) -> Callable[..., Any]:
    """The function of a call's backend; "auto" takes the kernels where they can run.

    Args:
        backend: as in `ttt_lora`.
        q: queries, or projections that they are part of.
        d: size of an adapter.
        mini_batch_size: m.

    Raises:
        ValueError: there is no such backend, or "triton" does not take such inputs.
        RuntimeError: "triton" was asked for where it cannot run.
    """
    return triton_backend.dispatch(
        "ttt_lora", backend, BACKENDS, q, lambda: _obstacle(d, mini_batch_size), in_graphs=True
    )


def takes_kernels(x: Tensor, dtype: torch.dtype, d: int, mini_batch_size: int) -> bool:
    """Whether backend "auto" will take the kernels, launched one by one, for projections of x.

    Args:
        x: input of the projections.
        dtype: of the projections.
        d: size of an adapter.
        mini_batch_size: m.
    """
    able = triton_backend.unable(x.device.type, dtype) is None
    return able and _obstacle(d, mini_batch_size) is None


def _obstacle(d: int, size: int) -> str | None:
    """What of a call the kernels do not do, with the fix."""
    if d > LARGEST:
        return f"d = {d} is over {LARGEST}: use a smaller one, or backend='torch'"
    if padded(size) * padded(d + 1) > LARGEST_TILE:
        return (
            f"mini_batch_size = {size} with d = {d} does not fit a program: use smaller "
            "mini-batches, or backend='torch'"
        )
    return None
