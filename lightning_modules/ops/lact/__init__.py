"""LaCT: a sequence layer whose hidden state is a SwiGLU network, written once per large chunk."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from lightning_modules.ops.lact.checks import check_lact
from lightning_modules.ops.lact.eager import eager_lact
from lightning_modules.ops.lact.fused import triton_lact, triton_obstacle
from lightning_modules.ops.lact.naive import naive_lact
from lightning_modules.ops.states import LaCTState, TokensRead
from lightning_modules.ops.triton_backend import dispatch

BACKENDS = {"torch": eager_lact, "naive": naive_lact, "triton": triton_lact}

__all__ = ["lact"]


def lact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    w0: Tensor,
    w1: Tensor,
    w2: Tensor,
    *,
    chunk_size: int,
    momentum: Tensor | None = None,
    muon: bool = False,
    muon_dtype: torch.dtype = torch.bfloat16,
    prenorm: bool = False,
    residual: bool = False,
    greedy: bool = False,
    mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    state: LaCTState | None = None,
    tokens_read: TokensRead | None = None,
    adapt: bool = True,
    recompute: bool = False,
    group: ProcessGroup | None = None,
    backend: str = "auto",
) -> tuple[Tensor, LaCTState]:
    """Read a sequence with a SwiGLU network per head that every chunk of it trains.

    One block is `f(x) = W1 (silu(W0 x) * (W2 x))`; r blocks read `x_0 = q`, `x_j = f_j(x_{j-1})`
    (plus `x_{j-1}` if residual and j < r), and the output is `x_r`. The tokens of a chunk are read
    with the weights from before it; then each writes: the inner loss of a token is
    `-<x_r(k), v>`, and with g_i the sum over the chunk of `lr_i` times its negative gradient
    (through all r blocks) by a weight W_i

        M_i <- g_i + mean(momentum) M_i,     W_i <- rows(W_i + NS5(M_i))

    where `rows` rescales every row to the norm it had when the document began, and NS5 (Muon) is
    left out, as is M, unless asked for. The last chunk of a document, full or not, only reads.
    Source: Zhang et al., "Test-Time Training Done Right", 2025, arXiv:2505.23884, section 3.

    Args:
        q: queries, `[B, T, H, D]`, T at least 1; used as they are.
        k: keys, `[B, T, H, D]`.
        v: values, `[B, T, H, D]`.
        lr: learning rates of W0, W1, W2, in this order, `[B, T, H, 3]`, or per channel
            `[B, T, H, 3, D]` (F = D: those of W0 and W2 scale the channels of k, that of W1 the
            hidden ones).
        w0: learned weight before the first token, `[r, H, F, D]`.
        w1: `[r, H, D, F]`.
        w2: `[r, H, F, D]`.
        chunk_size: C, tokens of a chunk.
        momentum: coefficient of each token, `[B, T, H]`; None: no momentum.
        muon: orthogonalise every update by five Newton-Schulz steps.
        muon_dtype: of these steps; bfloat16 is as published, float32 has better gradients.
        prenorm: add updates to a copy whose rows are never rescaled; read with a rescaled one.
        residual: skip connections between the blocks.
        greedy: a wrong baseline: every block is trained on raw k and v as if it stood alone.
        mask: tokens that exist, bool `[B, T]`. The others write nothing, take no place in a chunk
            and have output 0. None: all.
        document_ids: integers `[B, T]`: a token with another id than the one before (or than the
            state's) starts from w0, w1, w2 in a new chunk. None: one document without end.
        state: what an earlier call with the same options returned; None, or all zeros in a row:
            start from the learned weights. Where it carries no autograd graph, its weights count
            as `W + (w - w.detach())`: the learned ones get their gradient, the value stays.
        tokens_read: of the state's rows, if the host knows: then a state without documents does not
            make the call wait for the device. Must be true. None: ask the state.
        adapt: False reads without writing: chunks end, the weights stay as they are.
        recompute: keep no activation inside a chunk for the backward pass: it computes them again.
        group: processes that share the rows: each brings the p-th of P parts of the same length T,
            with its mask and documents, and gets its outputs. State and weights are those of the
            whole rows, the same on all; the gradient of each is the sum over the processes
            (see `ops.processes`).
        backend: "torch" (matrix products in float32), "triton" (products in the dtype of q, and
            kernels for CUDA between them; without a group and rates per channel), "naive" (a loop
            over tokens that defines the result), or "auto": "triton" on a GPU where it can, else
            "torch"; a line in the log says why, once.

    Returns:
        Outputs `[B, T, H, D]` in the dtype of q, and the state after the last token. Weights and
        state are float32 (float64 if q is), whatever autocast says; so is the arithmetic, but for
        the factors of products, which "triton" takes in bfloat16 if q is. The state keeps its
        autograd graph: detach it where backpropagation through time is to stop.

    Raises:
        ValueError: if shapes, dtypes or options do not fit together, or not the backend, or the
            state comes from a call with other options.
        TypeError: if the state is of another op.
        RuntimeError: backend "triton" without a GPU, or without triton.
    """
    options: dict[str, Any] = {
        "chunk_size": chunk_size,
        "momentum": momentum,
        "muon": muon,
        "muon_dtype": muon_dtype,
        "prenorm": prenorm,
        "residual": residual,
        "greedy": greedy,
        "mask": mask,
        "document_ids": document_ids,
        "state": state,
        "tokens_read": tokens_read,
        "adapt": adapt,
        "recompute": recompute,
        "group": group,
    }
    check_lact(q, k, v, lr, w0, w1, w2, **options)
    run = _outside_of_graphs() if torch.compiler.is_compiling() else _run
    return run(backend, q, k, v, lr, w0, w1, w2, **options)


def _run(
    backend: str, q: Tensor, k: Tensor, v: Tensor, lr: Tensor, *weights: Tensor, **options: Any
) -> tuple[Tensor, LaCTState]:
    obstacle = partial(triton_obstacle, lr, options["group"])
    run = dispatch("lact", backend, BACKENDS, q, obstacle)
    return run(q, k, v, lr, *weights, **options)


def _outside_of_graphs() -> Callable[..., tuple[Tensor, LaCTState]]:
    """`_run` as it is inside `torch.compile`, with the kernels where there is a GPU.

    The number of chunks depends on the length, so that their loop would be compiled anew for each.
    """
    # Not at import, which would load the compiler.
    return torch.compiler.disable(_run, reason="a loop over chunks, for any length")
