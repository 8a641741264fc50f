"""Which layout the tokens of a LaCT call get."""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_modules.ops.grid import Grid, Progress, inverse, plan_grid
from lightning_modules.ops.lact.layout import Counts, Even, Slots, Uneven
from lightning_modules.ops.states import LaCTState


class _Facts(NamedTuple):
    """What the host must know of each chunk.

    Attributes:
        widths: most tokens that a row reads in it.
        writes: whether some row writes the chunk before it.
        restarts: whether some row begins a document in it.
        fresh: whether some row of the state has seen nothing.
    """

    widths: list[int]
    writes: list[bool]
    restarts: list[bool]
    fresh: bool


def plan(
    q: Tensor,
    size: int,
    mask: Tensor | None,
    document_ids: Tensor | None,
    state: LaCTState | None,
    adapt: bool,
) -> Even | Uneven:
    """Plan a call. A state or documents make it wait for the device, a fresh start does not.

    Args:
        q: queries, `[B, T, H, D]`.
        size: C.
        mask: of the op, as are the other arguments.
    """
    if mask is None and document_ids is None:
        common = (False, 0) if state is None else _in_common(state)
        if common is not None:
            return _even(q, size, *common, adapt, state)
    return _uneven(q, size, mask, document_ids, state, adapt)


def _in_common(state: LaCTState) -> tuple[bool, int] | None:
    """Whether the rows have seen something, and their pending tokens; None if they differ."""
    counts = torch.stack([state.tokens_seen, state.pending_count]).tolist()
    rows = {(seen > 0, pending * (seen > 0)) for seen, pending in zip(*counts, strict=True)}
    return rows.pop() if len(rows) == 1 else None


def _even(
    q: Tensor, size: int, carries: bool, ahead: int, adapt: bool, state: LaCTState | None
) -> Even:
    """The layout of rows that all hold `ahead` tokens."""
    batch, time = q.shape[:2]
    full = (ahead + time - 1) // size
    zero = torch.zeros(batch, dtype=torch.int64, device=q.device)
    updates = seen = document = zero
    if carries and state is not None:
        updates, seen, document = state.updates, state.tokens_seen, state.document_id
    pending = zero + (ahead + time - full * size)
    counts = Counts(pending, updates + full * adapt, seen + time, document)
    return Even(time, size, ahead, adapt, carries, counts)


def _uneven(
    q: Tensor,
    size: int,
    mask: Tensor | None,
    document_ids: Tensor | None,
    state: LaCTState | None,
    adapt: bool,
) -> Uneven:
    """The layout of any rows: the grid of what they hold and read, and what follows from it."""
    batch, time = q.shape[:2]
    before = Progress.of(state, q)
    seen = before.tokens_seen > 0
    before = Progress(*(torch.where(seen, x, 0) for x in before))
    pending = 0 if state is None else size
    grid, after = plan_grid(q, mask, document_ids, before, size, pending, lazy=True)
    slot = grid.slot.view(batch, -1)
    chunk, place = slot.div(batch * size, rounding_mode="floor"), slot % size
    held = slot[:, :pending] >= 0
    writing = _writing(grid, adapt)
    if state is None and document_ids is None:
        facts = _bounds(len(writing), size, time, adapt)
    else:
        facts = _read_facts(grid, held.sum(1), writing, ~seen)
    own_chunk, own_place = chunk[:, pending:], place[:, pending:]
    ahead = torch.where(own_chunk == 0, held.sum(1, keepdim=True), 0)
    closes = torch.cat([writing[1:], torch.zeros_like(writing[:1])])
    is_written = (chunk >= 0) & closes.gather(0, chunk.mT.clamp(min=0)).mT
    updates = _updates(state, seen, writing, grid.restart)
    starts = [None] * len(facts.widths) if grid.restart is None else grid.restart.unbind(0)
    return Uneven(
        reads=_slots(own_chunk, own_place - ahead, own_chunk >= 0, facts.widths),
        writes=_slots(chunk, place, is_written, [size * some for some in facts.writes[1:]]),
        rows=writing.unbind(0)[: len(facts.widths)],
        restarts=[
            rows if some else None for rows, some in zip(starts, facts.restarts, strict=False)
        ],
        fresh=~seen if facts.fresh else None,
        place=own_place,
        waits=(own_chunk >= 0) & (own_chunk == grid.last.unsqueeze(1)),
        kept=held & (grid.last == 0).unsqueeze(1),
        drops=len(facts.widths) > 1 or facts.fresh or any(facts.restarts),
        size=size,
        carries=state is not None,
        counts=Counts(after.pending_count, updates, after.tokens_seen, after.document_id),
    )


def _writing(grid: Grid, adapt: bool) -> Tensor:
    """Rows that write chunk n - 1 before they read chunk n, `[N, B]`."""
    here = grid.fill > 0
    writing = here & torch.cat([torch.zeros_like(here[:1]), here[:-1]]) & adapt
    return writing if grid.restart is None else writing & ~grid.restart


def _bounds(count: int, size: int, time: int, adapt: bool) -> _Facts:
    """The facts of rows that differ in nothing but their masks, as if all tokens were there."""
    widths = [min(size, time)] * (count - 1) + [time - (count - 1) * size]
    return _Facts(widths, [False] + [adapt] * (count - 1), [False] * count, False)


def _read_facts(grid: Grid, ahead: Tensor, writing: Tensor, fresh: Tensor) -> _Facts:
    """The facts from the device, without the chunks at the end that no row reaches."""
    reading = torch.cat([grid.fill[:1] - ahead, grid.fill[1:]])
    restart = torch.zeros_like(writing) if grid.restart is None else grid.restart
    rows = [reading.amax(1), writing.any(1), restart.any(1), fresh.any().expand(len(writing))]
    widths, writes, restarts, some_fresh = torch.stack([x.long() for x in rows]).tolist()
    while len(widths) > 1 and not widths[-1]:
        widths.pop()
    if not any(widths):
        widths = [1]
    count = len(widths)
    return _Facts(widths, writes[:count], restarts[:count], bool(some_fresh[0]))


def _slots(chunk: Tensor, place: Tensor, valid: Tensor, widths: list[int]) -> Slots:
    """Slots for the valid tokens, from the chunk of each and its place in that, `[B, S]`."""
    batch = len(chunk)
    width = torch.tensor([*widths, 0], device=chunk.device)
    start = batch * (width.cumsum(0) - width)
    at = torch.where(valid, chunk, len(widths))
    row = torch.arange(batch, device=chunk.device).unsqueeze(1)
    slot = torch.where(valid, start[at] + row * width[at] + place, -1).flatten()
    return Slots(slot, inverse(slot, batch * sum(widths)), widths)


def _updates(
    state: LaCTState | None, seen: Tensor, writing: Tensor, restart: Tensor | None
) -> Tensor:
    """Chunks of its current document that each row has written after the call, `[B]`."""
    before = torch.zeros_like(seen, dtype=torch.int64) if state is None else state.updates
    before = torch.where(seen, before, 0)
    if restart is None:
        return before + writing.sum(0)
    index = torch.arange(len(writing), device=seen.device).unsqueeze(1)
    begins = torch.where(restart, index, -1).amax(0)
    return torch.where(begins < 0, before, 0) + (writing & (index > begins)).sum(0)
