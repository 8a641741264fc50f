"""TTT-Linear by Triton kernels: five launches for a forward and a backward pass."""

from typing import Any

import torch
from torch import Tensor

from lightning_modules.ops.states import TTTLinearState
from lightning_modules.ops.ttt_eager import Options, autocast_device
from lightning_modules.ops.ttt_linear.in_graphs import in_graph
from lightning_modules.ops.ttt_linear.launch import Call, TTTLinear
from lightning_modules.ops.ttt_linear.layout import GROUP, Layout, lay_out, open_tokens

MAX_SIZE = {torch.bfloat16: 128, torch.float32: 64}
"""Largest head size on a GPU: the tiles of a head have to fit into one program."""


def triton_obstacle(q: Tensor, *, mini_batch_size: int | None) -> str | None:
    """What the kernels cannot do of a call, with the fix; None if they can do it all."""
    largest = MAX_SIZE.get(q.dtype, 128) if q.is_cuda else 128
    if q.shape[-1] > largest:
        return (
            f"head size {q.shape[-1]} of {q.dtype} is over {largest}: use more heads, or "
            "backend='torch'"
        )
    size, what = mini_batch_size, "mini_batch_size"
    if size is None:
        size, what = q.shape[1], "T without mini_batch_size"
    if size > GROUP:
        return f"{what} = {size} is over {GROUP}: use smaller mini-batches, or backend='torch'"
    return None


def triton_ttt_linear(
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
    **keywords: Any,
) -> tuple[Tensor, TTTLinearState]:
    """TTT-Linear by Triton kernels; arguments and results are those of `ops.ttt_linear`.

    Products take their operands in the dtype of q (bfloat16, or float32 with three products of
    tf32 each) and accumulate in float32, in which the state is kept.
    """
    options = Options(**keywords)
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(autocast_device(q.device), enabled=False):
        layout, progress = lay_out(q, state, options)
        k, v, eta = k.to(q.dtype), v.to(q.dtype), eta.to(dtype)
        if options.write_mask is not None:
            eta = eta.masked_fill(~options.write_mask.unsqueeze(-1), 0)
        if w.dim() != b.dim():
            w, b = (x.expand(len(q), *x.shape[-3:]) for x in (w, b))
        continues = layout.pending > 0
        held = tuple(state[2:5]) if state is not None and continues else (None,) * 3
        changes = (None, None) if state is None else tuple(state[:2])
        call = Call(layout, options.causal, options.flush, options.mask is not None, options.eps)
        tau = _row_factors(options, layout, dtype, q.device)
        parameters = (x.to(dtype).contiguous() for x in (norm_weight, norm_bias, w, b))
        inputs = (x if x is None else x.contiguous() for x in (q, k, v, eta, tau))
        carried = (x if x is None else x.to(dtype).contiguous() for x in (*changes, *held))
        run = in_graph if torch.compiler.is_compiling() else TTTLinear.apply
        o, dw, db = run(call, *inputs, *parameters, *carried)
        if not options.causal or options.flush:
            slots = (options.mini_batch_size or 0) if options.causal else 0
            new = tuple(eta.new_zeros(len(q), slots, *x.shape[2:]) for x in (k, v, eta))
            count = torch.zeros_like(progress.pending_count)
        else:
            own = None if state is None else tuple(state[2:5])
            new, count = open_tokens((k, v, eta), own, layout, progress, dtype)
    done = (progress.tokens_seen, progress.document_id)
    return o, TTTLinearState(dw, db, new[0], new[1], new[2], count, *done)


def _row_factors(
    options: Options, layout: Layout, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """tau, `[m]`; None if not causal."""
    if not options.causal:
        return None
    if options.token_eta is not None:
        return options.token_eta.to(dtype)
    return 1 / torch.arange(1, layout.size + 1, device=device, dtype=dtype)
