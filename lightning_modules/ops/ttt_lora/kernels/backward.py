"""Triton kernels of TTT-as-LoRA, backward.

With L the gradient of the change of the weights after a block by all that follows, and G that of
what the open mini-batch has written by then (L if the block fills its mini-batch), the gradient of
an error is `de = -eta/m k~ G`, and that of the change before the block `L + k~^T dz + q~^T do`.
The scan over the blocks, from the last to the first, is about L and G alone: what tokens read is
taken back before it (`q~^T do` of all blocks at once), the gradients of the tokens after it
(`tokens.py`).
"""

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
    load_step,
    load_writers,
    mixing,
    product,
    read_gradient,
    store_matrix,
    store_rows,
    unit,
    waiting_in,
    with_one,
    written,
)


@triton.jit(do_not_specialize=["sb", "eb", "time", "blocks", "slots"])
def read_backward_kernel(
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
    reads,
    grad_error,
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
    """`q~^T do` of one block, and in mode B the gradient of its errors. Grid: `(blocks, B * G)`."""
    n, pid = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, member = pid // groups, pid % groups
    waiting = waiting_in(counts, row, time, STATE)
    count, _ = extent_of(plan_rows, waiting, row, time, SIZE, PLANNED)
    if n >= count:
        return
    start, stop, _, _, _, slot = block_of(plan, waiting, row, n, blocks, time, SIZE, PLANNED)
    token, inside = row * sb + member * sg, written(mask, start, stop, M, False)
    own, out = (row * time * groups + member) * D, (row * time * groups + member) * WIDTH
    wide, _ = load_keys(q + token, start, st, inside, D, BK, BD, ACC)
    queries = with_one(unit(wide, UNIT), D)
    grad = load_rows(grad_o + out, start, groups * WIDTH, inside, D, BD, ACC)
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
        mix = mixing(queries, keys, step, ACC)
        read += product(queries, total, ACC) + product(mix, error, ACC)
    output_norm += member * 2 * D
    grad, _ = read_gradient(grad, read, output_norm, output_eps, OUTPUT_NORM, D, ACC)
    if MODE_B:
        back = product(tl.trans(mix), grad, ACC)
        store_rows(grad_error + own, start, groups * D, inside, back, D)
    here = reads + (pid * blocks + n) * (D + 1) * D
    store_matrix(here, product(tl.trans(queries), grad, ACC), D + 1, D)


@triton.jit
def fetch(
    k,
    v,
    eta,
    plan,
    mask,
    reads,
    grad_error,
    saved,
    waiting,
    row,
    n,
    blocks,
    time,
    st,
    et,
    wide,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    ACC: tl.constexpr,
    MODE_B: tl.constexpr,
    LN: tl.constexpr,
    MASKED: tl.constexpr,
    PLANNED: tl.constexpr,
):
    """What the scan takes of a block: its flags, k, v, `-eta/m`, what reading it gives back."""
    start, stop, restarts, fills, _, slot = block_of(
        plan, waiting, row, n, blocks, time, SIZE, PLANNED
    )
    live = written(mask, start, stop, M, MASKED)
    wide_k, narrow = load_keys(k, start, st, live, D, BK, BD, ACC)
    step = load_step(eta, start, et, live, SIZE, ACC)
    of_read = load_matrix(reads + tl.cast(n, tl.int64) * (D + 1) * D, D + 1, D, BK, BD, ACC)
    values, of_error, change = narrow, tl.zeros([M, BD], ACC), of_read
    if MODE_B:
        of_error = load_rows(grad_error, start, wide, live, D, BD, ACC)
    if LN:
        values = load_rows(v, start, st, live, D, BD, ACC)
        change = kept_matrix(saved, slot, D + 1, D, BK, BD, ACC)
    return restarts, fills, wide_k, narrow, values, step, of_read, of_error, change


@triton.jit
def pull(
    keys,
    gradient,
    step,
    of_read,
    weights,
    target,
    norm,
    eps,
    D: tl.constexpr,
    LN: tl.constexpr,
    ACC: tl.constexpr,
):
    """`k~^T dz`: what the errors of a block add to the gradient of the weights it begins with."""
    grad = step[:, None] * product(keys, gradient, ACC) + of_read
    z = grad
    if LN:
        z = product(keys, weights, ACC)
    dz, _, _, _ = error_backward(grad, z, target, norm, eps, D, LN, ACC)
    return product(tl.trans(keys), dz, ACC)


@triton.jit(do_not_specialize=["sb", "eb", "time", "blocks", "slots"])
def scan_backward_kernel(
    k,
    v,
    eta,
    base,
    start_change,
    pending_k,
    pending_v,
    pending_eta,
    counts,
    norm,
    plan,
    plan_rows,
    mask,
    saved,
    grad_final,
    reads,
    grad_error,
    grads,
    grad_pending,
    grad_base,
    grad_start,
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
    FINAL: tl.constexpr,
):
    """G of every block, the gradients of the learned weights and of the state's change.

    Grid: `(B * G,)`.
    """
    pid = tl.program_id(0).to(tl.int64)
    row, member, matrix, wide = pid // groups, pid % groups, (D + 1) * D, groups * D
    k, v = k + row * sb + member * sg, v + row * sb + member * sg
    eta, norm, mask = eta + row * eb + member * eg, norm + member * 2 * D, mask + row * time
    reads, grads = reads + pid * blocks * matrix, grads + pid * blocks * matrix
    saved, grad_error = (
        saved + pid * slots * matrix,
        grad_error + (row * time * groups + member) * D,
    )
    waiting = waiting_in(counts, row, time, STATE)
    count, _ = extent_of(plan_rows, waiting, row, time, SIZE, PLANNED)
    learned = load_matrix(base + member * matrix, D + 1, D, BK, BD, ACC)
    after, open_after = tl.zeros([BK, BD], ACC), tl.zeros([BK, BD], ACC)
    if FINAL:
        after = load_matrix(grad_final + pid * matrix, D + 1, D, BK, BD, ACC)
    of_base, n = tl.zeros([BK, BD], ACC), count - 1
    restarts, fills, wide_k, kt, vt, step, of_read, of_error, change = fetch(
        k, v, eta, plan, mask, reads, grad_error, saved, waiting, row, n, blocks, time, st, et,
        wide, SIZE, D, M, BK, BD, ACC, MODE_B, LN, MASKED, PLANNED,
    )  # fmt: skip
    while n >= 0:
        keys, rates, weights = with_one(unit(wide_k, UNIT), D), step, learned + change
        target, begins, back, errors = vt - unit(kt, UNIT), restarts, of_read, of_error
        gradient = tl.where(fills, after, open_after)
        # What the block before needs is on its way while this one is computed.
        restarts, fills, wide_k, kt, vt, step, of_read, of_error, change = fetch(
            k, v, eta, plan, mask, reads, grad_error, saved, waiting, row, tl.maximum(n - 1, 0),
            blocks, time, st, et, wide, SIZE, D, M, BK, BD, ACC, MODE_B, LN, MASKED, PLANNED,
        )  # fmt: skip
        store_matrix(grads + tl.cast(n, tl.int64) * matrix, gradient, D + 1, D)
        here = back + pull(keys, gradient, rates, errors, weights, target, norm, eps, D, LN, ACC)
        of_base, after = of_base + here, after + here
        open_after = gradient + back if MODE_B else gradient
        if PLANNED:
            after, open_after = tl.where(begins, 0.0, after), tl.where(begins, 0.0, open_after)
        n -= 1
    if STATE:
        held = row * SIZE * groups + member
        keys, _, _, target, step = load_writers(
            pending_k + held * D, pending_v + held * D, pending_eta + held, 0, wide, groups,
            tl.arange(0, M) < waiting, SIZE, D, BK, BD, ACC, False,
        )  # fmt: skip
        weights = learned + load_matrix(start_change + pid * matrix, D + 1, D, BK, BD, ACC)
        store_matrix(grad_pending + pid * matrix, open_after, D + 1, D)
        none = tl.zeros([M, BD], ACC)
        here = pull(keys, open_after, step, none, weights, target, norm, eps, D, LN, ACC)
        of_base, after = of_base + here, after + here
        store_matrix(grad_start + pid * matrix, after, D + 1, D)
    store_matrix(grad_base + pid * matrix, of_base, D + 1, D)
