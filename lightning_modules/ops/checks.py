"""Argument checks of the ops: a message names the argument, what it was and what to pass instead.

They read shapes and dtypes only, never values, so that they cost no device synchronisation.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

Backend = TypeVar("Backend", bound=Callable[..., Any])


def select_backend(op: str, backend: str, backends: Mapping[str, Backend]) -> Backend:
    """The implementation called `backend`; "auto" takes the first of `backends`.

    Raises:
        ValueError: if the op has no such backend.
    """
    if backend == "auto":
        return next(iter(backends.values()))
    if backend not in backends:
        available = ", ".join(repr(name) for name in ("auto", *backends))
        raise ValueError(f"{op} has no backend {backend!r}; available: {available}")
    return backends[backend]


def check_shape(name: str, tensor: Tensor, *shapes: tuple[int, ...]) -> None:
    """Raise ValueError unless the tensor has one of the shapes."""
    found = tuple(tensor.shape)
    # Traced with a length that is not fixed, a number is never "in" a tuple of formulas.
    if found not in shapes and not any(_alike(found, shape) for shape in shapes):
        wanted = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"{name} must have shape {wanted}, but has {list(tensor.shape)}")


def _alike(found: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return len(found) == len(shape) and all(x == y for x, y in zip(found, shape, strict=True))


def check_tokens(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless q, k and v are `[B, T, H, D]` alike, T at least 1, q real-valued."""
    if q.dim() != 4 or q.shape[1] == 0:
        raise ValueError(f"q must be [B, T, H, D] with T >= 1, but has shape {list(q.shape)}")
    if not q.is_floating_point():
        raise ValueError(f"q must be floating point, but is {q.dtype}; convert it first")
    check_shape("k", k, tuple(q.shape))
    check_shape("v", v, tuple(q.shape))


def check_mask(name: str, mask: Tensor | None, q: Tensor) -> None:
    """Raise ValueError unless the mask is None or bool `[B, T]`."""
    if mask is None:
        return
    check_shape(name, mask, tuple(q.shape[:2]))
    if mask.dtype != torch.bool:
        raise ValueError(f"{name} must be bool, but is {mask.dtype}: pass {name}.bool()")


def check_document_ids(document_ids: Tensor | None, q: Tensor) -> None:
    """Raise ValueError unless the ids are None or integers `[B, T]`."""
    if document_ids is None:
        return
    check_shape("document_ids", document_ids, tuple(q.shape[:2]))
    if document_ids.is_floating_point() or document_ids.dtype == torch.bool:
        raise ValueError(f"document_ids must be integers, but are {document_ids.dtype}")


def check_state_class(state: Any, state_class: type[Any]) -> None:
    """Raise TypeError if the state is of another op."""
    if not isinstance(state, state_class):
        raise TypeError(f"state must be a {state_class.__name__}, but is a {type(state).__name__}")


def check_ttt_tokens(
    q: Tensor, k: Tensor, v: Tensor, eta: Tensor, norm_weight: Tensor, norm_bias: Tensor
) -> None:
    """Raise ValueError unless q, k, v are `[B, T, H, D]`, eta `[B, T, H]`, the norm `[H, D]`."""
    check_tokens(q, k, v)
    batch, time, heads, size = q.shape
    check_shape("eta", eta, (batch, time, heads))
    check_shape("norm_weight", norm_weight, (heads, size))
    check_shape("norm_bias", norm_bias, (heads, size))


def check_ttt_weights(q: Tensor, **weights: tuple[Tensor, int, int]) -> None:
    """Raise ValueError unless every learned weight is `[H, in, out]` or `[B, H, in, out]`.

    Args:
        q: queries, `[B, T, H, D]`.
        weights: name -> (weight or bias, in, out).
    """
    batch, _, heads, _ = q.shape
    for name, (tensor, *own) in weights.items():
        check_shape(name, tensor, (heads, *own), (batch, heads, *own))


def check_ttt_options(
    q: Tensor,
    *,
    mini_batch_size: int | None,
    causal: bool,
    token_eta: Tensor | None,
    mask: Tensor | None,
    write_mask: Tensor | None,
    document_ids: Tensor | None,
) -> None:
    """Raise ValueError for options of the TTT ops that do not fit together or do not fit q."""
    if mini_batch_size is not None and mini_batch_size < 1:
        raise ValueError(f"mini_batch_size must be at least 1, but is {mini_batch_size}")
    if causal and mini_batch_size is None:
        raise ValueError("causal=True needs a mini_batch_size: pass one, for example 16")
    if token_eta is not None and not causal:
        raise ValueError(
            "token_eta weighs the positions of causal mini-batches: leave it None if causal=False "
            "(factors that do not depend on the position belong into eta)"
        )
    if token_eta is not None:
        check_shape("token_eta", token_eta, (mini_batch_size or 0,))
    check_mask("mask", mask, q)
    check_mask("write_mask", write_mask, q)
    check_document_ids(document_ids, q)


def check_ttt_state(
    q: Tensor,
    state: Any | None,
    state_class: type[Any],
    deltas: Mapping[str, tuple[int, int]],
    slots: int,
) -> None:
    """Raise unless the state belongs to this op, this batch and this kind of call.

    Args:
        q: queries, `[B, T, H, D]`.
        state: the state, or None.
        state_class: the NamedTuple of the op.
        deltas: name of a weight's field -> its last two sizes.
        slots: pending tokens that a state of such a call has room for: the mini-batch size, or 0
            if not causal.

    Raises:
        TypeError: if the state is of another op.
        ValueError: if a shape does not fit.
    """
    if state is None:
        return
    check_state_class(state, state_class)
    batch, _, heads, size = q.shape
    for name, own in deltas.items():
        check_shape(f"state.{name}", getattr(state, name), (batch, heads, *own))
    if state.pending_k.shape[1] != slots:
        raise ValueError(
            f"state comes from {_kind_of_call(state.pending_k.shape[1])}, but this is "
            f"{_kind_of_call(slots)}: keep to one kind, or start with state=None"
        )
    check_shape("state.pending_k", state.pending_k, (batch, slots, heads, size))
    check_shape("state.pending_v", state.pending_v, (batch, slots, heads, size))
    check_shape("state.pending_eta", state.pending_eta, (batch, slots, heads))
    for name in ("pending_count", "tokens_seen", "document_id"):
        check_shape(f"state.{name}", getattr(state, name), (batch,))


def _kind_of_call(slots: int) -> str:
    """What makes states with so many slots for pending tokens."""
    return f"a causal call with mini_batch_size={slots}" if slots else "a call that is not causal"
