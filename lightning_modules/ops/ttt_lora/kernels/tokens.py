"""Triton kernels of TTT-as-LoRA, backward: the gradients of tokens, once the scan knows G."""

import triton
import triton.language as tl

from lightning_modules.ops.ttt_lora.kernels.blocks import (
    block_of,
    error_backward,
    error_of,
    extent_of,
    kept_matrix,
    load_keys,
    load_matrix,
    load_rows,
    load_writers,
    product,
    read_gradient,
    read_of,
    store_rows,
    unit,
    unit_backward,
    waiting_in,
    with_one,
    written,
)


@triton.jit
def write_backward(
    keys,
    step,
    target,
    weights,
    narrow_weights,
    gradient,
    of_read,
    norm,
    eps,
    D: tl.constexpr,
    LN: tl.constexpr,
    ACC: tl.constexpr,
):
    """Gradients of tokens as writers: of k, v, `-eta/m` and the norm; and their errors.

    `gradient` points at G of their block.
    """
    BK: tl.constexpr = weights.shape[0]
    BD: tl.constexpr = weights.shape[1]
    z = product(keys, weights, ACC)
    error = error_of(z, target, norm, eps, D, LN, ACC)
    along = product(keys, load_matrix(gradient, D + 1, D, BK, BD, ACC), ACC)
    grad = step[:, None] * along + of_read
    dz, dtarget, dgamma, dbeta = error_backward(grad, z, target, norm, eps, D, LN, ACC)
    narrow = load_matrix(gradient, D, D, BD, BD, ACC)
    dk = step[:, None] * product(error, tl.trans(narrow), ACC) - dtarget
    dk += product(dz, tl.trans(narrow_weights), ACC)
    return dk, dtarget, tl.sum(along * error, 1), error, dgamma, dbeta


@triton.jit
def mixing_backward(grad, error, queries, keys, q, k, step, ACC: tl.constexpr):
    """Gradients by q, k and `-eta/m` of what mode B reads of the own block."""
    place = tl.arange(0, step.shape[0])
    seen = place[:, None] >= place[None, :]
    of_mix = tl.where(seen, product(grad, tl.trans(error), ACC), 0.0)
    of_step = tl.sum(of_mix * product(queries, tl.trans(keys), ACC), 0)
    of_mix *= step[None, :]
    return product(of_mix, k, ACC), product(tl.trans(of_mix), q, ACC), of_step


@triton.jit
def add_open(dk, dv, deta, open_k, open_v, open_eta, groups, slot, live, D: tl.constexpr):
    """Gradients of tokens and, where they are in the open mini-batch, those of their slots."""
    column = tl.arange(0, dk.shape[1])
    place = slot[:, None] * groups * D + column[None, :]
    inside = live[:, None] & (column < D)[None, :]
    dk += tl.load(open_k + place, mask=inside, other=0).to(dk.dtype)
    dv += tl.load(open_v + place, mask=inside, other=0).to(dk.dtype)
    deta += tl.load(open_eta + slot * groups, mask=live, other=0).to(dk.dtype)
    return dk, dv, deta


@triton.jit
def store_sums(
    sums,
    dgamma,
    dbeta,
    dgain,
    dshift,
    deta,
    D: tl.constexpr,
    LN: tl.constexpr,
    OUTPUT_NORM: tl.constexpr,
    PER_TOKEN: tl.constexpr,
):
    """Sums over the tokens of a block, one after the other: of both norms `[2, d]`, of eta `[1]`.

    What is not there takes no room: a norm, and the sum of eta where it is per token.
    """
    column = tl.arange(0, dgamma.shape[1])
    if LN:
        tl.store(sums + column, tl.sum(dgamma, 0), mask=column < D)
        tl.store(sums + D + column, tl.sum(dbeta, 0), mask=column < D)
        sums += 2 * D
    if OUTPUT_NORM:
        tl.store(sums + column, tl.sum(dgain, 0), mask=column < D)
        tl.store(sums + D + column, tl.sum(dshift, 0), mask=column < D)
        sums += 2 * D
    if not PER_TOKEN:
        tl.store(sums, tl.sum(deta, 0))


@triton.jit
def read_weights(
    weights, saved_open, slot, D: tl.constexpr, MODE_B: tl.constexpr, ACC: tl.constexpr
):
    """What multiplies the queries of a block, without the bias: in mode B also what is open."""
    if MODE_B:
        weights += kept_matrix(saved_open, slot, D, D, weights.shape[0], weights.shape[1], ACC)
    return weights


