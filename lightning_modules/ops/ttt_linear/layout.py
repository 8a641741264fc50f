"""Where the kernels find the tokens of a mini-batch, and what stays pending."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_modules.ops.grid import Grid, Progress
from lightning_modules.ops.ttt_eager import Options, plan

GROUP = 64
"""Tokens that a kernel takes as one tile: the largest mini-batch, or several smaller ones."""


class Layout(NamedTuple):
    """How the rows of a call are cut into mini-batches.

    Attributes:
        size: m, slots of a mini-batch.
        number: N, mini-batches of a row.
        group: S, mini-batches of a group.
        pending: P, tokens of each row that come from the state before those of the call.
        token: token in each slot, -1 if it is empty, `[N * B * m]`; None: all rows are cut alike.
        fill: tokens in each mini-batch, `[N, B]`; None as `token`.
        last: index of each row's last mini-batch, `[B]`; None as `token`.
        restart: mini-batches that begin a document, int32 `[N, B]`; None: none does.
        kept: rows in which none does, int32 `[B]`; None as `restart`.
    """

    size: int
    number: int
    group: int
    pending: int
    token: Tensor | None
    fill: Tensor | None
    last: Tensor | None
    restart: Tensor | None
    kept: Tensor | None


def lay_out(q: Tensor, state: Any | None, options: Options) -> tuple[Layout, Progress]:
    """The layout of a call, and how far each row has come after it."""
    grid, progress = plan(q, state, options)
    if grid is None and options.mask is not None:
        grid = _grid_of_call(options.mask)
    time = q.shape[1]
    pending = (options.mini_batch_size or 0) if options.causal and state is not None else 0
    if grid is None:
        size = options.mini_batch_size or time
        cut = (size, -(-time // size), max(1, GROUP // size), pending)
        return Layout(*cut, *(None,) * 5), progress
    size, number = grid.size, grid.fill.shape[0]
    restart = kept = None
    if grid.restart is not None:
        restart = grid.restart.int()
        kept = 1 - restart.amax(0)
    # A document may start in any mini-batch: each of them needs weights of its own.
    group = max(1, GROUP // size) if restart is None else 1
    slots = (grid.token, grid.fill, grid.last.contiguous())
    return Layout(size, number, group, pending, *slots, restart, kept), progress


def _grid_of_call(mask: Tensor) -> Grid:
    """The call as one mini-batch in which masked tokens leave their slots empty."""
    flat = mask.flatten()
    token = torch.where(flat, torch.arange(len(flat), device=mask.device), -1)
    last = torch.zeros(len(mask), dtype=torch.int64, device=mask.device)
    return Grid(token, token, mask.shape[1], mask.sum(1).unsqueeze(0), last, None)


def open_tokens(
    tokens: tuple[Tensor, ...],
    held: tuple[Tensor, ...] | None,
    layout: Layout,
    progress: Progress,
    dtype: torch.dtype,
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The open mini-batch of each row: k, v, eta, `[B, m, ...]`, 0 in empty slots, and its count.

    Args:
        tokens: k, v, eta of the call, `[B, T, ...]`.
        held: those of the state, `[B, P, ...]`.
        layout: of the call.
        progress: after it.
        dtype: of the state.
    """
    time, size = tokens[0].shape[1], layout.size
    if layout.token is None or layout.last is None:
        count = torch.full_like(progress.pending_count, time % size)
        rest = (x[:, time - time % size :].to(dtype) for x in tokens)
        room = size - time % size
        return tuple(pad(x, (0, 0) * (x.dim() - 2) + (0, room)) for x in rest), count
    batch = len(layout.last)
    count = progress.pending_count % size
    row = torch.arange(batch, device=count.device)
    slots = layout.token.view(layout.number, batch, size)[layout.last.clamp(min=0), row]
    there = (slots >= 0) & (count > 0).unsqueeze(1)
    place = slots - row.unsqueeze(1) * (layout.pending + time) - layout.pending
    found = tuple(_pick(x, place, there & (place >= 0)).to(dtype) for x in tokens)
    if held is not None:
        own = (_pick(x, place + layout.pending, there & (place < 0)) for x in held)
        found = tuple(x + y for x, y in zip(found, own, strict=True))
    return found, count


def _pick(x: Tensor, place: Tensor, there: Tensor) -> Tensor:
    """`x[b, place[b, i]]`, 0 where nothing is there, `[B, m, ...]`."""
    row = torch.arange(len(x), device=x.device).unsqueeze(1)
    found = x[row, place.clamp(0, x.shape[1] - 1)]
    return torch.where(there.view(*there.shape, *[1] * (x.dim() - 2)), found, 0)
