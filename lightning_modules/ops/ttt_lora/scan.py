"""The change of the fast weights from mini-batch to mini-batch, and its gradient by hand.

One mini-batch after the other, forward and backward are two small products for all rows and
adapters at once (and the LayerNorm's, if the loss has one); everything that need not wait for the
mini-batch before is one product for all of them. Without the LayerNorm the change is a linear
function of the one before: then about sqrt(N) products do where those wait for each other. Of the
activations only the changes and the errors are kept.
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
from lightning_modules.ops.ttt_lora.recurrence import linear_recurrence

# Blocks trade launches for arithmetic. In launches they win from about 8 mini-batches on, which is
# what counts on a GPU. On a CPU arithmetic does too: with one thread, 64 mini-batches forward and
# backward take a third of the time where their transitions are 250 numbers each (3 rows of d = 8),
# three quarters at 2000 (24 rows), as long at 3000 and twice as long at 25000 (24 rows of d = 31).
MIN_MINI_BATCHES = 8
MAX_NUMBERS_ON_CPU = 2048


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
        error = learned - target
        if _worth_blocks(keys):
            return _LinearScan.apply(keys, scaled, error, start, restart)
        return _Scan.apply(keys, scaled, error, start, restart, None, None, 0.0)
    offset = torch.addcmul(norm.gamma * norm.beta, norm.gamma, target, value=-1)
    square = norm.gamma.square()
    return _Scan.apply(keys, scaled, learned, start, restart, offset, square, norm.eps)


def restarted(states: Tensor, restart: Tensor | None) -> Tensor:
    """Changes `[N, G, B, d + 1, d]` with which mini-batches start: 0 where a document begins."""
    if restart is None:
        return states
    return states.masked_fill(restart[:, None, :, None, None], 0)


def _worth_blocks(keys: Tensor) -> bool:
    """Whether the linear recurrence of the plain loss is to be cut into blocks."""
    count, group, batch, _, inner = keys.shape
    small = keys.device.type != "cpu" or group * batch * inner**2 <= MAX_NUMBERS_ON_CPU
    return count >= MIN_MINI_BATCHES and small


def _transitions(x: Tensor, y: Tensor) -> Tensor:
    """`I + x^T y` of `[N, G, B, m, d + 1]`, `[N, G, B, d + 1, d + 1]`."""
    transitions = x.mT @ y
    transitions.diagonal(dim1=-2, dim2=-1).add_(1)
    return transitions


class _LinearScan(torch.autograd.Function):
    """The scan of the plain loss; z is `learned - target`.

    The error `e = z + k~ D'` is affine in D', which is D, or 0 where a document begins, and so is
    the next change:

        D_{n+1} = D' + scaled^T e = T_n D' + scaled^T z,        T_n = I + scaled^T k~

    With L the gradients of the changes by all that follows, G those of the results, and
    `dz = G_e + scaled L_{n+1}` that of z, the backward pass is its transpose:

        L_n = G_n + keep_n (L_{n+1} + k~^T dz) = keep_n T_n^T L_{n+1} + (G_n + keep_n k~^T G_e)
    """

    @staticmethod
    def forward(
        ctx: Any,
        keys: Tensor,
        scaled: Tensor,
        z: Tensor,
        start: Tensor,
        restart: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        begins = None if restart is None else restart[:, None, :, None, None]
        transitions = _transitions(scaled, keys)
        states = linear_recurrence(transitions, scaled.mT @ z, start, begins)
        errors = z + keys @ restarted(states[:-1], restart)
        ctx.save_for_backward(keys, scaled, states, errors, restart)
        ctx.set_materialize_grads(False)
        return states, errors

    @staticmethod
    def backward(
        ctx: Any, grad_states: Tensor | None, grad_errors: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives("ttt_lora")
        keys, scaled, states, errors, restart = ctx.saved_tensors
        if grad_states is None:
            grad_states = torch.zeros_like(states)
        inputs = grad_states[:-1]
        if grad_errors is not None:
            inputs = inputs + restarted(keys.mT @ grad_errors, restart)
        begins = None if restart is None else restart.flip(0)[:, None, :, None, None]
        transposed = _transitions(keys, scaled).flip(0)
        grads = linear_recurrence(transposed, inputs.flip(0), grad_states[-1], begins).flip(0)
        dz = scaled @ grads[1:]
        if grad_errors is not None:
            dz = dz + grad_errors
        dkeys = dz @ restarted(states[:-1], restart).mT
        return dkeys, errors @ grads[1:].mT, dz, grads[0], None


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
