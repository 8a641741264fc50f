"""TTT-Linear: a sequence layer whose hidden state is the weight of an affine map."""

from functools import partial
from typing import Any

from torch import Tensor

from lightning_modules.ops.checks import (
    check_ttt_options,
    check_ttt_state,
    check_ttt_tokens,
    check_ttt_weights,
)
from lightning_modules.ops.states import TTTLinearState
from lightning_modules.ops.triton_backend import dispatch
from lightning_modules.ops.ttt_linear.eager import eager_ttt_linear
from lightning_modules.ops.ttt_linear.fused import triton_obstacle, triton_ttt_linear
from lightning_modules.ops.ttt_linear.naive import naive_ttt_linear

BACKENDS = {"torch": eager_ttt_linear, "naive": naive_ttt_linear, "triton": triton_ttt_linear}

__all__ = ["ttt_linear"]


def ttt_linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w: Tensor,
    b: Tensor,
    *,
    mini_batch_size: int | None = None,
    causal: bool,
    token_eta: Tensor | None = None,
    mask: Tensor | None = None,
    write_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    state: TTTLinearState | None = None,
    flush: bool = False,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, TTTLinearState]:
    """Read a sequence with an affine map that each token trains by one step of gradient descent.

    Token j asks the map to predict its value minus its key,
    `l_j = 1/2 || LN(k_j W + b; gamma, beta) - (v_j - k_j) ||^2`. With `W, b` the weights at the
    start of the token's mini-batch, output i is

        causal:      o_i = q_i + LN(q_i W_i + b_i),  W_i = W - tau_i sum_{j <= i} eta_j dl_j/dW
        not causal:  o_i = q_i + LN(q_i W' + b'),    W'  = W - sum_j eta_j dl_j/dW

    (likewise for b), j in the same mini-batch, whose last weights the next one starts with.
    Source: Sun et al., "Learning to (Learn at Test Time): RNNs with Expressive Hidden States",
    2024, arXiv:2407.04620, section 2.

    Args:
        q: queries, `[B, T, H, D]`, T at least 1.
        k: keys, `[B, T, H, D]`.
        v: values, `[B, T, H, D]`.
        eta: step size of each token, `[B, T, H]`, used as it is: factors such as 1/D or 1/T belong
            into it.
        norm_weight: gamma of the LayerNorm, `[H, D]`.
        norm_bias: beta of the LayerNorm, `[H, D]`.
        w: learned weight before the first token, `[H, D, D]` (in, out), or one for each row,
            `[B, H, D, D]`.
        b: learned bias before the first token, `[H, 1, D]` or `[B, H, 1, D]`.
        mini_batch_size: tokens whose gradients are taken at the same weights. None: all tokens of
            the call (and document), which only a non-causal call may do.
        causal: a token reads what tokens up to itself wrote and an unfinished mini-batch stays
            open for the next call. False: all tokens of a mini-batch write before any of them
            reads, and the end of the call closes the last mini-batch.
        token_eta: tau, the factor of each position in a causal mini-batch, `[mini_batch_size]`,
            not negative. None: `1 / (i + 1)`.
        mask: tokens that exist, bool `[B, T]`. The others write nothing, take no place in a
            mini-batch and have output 0. None: all.
        write_mask: tokens that write, bool `[B, T]`; False is the same as eta 0. None: all.
        document_ids: integers `[B, T]`: a token with another id than the one before (or than the
            state's) starts from w and b in a new mini-batch. None: one document without end.
        state: what an earlier call with the same `causal` and `mini_batch_size` returned; None, or
            all zeros in a row: start from w and b.
        flush: close an open mini-batch at the end of the call, as a short one.
        eps: added to the variance in the LayerNorm.
        backend: "torch" (matrix products), "triton" (kernels for CUDA, D up to 128, mini-batches
            of up to 64 tokens), "naive" (a loop over tokens that defines the result), or "auto":
            "triton" on a GPU where it can, else "torch"; a line in the log says why, once.

    Returns:
        Outputs `[B, T, H, D]` in the dtype of q, and the state after the last token. Arithmetic
        and state are float32 (float64 if q is), whatever autocast says; only "triton" multiplies
        bfloat16 inputs as such, and accumulates in float32. The state keeps its autograd graph:
        detach it where backpropagation through time is to stop.

    Raises:
        ValueError: if shapes, dtypes or options do not fit together, or not the backend.
        TypeError: if the state is of another op.
        RuntimeError: backend "triton" without a GPU, or without triton.
    """
    size = q.shape[-1]
    options: dict[str, Any] = {
        "mini_batch_size": mini_batch_size,
        "causal": causal,
        "token_eta": token_eta,
        "mask": mask,
        "write_mask": write_mask,
        "document_ids": document_ids,
    }
    check_ttt_tokens(q, k, v, eta, norm_weight, norm_bias)
    check_ttt_weights(q, w=(w, size, size), b=(b, 1, size))
    check_ttt_options(q, **options)
    shapes = {"dw": (size, size), "db": (1, size)}
    check_ttt_state(q, state, TTTLinearState, shapes, (mini_batch_size or 0) if causal else 0)
    obstacle = partial(triton_obstacle, q, mini_batch_size=mini_batch_size)
    run = dispatch("ttt_linear", backend, BACKENDS, q, obstacle, in_graphs=True)
    return run(
        q, k, v, eta, norm_weight, norm_bias, w, b, state=state, flush=flush, eps=eps, **options
    )
