"""Argument checks of TTT-as-LoRA: shapes and options, never values."""

from torch import Tensor

from lightning_modules.ops.checks import (
    check_document_ids,
    check_mask,
    check_shape,
    check_state_class,
)
from lightning_modules.ops.states import TTTLoRAState


def check_ttt_lora(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    w_base: Tensor,
    b_base: Tensor,
    mini_batch_size: int,
    mode: str,
    loss: str,
    norm: tuple[Tensor | None, Tensor | None],
    mask: Tensor | None,
    document_ids: Tensor | None,
    state: TTTLoRAState | None,
) -> None:
    """Raise unless the arguments of `ttt_lora` fit together.

    Raises:
        ValueError: naming the argument, what it was and what to pass instead.
        TypeError: if the state is of another op.
    """
    if q.dim() not in (3, 4) or q.shape[1] == 0:
        raise ValueError(
            f"q must be [B, T, d], or [B, T, G, d] for a group of adapters, with T >= 1, but has "
            f"shape {list(q.shape)}"
        )
    if not q.is_floating_point():
        raise ValueError(f"q must be floating point, but is {q.dtype}; convert it first")
    tokens, group, size = tuple(q.shape[:2]), tuple(q.shape[2:-1]), q.shape[-1]
    check_shape("k", k, tuple(q.shape))
    check_shape("v", v, tuple(q.shape))
    check_shape("eta", eta, (), *({group} if group else ()), (*tokens, *group))
    check_shape("w_base", w_base, (*group, size, size))
    check_shape("b_base", b_base, (*group, size))
    _check_learner(mini_batch_size, mode)
    check_norm(loss, *norm, (*group, size))
    check_mask("mask", mask, q)
    check_document_ids(document_ids, q)
    if state is not None:
        _check_state(state, q.shape[0], group, size, mini_batch_size)


def check_ttt_lora_cell(
    projected: Tensor,
    eta: Tensor,
    base: Tensor,
    mini_batch_size: int,
    mode: str,
    loss: str,
    norm: Tensor | None,
    mask: Tensor | None,
    document_ids: Tensor | None,
    state: TTTLoRAState | None,
) -> None:
    """As `check_ttt_lora` for the arguments of `ttt_lora_cell`, without a view of any of them."""
    if base.dim() != 3 or base.shape[1] != base.shape[2] + 1:
        raise ValueError(f"base must be [G, d + 1, d], but has shape {list(base.shape)}")
    group, size = base.shape[0], base.shape[2]
    if projected.dim() != 3 or projected.shape[1] == 0 or projected.shape[2] < 3 * group * size:
        raise ValueError(
            f"projected must be [B, T, P] with T >= 1 and P >= 3 G d = {3 * group * size}, but has "
            f"shape {list(projected.shape)}"
        )
    if not projected.is_floating_point():
        raise ValueError(f"projected must be floating point, but is {projected.dtype}")
    check_shape("eta", eta, (), (group,), (*projected.shape[:2], group))
    _check_learner(mini_batch_size, mode)
    if loss not in ("plain", "ln") or (loss == "ln" and norm is None):
        check_norm(loss, None, None, (group, size))
    if norm is not None:
        check_shape("norm", norm, (group, 2, size))
    check_mask("mask", mask, projected)
    check_document_ids(document_ids, projected)
    if state is not None:
        _check_state(state, projected.shape[0], (group,), size, mini_batch_size)


def _check_learner(mini_batch_size: int, mode: str) -> None:
    if mini_batch_size < 1:
        raise ValueError(f"mini_batch_size must be at least 1, but is {mini_batch_size}")
    if mode not in ("A", "B"):
        raise ValueError(
            f"mode must be 'A' (read, then update) or 'B' (see the own mini-batch up to oneself), "
            f"but is {mode!r}: to read updated weights would be to read the future"
        )


def check_norm(
    loss: str, weight: Tensor | None, bias: Tensor | None, shape: tuple[int, ...]
) -> None:
    """Raise ValueError unless the loss exists and has the norm that it needs."""
    if loss not in ("plain", "ln"):
        raise ValueError(f"loss must be 'plain' or 'ln', but is {loss!r}")
    for name, tensor in (("norm_weight", weight), ("norm_bias", bias)):
        if loss == "plain" and tensor is not None:
            raise ValueError(f"{name} belongs to loss='ln': leave it None, or choose that loss")
        if loss == "ln":
            if tensor is None:
                raise ValueError(f"loss='ln' needs {name}, that of the LayerNorm on the output")
            check_shape(name, tensor, shape)


def _check_state(
    state: TTTLoRAState, batch: int, group: tuple[int, ...], size: int, slots: int
) -> None:
    check_state_class(state, TTTLoRAState)
    wide, rows = (batch, slots, *group, size), (batch,)
    changes = ((batch, *group, size, size), (batch, *group, size))
    if [x.shape for x in state] == [*changes, wide, wide, wide[:-1], rows, rows, rows]:
        return
    check_shape("state.dw", state.dw, (batch, *group, size, size))
    check_shape("state.db", state.db, (batch, *group, size))
    if state.pending_k.shape[1] != slots:
        raise ValueError(
            f"state comes from a call with mini_batch_size={state.pending_k.shape[1]}, but this "
            f"one has mini_batch_size={slots}: keep to one, or start with state=None"
        )
    check_shape("state.pending_k", state.pending_k, (batch, slots, *group, size))
    check_shape("state.pending_v", state.pending_v, (batch, slots, *group, size))
    check_shape("state.pending_eta", state.pending_eta, (batch, slots, *group))
    for name in ("pending_count", "tokens_seen", "document_id"):
        check_shape(f"state.{name}", getattr(state, name), (batch,))
