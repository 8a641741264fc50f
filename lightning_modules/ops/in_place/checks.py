"""Argument checks of In-Place TTT: shapes and options, never values."""

import torch
from torch import Tensor

from lightning_modules.ops.checks import (
    check_document_ids,
    check_mask,
    check_shape,
    check_state_class,
)
from lightning_modules.ops.states import InPlaceState


def check_in_place(
    z: Tensor,
    v: Tensor,
    w_down: Tensor,
    eta: float | Tensor,
    *,
    chunk_size: int,
    clip: float | Tensor | None,
    mask: Tensor | None,
    document_ids: Tensor | None,
    state: InPlaceState | None,
) -> None:
    """Raise unless the arguments of `in_place` fit together.

    Raises:
        ValueError: naming the argument, what it was and what to pass instead.
        TypeError: if the state is of another op.
    """
    if z.dim() != 3 or z.shape[1] == 0:
        raise ValueError(f"z must be [B, T, F] with T >= 1, but has shape {list(z.shape)}")
    if not z.is_floating_point():
        raise ValueError(f"z must be floating point, but is {z.dtype}; convert it first")
    batch, time, hidden = z.shape
    if w_down.dim() != 2 or w_down.shape[1] != hidden:
        raise ValueError(
            f"w_down must be [D, F] with F = {hidden} as z has, the weight of a linear layer, but "
            f"has shape {list(w_down.shape)}"
        )
    check_shape("v", v, (batch, time, w_down.shape[0]))
    if isinstance(eta, Tensor):
        check_shape("eta", eta, (), (batch, time))
    if w_down.dtype != z.dtype and not _autocasts(z.device.type):
        raise ValueError(
            f"w_down must have the dtype of z, {z.dtype}, but is {w_down.dtype}: convert one of "
            "them, or call the op under autocast"
        )
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, but is {chunk_size}")
    if clip is not None and not torch.is_tensor(clip) and clip <= 0:
        raise ValueError(
            f"clip must be positive, but is {clip}: None does not clip, and eta=0 never writes"
        )
    check_mask("mask", mask, z)
    check_document_ids(document_ids, z)
    if state is not None:
        _check_state(state, batch, *w_down.shape)


def _check_state(state: InPlaceState, batch: int, size: int, hidden: int) -> None:
    check_state_class(state, InPlaceState)
    for name in ("dw", "pending_dw"):
        check_shape(f"state.{name}", getattr(state, name), (batch, size, hidden))
    for name in ("pending_count", "tokens_seen", "document_id"):
        check_shape(f"state.{name}", getattr(state, name), (batch,))


def _autocasts(device: str) -> bool:
    """Whether autocast is on; meta has none."""
    return device != "meta" and torch.is_autocast_enabled(device)
