"""TTT-as-LoRA by Triton kernels: two launches forward, three backward, for all rows and adapters.

Beside the inputs the backward pass keeps the change of the weights at the beginning of each block,
as the torch backend does, and takes everything else again from it.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_modules.ops.grid import Progress
from lightning_modules.ops.states import TTTLoRAState
from lightning_modules.ops.ttt_lora.call import Call
from lightning_modules.ops.ttt_lora.plan import make_plan


class Result(NamedTuple):
    """Outputs `[B, T, G, width]`, the change, the open mini-batch and the progress after a call."""

    o: Tensor
    change: Tensor
    open_k: Tensor
    open_v: Tensor
    open_eta: Tensor
    progress: Tensor


def run(
    call: Call,
    tokens: Sequence[Tensor],
    eta: Tensor,
    base: Tensor,
    norm: Tensor | None,
    output_norm: Tensor | None,
    state: TTTLoRAState | None,
) -> tuple[Tensor, TTTLoRAState]:
    """The outputs and the next state.

    Args:
        tokens: q, k, v `[B, T, G, d]` with equal strides, or one tensor of all k, q, v
            one after the other, `[B, T, P]`.
        eta: `[B, T, G]`.
        base: w_base and below it b_base, `[G, d + 1, d]`.
        norm: gamma and beta in the loss "ln", `[G, 2, d]`; None: the loss is "plain".
        output_norm: those of the output's norm; None: it has none.
        state: that of a group.
    """
    start: Tensor | None = None
    pending: tuple[Tensor | None, ...] = (None, None, None)
    before: tuple[Tensor | None, ...] = (None, None, None)
    if state is not None:
        start = torch.cat([state.dw, state.db.unsqueeze(-2)], dim=-2).to(base.dtype)
        pending = tuple(x.to(base.dtype).contiguous() for x in state[2:5])
        before = tuple(x.contiguous() for x in state[5:])
    result = Result(
        *_Fused.apply(call, before, eta, base, start, *pending, norm, output_norm, *tokens)[:6]
    )
    progress = call.plan.progress or Progress(*result.progress.unbind(0))
    change = result.change
    fields = (change[..., :-1, :], change[..., -1, :], *result[2:5], *progress)
    return result.o, TTTLoRAState(*fields)


class _Fused(torch.autograd.Function):
    """See `run`; differentiable once."""

    @staticmethod
    def forward(
        call: Call,
        before: tuple[Tensor | None, ...],
        eta: Tensor,
        base: Tensor,
        start: Tensor | None,
        pending_k: Tensor | None,
        pending_v: Tensor | None,
        pending_eta: Tensor | None,
        norm: Tensor | None,
        output_norm: Tensor | None,
        *tokens: Tensor,
    ) -> tuple[Tensor, ...]:
        from lightning_modules.ops.ttt_lora.kernels.launch import forward

        pending = (pending_k, pending_v, pending_eta)
        return forward(call, before, eta, base, start, pending, norm, output_norm, tokens)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        call, before, *tensors = inputs
        ctx.call = call
        ctx.save_for_backward(*before, *tensors, *output[6:])
        ctx.mark_non_differentiable(*output[5:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        from lightning_modules.ops.ttt_lora.kernels.launch import backward

        if torch.is_grad_enabled():
            raise NotImplementedError(
                "the triton backend of ttt_lora has no second derivatives: leave out "
                "create_graph=True, or use backend='naive'"
            )
        saved = ctx.saved_tensors
        needed = ctx.needs_input_grad[4:8]
        found = backward(ctx.call, saved[:3], saved[3:-2], saved[-2:], grads[:5], any(needed))
        return None, None, *found


def triton_ttt_lora(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eta: Tensor,
    w_base: Tensor,
    b_base: Tensor,
    *,
    mini_batch_size: int,
    mode: str,
    norm: tuple[Tensor, Tensor] | None,
    norm_eps: float,
    mask: Tensor | None,
    document_ids: Tensor | None,
    state: TTTLoRAState | None,
    adapt: bool,
) -> tuple[Tensor, TTTLoRAState]:
    """TTT-as-LoRA by Triton kernels; arguments as in `eager_ttt_lora`."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    before = None if state is None else Progress.of(state, q)
    plan = make_plan(q.shape[1], mini_batch_size, mask, document_ids, before)
    call = Call(mini_batch_size, mode == "B", plan, q.shape[-1], norm_eps)
    base = torch.cat([w_base, b_base.unsqueeze(-2)], dim=-2).to(dtype)
    both = None if norm is None else torch.stack(norm, dim=1).to(dtype)
    rates = eta if adapt else torch.zeros_like(eta)
    tokens: tuple[Tensor, ...] = (q, k.to(q.dtype), v.to(q.dtype))
    if any(x.stride() != q.stride() or x.stride(-1) != 1 for x in tokens):
        tokens = tuple(x.contiguous() for x in tokens)
    return run(call, tokens, rates, base, both, None, state)
