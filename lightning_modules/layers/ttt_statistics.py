"""What a TTT layer tells the monitors about its fast weights and its inner objective."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_modules.layers.weight_change import change_statistics

if TYPE_CHECKING:
    from lightning_modules.layers.ttt import TTTLayer
    from lightning_modules.streams import FastState

Weights = tuple[Tensor, ...]
TOPICS = ("fast_weight", "inner_loss")


class InnerProblem(NamedTuple):
    """What the op was given: the data of the inner objective.

    Attributes:
        k: keys `[B, T, H, D]`, as the op saw them (normalised, rotated).
        v: values `[B, T, H, D]`.
        eta: step sizes `[B, T, H]`.
        writes: tokens that write, bool `[B, T]`.
        document_ids: int64 `[B, T]` or None.
    """

    k: Tensor
    v: Tensor
    eta: Tensor
    writes: Tensor
    document_ids: Tensor | None


@torch.no_grad()
def publish_statistics(
    layer: TTTLayer,
    fast_state: FastState,
    slot: str,
    problem: InnerProblem,
    state: Any | None,
    next_state: Any,
) -> None:
    """Publish the topics that a monitor listens to: `fast_weight` and `inner_loss`.

    Args:
        layer: owner of the learned initial weights.
        fast_state: where to publish.
        slot: name of the layer.
        problem: inputs of the op.
        state: state before the call, None if fresh.
        next_state: state after it.
    """
    if fast_state.listens("fast_weight"):
        eta = problem.eta * problem.writes.unsqueeze(-1)
        statistics = weight_statistics(layer.fast_weights, _deltas(layer, next_state))
        fast_state.publish("fast_weight", slot, eta=eta, **statistics)
    if fast_state.listens("inner_loss"):
        before, after = inner_losses(layer, problem, state, next_state)
        fast_state.publish("inner_loss", slot, before=before, after=after)


def weight_statistics(weights: Weights, deltas: Weights) -> dict[str, Tensor]:
    """Size of the change of the fast matrices (both of them for the MLP; biases are left out).

    Args:
        weights: learned initial matrices and biases, alternating, `[H, ...]`.
        deltas: their changes, `[B, H, ...]`.

    Returns:
        `state_norm [B, H] = ||dW||`, `weight_norm [H] = ||W||` and `cosine [B, H]`, the cosine of
        `W + dW` to `W`.
    """
    weight, delta = (_matrices(values) for values in (weights, deltas))
    return change_statistics(weight.to(delta.dtype), delta)


def _matrices(values: Weights) -> Tensor:
    """All entries of a head's matrices in one row, `[..., H, N]`; of one matrix it is a view."""
    flat = [value.flatten(-2) for value in values[::2]]
    return flat[0] if len(flat) == 1 else torch.cat(flat, dim=-1)


def inner_losses(
    layer: TTTLayer, problem: InnerProblem, state: Any | None, next_state: Any
) -> tuple[Tensor, Tensor]:
    """Mean inner objective of the call's writing tokens, before and after its updates.

    Only tokens of a row's last document count, as only its weights are in the state. Updates of a
    mini-batch that is still open at the end are not in the state yet.

    Returns:
        `before` and `after`, `[B, H]`; 0 for a row in which nothing writes.
    """
    counted, after = problem.writes, _deltas(layer, next_state)
    if state is None:
        before = tuple(torch.zeros_like(delta) for delta in after)
    else:
        before = _deltas(layer, state)
    if problem.document_ids is not None:
        counted = counted & (problem.document_ids == next_state.document_id.unsqueeze(1))
        if state is not None:
            continues = state.document_id == next_state.document_id
            before = tuple(d * continues.view(-1, *[1] * (d.dim() - 1)) for d in before)
    return (
        _mean_objective(layer, problem, before, counted),
        _mean_objective(layer, problem, after, counted),
    )


def inner_objective(layer: TTTLayer, k: Tensor, v: Tensor, deltas: Weights) -> Tensor:
    """`1/2 ||LN(f(k; W + dW)) - (v - k)||^2` per token and head (section 2.3), `[B, T, H]`."""
    dtype = deltas[0].dtype
    k, v = k.to(dtype).transpose(1, 2), v.to(dtype).transpose(1, 2)
    weights = [w.to(dtype) + d for w, d in zip(layer.fast_weights, deltas, strict=True)]
    z = k @ weights[0] + weights[1]
    if len(weights) == 4:
        z = F.gelu(z, approximate="tanh") @ weights[2] + weights[3]
    normed = F.layer_norm(z, z.shape[-1:], eps=layer.config.eps)
    scale, shift = layer.ttt_norm_weight.to(dtype), layer.ttt_norm_bias.to(dtype)
    error = normed * scale.unsqueeze(1) + shift.unsqueeze(1) - (v - k)
    return 0.5 * error.square().sum(-1).transpose(1, 2)


def _mean_objective(
    layer: TTTLayer, problem: InnerProblem, deltas: Weights, counted: Tensor
) -> Tensor:
    with torch.autocast(problem.k.device.type, enabled=False):
        loss = inner_objective(layer, problem.k, problem.v, deltas)
    total = torch.where(counted.unsqueeze(-1), loss, 0.0).sum(1)
    return total / counted.sum(1).clamp(min=1).unsqueeze(-1)


def _deltas(layer: TTTLayer, state: Any) -> Weights:
    """Changes of the fast weights in a state, in the order of `layer.fast_weights`."""
    return tuple(state[: len(layer.fast_weights)])
