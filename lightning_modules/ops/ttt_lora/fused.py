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
from lightning_modules.ops.ttt_lora.in_graphs import in_graph
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
        eta: `[]`, `[G]` or `[B, T, G]`.
        base: w_base and below it b_base, `[G, d + 1, d]`.
        norm: gamma and beta in the loss "ln", `[G, 2, d]`; None: the loss is "plain".
        output_norm: those of the output's norm; None: it has none.
        state: that of a group.
    """
    change: tuple[Tensor | None, ...] = (None,) * 5
    before: tuple[Tensor | None, ...] = (None, None, None)
    if state is not None:
        change = (*state[:2], *(x.to(base.dtype).contiguous() for x in state[2:5]))
        before = tuple(x.contiguous() for x in state[5:])
    others = (*change[2:], norm, output_norm, *tokens)
    if torch.compiler.is_compiling():
        start = None if state is None else _below(state.dw, state.db, base.dtype)
        result = Result(*in_graph(call, before, eta, base, start, others))
    else:
        result = Result(*_Fused.apply(call, before, eta, base, *change[:2], *others))
    progress = call.plan.progress or Progress(*result.progress.unbind(0))
    after = result.change
    fields = (after[..., :-1, :], after[..., -1, :], *result[2:5], *progress)
    return result.o, TTTLoRAState(*fields)


def one_matrix(dw: Tensor | None, db: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """dw and below it db, `[B, G, d + 1, d]`: a copy only if they do not lie so in memory.

    They do in a state that a call of the kernels has left.
    """
    if dw is None or db is None:
        return None
    batch, group, d, _ = dw.shape
    shape, strides = (batch, group, d + 1, d), (group * (d + 1) * d, (d + 1) * d, d, 1)
    together = dw.dtype == db.dtype == dtype and dw.stride() == strides
    together = together and db.stride() == (*strides[:2], 1)
    if together and db.data_ptr() == dw.data_ptr() + d * d * dw.element_size():
        storage = dw.untyped_storage()
        if storage.data_ptr() == db.untyped_storage().data_ptr():
            return dw.as_strided(shape, strides)
    return _below(dw, db, dtype)


def _below(dw: Tensor, db: Tensor, dtype: torch.dtype) -> Tensor:
    """dw and below it db, a copy."""
    return torch.cat([dw, db.unsqueeze(-2)], dim=-2).to(dtype)


class _Fused(torch.autograd.Function):
    """See `run`; differentiable once.

    No `setup_context`: it makes torch look up the signature of `forward` in every call.
    """

    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        before: tuple[Tensor | None, ...],
        eta: Tensor,
        base: Tensor,
        dw: Tensor | None,
        db: Tensor | None,
        *others: Tensor | None,
    ) -> tuple[Tensor, ...]:
        from lightning_modules.ops.ttt_lora.kernels.launch import forward

        start = one_matrix(dw, db, base.dtype)
        *pending, norm, output_norm = others[:5]
        tokens = [x for x in others[5:] if x is not None]
        outputs = forward(call, before, eta, base, start, tuple(pending), norm, output_norm, tokens)
        ctx.call = call
        ctx.save_for_backward(*before, eta, base, start, *others, *outputs[6:])
        ctx.mark_non_differentiable(outputs[5])
        ctx.set_materialize_grads(False)
        return outputs[:6]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        from lightning_modules.ops.ttt_lora.kernels.launch import backward

        if torch.is_grad_enabled():
            raise NotImplementedError(
                "the triton backend of ttt_lora has no second derivatives: leave out "
                "create_graph=True, or use backend='naive'"
            )
        saved = ctx.saved_tensors
        needed = ctx.needs_input_grad[4:9]
        found = backward(ctx.call, saved[:3], saved[3:-2], saved[-2:], grads[:5], any(needed))
        of_eta, of_base, change, *rest = found
        both = (None, None) if change is None else (change[..., :-1, :], change[..., -1, :])
        return None, None, of_eta, of_base, *both, *rest


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
