"""TTT-Linear in Triton: the first two kernels of the backward pass.

As in the forward pass only what has to wait does: `output_gradient_kernel` and
`inputs.input_gradient_kernel` take groups of mini-batches, all at once, and between them
`weight_gradient_kernel` walks back through the mini-batches of a row and head with the gradient
`L` at the weights that a mini-batch leaves behind. A mini-batch with keys k, queries q,
predictions `z = k W + b` and `p = q W_i + b_i`, and steps `s_j`, gives

    dG_j = sum_i c_ij (q_i . k_j + 1) dp_i + s_j (k_j L + l)
    L   += q^T dp + k^T dz,   l += sum(dp) + sum(dz)

and dz from dG as below. `L` is kept less its mean over the outputs, to which `sum(G_j) = 0` makes
everything blind; so is dG, or what rounding leaves of its mean would grow as in the forward pass.
"""

import triton
import triton.language as tl

from lightning_modules.ops.ttt_linear.kernels.tiles import (
    SIZES,
    add_to,
    applied,
    both_sums,
    centred,
    closing_factors,
    earlier_coefficients,
    inputs_of,
    load_etas,
    load_slots,
    load_tokens,
    outer,
    outputs_of,
    places,
    reading_coefficients,
    readings,
    slots_of,
    store_weights,
)


@triton.jit
def normalised(z, D: tl.constexpr, EPS: tl.constexpr):
    """Centred rows divided by their standard deviation, and 1 / that."""
    rstd = tl.rsqrt(tl.sum(z * z, 1) / D + EPS)
    return z * rstd[:, None], rstd


