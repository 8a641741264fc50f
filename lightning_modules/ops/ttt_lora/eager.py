"""TTT-as-LoRA by matrix products over whole mini-batches.

A bias is one more row of the weight, whose input is always 1: below, `k~ = [k, 1]` and
`D = [dw; db]`, `[d + 1, d]`. What the learned weights predict is one product for all tokens; the
scan over the mini-batches is about D alone.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_modules.ops.grid import Grid, Progress, arrange, open_mini_batch, plan_grid
from lightning_modules.ops.states import TTTLoRAState
from lightning_modules.ops.ttt_eager import affine, autocast_device
from lightning_modules.ops.ttt_lora.reading import Writes, read_rows, read_slots
from lightning_modules.ops.ttt_lora.scan import Norm, scan


def eager_ttt_lora(
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
    """TTT-as-LoRA by matrix products.

    Args:
        q: queries, `[B, T, G, d]`; k and v likewise.
        eta: `[B, T, G]`.
        w_base: `[G, d, d]`.
        b_base: `[G, d]`.
        norm: gamma and beta of the loss "ln", `[G, d]` each; None: the loss is "plain".
        state: that of a group.

    The other arguments and the results are those of `ops.ttt_lora` for a group.
    """
    dtype, time, size = torch.promote_types(q.dtype, torch.float32), q.shape[1], mini_batch_size
    with torch.autocast(autocast_device(q.device), enabled=False):
        grid, progress = _plan(q, mask, document_ids, state, size)
        queries, rates = q.to(dtype), eta.to(dtype).unsqueeze(-1)
        rates = rates if adapt else torch.zeros_like(rates)
        keys, values, rates = _tokens(k.to(dtype), v.to(dtype), rates, mask, state)
        weights = (w_base.to(dtype), b_base.to(dtype))
        tokens = (keys, torch.ones_like(rates), values, rates, _learned(keys, *weights))
        k_, v_, eta_, z_ = _mini_batches(tokens, size, grid)
        target, step = v_ - k_[..., :-1], eta_ / -size
        scaled = step * _closed(grid, time, size, eta_)[..., None, None] * k_
        restart = None if grid is None else grid.restart
        start = _change(state, w_base, q.shape[0], dtype)
        states, errors = scan(k_, scaled, z_, target, start, restart, _norm(norm, norm_eps, dtype))
        writes = None if mode == "A" else Writes(k_, step, errors)
        if mask is None or grid is None:
            o = read_slots(_with_one(queries), states, writes, size, grid)
        else:
            o = read_rows(_with_one(queries), states, writes, size, grid)
        o = o + _learned(queries, *weights)
        pending, count = open_mini_batch((k_[..., :-1], v_, eta_), time, grid, progress)
    # Copies: views would keep the changes of all mini-batches alive as long as the state.
    last = states[-1].transpose(0, 1).clone(memory_format=torch.contiguous_format)
    dw, db = last[..., :-1, :], last[..., -1, :]
    new = (dw, db, *pending[:2], pending[2].squeeze(-1), count, *progress[1:])
    return o.to(q.dtype), TTTLoRAState(*new)


def _plan(
    q: Tensor,
    mask: Tensor | None,
    document_ids: Tensor | None,
    state: TTTLoRAState | None,
    size: int,
) -> tuple[Grid | None, Progress]:
    """A grid where rows may differ in what they hold; otherwise the progress alone."""
    progress = Progress.of(state, q)
    if mask is None and document_ids is None and state is None:
        return None, progress._replace(tokens_seen=progress.tokens_seen + q.shape[1])
    pending, masked = size if state is not None else 0, mask is not None
    return plan_grid(q, mask, document_ids, progress, size, pending, keep=masked)


def _tokens(
    k: Tensor, v: Tensor, eta: Tensor, mask: Tensor | None, state: TTTLoRAState | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens `[B, S, G, E]`, the state's pending ones before the call's."""
    if mask is not None:  # the gradient of w_base multiplies keys by zero, which keeps a NaN
        k = k.masked_fill(~mask[..., None, None], 0)
    if state is None:
        return k, v, eta
    return (
        torch.cat([state.pending_k.to(k.dtype), k], dim=1),
        torch.cat([state.pending_v.to(k.dtype), v], dim=1),
        torch.cat([state.pending_eta.to(k.dtype).unsqueeze(-1), eta], dim=1),
    )


def _mini_batches(tokens: tuple[Tensor, ...], size: int, grid: Grid | None) -> tuple[Tensor, ...]:
    """k~, v, eta and the learned predictions of tokens `[B, S, G, E]`, `[N, G, B, m, E]`.

    One rearrangement for all of them, since each has launches of its own.

    Args:
        tokens: k, 1, v, eta, predictions.
        size: m.
        grid: None if all rows are cut alike.
    """
    d = tokens[0].shape[-1]
    together = arrange(torch.cat(tokens, dim=-1), size, grid)
    return tuple(x.contiguous() for x in together.split([d + 1, d, 1, d], dim=-1))


def _with_one(x: Tensor) -> Tensor:
    """`[x, 1]`: the input of a weight whose last row is the bias."""
    return pad(x, (0, 1), value=1.0)


def _learned(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """`x w_base + b_base` of all tokens, `[B, S, G, d]`."""
    heads_first = x.permute(2, 0, 1, 3)
    y = affine(heads_first, w.unsqueeze(1), b[:, None, None])
    return y.permute(1, 2, 0, 3)


def _closed(grid: Grid | None, time: int, size: int, like: Tensor) -> Tensor:
    """Mini-batches that are full, bool `[N, 1, 1 or B]`."""
    if grid is not None:
        return (grid.fill == size).unsqueeze(1)
    index = torch.arange(like.shape[0], device=like.device)
    return (index < time // size)[:, None, None]


def _change(state: TTTLoRAState | None, w_base: Tensor, batch: int, dtype: torch.dtype) -> Tensor:
    """D at the beginning of the call, `[G, B, d + 1, d]`."""
    group, size, _ = w_base.shape
    if state is None:
        return w_base.new_zeros(group, batch, size + 1, size, dtype=dtype)
    change = torch.cat([state.dw, state.db.unsqueeze(-2)], dim=-2)
    return change.to(dtype).transpose(0, 1).contiguous()


def _norm(norm: tuple[Tensor, Tensor] | None, eps: float, dtype: torch.dtype) -> Norm | None:
    if norm is None:
        return None
    gamma, beta = (x.to(dtype)[:, None, None] for x in norm)
    return Norm(gamma, beta, eps)
