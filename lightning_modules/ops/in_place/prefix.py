"""The weights that each chunk reads, from what the chunks add, in few passes over these matrices.

With x_n what chunk n adds (the first one to what the state's open chunk holds), `f_n = closed_n
min(1, clip / ||x_n||)` and S of the state:

    before_n = S + sum_{i < n} f_i x_i,   after = S + sum_i f_i x_i,   pending = sum_i still_i x_i

Autograd's operations would move 1.6 times as many bytes: gradients of slices, of every factor, and
of the sum, which is turned around for them.
"""

from typing import Any

import torch
from torch import Tensor

from lightning_modules.ops.ttt_eager import refuse_second_derivatives

Clip = float | Tensor | None


class Prefix(torch.autograd.Function):
    """`before [B, N, D, F]`, `after` and `pending [B, D, F]`; differentiable once.

    Inputs: `adds [B, N, D, F]`, the state's `dw` and `pending_dw [B, D, F]` (None: zero), clip,
    `closed` and `still`, bool `[B, N]`, and the first chunk that may be open after the call.
    """

    @staticmethod
    def forward(
        ctx: Any,
        adds: Tensor,
        dw: Tensor | None,
        opened: Tensor | None,
        clip: Clip,
        closed: Tensor,
        still: Tensor,
        open_from: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        head = adds[:, 0] if opened is None else adds[:, 0] + opened
        norm, factor = None, closed.to(adds.dtype)
        if clip is not None:
            norm = _by_chunk(lambda x: torch.linalg.vector_norm(x, dim=(2, 3)), head, adds)
            factor = factor * (clip / norm.clamp(min=clip))
        scaled = _matrix(factor)
        first = torch.zeros_like(head) if dw is None else dw
        parts = (
            first.unsqueeze(1),
            (head * scaled[:, 0]).unsqueeze(1),
            adds[:, 1:] * scaled[:, 1:],
        )
        totals = torch.cat(parts, dim=1).cumsum_(1)
        weight = still.to(adds.dtype)
        pending = torch.zeros_like(head)
        for n in range(open_from, adds.shape[1]):
            pending.addcmul_(_matrix(weight)[:, n], adds[:, n] if n else head)
        ctx.set_materialize_grads(False)
        ctx.clip = None if torch.is_tensor(clip) else clip
        ctx.open_from, ctx.has = open_from, (dw is not None, opened is not None)
        kept = (adds, head) if clip is not None else (None, None)  # else nobody needs them
        ctx.save_for_backward(*kept, norm, factor, weight, clip if torch.is_tensor(clip) else None)
        # A copy: the state must not keep the matrices of all chunks.
        return totals[:, :-1], totals[:, -1].clone(), pending

    @staticmethod
    def backward(
        ctx: Any, dbefore: Tensor | None, dafter: Tensor | None, dpending: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives("in_place")
        adds, head, norm, factor, weight, clip = ctx.saved_tensors
        given = next((x for x in (dbefore, dafter, dpending) if x is not None), None)
        if given is None:
            return (None,) * 7
        grad, of_dw = _suffix(given, factor.shape[1], dbefore, dafter)
        of_clip = None
        if norm is None:
            grad.mul_(_matrix(factor))
        else:
            bound = ctx.clip if clip is None else clip
            of_clip = _through_clip(grad, adds, head, norm, factor, bound)
        if dpending is not None:
            open_from = ctx.open_from
            grad[:, open_from:].addcmul_(_matrix(weight)[:, open_from:], dpending.unsqueeze(1))
        of_opened = grad[:, 0].clone() if ctx.has[1] else None
        return grad, of_dw if ctx.has[0] else None, of_opened, of_clip, None, None, None


def _through_clip(
    grad: Tensor, adds: Tensor, head: Tensor, norm: Tensor, factor: Tensor, clip: float | Tensor
) -> Tensor | None:
    """The gradient of `f x` into that of x, in place; returns that of a clip that is a tensor."""
    of_factor = _by_chunk(lambda x, y: (x * y).sum((2, 3)), head, adds, grad)
    bounded = torch.where((norm >= clip) & (factor != 0), of_factor, 0) / norm.clamp(min=clip)
    slope = _matrix(-bounded * factor / norm.clamp(min=clip))
    grad.mul_(_matrix(factor))
    grad[:, 0].addcmul_(slope[:, 0], head)
    grad[:, 1:].addcmul_(slope[:, 1:], adds[:, 1:])
    return bounded.sum().view_as(clip) if torch.is_tensor(clip) else None


def _matrix(x: Tensor) -> Tensor:
    """`[B, N]` beside `[B, N, D, F]`."""
    return x[..., None, None]


def _by_chunk(function: Any, head: Tensor, *matrices: Tensor) -> Tensor:
    """A number for each chunk, `[B, N]`; head is the first one of the first tensor's."""
    first, *others = matrices
    one = function(head.unsqueeze(1), *(x[:, :1] for x in others))
    return torch.cat([one, function(first[:, 1:], *(x[:, 1:] for x in others))], dim=1)


def _suffix(
    like: Tensor, number: int, dbefore: Tensor | None, dafter: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of what each chunk adds, `[B, N, D, F]`, and of dw."""
    grad = like.new_empty(len(like), number, *like.shape[-2:])
    grad[:, :-1] = 0 if dbefore is None else dbefore[:, 1:]
    grad[:, -1] = 0 if dafter is None else dafter
    for n in range(number - 1, 0, -1):
        grad[:, n - 1].add_(grad[:, n])
    return grad, grad[:, 0] + dbefore[:, 0] if dbefore is not None else grad[:, 0].clone()
