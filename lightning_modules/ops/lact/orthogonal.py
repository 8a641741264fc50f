"""Muon's steps on all weights of a call at once, with their backward pass, without autograd."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_modules.ops.lact.muon import STEPS

EPS = 1e-7


class _Step(NamedTuple):
    """X, `X X^T` and `b A + c A^2` of a step, `[N, n, m]`, `[N, n, n]` twice."""

    x: Tensor
    gram: Tensor
    poly: Tensor


def orthogonal(packed: Tensor, hidden: int, size: int, dtype: torch.dtype) -> Tensor:
    """`newton_schulz` of every matrix of packed weights `[..., 3 F D]`, in the dtype of these."""
    matrices = _matrices(packed, hidden, size)
    x, _ = _steps(_unit(matrices, dtype)[0])
    return _packed(x.to(packed.dtype), packed.shape, hidden, size)


def orthogonal_backward(
    packed: Tensor, upper: Tensor, hidden: int, size: int, dtype: torch.dtype
) -> Tensor:
    """The gradient by `packed`, from that by what `orthogonal` returned.

    With `Y = (a + b A + c A^2) X, A = X X^T`, `G = dY X^T` and `S = G + G^T`:
    `dX = (a + b A + c A^2) dY + (b S + c (A S + S A)) X`.
    """
    matrices = _matrices(packed, hidden, size)
    start, norm = _unit(matrices, dtype)
    _, steps = _steps(start)
    dy = _matrices(upper, hidden, size).to(dtype)
    for (a, b, c), (x, gram, poly) in zip(reversed(STEPS), reversed(steps), strict=True):
        both = torch.bmm(dy, x.mT)
        both = both + both.mT
        inner = torch.baddbmm(both, gram, both, beta=b, alpha=c)
        inner.baddbmm_(both, gram, alpha=c)  # in place: a sum that stays is a copy before
        dy = torch.baddbmm(dy, poly, dy, beta=a).baddbmm_(inner, x)
    dx = dy.to(matrices.dtype)
    along = (dx * matrices).sum((-2, -1), keepdim=True)
    scale = 1 / (norm + EPS)
    # A matrix of zeros has no direction: its gradient is that of the scale alone, as in autograd.
    direction = matrices / torch.where(norm > 0, norm, 1)
    gradient = dx * scale - direction * (along * scale.square())
    return _packed(gradient, packed.shape, hidden, size)


def _unit(matrices: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    norm = torch.linalg.matrix_norm(matrices, keepdim=True)
    return (matrices / (norm + EPS)).to(dtype), norm


def _steps(x: Tensor) -> tuple[Tensor, list[_Step]]:
    steps = []
    for a, b, c in STEPS:
        gram = torch.bmm(x, x.mT)
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        steps.append(_Step(x, gram, poly))
        x = torch.baddbmm(x, poly, x, beta=a)
    return x, steps


def _matrices(packed: Tensor, hidden: int, size: int) -> Tensor:
    """Packed weights as wide matrices, W0, W2, W1 of each head behind each other, `[N, n, m]`."""
    kinds = packed.reshape(-1, 3, hidden * size)
    if hidden == size:
        return kinds.reshape(-1, size, size)
    first, last = (
        kinds[:, :2].unflatten(2, (hidden, size)),
        kinds[:, 2:].unflatten(2, (size, hidden)),
    )
    wide = (first, last.mT) if hidden < size else (first.mT, last)
    return torch.cat(wide, dim=1).flatten(0, 1)


def _packed(matrices: Tensor, shape: torch.Size, hidden: int, size: int) -> Tensor:
    """The inverse of `_matrices`."""
    if hidden == size:
        return matrices.reshape(shape)
    kinds = matrices.unflatten(0, (-1, 3))
    first, last = kinds[:, :2], kinds[:, 2:]
    first, last = (first, last.mT) if hidden < size else (first.mT, last)
    return torch.cat([first.flatten(1), last.flatten(1)], dim=1).view(shape)
