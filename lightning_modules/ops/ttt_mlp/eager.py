"""TTT-MLP by matrix products over whole mini-batches."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu

from lightning_modules.ops.states import TTTMLPState
from lightning_modules.ops.ttt_eager import (
    MiniBatches,
    Options,
    Tensors,
    add,
    add_product,
    affine,
    prediction_gradient,
    restarted,
    run_ttt,
    stack,
    unstack,
)


def eager_ttt_mlp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    state: TTTMLPState | None,
    **options: Any,
) -> tuple[Tensor, TTTMLPState]:
    """TTT-MLP by matrix products; arguments and results are those of `ops.ttt_mlp`."""
    return run_ttt(
        scan_mlp,
        (w1, b1, w2, b2),
        TTTMLPState,
        q,
        k,
        v,
        eta,
        norm_weight,
        norm_bias,
        state,
        Options(**options),
    )


def scan_mlp(
    batches: MiniBatches, learned: Tensors, changes: Sequence[Tensor | None]
) -> tuple[Tensor, Tensors]:
    """Predictions `[N, H, B, m, D]` for the queries, and `(dw1, db1, dw2, db2)` at the end.

    For each mini-batch, with x2, G1, G2 of its keys (`_gradients`):
    `dw1 += (step k)^T G1, db1 += step^T G1, dw2 += x2^T (step G2), db2 += step^T G2`, and the dual
    form of each layer for the queries.
    """
    keys, queries = unstack(batches.k), unstack(batches.q)
    offsets, steps = unstack(batches.offset), unstack(batches.step)
    scaled_keys = unstack(batches.step * batches.k)
    mixes = first_mixes = None
    if batches.mix is not None:
        mixes = unstack(batches.mix)
        first_mixes = unstack(torch.addcmul(batches.mix, batches.mix, batches.q @ batches.k.mT))
    predictions: list[Tensor] = []
    after: Tensors = ()
    for n in range(len(keys)):
        before = restarted(changes, batches.restart, n)
        weights = add(learned, before)
        x2, g1, g2 = _gradients(keys[n], offsets[n], weights, batches)
        changes = after = (
            add_product(before[0], scaled_keys[n].mT, g1),
            add_product(before[1], steps[n].mT, g1),
            add_product(before[2], x2.mT, steps[n] * g2),
            add_product(before[3], steps[n].mT, g2),
        )
        if mixes is None or first_mixes is None:
            w1, b1, w2, b2 = add(learned, after)
            predictions.append(affine(_gelu(affine(queries[n], w1, b1)), w2, b2))
        else:
            w1, b1, w2, b2 = weights
            hidden = _gelu(add_product(affine(queries[n], w1, b1), first_mixes[n], g1))
            mix = torch.addcmul(mixes[n], mixes[n], hidden @ x2.mT)
            predictions.append(add_product(affine(hidden, w2, b2), mix, g2))
    return stack(predictions), after


def _gradients(k: Tensor, offset: Tensor, weights: Tensors, batches: MiniBatches) -> Tensors:
    """`x2 = gelu(x1)` with `x1 = k W1 + b1`, and the gradients at both layers' outputs.

    G2 is that at the prediction `x2 W2 + b2`, and `G1 = (G2 W2^T) gelu'(x1)`.

    Returns:
        `x2, G1 [H, B, m, F]` and `G2 [H, B, m, D]`.
    """
    w1, b1, w2, b2 = weights
    x1 = affine(k, w1, b1)
    x2 = _gelu(x1)
    g2 = prediction_gradient(affine(x2, w2, b2), offset, batches.square, batches.eps)
    g1 = torch.ops.aten.gelu_backward(affine(g2, w2.mT), x1, approximate="tanh")
    return x2, g1, g2


def _gelu(x: Tensor) -> Tensor:
    return gelu(x, approximate="tanh")
