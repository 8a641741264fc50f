"""TTT-as-LoRA by Triton kernels: two launches forward, three backward, for all rows and adapters.

Beside the inputs the backward pass keeps the change of the weights at the beginning of each block,
as the torch backend does, and takes everything else again from it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_modules.ops.grid import Progress
from lightning_modules.ops.states import TTTLoRAState
from lightning_modules.ops.ttt_lora.call import Call
from lightning_modules.ops.ttt_lora.in_graphs import in_graph
from lightning_modules.ops.ttt_lora.plan import make_plan

Given = tuple[Tensor | None, ...]


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
    before, change, others = prepare(base, tokens, norm, output_norm, state)
    if torch.compiler.is_compiling():
        start = None if state is None else _below(state.dw, state.db, base.dtype)
        found = in_graph(call, before, eta, base, start, others)
    else:
        found = _Fused.apply(call, before, eta, base, *change, *others)
    return found[0], state_of(call, found[1:])


def prepare(
    base: Tensor,
    tokens: Sequence[Tensor],
    norm: Tensor | None,
    output_norm: Tensor | None,
    state: TTTLoRAState | None,
) -> tuple[Given, Given, Given]:
    """The state's integers, dw and db, and the others that `kernel_forward` takes."""
    if state is None:
        return (None,) * 3, (None,) * 2, (None, None, None, norm, output_norm, *tokens)
    dtype = base.dtype  # to ask is faster than a copy that copies nothing
    held = (x if x.dtype == dtype else x.to(dtype) for x in state[2:5])
    before = tuple([x.contiguous() for x in state[5:]])
    return before, state[:2], (*(x.contiguous() for x in held), norm, output_norm, *tokens)


def state_of(call: Call, after: Sequence[Tensor]) -> TTTLoRAState:
    """The state from the change, the open mini-batch and the progress after a call."""
    change, *held, counted = after
    progress = call.plan.progress or counted.unbind(0)
    d = change.shape[-1]
    return TTTLoRAState(change.narrow(2, 0, d), change.select(2, d), *held, *progress)


def one_matrix(dw: Tensor | None, db: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """dw and below it db, `[B, G, d + 1, d]`: a copy only if they do not lie so in memory.

    They do in a state that a call of the kernels has left.
    """
    if dw is None or db is None:
        return None
    batch, group, d, _ = dw.shape
    shape, strides = (batch, group, d + 1, d), (group * (d + 1) * d, (d + 1) * d, d, 1)
    together = dw.dtype == db.dtype == dtype and dw.stride() == strides
    if (
        together
        and db.stride() == (*strides[:2], 1)
        and db.data_ptr() == dw.data_ptr() + d * d * dw.element_size()
    ):
        storage = dw.untyped_storage()
        if storage.data_ptr() == db.untyped_storage().data_ptr():
            return dw.as_strided(shape, strides)
    return _below(dw, db, dtype)


def _below(dw: Tensor, db: Tensor, dtype: torch.dtype) -> Tensor:
    """dw and below it db, a copy."""
    return torch.cat([dw, db.unsqueeze(-2)], dim=-2).to(dtype)


def kernel_forward(
    call: Call,
    before: Given,
    eta: Tensor,
    base: Tensor,
    dw: Tensor | None,
    db: Tensor | None,
    *others: Tensor | None,
) -> tuple[tuple[Tensor, ...], Given]:
    """What the kernels compute, and what `kernel_backward` needs.

    Args:
        call: what the kernels must know of it.
        before: the state's integers.
        eta: step sizes.
        base: w_base and below it b_base.
        dw: of the state.
        db: of the state.
        *others: k, v and eta of the open mini-batch, the norm in the loss and that of the output,
            and the tokens.

    Returns:
        Outputs `[B, T, G, width]`, the change, k, v and eta of the open mini-batch, and the
        progress.
    """
    from lightning_modules.ops.ttt_lora.kernels.launch import forward

    start = one_matrix(dw, db, base.dtype)
    *pending, norm, output_norm = others[:5]
    tokens = [x for x in others[5:] if x is not None]
    found = forward(call, before, eta, base, start, tuple(pending), norm, output_norm, tokens)
    return found[:6], (*before, eta, base, start, *others, *found[6:])


def kernel_backward(
    call: Call, saved: Sequence[Tensor], grads: Sequence[Tensor | None], of_state: bool
) -> Given:
    """Gradients of eta, base, dw, db and the others.

    Args:
        call: of the forward pass.
        saved: by the forward pass.
        grads: of outputs, the change, k, v and eta of the open mini-batch; None: zero.
        of_state: whether the gradients of the state are asked for.
    """
    from lightning_modules.ops.ttt_lora.kernels.launch import backward

    if torch.is_grad_enabled():
        raise NotImplementedError(
            "the triton backend of ttt_lora has no second derivatives: leave out "
            "create_graph=True, or use backend='naive'"
        )
    found = backward(call, saved[:3], saved[3:-2], saved[-2:], grads, of_state)
    of_eta, of_base, change, *rest = found
    both = (None, None) if change is None else (change[:, :, :-1], change[:, :, -1])
    return of_eta, of_base, *both, *rest


class _Fused(torch.autograd.Function):
    """`kernel_forward` of its arguments, less what is saved; differentiable once.

    No `setup_context`: it makes torch look up the signature of `forward` in every call.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, *given: Any) -> tuple[Tensor, ...]:
        outputs, saved = kernel_forward(call, *given)
        ctx.call = call
        ctx.save_for_backward(*saved)
        ctx.mark_non_differentiable(outputs[5])
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        of_state = any(ctx.needs_input_grad[4:9])
        return None, None, *kernel_backward(ctx.call, ctx.saved_tensors, grads[:5], of_state)


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
