"""A stack of SwiGLU blocks over the tokens of a chunk: what it reads, and what they write into it.

Tokens are `[H, B, m, D]`. A weight of all blocks is `[r, H, R, out, in]`, where R is 1 as long as
the B rows share it.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

Triple = tuple[Tensor, Tensor, Tensor]


def read(weights: Triple, x: Tensor, residual: bool) -> Tensor:
    """`x_j = W1_j (silu(W0_j x) * (W2_j x)) [+ x]` for j = 1..r with x = `x_{j-1}`, `[H, B, m, D]`.

    Args:
        weights: W0, W1, W2.
        x: `x_0`, `[H, B, m, D]`.
        residual: skip connections around all blocks but the last.
    """
    blocks = list(zip(*(w.unbind(0) for w in weights), strict=True))
    for j, (w0, w1, w2) in enumerate(blocks):
        y = product(silu(product(x, w0)) * product(x, w2), w1)
        x = x + y if residual and j < len(blocks) - 1 else y
    return x


def ascent(
    weights: Triple, k: Tensor, v: Tensor, lr: Triple, residual: bool, greedy: bool
) -> Triple:
    """Sum over the tokens of `lr_i` times the gradient of `<x_r(k), v>` by W_i, `[r, H, B, ., .]`.

    With `p = W0 x, h = W2 x, g = silu(p)` and `d_r = v`, block by block from the last one:

        u = W1^T d,   dW1 = sum lr1 d (g h)^T,   dW2 = sum lr2 (u g) x^T
        a = u h silu'(p),   dW0 = sum lr0 a x^T,   d <- W0^T a + W2^T (u g) [+ d]

    Args:
        weights: W0, W1, W2.
        k: `x_0`, `[H, B, m, D]`.
        v: `[H, B, m, D]`.
        lr: rates of W0, W1, W2, `[H, B, m, 1]` or per channel `[H, B, m, D]`; 0 for no token.
        residual: as in `read`.
        greedy: give every block k for its x and v for its d.
    """
    lr0, lr1, lr2 = lr
    blocks = list(zip(*(w.unbind(0) for w in weights), strict=True))
    inside = _inputs(blocks, k, residual, greedy)
    changes: list[Triple] = []
    d = v
    for j in reversed(range(len(blocks))):
        (w0, w1, w2), (x, p, h) = blocks[j], inside[j]
        hidden, ug, a = gate_gradient(p, h, product(d, w1.mT))
        changes.append((a.mT @ (lr0 * x), d.mT @ (lr1 * hidden), ug.mT @ (lr2 * x)))
        if j > 0 and not greedy:
            below = product(a, w0.mT) + product(ug, w2.mT)
            d = below + d if residual and j < len(blocks) - 1 else below
    c0, c1, c2 = (torch.stack(parts[::-1]) for parts in zip(*changes, strict=True))
    return c0, c1, c2


def _inputs(
    blocks: list[Triple], x: Tensor, residual: bool, greedy: bool
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """`x_{j-1}`, p and h of every block; the last one's output is of no use."""
    inside = []
    for j, (w0, w1, w2) in enumerate(blocks):
        p, h = product(x, w0), product(x, w2)
        inside.append((x, p, h))
        if j < len(blocks) - 1 and not greedy:
            y = product(silu(p) * h, w1)
            x = x + y if residual else y
    return inside


def product(x: Tensor, w: Tensor) -> Tensor:
    """`x w^T`, `[H, B, m, out]`; one product for all rows where they share the weight."""
    if w.shape[1] == 1:
        return (x.flatten(1, 2) @ w.squeeze(1).mT).unflatten(1, x.shape[1:3])
    return x @ w.mT


class _GateGradient(torch.autograd.Function):
    """See `gate_gradient`. Keeps p, h, u alone, where autograd would keep eight tensors."""

    @staticmethod
    def forward(ctx: Any, p: Tensor, h: Tensor, u: Tensor) -> Triple:
        ctx.save_for_backward(p, h, u)
        g = silu(p)
        return g * h, u * g, torch.ops.aten.silu_backward(u * h, p)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Triple:
        (p, h, u), (of_hidden, of_ug, of_a) = ctx.saved_tensors, grads
        s = p.sigmoid()
        g, rest = p * s, s - 1
        slope = torch.addcmul(s, g, rest, value=-1)  # silu' = s + g (1 - s)
        curve = rest * torch.sub(g, slope, alpha=2)  # silu'' = (1 - s) (2 silu' - g)
        steep = of_a * slope
        dh = torch.addcmul(steep * u, of_hidden, g)
        du = torch.addcmul(steep * h, of_ug, g)
        dp = torch.addcmul(of_hidden * h, of_ug, u) * slope
        return torch.addcmul(dp, of_a * u * h, curve), dh, du


def gate_gradient(p: Tensor, h: Tensor, u: Tensor) -> Triple:
    """Hidden channels `g h` with `g = silu(p)`, and with u their gradient `u g` and `u h silu'(p)`.

    Args:
        p: `W0 x`, `[H, B, m, F]`.
        h: `W2 x`, `[H, B, m, F]`.
        u: `W1^T d`, `[H, B, m, F]`.
    """
    return _GateGradient.apply(p, h, u)