@triton.jit
def gradients_of_reads(
    q, do, dp, dg, sums, weights, biases, keys, new, gain, tau, e, factor, n, i, t, asked, lane, at,
    kept, state, b, h, T, P, H, EPS: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
    CAUSAL: tl.constexpr, SINGLE: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """Gradients at what queries read, and of `G` inside their mini-batch; sums for gamma, beta."""
    d = lane[None, :]
    queries = load_tokens(q, q, t, asked, d, b, h, T, P, H, D, False)
    c = reading_coefficients(tau, e, earlier_coefficients(e, factor, n, SINGLE), n, i, CAUSAL)
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    mixed = (c * (scores + 1.0)).to(keys.dtype)  # early: the two factors would not fit
    p = readings(queries, weights, biases, state, lane, D, AXIS, PRECISION)
    p = centred(p + tl.dot(mixed, new, input_precision=PRECISION), lane, D)
    ph, over = normalised(p, D, EPS)
    upper = load_tokens(do, do, t, asked, d, b, h, T, P, H, D, False).to(p.dtype)
    tl.store(sums + state * 2 * D + lane, tl.sum(upper * ph, 0), mask=lane < D)
    tl.store(sums + state * 2 * D + D + lane, tl.sum(upper, 0), mask=lane < D)
    y = gain * upper
    y = y - (tl.sum(y, 1) / D)[:, None] - ph * (tl.sum(ph * y, 1) / D)[:, None]
    y = tl.where(d < D, y * over[:, None], 0.0).to(keys.dtype)
    tl.store(dp + at, y, mask=kept)
    mixed = tl.trans(tl.where(n[:, None] == n[None, :], mixed, 0.0))
    tl.store(dg + at, tl.dot(mixed, y, input_precision=PRECISION).to(keys.dtype), mask=kept)


@triton.jit
def readings_of_keys(
    v, held_v, zh, rstd, along, weights, biases, keys, new, gain, shift, e, factor, n, t, there,
    inside, lane, place, at, kept, state, b, h, T, P, H, EPS: tl.constexpr, D: tl.constexpr,
    PRECISION: tl.constexpr, HAS_PENDING: tl.constexpr, SINGLE: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """The normalised predictions for keys, and their statistics."""
    d = lane[None, :]
    z = readings(keys, weights, biases, state, lane, D, AXIS, PRECISION)
    if not SINGLE:
        scores = tl.dot(keys, tl.trans(keys), input_precision=PRECISION)
        mixed = earlier_coefficients(e, factor, n, SINGLE) * (scores + 1.0)
        z += tl.dot(mixed.to(keys.dtype), new, input_precision=PRECISION)
    z, over = normalised(centred(z, lane, D), D, EPS)
    values = load_tokens(v, held_v, t, there, d, b, h, T, P, H, D, HAS_PENDING)
    error = gain * (gain * z + shift + keys.to(z.dtype) - values.to(z.dtype))
    tl.store(zh + at, z.to(keys.dtype), mask=kept)
    tl.store(rstd + place, over, mask=inside)
    tl.store(along + place, tl.sum(z * error, 1) / D, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def output_gradient_kernel(
    q,
    k,
    v,
    eta,
    tau,
    gamma,
    beta,
    held_k,
    held_v,
    held_eta,
    token,
    fill,
    last,
    g,
    weights,
    biases,
    do,
    dp,
    dg,
    zh,
    rstd,
    along,
    sums,
    T,
    N,
    m,
    S,
    P,
    B,
    H,
    EPS: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    BG: tl.constexpr,
    SINGLE: tl.constexpr,
    AXIS: tl.constexpr,
    PRECISION: tl.constexpr,
    CAUSAL: tl.constexpr,
    FLUSH: tl.constexpr,
    HAS_GRID: tl.constexpr,
    HAS_PENDING: tl.constexpr,
    HALVES: tl.constexpr,
):
    """Gradients at what queries read, and of `G` inside their mini-batch; statistics of z.

    Per slot: `dp`, `dg`, the normalised prediction `zh` for the key, `rstd = 1 / std`, and
    `along = mean(zh h)`; per group: `sum(do ph)` and `sum(do)`, for gamma and beta. With two halves
    queries and keys have programs of their own: one would not keep what both need.
    """
    group, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = row // H, row % H
    lane = tl.arange(0, BD)
    d = lane[None, :]
    n, i, inside = slots_of(group, S, m, N, BG)
    t, there = places(token, b, n, i, inside, B, T, P, m, HAS_GRID)
    e = load_etas(eta, held_eta, t, there, b, h, T, P, H, HAS_PENDING)
    factor, _ = closing_factors(tau, fill, last, n, b, B, N, T, m, CAUSAL, FLUSH, HAS_GRID)
    t, there = t[:, None], there[:, None]
    asked = there & (t >= 0)
    keys = load_tokens(k, held_k, t, there, d, b, h, T, P, H, D, HAS_PENDING)
    place = row * N * m + n * m + i
    at, kept = place[:, None] * D + d, inside[:, None] & (d < D)
    new = load_slots(g, place[:, None], d, inside[:, None], D)
    gain = tl.load(gamma + h * D + d, mask=d < D, other=0.0)
    shift = tl.load(beta + h * D + d, mask=d < D, other=0.0)
    state = row * tl.cdiv(N, S) + group
    if HALVES == 1 or tl.program_id(2) == 0:
        gradients_of_reads(
            q, do, dp, dg, sums, weights, biases, keys, new, gain, tau, e, factor, n, i, t, asked,
            lane, at, kept, state, b, h, T, P, H, EPS, D, PRECISION, CAUSAL, SINGLE,
            AXIS,
        )  # fmt: skip
    if HALVES == 1 or tl.program_id(2) == 1:
        readings_of_keys(
            v, held_v, zh, rstd, along, weights, biases, keys, new, gain, shift, e, factor, n, t,
            there, inside, lane, place, at, kept, state, b, h, T, P, H, EPS, D, PRECISION,
            HAS_PENDING, SINGLE, AXIS,
        )  # fmt: skip


@triton.jit
def key_gradients(dg, zh, g, gain, r, a, D: tl.constexpr, AXIS: tl.constexpr):
    """`dh` and `dz` from `dG`: the equations of `weight_gradient_kernel`."""
    total, x = both_sums(dg, zh * dg, AXIS)
    dg, x = dg - inputs_of(total / D, AXIS), inputs_of(x / D, AXIS)
    dh = r * (dg - zh * x)
    y = gain * gain * dh
    total, along = both_sums(y, zh * y + dg * g, AXIS)
    dz = y - inputs_of(total / D, AXIS) - zh * inputs_of(along / D, AXIS) - a * dh - x * g
    return dh, r * dz


@triton.jit
def outgoing_gradients(
    dw_out, db_out, gain, row, place, real, d, D: tl.constexpr, BD: tl.constexpr,
    HAS_DSTATE: tl.constexpr,
):  # fmt: skip
    """`L`, `l` at the end of a row: the gradients at the state that it leaves, or 0."""
    upper = tl.zeros([BD, BD], dtype=gain.dtype)
    upper_bias = tl.zeros([BD], dtype=gain.dtype)
    if HAS_DSTATE:
        upper += tl.load(dw_out + place, mask=real, other=0.0)
        upper_bias += tl.load(db_out + row * D + d, mask=d < D, other=0.0)
    return upper, upper_bias


@triton.jit
def undo_writing(
    dh, dz, keys, own, z, new, r, a, step, upper, upper_bias, gain, slot, inside, out,
    D: tl.constexpr, AXIS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store `dh`, `dz` of a mini-batch, `own` the part of `dG` inside it; return `dz`."""
    at, kept = inputs_of(slot, AXIS) * D + out, inputs_of(inside, AXIS) & (out < D)
    z, new = z.to(gain.dtype), new.to(gain.dtype)
    wrote = applied(upper, keys, AXIS, PRECISION) + outputs_of(upper_bias, AXIS)
    below, read = key_gradients(own.to(gain.dtype) + wrote * step, z, new, gain, r, a, D, AXIS)
    read = tl.where(kept, read, 0.0)
    tl.store(dh + at, below.to(keys.dtype), mask=kept)
    tl.store(dz + at, read.to(keys.dtype), mask=kept)
    return read


@triton.jit
def add_readings(
    upper, upper_bias, queries, asking, keys, read, AXIS: tl.constexpr, PRECISION: tl.constexpr
):
    """`L + q^T dp + k^T dz` and `l + sum(dp) + sum(dz)`; queries are rows whatever AXIS is."""
    if AXIS == 0:
        upper += tl.dot(asking, queries, input_precision=PRECISION)
    else:
        upper += tl.dot(tl.trans(queries), asking, input_precision=PRECISION)
    upper += outer(read.to(keys.dtype), keys, AXIS, PRECISION)
    return upper, upper_bias + tl.sum(asking.to(read.dtype) + read, 1 - AXIS)


@triton.jit
def add_initial(dw, db, row, place, real, weight, bias, d, D: tl.constexpr):
    """Add the gradients of the weights with which the documents of a row begin."""
    add_to(dw + place, weight, real)
    add_to(db + row * D + d, bias, d < D)


@triton.jit
def tokens_to_undo(
    q, k, eta, tau, held_k, held_eta, token, fill, last, g, dp, dg, zh, rstd, along, row, n, i, d,
    b, h, T, N, m, P, B, H, D: tl.constexpr, AXIS: tl.constexpr, CAUSAL: tl.constexpr,
    FLUSH: tl.constexpr, HAS_GRID: tl.constexpr, HAS_PENDING: tl.constexpr,
):  # fmt: skip
    """What a step back reads: keys, queries, dp, dG inside, zh, G, 1 / std, mean(zh h), steps."""
    t, there = places(token, b, n, i, i < m, B, T, P, m, HAS_GRID)
    e = load_etas(eta, held_eta, t, there, b, h, T, P, H, HAS_PENDING)
    factor, _ = closing_factors(tau, fill, last, n, b, B, N, T, m, CAUSAL, FLUSH, HAS_GRID)
    out, across, here = outputs_of(d, AXIS), inputs_of(t, AXIS), inputs_of(there, AXIS)
    keys = load_tokens(k, held_k, across, here, out, b, h, T, P, H, D, HAS_PENDING)
    asked = (there & (t >= 0))[:, None]
    queries = load_tokens(q, q, t[:, None], asked, d[None, :], b, h, T, P, H, D, False)
    slot, inside = row * N * m + n * m + i, i < m
    at, kept = inputs_of(slot, AXIS) * D + out, inputs_of(inside, AXIS) & (out < D)
    asking = tl.load(dp + at, mask=kept, other=0.0)
    own = tl.load(dg + at, mask=kept, other=0.0)
    z = tl.load(zh + at, mask=kept, other=0.0)
    new = tl.load(g + at, mask=kept, other=0.0)
    r = inputs_of(tl.load(rstd + slot, mask=inside, other=0.0), AXIS)
    a = inputs_of(tl.load(along + slot, mask=inside, other=0.0), AXIS)
    return keys, queries, asking, own, z, new, r, a, inputs_of(-factor * e, AXIS)


@triton.jit(do_not_specialize=SIZES)
def weight_gradient_kernel(
    q,
    k,
    eta,
    tau,
    gamma,
    held_k,
    held_eta,
    token,
    fill,
    last,
    restart,
    g,
    dp,
    dg,
    zh,
    rstd,
    along,
    dw_out,
    db_out,
    dh,
    dz,
    dweights,
    dbiases,
    dw,
    db,
    dw_rows,
    db_rows,
    T,
    N,
    m,
    S,
    P,
    B,
    H,
    D: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
    PARTS: tl.constexpr,
    AXIS: tl.constexpr,
    AHEAD: tl.constexpr,
    PRECISION: tl.constexpr,
    CAUSAL: tl.constexpr,
    FLUSH: tl.constexpr,
    HAS_GRID: tl.constexpr,
    HAS_PENDING: tl.constexpr,
    HAS_DSTATE: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
):
    """Walk back through the mini-batches of a row and head: `dh`, `dz`, `L`, `l` of each group.

    With `r = 1 / std`, `a = mean(zh h)`, `x = mean(zh dG)`:

        dh = r (dG - zh x),   y = gamma^2 dh
        dz = r (y - mean(y) - zh (mean(zh y) + mean(dG G)) - a dh - x G)

    At a mini-batch that starts a document `L` goes to the initial weights and starts from 0.
    """
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, BD)
    b, h = row // H, row % H
    real = (d[:, None] < D) & (d[None, :] < D)
    out = outputs_of(d, AXIS)
    gain = tl.load(gamma + h * D + out, mask=out < D, other=0.0)
    upward = row * D * D + inputs_of(d, AXIS) * D + out
    upper, upper_bias = outgoing_gradients(
        dw_out, db_out, gain, row, upward, real, d, D, BD, HAS_DSTATE
    )
    if AHEAD:
        following = tokens_to_undo(
            q, k, eta, tau, held_k, held_eta, token, fill, last, g, dp, dg, zh, rstd, along, row,
            N - 1, tl.arange(0, BT), d, b, h, T, N, m, P, B, H, D, AXIS, CAUSAL, FLUSH, HAS_GRID,
            HAS_PENDING,
        )  # fmt: skip
    for back in range(0, N):
        n = N - 1 - back
        if (n % S == S - 1) | (back == 0):
            group = row * tl.cdiv(N, S) + n // S
            store_weights(dweights, dbiases, group, upper, upper_bias, d, D)
        old, old_bias = upper.to(k.dtype.element_ty), upper_bias
        for part in range(0, PARTS):
            i = part * BT + tl.arange(0, BT)
            loaded = n
            if AHEAD:
                keys, queries, asking, own, z, new, r, a, step = following
                loaded = tl.maximum(n - 1, 0)
            following = tokens_to_undo(
                q, k, eta, tau, held_k, held_eta, token, fill, last, g, dp, dg, zh, rstd, along,
                row, loaded, i, d, b, h, T, N, m, P, B, H, D, AXIS, CAUSAL, FLUSH, HAS_GRID,
                HAS_PENDING,
            )  # fmt: skip
            if not AHEAD:
                keys, queries, asking, own, z, new, r, a, step = following
            read = undo_writing(
                dh, dz, keys, own, z, new, r, a, step, old, old_bias, gain, row * N * m + n * m + i,
                i < m, out, D, AXIS, PRECISION,
            )  # fmt: skip
            upper, upper_bias = add_readings(
                upper, upper_bias, queries, asking, keys, read, AXIS, PRECISION
            )
        if HAS_DOCUMENTS:  # noqa: SIM102  (known when the kernel is compiled)
            if tl.load(restart + n * B + b) != 0:
                add_initial(dw_rows, db_rows, row, upward, real, upper, upper_bias, d, D)
                upper, upper_bias = upper * 0.0, upper_bias * 0.0
    tl.store(dw + upward, upper, mask=real)
    tl.store(db + row * D + d, upper_bias, mask=d < D)
    if HAS_DOCUMENTS:
        add_initial(dw_rows, db_rows, row, upward, real, upper, upper_bias, d, D)
