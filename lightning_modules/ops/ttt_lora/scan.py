"""The change of the fast weights from mini-batch to mini-batch, and its gradient by hand.

Per mini-batch, forward and backward are two small products for all rows and adapters at once (and
the LayerNorm's, if the loss has one); everything that need not wait for the mini-batch before is
one product for all of them. Of the activations only the changes and the errors are kept.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_modules.ops.ttt_eager import (
    NormError,
    add_product,
    norm_error,
    norm_error_backward,
    refuse_second_derivatives,
    stack,
)


class Norm(NamedTuple):
    """The LayerNorm in the loss "ln": gamma and beta `[G, 1, 1, d]`."""

    gamma: Tensor
    beta: Tensor
    eps: float


def scan(
    keys: Tensor,
    scaled: Tensor,
    learned: Tensor,
    target: Tensor,
    start: Tensor,
    restart: Tensor | None,
    norm: Norm | None,
) -> tuple[Tensor, Tensor]:
    """Changes D at the beginning of each mini-batch and at the end, and the errors of all tokens.

    With `z = learned + k~ D`, the error is `e = z - target`, or behind the norm the gradient of
    `1/2 || LN(z) - target ||^2` by z, and the next mini-batch starts with `D + scaled^T e`.
    Differentiable once.

    Args:
        keys: `k~`, 0 in empty slots, `[N, G, B, m, d + 1]`.
        scaled: `-eta/m k~`, 0 also in mini-batches that are not full.
        learned: predictions of the learned weights, `[N, G, B, m, d]`.
        target: `v - k`, `[N, G, B, m, d]`.
        start: D before the first mini-batch, `[G, B, d + 1, d]`.
        restart: mini-batches that begin a document, `[N, B]`; None: none does.
        norm: of the loss; None: plain.

    Returns:
        `[N + 1, G, B, d + 1, d]`, not yet 0 where a document begins, and `[N, G, B, m, d]`.
    """
    if norm is None:
        return _Scan.apply(keys, scaled, learned - target, start, restart, None, None, 0.0)
    offset = torch.addcmul(norm.gamma * norm.beta, norm.gamma, target, value=-1)
    square = norm.gamma.square()
    return _Scan.apply(keys, scaled, learned, start, restart, offset, square, norm.eps)


def restarted(states: Tensor, restart: Tensor | None) -> Tensor:
    """Changes `[N, G, B, d + 1, d]` with which mini-batches start: 0 where a document begins."""
    if restart is None:
        return states
    return states.masked_fill(restart[:, None, :, None, None], 0)


class _Scan(torch.autograd.Function):
    """See `scan`; `learned` is without the target if there is no norm (offset None).

    With L the gradient of the change after a mini-batch, that of its beginning is
    `L + k~^T dz`, where dz is the error's derivative times `scaled L`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        keys: Tensor,
        scaled: Tensor,
        learned: Tensor,
        start: Tensor,
        restart: Tensor | None,
        offset: Tensor | None,
        square: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        states, errors = [start], []
        for n in range(len(keys)):
            change = states[-1]
            if restart is not None:
                change = change.masked_fill(restart[n].view(1, -1, 1, 1), 0)
            error = add_product(learned[n], keys[n], change)
            if offset is not None and square is not None:
                error = norm_error(error, offset[n], square, eps).gradient
            states.append(add_product(change, scaled[n].mT, error))
            errors.append(error)
        result = torch.stack(states), stack(errors)
        kept = None if offset is None else learned
        ctx.save_for_backward(keys, scaled, *result, restart, kept, offset, square)
        ctx.eps = eps
        ctx.set_materialize_grads(False)
        return result

    @staticmethod
    def backward(
        ctx: Any, grad_states: Tensor | None, grad_errors: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives("ttt_lora")
        keys, scaled, states, errors, restart, learned, offset, square = ctx.saved_tensors
        if grad_states is None:
            grad_states = torch.zeros_like(states)
        starts, at, points = restarted(states[:-1], restart), None, None
        if offset is not None:
            z = learned + keys @ starts
            at = norm_error(z, offset, square, ctx.eps)
            points = [NormError(*parts) for parts in zip(*at, strict=True)]
        grads, dzs, dhs = [grad_states[-1]], [], []
        for n in reversed(range(len(keys))):
            after = grads[-1]
            of_error = None if grad_errors is None else grad_errors[n]
            dz = add_product(of_error, scaled[n], after)
            if points is not None:
                dz, dh = norm_error_backward(dz, points[n], square)
                dhs.append(dh)
            before = add_product(after, keys[n].mT, dz)
            if restart is not None:
                before = before.masked_fill(restart[n].view(1, -1, 1, 1), 0)
            grads.append(before + grad_states[n])
            dzs.append(dz)
        dlearned, ends = stack(dzs[::-1]), stack(grads[-2::-1])
        doffset = dsquare = None
        if at is not None:
            doffset = stack(dhs[::-1])
            dsquare = (doffset * at.normalised).sum((0, 2, 3)).view_as(square)
        dkeys, dscaled = dlearned @ starts.mT, errors @ ends.mT
        return dkeys, dscaled, dlearned, grads[-1], None, doffset, dsquare, None
