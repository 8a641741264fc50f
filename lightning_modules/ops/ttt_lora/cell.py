"""TTT-as-LoRA from what a linear layer projects to what the next one reads."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, normalize

from lightning_modules.ops.grid import Progress
from lightning_modules.ops.states import TTTLoRAState
from lightning_modules.ops.ttt_eager import autocast_device
from lightning_modules.ops.ttt_lora.call import Call
from lightning_modules.ops.ttt_lora.checks import check_ttt_lora_cell
from lightning_modules.ops.ttt_lora.choose import choose_backend
from lightning_modules.ops.ttt_lora.fused import run, triton_ttt_lora
from lightning_modules.ops.ttt_lora.linears import Linears, add_reads, run_linears
from lightning_modules.ops.ttt_lora.plan import make_plan


def ttt_lora_cell(
    projected: Tensor,
    eta: Tensor,
    base: Tensor,
    *,
    mini_batch_size: int,
    mode: Literal["A", "B"] = "A",
    loss: Literal["plain", "ln"] = "plain",
    norm: Tensor | None = None,
    norm_eps: float = 1e-5,
    q_residual: bool = False,
    mask: Tensor | None = None,
    document_ids: Tensor | None = None,
    state: TTTLoRAState | None = None,
    adapt: bool = True,
    shared: dict[Any, Any] | None = None,
    linears: Linears | None = None,
    backend: str = "auto",
) -> tuple[Any, TTTLoRAState]:
    """`ttt_lora` of a group with what stands before and behind it in a layer.

        k = l2norm(projected_k),   q = l2norm(projected_q),   v = projected_v
        y = LN(ttt_lora(q, k, v)) [+ q]

    Args:
        projected: k, q and v of G adapters, one after the other: `[B, T, P]`, P at least `3 G d`;
            what comes behind them is not looked at.
        eta: step sizes, `[]`, `[G]` or `[B, T, G]`.
        base: w_base and below it b_base, `[G, d + 1, d]`.
        mini_batch_size: as in `ttt_lora`, as are the others.
        norm: gamma and beta of LN, `[G, 2, d]`; None: no norm (with loss="plain" only).
        norm_eps: added to the variance in LN.
        q_residual: add q.
        shared: of calls whose tokens, mask, documents and progress are one and the same: what the
            first of them leaves for the others.
        linears: the linear layers that the adapters belong to, whose inputs are projected: then
            they are computed, too.
        backend: as in `ttt_lora`.

    Returns:
        `[B, T, G, d]` in the dtype of `projected`, with columns of zeros behind d up to a multiple
        of 8 where a GPU's matrix product wants them, and the state after the last token. With
        `linears` in place of it a tuple of what each layer puts out with its adapter,
        `[B, T, out]`.

    Raises:
        ValueError: if shapes, dtypes or options do not fit together.
        TypeError: if the state is of another op.
    """
    d, flags = base.shape[-1], (mask, document_ids)
    check_ttt_lora_cell(projected, eta, base, mini_batch_size, mode, loss, norm, *flags, state)
    function = choose_backend(backend, projected, d, mini_batch_size)
    dtype = torch.promote_types(projected.dtype, torch.float32)
    rates = eta if adapt else torch.zeros_like(eta)
    if function is triton_ttt_lora:
        plan = _shared_plan(projected, mini_batch_size, *flags, state, shared)
        width = d + -d % 8
        around = (True, norm_eps, q_residual)
        call = Call(mini_batch_size, mode == "B", plan, width, norm_eps, *around)
        behind = None if norm is None else norm.to(dtype)
        in_loss = behind if loss == "ln" else None
        rest = (rates, base.to(dtype), in_loss, behind, state)
        if linears is not None and not torch.compiler.is_compiling():
            return run_linears(linears, call, projected, *rest)
        o, new = run(call, (projected,), *rest)
        return o if linears is None else add_reads(linears, o), new
    (q, k, v), weights, both = _parts(projected, base, norm, loss)
    rates = rates.expand(q.shape[:3])
    with torch.autocast(autocast_device(q.device), enabled=False):
        q, k = (normalize(x.to(dtype), dim=-1, eps=1e-12) for x in (q, k))
        options = {"mini_batch_size": mini_batch_size, "mode": mode, "norm_eps": norm_eps}
        inside = None if both[0] is None else both
        given = {"mask": mask, "document_ids": document_ids, "state": state, "adapt": adapt}
        o, new = function(q, k, v.to(dtype), rates, *weights, norm=inside, **options, **given)
        if norm is not None:
            gamma, beta = norm.to(dtype).unbind(1)
            o = torch.addcmul(beta, layer_norm(o, (d,), eps=norm_eps), gamma)
        o = o + q if q_residual else o
    o = o.to(projected.dtype)
    return o if linears is None else add_reads(linears, o), new


def _parts(
    projected: Tensor, base: Tensor, norm: Tensor | None, loss: str
) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor], tuple[Tensor | None, Tensor | None]]:
    """Views of q, k and v, of w_base and b_base, and of the norm in the loss."""
    group, _, d = base.shape
    k, q, v = projected[..., : 3 * group * d].unflatten(-1, (3, group, d)).unbind(2)
    inside = norm if loss == "ln" else None
    both = (None, None) if inside is None else (inside[:, 0], inside[:, 1])
    return (q, k, v), (base[:, :-1], base[:, -1]), both


def _shared_plan(
    tokens: Tensor,
    size: int,
    mask: Tensor | None,
    document_ids: Tensor | None,
    state: TTTLoRAState | None,
    shared: dict[Any, Any] | None,
) -> Any:
    """The plan of a call, made by the first of those that share it."""
    key = ("plan of ttt_lora", size, state is None)
    if shared is not None and key in shared:
        return shared[key]
    progress = None if state is None else Progress.of(state, tokens)
    plan = make_plan(tokens.shape[1], size, mask, document_ids, progress)
    if shared is not None:
        shared[key] = plan
    return plan
