"""Which layout the tokens of a LaCT call get."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from lightning_modules.ops.grid import Grid, Progress, integers_on, inverse, plan_grid
from lightning_modules.ops.lact.layout import Counts, Even, Slots, Uneven
from lightning_modules.ops.lact.shared import Shared, share_of
from lightning_modules.ops.processes import gather_flags, own_part
from lightning_modules.ops.states import LaCTState, TokensRead


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
    tokens_read: TokensRead | None,
    adapt: bool,
    group: ProcessGroup | None,
) -> Even | Uneven | Shared:
    """Plan a call.

    It waits for the device if there are documents, a group, or a state of which the host does not
    know how many tokens its rows have read.

    Args:
        q: queries, `[B, T, H, D]`.
        size: C.
        mask: of the op, as are the other arguments.
    """
    if state is not None and tokens_read is not None:
        same = (tokens_read.on(q.device) == state.tokens_seen).all()
        # Raised when the device gets there; nobody waits for it.
        torch._assert_async(same, "tokens_read are not those of the state's rows")
    if group is not None:
        return _shared(q, size, *gather_flags(mask, document_ids, group), state, adapt, group)
    if mask is None and document_ids is None:
        common = (False, 0) if state is None else _in_common(state, size, tokens_read)
        if common is not None:
            return _even(q, size, *common, adapt, state)
    return _uneven(q, size, mask, document_ids, state, tokens_read, adapt)


def _in_common(
    state: LaCTState, size: int, tokens_read: TokensRead | None
) -> tuple[bool, int] | None:
    """Whether the rows have seen something, and their pending tokens; None if they differ."""
    if tokens_read is not None:
        known = {(read > 0, _pending(read, size)) for read in tokens_read.rows}
        return known.pop() if len(known) == 1 else None
    counts = torch.stack([state.tokens_seen, state.pending_count]).tolist()
    rows = {(seen > 0, pending * (seen > 0)) for seen, pending in zip(*counts, strict=True)}
    return rows.pop() if len(rows) == 1 else None


def _pending(read: int, size: int) -> int:
    """Tokens in the open chunk of a row that has read so many: a full one stays open, too."""
    return (read - 1) % size + 1 if read else 0


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


class _Chart(NamedTuple):
    """Where the S tokens of rows stand, the state's C before those of the call.

    Attributes:
        chunk: of each token, -1 for none, `[B, S]`.
        place: in that, `[B, S]`.
        pending: slots of the state: C, or 0 without one.
        is_written: tokens that are written in the call, bool `[B, S]`.
        rows: rows that write the chunk before, for each chunk, bool `[N, B]`.
        grid: the slots from which this follows.
        seen: rows whose state has seen something, bool `[B]`.
        after: the progress after the call.
    """

    chunk: Tensor
    place: Tensor
    pending: int
    is_written: Tensor
    rows: Tensor
    grid: Grid
    seen: Tensor
    after: Progress


def _chart(
    like: Tensor,
    size: int,
    mask: Tensor | None,
    document_ids: Tensor | None,
    state: LaCTState | None,
    adapt: bool,
) -> _Chart:
    """Cut rows `[B, T, ...]` into chunks; arguments as of `plan`."""
    batch = like.shape[0]
    before = Progress.of(state, like)
    seen = before.tokens_seen > 0
    before = Progress(*(torch.where(seen, x, 0) for x in before))
    pending = 0 if state is None else size
    grid, after = plan_grid(like, mask, document_ids, before, size, pending, lazy=True)
    slot = grid.slot.view(batch, -1)
    chunk, place = slot.div(batch * size, rounding_mode="floor"), slot % size
    rows = _writing(grid, adapt)
    closes = torch.cat([rows[1:], torch.zeros_like(rows[:1])])
    is_written = (chunk >= 0) & closes.gather(0, chunk.mT.clamp(min=0)).mT
    return _Chart(chunk, place, pending, is_written, rows, grid, seen, after)


def _uneven(
    q: Tensor,
    size: int,
    mask: Tensor | None,
    document_ids: Tensor | None,
    state: LaCTState | None,
    tokens_read: TokensRead | None,
    adapt: bool,
) -> Uneven:
    """The layout of any rows: the grid of what they hold and read, and what follows from it."""
    chart = _chart(q, size, mask, document_ids, state, adapt)
    held = chart.chunk[:, : chart.pending] >= 0
    if state is None and document_ids is None:
        facts = _bounds(len(chart.rows), size, q.shape[1], adapt)
    elif tokens_read is not None and document_ids is None:
        facts = _bounds_behind(tokens_read.rows, size, q.shape[1], adapt)
    else:
        facts = _read_facts(chart.grid, held.sum(1), chart.rows, ~chart.seen)
    own_chunk, own_place = (x[:, chart.pending :] for x in (chart.chunk, chart.place))
    ahead = torch.where(own_chunk == 0, held.sum(1, keepdim=True), 0)
    reads = _slots(own_chunk, own_place - ahead, own_chunk >= 0, facts.widths)
    widths = [size * some for some in facts.writes[1:]]
    writes = _slots(chart.chunk, chart.place, chart.is_written, widths)
    return _layout(chart, facts, reads, writes, slice(None), size, state)


def _shared(
    q: Tensor,
    size: int,
    mask: Tensor | None,
    document_ids: Tensor | None,
    state: LaCTState | None,
    adapt: bool,
    group: ProcessGroup,
) -> Shared:
    """The layout of a share of whole rows; mask and documents are those of the whole rows."""
    batch, time = q.shape[:2]
    whole = q.new_empty(batch, group.size() * time)
    chart = _chart(whole, size, mask, document_ids, state, adapt)
    held = (chart.chunk[:, : chart.pending] >= 0).sum(1)
    facts = _read_facts(chart.grid, held, chart.rows, ~chart.seen)
    writing = facts.writes[1:]
    share = share_of(chart.chunk, chart.is_written, chart.pending, time, len(writing), group)
    reads, writes = (_slots(chunk, place, chunk >= 0, widths) for chunk, place, widths in share)
    own = own_part(time, group)
    return Shared(_layout(chart, facts, reads, writes, own, size, state), writing, group)


def _layout(
    chart: _Chart,
    facts: _Facts,
    reads: Slots,
    writes: Slots,
    own: slice,
    size: int,
    state: LaCTState | None,
) -> Uneven:
    """The layout, in which the tokens that may become pending are those of `own`."""
    grid, after = chart.grid, chart.after
    starts = [None] * len(facts.widths) if grid.restart is None else grid.restart.unbind(0)
    own_chunk, own_place = (x[:, chart.pending :][:, own] for x in (chart.chunk, chart.place))
    held = chart.chunk[:, : chart.pending] >= 0
    updates = _updates(state, chart.seen, chart.rows, grid.restart)
    return Uneven(
        reads=reads,
        writes=writes,
        rows=chart.rows.unbind(0)[: len(facts.widths)],
        restarts=[
            rows if some else None for rows, some in zip(starts, facts.restarts, strict=False)
        ],
        fresh=~chart.seen if facts.fresh else None,
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


def _bounds_behind(read: tuple[int, ...], size: int, time: int, adapt: bool) -> _Facts:
    """The same behind a state whose rows have read so many tokens.

    The call's chunk 0 is the open one of the state; a row that has read nothing has none, and
    begins with chunk 1.
    """
    begins = [_pending(some, size) or size for some in read]
    starts = range(0, max(begins) + time, size)
    widths = [max(min(b + time, n + size) - max(b, n) for b in begins) for n in starts]
    held = [b for b, some in zip(begins, read, strict=True) if some]
    first_writes = any(b + time > size for b in held)
    writes = [adapt and (first_writes if n == size else n > size) for n in starts]
    return _Facts([max(0, w) for w in widths], writes, [False] * len(starts), 0 in read)


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
    width = integers_on([*widths, 0], chunk.device)
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
