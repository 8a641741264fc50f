"""TTT-Linear by matrix products over whole mini-batches."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_modules.ops.states import TTTLinearState
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


def eager_ttt_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w: Tensor,
    b: Tensor,
    *,
    state: TTTLinearState | None,
    **options: Any,
) -> tuple[Tensor, TTTLinearState]:
    """TTT-Linear by matrix products; arguments and results are those of `ops.ttt_linear`."""
    return run_ttt(
        scan_linear,
        (w, b),
        TTTLinearState,
        q,
        k,
        v,
        eta,
        norm_weight,
        norm_bias,
        state,
        Options(**options),
    )


def scan_linear(
    batches: MiniBatches, learned: Tensors, changes: Sequence[Tensor | None]
) -> tuple[Tensor, Tensors]:
    """Predictions `[N, H, B, m, D]` for the queries, and the changes `(dw, db)` at the end.

    For each mini-batch, with G the gradients at the predictions `k W + b` for its keys:
    `dw += (step k)^T G, db += step^T G`, and the dual form for the queries.
    """
    keys, queries = unstack(batches.k), unstack(batches.q)
    offsets, steps = unstack(batches.offset), unstack(batches.step)
    scaled_keys = unstack(batches.step * batches.k)
    mixes = None
    if batches.mix is not None:
        mixes = unstack(torch.addcmul(batches.mix, batches.mix, batches.q @ batches.k.mT))
    predictions: list[Tensor] = []
    after: Tensors = ()
    for n in range(len(keys)):
        before = restarted(changes, batches.restart, n)
        weights = add(learned, before)
        z = affine(keys[n], *weights)
        g = prediction_gradient(z, offsets[n], batches.square, batches.eps)
        changes = after = (
            add_product(before[0], scaled_keys[n].mT, g),
            add_product(before[1], steps[n].mT, g),
        )
        if mixes is None:
            predictions.append(affine(queries[n], *add(learned, after)))
        else:
            predictions.append(add_product(affine(queries[n], *weights), mixes[n], g))
    return stack(predictions), after
