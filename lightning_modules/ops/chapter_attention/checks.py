"""Argument checks of chapter attention: shapes and options, never values."""

import torch
from torch import Tensor

from lightning_modules.ops.checks import check_shape

SHARED_MODES = ("together", "per_chapter")
MIXINGS = ("joint", "mixture")


def check_chapter_attention(
    q: Tensor,
    mem_k: Tensor,
    mem_v: Tensor,
    chapters: Tensor | None,
    log_weights: Tensor | None,
    *,
    block_size: int,
    shared: int,
    shared_mode: str,
    mixing: str,
    scale: float | None,
    dropout: float,
    return_lse: bool,
) -> None:
    """Raise unless the arguments of `chapter_attention` fit together.

    Raises:
        ValueError: naming the argument, what it was and what to pass instead.
    """
    _check_bank(q, mem_k, mem_v)
    if block_size < 1:
        raise ValueError(f"block_size must be at least 1, but is {block_size}")
    for name, value, choices in (
        ("shared_mode", shared_mode, SHARED_MODES),
        ("mixing", mixing, MIXINGS),
    ):
        if value not in choices:
            wanted = " or ".join(repr(choice) for choice in choices)
            raise ValueError(f"{name} must be {wanted}, but is {value!r}")
    if scale is not None and not scale > 0:
        raise ValueError(f"scale must be positive, but is {scale}: None is D ** -0.5")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and less than 1, but is {dropout}")
    if return_lse and mixing == "mixture":
        raise ValueError(
            "return_lse=True with mixing='mixture': a mixture is several softmaxes, with "
            "no one lse: use mixing='joint', or return_lse=False"
        )
    if chapters is None:
        _check_whole_bank(log_weights, shared)
    else:
        _check_chapters(q, mem_k, chapters, log_weights, block_size, shared)


def _check_bank(q: Tensor, mem_k: Tensor, mem_v: Tensor) -> None:
    if q.dim() != 4 or 0 in q.shape:
        raise ValueError(f"q must be [B, T, H, D], nothing 0, but has shape {list(q.shape)}")
    if mem_k.dim() != 4 or 0 in mem_k.shape:
        raise ValueError(
            f"mem_k must be [C, R, Hkv, D], nothing 0, but has shape {list(mem_k.shape)}"
        )
    for name, x in (("q", q), ("mem_k", mem_k), ("mem_v", mem_v)):
        if not x.is_floating_point():
            raise ValueError(f"{name} must be floating point, but is {x.dtype}; convert it first")
    check_shape("mem_k", mem_k, (*mem_k.shape[:3], q.shape[3]))
    check_shape("mem_v", mem_v, tuple(mem_k.shape))
    if q.shape[2] % mem_k.shape[2]:
        raise ValueError(
            f"q has {q.shape[2]} heads, which the {mem_k.shape[2]} of mem_k cannot share evenly: "
            "pass a number of heads that is a multiple of it"
        )


def _check_whole_bank(log_weights: Tensor | None, shared: int) -> None:
    if log_weights is not None:
        raise ValueError("log_weights weigh chapters: pass chapters too, or leave them None")
    if shared != 0:
        raise ValueError(
            f"shared={shared} without chapters, but then every token reads the whole bank: pass "
            "shared=0, or chapters"
        )


def _check_chapters(
    q: Tensor,
    mem_k: Tensor,
    chapters: Tensor,
    log_weights: Tensor | None,
    block_size: int,
    shared: int,
) -> None:
    if chapters.dtype != torch.int64:
        raise ValueError(f"chapters must be int64, but are {chapters.dtype}: pass chapters.long()")
    blocks = -(-q.shape[1] // block_size)
    if chapters.dim() != 3 or chapters.shape[2] == 0:
        raise ValueError(
            f"chapters must be [B, {blocks}, k] with k >= 1, but have shape "
            f"{list(chapters.shape)}: None reads the whole bank"
        )
    check_shape("chapters", chapters, (len(q), blocks, chapters.shape[2]))
    if not 0 <= shared < len(mem_k):
        raise ValueError(
            f"shared={shared} of {len(mem_k)} chapters: it must be at least 0, and leave one to "
            "choose"
        )
    if chapters.shape[2] > len(mem_k) - shared:
        raise ValueError(
            f"chapters has {chapters.shape[2]} for each block, but only {len(mem_k) - shared} can "
            f"be chosen ({len(mem_k)} less shared={shared}): none may be chosen twice"
        )
    if log_weights is not None:
        check_shape("log_weights", log_weights, tuple(chapters.shape))
        if not log_weights.is_floating_point():
            raise ValueError(f"log_weights must be floating point, but are {log_weights.dtype}")
