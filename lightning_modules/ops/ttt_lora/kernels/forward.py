"""Triton kernels of TTT-as-LoRA, forward: the scan over a row's blocks, and what tokens read.

The scan is one program for each row and adapter, two small products for each block; it keeps the
change of the weights at the beginning of every block. With it all blocks are read at once.
"""

import triton
import triton.language as tl

from lightning_modules.ops.ttt_lora.kernels.blocks import (
    block_of,
    error_of,
    extent_of,
    kept_matrix,
    load_keys,
    load_matrix,
    load_norm,
    load_rows,
    load_step,
    load_writers,
    mixing,
    normalise,
    product,
    store_matrix,
    store_rows,
    unit,
    waiting_in,
    with_one,
    written,
)


@triton.jit
def store_open(
    open_k,
    open_v,
    open_eta,
    stride,
    groups,
    slot,
    live,
    keys,
    values,
    step,
    SIZE: tl.constexpr,
    D: tl.constexpr,
):
    """Put tokens into the slots of the mini-batch that stays open."""
    column = tl.arange(0, keys.shape[1])
    inside, place = live[:, None] & (column < D)[None, :], slot[:, None] * stride + column[None, :]
    tl.store(open_k + place, keys, mask=inside)
    tl.store(open_v + place, values, mask=inside)
    tl.store(open_eta + slot * groups, step * -SIZE, mask=live)


@triton.jit
def clear_open(
    open_k,
    open_v,
    open_eta,
    stride,
    groups,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    BD: tl.constexpr,
    ACC: tl.constexpr,
):
    """Empty all slots, before any is filled."""
    slot, none = tl.arange(0, M), tl.zeros([M, BD], ACC)
    rates, live = tl.zeros([M], ACC), slot < SIZE
    store_open(open_k, open_v, open_eta, stride, groups, slot, live, none, none, rates, SIZE, D)
    tl.debug_barrier()


@triton.jit
def fetch(
    k,
    v,
    eta,
    plan,
    mask,
    waiting,
    row,
    n,
    blocks,
    time,
    st,
    et,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    ACC: tl.constexpr,
    MASKED: tl.constexpr,
    PLANNED: tl.constexpr,
):
    """What the scan takes of a block: its place, which tokens exist, k, v, `-eta/m`."""
    start, stop, restarts, fills, before, slot = block_of(
        plan, waiting, row, n, blocks, time, SIZE, PLANNED
    )
    live = written(mask, start, stop, M, MASKED)
    wide, narrow = load_keys(k, start, st, live, D, BK, BD, ACC)
    values = load_rows(v, start, st, live, D, BD, ACC)
    step = load_step(eta, start, et, live, SIZE, ACC)
    return slot, restarts, fills, before, live, wide, narrow, values, step


@triton.jit
def write(
    keys, learned, target, step, norm, eps, D: tl.constexpr, LN: tl.constexpr, ACC: tl.constexpr
):
    """What tokens add to their mini-batch's changes, `[BK, BD]`."""
    error = error_of(product(keys, learned, ACC), target, norm, eps, D, LN, ACC)
    return product(tl.trans(keys * step[:, None]), error, ACC)


@triton.jit
def resume(
    start_change,
    pending_k,
    pending_v,
    pending_eta,
    open_k,
    open_v,
    open_eta,
    learned,
    norm,
    eps,
    wide,
    groups,
    waiting,
    opened,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    ACC: tl.constexpr,
    LN: tl.constexpr,
):
    """The state's change of the weights, and what its open mini-batch has written."""
    BK: tl.constexpr = learned.shape[0]
    BD: tl.constexpr = learned.shape[1]
    place = tl.arange(0, M)
    live = place < waiting
    change = load_matrix(start_change, D + 1, D, BK, BD, ACC)
    keys, k, _, target, step = load_writers(
        pending_k, pending_v, pending_eta, 0, wide, groups, live, SIZE, D, BK, BD, ACC, False
    )
    total = write(keys, learned + change, target, step, norm, eps, D, LN, ACC)
    kept = live & (opened < 0)
    v = load_rows(pending_v, 0, wide, live, D, BD, ACC)
    store_open(open_k, open_v, open_eta, wide, groups, place, kept, k, v, step, SIZE, D)
    return change, total


