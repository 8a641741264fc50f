"""TTT-as-LoRA: inside an adapter of a linear layer, an affine map that learns while it reads."""

from typing import Literal

from torch import Tensor

from lightning_modules.ops.states import TTTLoRAState
from lightning_modules.ops.ttt_lora.cell import ttt_lora_cell
from lightning_modules.ops.ttt_lora.checks import check_ttt_lora
from lightning_modules.ops.ttt_lora.choose import choose_backend, takes_kernels
from lightning_modules.ops.ttt_lora.linears import Linears
from lightning_modules.ops.ttt_lora.loss import inner_loss

__all__ = ["Linears", "inner_loss", "takes_kernels", "ttt_lora", "ttt_lora_cell"]


def ttt_lora(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    w_base: Tensor,
    b_base: Tensor,
    *,
    mini_batch_size: int,
    mode: Literal["A", "B"] = "A",
    loss: Literal["plain", "ln"] = "plain",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    norm_eps: float = 1e-5,
    mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    state: TTTLoRAState | None = None,
    adapt: bool = True,
    backend: str = "auto",
) -> tuple[Tensor, TTTLoRAState]:
    """Read a sequence with an affine map that its tokens train, mini-batch by mini-batch.

    Token j asks the map to predict its value minus its key. With `W, b` the weights at the start
    of its mini-batch, `z_j = k_j W + b` and m the mini-batch size, the loss and its gradient are

        plain:  l_j = 1/2 || z_j - (v_j - k_j) ||^2,                    e_j = dl_j/dz_j
        ln:     l_j = 1/2 || LN(z_j; gamma, beta) - (v_j - k_j) ||^2

    and when a mini-batch is full, the next one starts with

        W <- W - 1/m sum_j eta_j k_j^T e_j,     b <- b - 1/m sum_j eta_j e_j

    A token i reads, with the sum over the tokens of its mini-batch up to itself,

        mode A:  o_i = q_i W + b
        mode B:  o_i = q_i W + b - 1/m sum_{j <= i} eta_j (q_i . k_j + 1) e_j

    Nothing that is read was written later. It is TTT-Linear (Sun et al., 2024, arXiv:2407.04620,
    section 2) with a step that is a mean over the mini-batch.

    Several adapters of one size that read the same tokens (the projections of an attention layer)
    run as one group of G: q, k, v `[B, T, G, d]`, eta `[]`, `[G]` or `[B, T, G]`, w_base
    `[G, d, d]`, b_base and the norm `[G, d]`, o `[B, T, G, d]`. They share mask and documents.

    Args:
        q: queries, `[B, T, d]`, T at least 1; used as they are (normalise them before).
        k: keys, `[B, T, d]`, likewise.
        v: values, `[B, T, d]`.
        eta: step size, `[]`, or one for each token, `[B, T]`.
        w_base: learned weight before the first token, `[d, d]` (in, out).
        b_base: learned bias before the first token, `[d]`.
        mini_batch_size: m, tokens whose gradients are taken at the same weights.
        mode: "A": read, then update; "B": see the tokens of the own mini-batch up to oneself.
        loss: "plain", or "ln": behind the LayerNorm of the output.
        norm_weight: gamma of that LayerNorm, `[d]`; with "ln" only.
        norm_bias: beta of that LayerNorm, `[d]`; with "ln" only.
        norm_eps: added to the variance in that LayerNorm.
        mask: tokens that exist, bool `[B, T]`. The others write nothing, take no place in a
            mini-batch, and read what the tokens before them wrote. None: all.
        document_ids: integers `[B, T]`: a token with another id than the one before (or than the
            state's) starts from w_base and b_base in a new mini-batch; ids of masked tokens are
            not looked at. None: one document without end.
        state: what an earlier call with the same `mini_batch_size` returned; None, or all zeros in
            a row: start from w_base and b_base.
        adapt: False is eta 0 for all tokens of the call: they read and take places, but never
            write.
        backend: "torch", "triton" (kernels for a GPU: float32 or bfloat16, d up to 64), "naive" (a
            loop over tokens that defines the result), or "auto" (triton where it can run).

    Returns:
        Outputs `[B, T, d]` before the output norm, in the dtype of q, and the state after the last
        token: a mini-batch that is not full stays open. Arithmetic and state are float32 (float64
        if q is), whatever autocast says. The state keeps its autograd graph: detach it where
        backpropagation through time is to stop.

    Raises:
        ValueError: if shapes, dtypes or options do not fit together.
        TypeError: if the state is of another op.
        RuntimeError: "triton" was asked for where it cannot run.
    """
    norm = (norm_weight, norm_bias)
    check_ttt_lora(
        q, k, v, eta, w_base, b_base, mini_batch_size, mode, loss, norm, mask, document_ids, state
    )
    run = choose_backend(backend, q, q.shape[-1], mini_batch_size)
    single = q.dim() == 3
    if single:
        q, k, v = q.unsqueeze(2), k.unsqueeze(2), v.unsqueeze(2)
        eta = eta.unsqueeze(-1) if eta.dim() else eta
        w_base, b_base = w_base.unsqueeze(0), b_base.unsqueeze(0)
        norm_weight, norm_bias = (None if x is None else x.unsqueeze(0) for x in norm)
        state = None if state is None else _with_group(state)
    o, new = run(
        q,
        k,
        v,
        eta.expand(q.shape[:3]),
        w_base,
        b_base,
        mini_batch_size=mini_batch_size,
        mode=mode,
        norm=None if norm_weight is None or norm_bias is None else (norm_weight, norm_bias),
        norm_eps=norm_eps,
        mask=mask,
        document_ids=document_ids,
        state=state,
        adapt=adapt,
    )
    return (o.squeeze(2), _without_group(new)) if single else (o, new)


def _with_group(state: TTTLoRAState) -> TTTLoRAState:
    """The state of one adapter as that of a group of one."""
    return state._replace(
        dw=state.dw.unsqueeze(1),
        db=state.db.unsqueeze(1),
        pending_k=state.pending_k.unsqueeze(2),
        pending_v=state.pending_v.unsqueeze(2),
        pending_eta=state.pending_eta.unsqueeze(2),
    )


def _without_group(state: TTTLoRAState) -> TTTLoRAState:
    """The inverse of `_with_group`."""
    return state._replace(
        dw=state.dw.squeeze(1),
        db=state.db.squeeze(1),
        pending_k=state.pending_k.squeeze(2),
        pending_v=state.pending_v.squeeze(2),
        pending_eta=state.pending_eta.squeeze(2),
    )
