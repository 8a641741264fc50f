"""Which backend a call of TTT-as-LoRA takes, and why."""

import functools
import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_modules.ops.checks import select_backend
from lightning_modules.ops.ttt_lora.eager import eager_ttt_lora
from lightning_modules.ops.ttt_lora.fused import triton_ttt_lora
from lightning_modules.ops.ttt_lora.naive import naive_ttt_lora

BACKENDS = {"torch": eager_ttt_lora, "triton": triton_ttt_lora, "naive": naive_ttt_lora}

LARGEST = 64
"""d up to which the change of the weights fits the registers of a program."""

LARGEST_TILE = 4096
"""Numbers in the tile of a mini-batch's keys, both sizes rounded up to powers of two."""


def choose_backend(backend: str, q: Tensor, mini_batch_size: int) -> tuple[str, Callable[..., Any]]:
    """Name and function of the backend of a call; "auto" takes the kernels where they can run.

    Args:
        backend: as in `ttt_lora`.
        q: queries, `[..., d]`.
        mini_batch_size: m.

    Raises:
        ValueError: there is no such backend, or "triton" does not take such inputs.
        RuntimeError: "triton" was asked for where it cannot run.
    """
    if backend == "auto":
        reason = _missing(q.device.type, "cuda") or _unsupported(q, mini_batch_size)
        if reason is None and torch.compiler.is_compiling():
            reason = "torch.compile fuses the torch backend"
        backend = "triton" if reason is None else "torch"
        if not torch.compiler.is_compiling():
            _say_once(backend, reason or f"the inputs are {q.dtype} on {q.device.type}")
    elif backend == "triton":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        missing = _missing(q.device.type, *(("cuda", "cpu") if interpreted else ("cuda",)))
        if missing is not None:
            raise RuntimeError(f"backend='triton' of ttt_lora cannot run: {missing}")
        unsupported = _unsupported(q, mini_batch_size)
        if unsupported is not None:
            raise ValueError(f"backend='triton' of ttt_lora: {unsupported}; use backend='torch'")
    return backend, select_backend("ttt_lora", backend, BACKENDS)


def _missing(device: str, *devices: str) -> str | None:
    """What the machine lacks for the kernels."""
    if not _has_triton():
        return "triton is not installed (pip install 'fast-weights[gpu]')"
    if device not in devices:
        return (
            f"the inputs are on {device}: move them to a GPU, use backend='torch', or set "
            "TRITON_INTERPRET=1 before Python starts to interpret the kernels (slow)"
        )
    return None


def _unsupported(q: Tensor, size: int) -> str | None:
    """What of the inputs the kernels do not take."""
    dtypes = [torch.float32, torch.bfloat16]
    if q.device.type == "cpu":
        dtypes.append(torch.float64)  # the interpreter's arithmetic is numpy's
    if q.dtype not in dtypes:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"q must be {names}, but is {q.dtype}"
    d = q.shape[-1]
    if d > LARGEST:
        return f"d={d} is over {LARGEST}"
    tile = padded(size) * padded(d + 1)
    if tile > LARGEST_TILE:
        return f"mini_batch_size={size} with d={d} does not fit a program"
    return None


def padded(size: int) -> int:
    """Rows or columns of a tile: a power of two, as many as a product of tiles needs."""
    return max(16, 1 << (size - 1).bit_length())


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _say_once(backend: str, reason: str) -> None:
    logging.getLogger(__name__).info("ttt_lora takes the %s backend: %s", backend, reason)