@triton.jit(do_not_specialize=["sb", "eb", "time", "blocks", "slots"])
def scan_kernel(
    k,
    v,
    eta,
    base,
    start_change,
    pending_k,
    pending_v,
    pending_eta,
    counts,
    seen,
    documents,
    norm,
    plan,
    plan_rows,
    mask,
    saved,
    saved_open,
    final,
    open_k,
    open_v,
    open_eta,
    progress,
    sb,
    st,
    sg,
    eb,
    et,
    eg,
    time,
    blocks,
    slots,
    groups,
    eps,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    ACC: tl.constexpr,
    MODE_B: tl.constexpr,
    LN: tl.constexpr,
    UNIT: tl.constexpr,
    MASKED: tl.constexpr,
    PLANNED: tl.constexpr,
    STATE: tl.constexpr,
):
    """The changes of the weights at the beginning of all blocks and at the end; what stays open.

    Grid: `(B * G,)`. See `fused.py` for the tensors.
    """
    pid = tl.program_id(0).to(tl.int64)
    row, member, matrix, wide = pid // groups, pid % groups, (D + 1) * D, groups * D
    k, v = k + row * sb + member * sg, v + row * sb + member * sg
    eta, norm, mask = eta + row * eb + member * eg, norm + member * 2 * D, mask + row * time
    saved, saved_open = saved + pid * slots * matrix, saved_open + pid * slots * matrix
    of_eta = row * SIZE * groups + member
    open_k, open_v, open_eta = open_k + of_eta * D, open_v + of_eta * D, open_eta + of_eta
    waiting = waiting_in(counts, row, time, STATE)
    count, opened = extent_of(plan_rows, waiting, row, time, SIZE, PLANNED)
    learned = load_matrix(base + member * matrix, D + 1, D, BK, BD, ACC)
    clear_open(open_k, open_v, open_eta, wide, groups, SIZE, D, M, BD, ACC)
    change, total, n = tl.zeros([BK, BD], ACC), tl.zeros([BK, BD], ACC), time * 0
    if STATE:
        change, total = resume(
            start_change + pid * matrix, pending_k + of_eta * D, pending_v + of_eta * D,
            pending_eta + of_eta, open_k, open_v, open_eta, learned, norm, eps, wide, groups,
            waiting, opened, SIZE, D, M, ACC, LN,
        )  # fmt: skip
    slot, restarts, fills, before, live, wide_k, kt, vt, step = fetch(
        k, v, eta, plan, mask, waiting, row, n, blocks, time, st, et,
        SIZE, D, M, BK, BD, ACC, MASKED, PLANNED,
    )  # fmt: skip
    while n < count:
        if PLANNED:
            change, total = tl.where(restarts, 0.0, change), tl.where(restarts, 0.0, total)
        if slot >= 0:
            place = tl.cast(slot, tl.int64) * matrix
            store_matrix(saved + place, change, D + 1, D)
            if MODE_B:
                store_matrix(saved_open + place, total, D + 1, D)
        keys, values, rates, exist, rank, ends = wide_k, vt, step, live, before, fills
        used = unit(kt, UNIT)
        # What the next block needs is on its way while this one is computed.
        slot, restarts, fills, before, live, wide_k, kt, vt, step = fetch(
            k, v, eta, plan, mask, waiting, row, tl.minimum(n + 1, count - 1), blocks, time, st, et,
            SIZE, D, M, BK, BD, ACC, MASKED, PLANNED,
        )  # fmt: skip
        keys, target = with_one(unit(keys, UNIT), D), values - used
        total += write(keys, learned + change, target, rates, norm, eps, D, LN, ACC)
        if n >= opened:
            place = rank + tl.cumsum(exist.to(tl.int32), 0) - 1
            store_open(
                open_k, open_v, open_eta, wide, groups, place, exist, used, values, rates, SIZE, D
            )
        change, total = tl.where(ends, change + total, change), tl.where(ends, 0.0, total)
        n += 1
    store_matrix(final + pid * matrix, change, D + 1, D)
    if not PLANNED:
        rows = tl.num_programs(0) // groups
        store_progress(progress, counts, seen, documents, row, rows, member, time, SIZE, STATE)


