"""Argument checks of LaCT: shapes and options, never values."""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from lightning_modules.ops.checks import (
    check_document_ids,
    check_mask,
    check_shape,
    check_state_class,
    check_tokens,
)
from lightning_modules.ops.states import LaCTState, TokensRead


def check_lact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    w0: Tensor,
    w1: Tensor,
    w2: Tensor,
    *,
    chunk_size: int,
    momentum: Tensor | None,
    muon: bool,
    muon_dtype: torch.dtype,
    prenorm: bool,
    residual: bool,
    greedy: bool,
    mask: Tensor | None,
    document_ids: Tensor | None,
    state: LaCTState | None,
    tokens_read: TokensRead | None,
    adapt: bool,
    recompute: bool,
    group: ProcessGroup | None,
) -> None:
    """Raise unless the arguments of `lact` fit together.

    Raises:
        ValueError: naming the argument, what it was and what to pass instead.
        TypeError: if the state is of another op.
    """
    check_tokens(q, k, v)
    _check_weights(q, w0, w1, w2)
    _check_rates(q, lr, momentum, hidden=w0.shape[2])
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, but is {chunk_size}")
    if muon and not muon_dtype.is_floating_point:
        raise ValueError(f"muon_dtype must be floating point, but is {muon_dtype}")
    check_mask("mask", mask, q)
    check_document_ids(document_ids, q)
    if state is not None:
        _check_state(state, q, lr, w0, chunk_size, momentum is not None, prenorm)
    if tokens_read is not None and len(tokens_read.rows) != len(q):
        raise ValueError(f"tokens_read must be of {len(q)} rows, but is of {len(tokens_read.rows)}")


def _check_weights(q: Tensor, w0: Tensor, w1: Tensor, w2: Tensor) -> None:
    heads, size = q.shape[2:]
    if w0.dim() != 4 or 0 in w0.shape[:3:2]:
        raise ValueError(
            f"w0 must be [r, H, F, D] with r >= 1 blocks of F >= 1 hidden channels, but has shape "
            f"{list(w0.shape)}: one block is w0[None]"
        )
    blocks, _, hidden, _ = w0.shape
    check_shape("w0", w0, (blocks, heads, hidden, size))
    check_shape("w1", w1, (blocks, heads, size, hidden))
    check_shape("w2", w2, (blocks, heads, hidden, size))


def _check_rates(q: Tensor, lr: Tensor, momentum: Tensor | None, hidden: int) -> None:
    batch, time, heads, size = q.shape
    check_shape("lr", lr, (batch, time, heads, 3), (batch, time, heads, 3, size))
    if lr.dim() == 5 and hidden != size:
        raise ValueError(
            f"lr per channel [B, T, H, 3, D] needs as many hidden channels as D = {size}, but w0 "
            f"has {hidden}: use a hidden size of D, or one rate per head, [B, T, H, 3]"
        )
    if momentum is not None:
        check_shape("momentum", momentum, (batch, time, heads))


def _check_state(
    state: LaCTState,
    q: Tensor,
    lr: Tensor,
    w0: Tensor,
    slots: int,
    momentum: bool,
    prenorm: bool,
) -> None:
    """Raise unless the state comes from a call with the same options, sizes and rows."""
    check_state_class(state, LaCTState)
    batch, _, heads, size = q.shape
    blocks, _, hidden, _ = w0.shape
    for name, theirs, ours in (
        ("batch size", state.w0.shape[0], batch),
        ("blocks", state.w0.shape[1], blocks),
        ("chunk_size", state.pending_k.shape[1], slots),
        ("momentum", state.momentum_w0.shape[1] > 0, momentum),
        ("prenorm", state.main_w0.shape[1] > 0, prenorm),
        ("lr per channel", state.pending_lr.dim() == 5, lr.dim() == 5),
    ):
        if theirs != ours:
            raise ValueError(
                f"state comes from a call with another {name}, {theirs}, but this one has {ours}: "
                "keep to one, or start with state=None"
            )
    weights = {"w0": (hidden, size), "w1": (size, hidden), "w2": (hidden, size)}
    for name, (rows, columns) in weights.items():
        for field, count, inner in (
            (name, blocks, columns),
            (f"main_{name}", blocks * prenorm, columns),
            (f"momentum_{name}", blocks * momentum, columns),
            (f"norm_{name}", blocks, 1),
        ):
            shape = (batch, count, heads, rows, inner)
            check_shape(f"state.{field}", getattr(state, field), shape)
    check_shape("state.pending_k", state.pending_k, (batch, slots, heads, size))
    check_shape("state.pending_v", state.pending_v, (batch, slots, heads, size))
    check_shape("state.pending_lr", state.pending_lr, (batch, slots, *lr.shape[2:]))
    check_shape("state.pending_momentum", state.pending_momentum, (batch, slots * momentum, heads))
    for name in ("pending_count", "updates", "tokens_seen", "document_id"):
        check_shape(f"state.{name}", getattr(state, name), (batch,))
