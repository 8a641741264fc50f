"""TTT-MLP: a sequence layer whose hidden state is the weights of a two-layer MLP."""

from typing import Any

from torch import Tensor

from lightning_modules.ops.checks import (
    check_ttt_options,
    check_ttt_state,
    check_ttt_tokens,
    check_ttt_weights,
    select_backend,
)
from lightning_modules.ops.states import TTTMLPState
from lightning_modules.ops.ttt_mlp.eager import eager_ttt_mlp
from lightning_modules.ops.ttt_mlp.naive import naive_ttt_mlp

BACKENDS = {"torch": eager_ttt_mlp, "naive": naive_ttt_mlp}

__all__ = ["ttt_mlp"]


def ttt_mlp(
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
    mini_batch_size: int | None = None,
    causal: bool,
    token_eta: Tensor | None = None,
    mask: Tensor | None = None,
    write_mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    state: TTTMLPState | None = None,
    flush: bool = False,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, TTTMLPState]:
    """Read a sequence with an MLP that each token trains by one step of gradient descent.

    Token j asks `f(x) = gelu(x W1 + b1) W2 + b2` (tanh approximation) to predict its value minus
    its key, `l_j = 1/2 || LN(f(k_j); gamma, beta) - (v_j - k_j) ||^2`. With `W` all four weights
    at the start of the token's mini-batch, output i is

        causal:      o_i = q_i + LN(f_{W_i}(q_i)),  W_i = W - tau_i sum_{j <= i} eta_j dl_j/dW
        not causal:  o_i = q_i + LN(f_{W'}(q_i)),   W'  = W - sum_j eta_j dl_j/dW

    j in the same mini-batch, whose last weights the next one starts with. Source: Sun et al.,
    "Learning to (Learn at Test Time): RNNs with Expressive Hidden States", 2024,
    arXiv:2407.04620, section 2.

    Args:
        q: queries, `[B, T, H, D]`, T at least 1.
        k: keys, `[B, T, H, D]`.
        v: values, `[B, T, H, D]`.
        eta: step size of each token, `[B, T, H]`, used as it is.
        norm_weight: gamma of the LayerNorm, `[H, D]`.
        norm_bias: beta of the LayerNorm, `[H, D]`.
        w1: learned first weight, `[H, D, F]` (in, out), F usually 4D, or one for each row,
            `[B, H, D, F]`.
        b1: learned first bias, `[H, 1, F]` or `[B, H, 1, F]`.
        w2: learned second weight, `[H, F, D]` or `[B, H, F, D]`.
        b2: learned second bias, `[H, 1, D]` or `[B, H, 1, D]`.
        mini_batch_size: as in `ttt_linear`, like all that follow.
        causal: whether a token reads only what tokens up to itself wrote.
        token_eta: tau, `[mini_batch_size]`; None: `1 / (i + 1)`. Causal only.
        mask: tokens that exist, bool `[B, T]`; the output of the others is 0.
        write_mask: tokens that write, bool `[B, T]`.
        document_ids: integers `[B, T]`; another id starts from the learned weights.
        state: what an earlier call returned.
        flush: close an open mini-batch at the end of the call.
        eps: added to the variance in the LayerNorm.
        backend: "torch", "naive" or "auto".

    Returns:
        Outputs `[B, T, H, D]` in the dtype of q, and the state after the last token, in float32
        (float64 if q is), with its autograd graph.

    Raises:
        ValueError: if shapes, dtypes or options do not fit together.
        TypeError: if the state is of another op.
    """
    size, hidden = q.shape[-1], w1.shape[-1]
    options: dict[str, Any] = {
        "mini_batch_size": mini_batch_size,
        "causal": causal,
        "token_eta": token_eta,
        "mask": mask,
        "write_mask": write_mask,
        "document_ids": document_ids,
    }
    run = select_backend("ttt_mlp", backend, BACKENDS)
    check_ttt_tokens(q, k, v, eta, norm_weight, norm_bias)
    check_ttt_weights(
        q, w1=(w1, size, hidden), b1=(b1, 1, hidden), w2=(w2, hidden, size), b2=(b2, 1, size)
    )
    check_ttt_options(q, **options)
    shapes = {"dw1": (size, hidden), "db1": (1, hidden), "dw2": (hidden, size), "db2": (1, size)}
    check_ttt_state(q, state, TTTMLPState, shapes, (mini_batch_size or 0) if causal else 0)
    run_options = {"state": state, "flush": flush, "eps": eps, **options}
    return run(q, k, v, eta, norm_weight, norm_bias, w1, b1, w2, b2, **run_options)