@triton.jit
def store_progress(
    progress,
    counts,
    seen,
    documents,
    row,
    rows,
    member,
    time,
    SIZE: tl.constexpr,
    STATE: tl.constexpr,
):
    """How far a row has come where all tokens exist: pending, seen, the document's id."""
    total, document = tl.cast(time, tl.int64), tl.cast(time, tl.int64) * 0
    if STATE:
        total, document = total + tl.load(seen + row), tl.load(documents + row)
    count = (waiting_in(counts, row, time, STATE) + time) % SIZE
    first = member == 0
    tl.store(progress + row, count.to(tl.int64), mask=first)
    tl.store(progress + rows + row, total, mask=first)
    tl.store(progress + 2 * rows + row, document, mask=first)


@triton.jit(do_not_specialize=["sb", "eb", "time", "blocks", "slots"])
def read_kernel(
    q,
    k,
    v,
    eta,
    base,
    counts,
    norm,
    output_norm,
    plan,
    plan_rows,
    mask,
    saved,
    saved_open,
    o,
    sb,
    st,
    sg,
    eb,
    et,
    eg,
    time,
    blocks,
    slots,
    groups,
    eps,
    output_eps,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    ACC: tl.constexpr,
    MODE_B: tl.constexpr,
    LN: tl.constexpr,
    UNIT: tl.constexpr,
    MASKED: tl.constexpr,
    PLANNED: tl.constexpr,
    STATE: tl.constexpr,
    WIDTH: tl.constexpr,
    OUTPUT_NORM: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """What the tokens of one block read. Grid: `(blocks, B * G)`."""
    n, pid = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, member = pid // groups, pid % groups
    waiting = waiting_in(counts, row, time, STATE)
    count, _ = extent_of(plan_rows, waiting, row, time, SIZE, PLANNED)
    if n >= count:
        return
    start, stop, _, _, _, slot = block_of(plan, waiting, row, n, blocks, time, SIZE, PLANNED)
    token, inside = row * sb + member * sg, written(mask, start, stop, M, False)
    wide, narrow = load_keys(q + token, start, st, inside, D, BK, BD, ACC)
    queries = with_one(unit(wide, UNIT), D)
    kept = pid * slots * (D + 1) * D
    weights = load_matrix(base + member * (D + 1) * D, D + 1, D, BK, BD, ACC)
    weights += kept_matrix(saved + kept, slot, D + 1, D, BK, BD, ACC)
    read = product(queries, weights, ACC)
    if MODE_B:
        live, of_eta = written(mask + row * time, start, stop, M, MASKED), row * eb + member * eg
        keys, _, _, target, step = load_writers(
            k + token, v + token, eta + of_eta, start, st, et, live, SIZE, D, BK, BD, ACC, UNIT
        )
        z = product(keys, weights, ACC)
        error = error_of(z, target, norm + member * 2 * D, eps, D, LN, ACC)
        total = kept_matrix(saved_open + kept, slot, D + 1, D, BK, BD, ACC)
        read += product(queries, total, ACC)
        read += product(mixing(queries, keys, step, ACC), error, ACC)
    if OUTPUT_NORM:
        gamma, beta = load_norm(output_norm + member * 2 * D, D, BD, ACC)
        normalised, _ = normalise(read, output_eps, D)
        read = gamma * normalised + beta
    if RESIDUAL:
        read += unit(narrow, UNIT)
    own = (row * time * groups + member) * WIDTH
    store_rows(o + own, start, groups * WIDTH, inside, read, WIDTH)