@triton.jit
def store_rates(grad_eta, start, stride, inside, live, deta, PER_TOKEN: tl.constexpr):
    """Gradients of step sizes, 0 for tokens that do not exist; into memory if PER_TOKEN."""
    deta = tl.where(live, deta, 0.0)
    if PER_TOKEN:
        first = grad_eta + tl.cast(start, tl.int64) * stride
        tl.store(first + tl.arange(0, deta.shape[0]) * stride, deta, mask=inside)
    return deta


@triton.jit
def clear_sums(
    sums,
    M: tl.constexpr,
    BD: tl.constexpr,
    ACC: tl.constexpr,
    D: tl.constexpr,
    LN: tl.constexpr,
    OUTPUT_NORM: tl.constexpr,
    PER_TOKEN: tl.constexpr,
):
    """The sums of a block without tokens."""
    none = tl.zeros([M, BD], ACC)
    rates = tl.zeros([M], ACC)
    store_sums(sums, none, none, none, none, rates, D, LN, OUTPUT_NORM, PER_TOKEN)


@triton.jit
def clear_behind(
    rest, start, stride, inside, BEHIND: tl.constexpr, TILE: tl.constexpr, ACC: tl.constexpr
):
    """Zeros in the columns behind k, q and v."""
    if BEHIND > 0:
        none = tl.zeros([inside.shape[0], TILE], ACC)
        store_rows(rest, start, stride, inside, none, BEHIND)


@triton.jit
def weights_at(
    base, saved, slot, D: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr
):
    """The weights of a block, and without their bias, `[BK, BD]` and `[BD, BD]`."""
    wide = load_matrix(base, D + 1, D, BK, BD, ACC)
    narrow = load_matrix(base, D, D, BD, BD, ACC)
    wide += kept_matrix(saved, slot, D + 1, D, BK, BD, ACC)
    return wide, narrow + kept_matrix(saved, slot, D, D, BD, BD, ACC)


@triton.jit
def store_tokens(q, k, v, start, stride, inside, live, dq, dk, dv, D: tl.constexpr):
    """Gradients of the tokens of a block; those that do not exist have written nothing."""
    store_rows(q, start, stride, inside, dq, D)
    store_rows(k, start, stride, inside, tl.where(live[:, None], dk, 0.0), D)
    store_rows(v, start, stride, inside, tl.where(live[:, None], dv, 0.0), D)


@triton.jit(do_not_specialize=["sb", "eb", "gb", "time", "blocks", "slots"])
def token_backward_kernel(
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
    grad_o,
    grads,
    grad_error,
    open_k,
    open_v,
    open_eta,
    grad_q,
    grad_k,
    grad_v,
    grad_eta,
    sums,
    sb,
    st,
    sg,
    eb,
    et,
    eg,
    gb,
    gt,
    gg,
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
    OPEN: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    BEHIND: tl.constexpr,
    BEHIND_TILE: tl.constexpr,
):
    """Gradients of the tokens of one block. Grid: `(blocks, B * G)`.

    Behind the blocks' SUMS numbers there is room for ROWS times as many, behind k, q and v there
    are BEHIND columns.
    """
    n, pid = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, member, matrix = pid // groups, pid % groups, (D + 1) * D
    waiting = waiting_in(counts, row, time, STATE)
    count, opened = extent_of(plan_rows, waiting, row, time, SIZE, PLANNED)
    block, sums = pid * blocks + n, sums + (pid * (blocks + ROWS) + n) * SUMS
    if n >= count:
        clear_sums(sums, M, BD, ACC, D, LN, OUTPUT_NORM, PER_TOKEN)
        return
    start, stop, _, _, before, slot = block_of(plan, waiting, row, n, blocks, time, SIZE, PLANNED)
    token, own = row * sb + member * sg, row * time * groups + member
    inside = written(mask, start, stop, M, False)
    live = written(mask + row * time, start, stop, M, MASKED)
    wide, qt = load_keys(q + token, start, st, inside, D, BK, BD, ACC)
    queries = with_one(unit(wide, UNIT), D)
    keys, kt, k_used, target, step = load_writers(
        k + token, v + token, eta + row * eb + member * eg, start, st, et, live,
        SIZE, D, BK, BD, ACC, UNIT,
    )  # fmt: skip
    grad = load_rows(grad_o + own * WIDTH, start, groups * WIDTH, inside, D, BD, ACC)
    saved, saved_open = saved + pid * slots * matrix, saved_open + pid * slots * matrix
    weights, narrow = weights_at(base + member * matrix, saved, slot, D, BK, BD, ACC)
    of_read = load_rows(grad_error + own * D, start, groups * D, live & MODE_B, D, BD, ACC)
    dk, dv, dstep, error, dgamma, dbeta = write_backward(
        keys, step, target, weights, narrow, grads + block * matrix, of_read,
        norm + member * 2 * D, eps, D, LN, ACC,
    )  # fmt: skip
    read = read_of(queries, weights, keys, step, error, saved_open, slot, D, MODE_B, ACC)
    output_norm += member * 2 * D
    dread, dgain = read_gradient(grad, read, output_norm, output_eps, OUTPUT_NORM, D, ACC)
    dq = product(dread, tl.trans(read_weights(narrow, saved_open, slot, D, MODE_B, ACC)), ACC)
    if MODE_B:
        used = unit(qt, UNIT)
        of_q, of_k, of_step = mixing_backward(dread, error, queries, keys, used, k_used, step, ACC)
        dq, dk, dstep = dq + of_q, dk + of_k, dstep + of_step
    if RESIDUAL:
        dq += grad
    dq, deta = unit_backward(dq, qt, UNIT), dstep * (-1.0 / SIZE)
    if OPEN:
        held, rank = row * SIZE * groups + member, before + tl.cumsum(live.to(tl.int32), 0) - 1
        open_k, open_v, open_eta = open_k + held * D, open_v + held * D, open_eta + held
        here = live & (n >= opened)
        dk, dv, deta = add_open(dk, dv, deta, open_k, open_v, open_eta, groups, rank, here, D)
    first = row * gb + member * gg
    store_tokens(grad_q + first, grad_k + first, grad_v + first, start, gt, inside, live,
                 dq, unit_backward(dk, kt, UNIT), dv, D)  # fmt: skip
    rest = grad_k + row * gb + 3 * groups * D  # k comes first in a token's row
    clear_behind(rest, start, gt, inside & (member == 0), BEHIND, BEHIND_TILE, ACC)
    deta = store_rates(grad_eta + own, start, groups, inside, live, deta, PER_TOKEN)
    store_sums(sums, dgamma, dbeta, dgain, grad, deta, D, LN, OUTPUT_NORM, PER_TOKEN)


