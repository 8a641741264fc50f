"""What a LaCT layer tells the monitors about its fast weights and its inner objective."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.layers.weight_change import change_statistics
from lightning_modules.ops.states import LaCTState

if TYPE_CHECKING:
    from lightning_modules.layers.lact import LaCTLayer
    from lightning_modules.streams import FastState

Weights = tuple[Tensor, ...]
TOPICS = ("fast_weight", "inner_loss")


class InnerProblem(NamedTuple):
    """What the op was given.

    Attributes:
        q: queries `[B, T, H, D]`, as the op saw them (normalised, rotated).
        k: keys, likewise.
        v: values `[B, T, H, D]`.
        lr: learning rates, `[B, T, H, 3]` or `[B, T, H, 3, D]`.
        momentum: coefficients `[B, T, H]`, or None.
        mask: real tokens, bool `[B, T]`, or None.
        document_ids: int64 `[B, T]`, or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    lr: Tensor
    momentum: Tensor | None
    mask: Tensor | None
    document_ids: Tensor | None


@torch.no_grad()
def publish_statistics(
    layer: LaCTLayer,
    fast_state: FastState,
    slot: str,
    problem: InnerProblem,
    state: LaCTState | None,
    next_state: LaCTState,
) -> None:
    """Publish the topics that a monitor listens to: `fast_weight` and `inner_loss`.

    Args:
        layer: owner of the learned weights.
        fast_state: where to publish.
        slot: name of the layer.
        problem: inputs of the op.
        state: state before the call, None if fresh.
        next_state: state after it.
    """
    learned = tuple(w.to(next_state.w0.dtype) for w in layer.fast_weights)
    if fast_state.listens("fast_weight"):
        eta = problem.lr
        if problem.mask is not None:
            eta = eta * problem.mask.view(*problem.mask.shape, *[1] * (eta.dim() - 2))
        fast_state.publish("fast_weight", slot, eta=eta, **weight_statistics(learned, next_state))
    if fast_state.listens("inner_loss"):
        before = learned if state is None else weights_in_use(learned, state)
        counted = _counted_tokens(problem, next_state)
        if state is not None and problem.document_ids is not None:
            same = state.document_id == next_state.document_id
            before = tuple(
                torch.where(_per_row(same, w), w, initial)
                for w, initial in zip(before, learned, strict=True)
            )
        residual = layer.config.memory.residual_ttt
        fast_state.publish(
            "inner_loss",
            slot,
            before=inner_loss(problem, before, counted, residual),
            after=inner_loss(problem, weights_in_use(learned, next_state), counted, residual),
        )


def weights_in_use(learned: Weights, state: LaCTState) -> Weights:
    """W0, W1, W2 of every row, `[B, r, H, ...]`: the learned ones where a row is fresh."""
    begun = state.tokens_seen > 0
    pairs = zip((state.w0, state.w1, state.w2), learned, strict=True)
    return tuple(torch.where(_per_row(begun, value), value, initial) for value, initial in pairs)


def weight_statistics(learned: Weights, state: LaCTState) -> dict[str, Tensor]:
    """Size of the change of the fast weights, over all networks of the stack.

    Args:
        learned: weights before the first token, `[r, H, ...]`.
        state: has those in use, `[B, r, H, ...]`; a row that is fresh has not changed any.

    Returns:
        `state_norm [B, H] = ||W - W_learned||`, `weight_norm [H] = ||W_learned||` and
        `cosine [B, H]` between the two.
    """
    weights = (state.w0, state.w1, state.w2)
    initial, current = (
        torch.cat([value.flatten(-2) for value in values], dim=-1) for values in (learned, weights)
    )
    begun = _per_row(state.tokens_seen > 0, current)
    return change_statistics(initial, torch.where(begun, current - initial, 0.0), dim=(-3, -1))


def inner_loss(problem: InnerProblem, weights: Weights, counted: Tensor, residual: bool) -> Tensor:
    """Mean of `-<x_r(k), v>` over the counted tokens `[B, T]`, `[B, H]`; 0 where there is none."""
    with torch.autocast(problem.k.device.type, enabled=False):
        x, v = (i.to(weights[0].dtype).permute(0, 2, 3, 1) for i in (problem.k, problem.v))
        blocks = weights[0].shape[-4]
        for j in range(blocks):
            w0, w1, w2 = (w[..., j, :, :, :] for w in weights)
            y = w1 @ (F.silu(w0 @ x) * (w2 @ x))
            x = x + y if residual and j < blocks - 1 else y
        loss = -(x * v).sum(2)
    total = torch.where(counted.unsqueeze(1), loss, 0.0).sum(-1)
    return total / counted.sum(1).clamp(min=1).unsqueeze(-1)


def _counted_tokens(problem: InnerProblem, next_state: LaCTState) -> Tensor:
    """Real tokens of each row's last document, whose weights are in the state, bool `[B, T]`."""
    shape, device = problem.k.shape[:2], problem.k.device
    counted = torch.ones(shape, dtype=torch.bool, device=device)
    if problem.mask is not None:
        counted = counted & problem.mask
    if problem.document_ids is not None:
        counted = counted & (problem.document_ids == next_state.document_id.unsqueeze(1))
    return counted


def _per_row(rows: Tensor, like: Tensor) -> Tensor:
    """`rows [B]` with as many dimensions as `like`."""
    return rows.view(-1, *[1] * (like.dim() - 1))
