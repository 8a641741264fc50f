"""The Triton kernel that cuts rows with masked tokens or documents into blocks."""

import triton
import triton.language as tl

from lightning_modules.ops.ttt_lora.kernels.blocks import FIELDS, waiting_in, written


@triton.jit(do_not_specialize=["time", "blocks"])
def plan_kernel(
    mask,
    starts,
    counts,
    plan,
    plan_rows,
    open_count,
    time,
    blocks,
    SIZE: tl.constexpr,
    M: tl.constexpr,
    MASKED: tl.constexpr,
    DOCUMENTS: tl.constexpr,
    STATE: tl.constexpr,
):
    """The blocks of one row, see `block_of` and `extent_of`. Grid: `(B,)`.

    `starts` are the tokens that begin a document, `open_count` how many tokens stay pending.
    """
    row = tl.program_id(0).to(tl.int64)
    mask, starts, plan = mask + row * time, starts + row * time, plan + row * blocks * FIELDS
    place = tl.arange(0, M)
    before = waiting_in(counts, row, time, STATE)
    opened = tl.where(before > 0, -1, 0)
    t, n, slots = time * 0, time * 0, time * 0
    while t < time:
        live = written(mask, t, time, M, MASKED)
        begins = place < 0
        if DOCUMENTS:
            begins = tl.load(starts + t + place, mask=t + place < time, other=0) != 0
        restarts = tl.max((begins & (place == 0)).to(tl.int32), 0)
        before = tl.where(restarts > 0, 0, before)
        opened = tl.where(before == 0, n, opened)
        rank = before + tl.cumsum(live.to(tl.int32), 0)
        full = tl.min(tl.where(live & (rank == SIZE), place + 1, M + 1), 0)
        stop = tl.min(tl.where(begins & (place > 0), place, M), 0)
        fills = (full <= stop).to(tl.int32)
        stop = tl.minimum(tl.minimum(full, stop), time - t)
        held = tl.sum((live & (place < stop)).to(tl.int32), 0)
        tl.store(plan, t)
        tl.store(plan + 1, t + stop)
        tl.store(plan + 2, restarts + 2 * fills)
        tl.store(plan + 3, before)
        tl.store(plan + 4, tl.where(restarts > 0, -1, slots))
        slots += 1 - restarts
        before = tl.where(fills > 0, 0, before + held)
        t, n, plan = t + stop, n + 1, plan + FIELDS
    tl.store(plan_rows + row * 2, n)
    tl.store(plan_rows + row * 2 + 1, tl.where(before == 0, n, opened))
    tl.store(open_count + row, before.to(tl.int64))