@triton.jit(do_not_specialize=["time", "blocks"])
def pending_backward_kernel(
    k,
    v,
    eta,
    base,
    start_change,
    counts,
    norm,
    plan_rows,
    gradient,
    open_k,
    open_v,
    open_eta,
    grad_k,
    grad_v,
    grad_eta,
    sums,
    time,
    blocks,
    groups,
    eps,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    ACC: tl.constexpr,
    LN: tl.constexpr,
    PLANNED: tl.constexpr,
    OPEN: tl.constexpr,
    SUMS: tl.constexpr,
):
    """Gradients of the tokens that the state held. Grid: `(B * G,)`.

    The sums of the norm in the loss come in a row of their own behind those of the blocks.
    """
    pid = tl.program_id(0).to(tl.int64)
    row, member, matrix, wide = pid // groups, pid % groups, (D + 1) * D, groups * D
    waiting = waiting_in(counts, row, time, True)
    _, opened = extent_of(plan_rows, waiting, row, time, SIZE, PLANNED)
    own, place = (row * SIZE * groups + member) * D, tl.arange(0, M)
    of_eta, live = row * SIZE * groups + member, place < waiting
    keys, _, _, target, step = load_writers(
        k + own, v + own, eta + of_eta, 0, wide, groups, live, SIZE, D, BK, BD, ACC, False
    )
    weights, narrow = weights_at(base + member * matrix, start_change, pid, D, BK, BD, ACC)
    dk, dv, dstep, _, dgamma, dbeta = write_backward(
        keys,
        step,
        target,
        weights,
        narrow,
        gradient + pid * matrix,
        tl.zeros([M, BD], ACC),
        norm + member * 2 * D,
        eps,
        D,
        LN,
        ACC,
    )
    deta = dstep * (-1.0 / SIZE)
    if OPEN:
        open_k, open_v, open_eta = open_k + own, open_v + own, open_eta + of_eta
        here = live & (opened < 0)
        dk, dv, deta = add_open(dk, dv, deta, open_k, open_v, open_eta, groups, place, here, D)
    inside = place < SIZE
    dk, dv = tl.where(live[:, None], dk, 0.0), tl.where(live[:, None], dv, 0.0)
    store_rows(grad_k + own, 0, wide, inside, dk, D)
    store_rows(grad_v + own, 0, wide, inside, dv, D)
    tl.store(grad_eta + of_eta + place * groups, tl.where(live, deta, 0.0), mask=inside)
    if LN:
        column, sums = tl.arange(0, BD), sums + (pid * (blocks + 1) + blocks) * SUMS
        tl.store(sums + column, tl.sum(dgamma, 0), mask=column < D)
        tl.store(sums + D + column, tl.sum(dbeta, 0), mask=column < D)
