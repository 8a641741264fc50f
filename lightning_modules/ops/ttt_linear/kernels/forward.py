"""TTT-Linear in Triton: the two kernels of the forward pass (see `tiles.py`)."""

import triton
import triton.language as tl

from lightning_modules.ops.ttt_linear.kernels.tiles import (
    SIZES,
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
def initial_weights(
    w, b0, dw, db, first, row, keep, d, D: tl.constexpr, AXIS: tl.constexpr, HAS_STATE: tl.constexpr
):
    """Weight, outputs along AXIS, and bias `[out]` at the start, less their mean over outputs.

    The state's change counts where `keep` is not 0.
    """
    real = (d[:, None] < D) & (d[None, :] < D)
    place = inputs_of(d, AXIS) * D + outputs_of(d, AXIS)
    weight = tl.load(w + first * D * D + place, mask=real, other=0.0)
    bias = tl.load(b0 + first * D + d, mask=d < D, other=0.0)
    if HAS_STATE:
        weight += tl.load(dw + row * D * D + place, mask=real & (keep != 0), other=0.0)
        bias += tl.load(db + row * D + d, mask=(d < D) & (keep != 0), other=0.0)
    weight = tl.where(real, weight - inputs_of(tl.sum(weight, AXIS) / D, AXIS), 0.0)
    bias = tl.where(d < D, bias - tl.sum(bias, 0) / D, 0.0)
    return weight, bias


@triton.jit
def tokens_to_write(
    k, v, eta, tau, held_k, held_v, held_eta, token, fill, last, n, i, out, b, h, T, N, m, P, B, H,
    D: tl.constexpr, AXIS: tl.constexpr, CAUSAL: tl.constexpr, FLUSH: tl.constexpr,
    HAS_GRID: tl.constexpr, HAS_PENDING: tl.constexpr,
):  # fmt: skip
    """Keys, values, which there are, and the steps by which `G` changes the weights."""
    t, there = places(token, b, n, i, i < m, B, T, P, m, HAS_GRID)
    e = load_etas(eta, held_eta, t, there, b, h, T, P, H, HAS_PENDING)
    factor, _ = closing_factors(tau, fill, last, n, b, B, N, T, m, CAUSAL, FLUSH, HAS_GRID)
    t, there = inputs_of(t, AXIS), inputs_of(there, AXIS)
    keys = load_tokens(k, held_k, t, there, out, b, h, T, P, H, D, HAS_PENDING)
    values = load_tokens(v, held_v, t, there, out, b, h, T, P, H, D, HAS_PENDING)
    return keys, values, there, inputs_of(-factor * e, AXIS)


@triton.jit
def written(
    keys, values, there, weight, bias, gain, square, offset, out, D: tl.constexpr,
    EPS: tl.constexpr, AXIS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`G` of a mini-batch, 0 where no token is: the equations of `write_kernel`."""
    miss = offset + (keys.to(gain.dtype) - values.to(gain.dtype))
    z = applied(weight, keys, AXIS, PRECISION) + outputs_of(bias, AXIS)
    total, squares = both_sums(z, z * z, AXIS)
    mean = total / D  # of rounding errors: see `tiles.py`
    rstd = tl.rsqrt(tl.maximum(squares / D - mean * mean, 0.0) + EPS)
    rstd = inputs_of(rstd, AXIS)
    zh = (z - inputs_of(mean, AXIS)) * rstd
    error = square * zh + gain * miss
    total, along = both_sums(error, zh * error, AXIS)
    new = error - inputs_of(total / D, AXIS) - zh * inputs_of(along / D, AXIS)
    return tl.where(there & (out < D), rstd * new, 0.0)


@triton.jit
def store_change(
    dw_out, db_out, weight, bias, w, b0, dw, db, kept, first, row, b, d, D: tl.constexpr,
    AXIS: tl.constexpr, HAS_STATE: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """The outgoing state: W less its start, on top of what the row came with.

    In a row where a document began, what it came with is gone from both.
    """
    keep = 1
    if HAS_DOCUMENTS:
        keep = tl.load(kept + b)
    start, start_bias = initial_weights(w, b0, dw, db, first, row, keep, d, D, AXIS, HAS_STATE)
    weight, bias = weight - start, bias - start_bias
    real = (d[:, None] < D) & (d[None, :] < D)
    place = row * D * D + inputs_of(d, AXIS) * D + outputs_of(d, AXIS)
    if HAS_STATE:
        weight += tl.load(dw + place, mask=real & (keep != 0), other=0.0)
        bias += tl.load(db + row * D + d, mask=(d < D) & (keep != 0), other=0.0)
    tl.store(dw_out + place, weight, mask=real)
    tl.store(db_out + row * D + d, bias, mask=d < D)


@triton.jit(do_not_specialize=SIZES)
def write_kernel(
    k,
    v,
    eta,
    tau,
    gamma,
    beta,
    w,
    b0,
    dw,
    db,
    held_k,
    held_v,
    held_eta,
    token,
    fill,
    last,
    restart,
    kept,
    g,
    weights,
    biases,
    dw_out,
    db_out,
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
    BT: tl.constexpr,
    PARTS: tl.constexpr,
    AXIS: tl.constexpr,
    AHEAD: tl.constexpr,
    PRECISION: tl.constexpr,
    CAUSAL: tl.constexpr,
    FLUSH: tl.constexpr,
    PER_ROW: tl.constexpr,
    HAS_GRID: tl.constexpr,
    HAS_PENDING: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr,
):
    """Walk through the mini-batches of a row and head: `G`, the weights of each group, the state.

    With `zh = (z - mean(z)) / std` of `z = k W + b` and `h = gamma^2 zh + gamma (beta + k - v)`,
    the gradient is `G = (h - mean(h) - zh mean(zh h)) / std`.
    """
    row, d = tl.program_id(0).to(tl.int64), tl.arange(0, BD)
    b, h = row // H, row % H
    first = row if PER_ROW else h
    out = outputs_of(d, AXIS)
    gain = tl.load(gamma + h * D + out, mask=out < D, other=0.0)
    offset = tl.load(beta + h * D + out, mask=out < D, other=0.0)
    square = gain * gain
    weight, bias = initial_weights(w, b0, dw, db, first, row, 1, d, D, AXIS, HAS_STATE)
    if AHEAD:
        following = tokens_to_write(
            k, v, eta, tau, held_k, held_v, held_eta, token, fill, last, 0, tl.arange(0, BT), out,
            b, h, T, N, m, P, B, H, D, AXIS, CAUSAL, FLUSH, HAS_GRID, HAS_PENDING,
        )  # fmt: skip
    for n in range(0, N):
        if HAS_DOCUMENTS:  # noqa: SIM102  (known when the kernel is compiled)
            if tl.load(restart + n * B + b) != 0:
                weight, bias = initial_weights(w, b0, dw, db, first, row, 0, d, D, AXIS, False)
        if n % S == 0:
            group = row * tl.cdiv(N, S) + n // S
            store_weights(weights, biases, group, weight, bias, d, D)
        old, old_bias = weight.to(k.dtype.element_ty), bias
        for part in range(0, PARTS):
            i = part * BT + tl.arange(0, BT)
            loaded = n
            if AHEAD:
                keys, values, there, step = following
                loaded = tl.minimum(n + 1, N - 1)
            following = tokens_to_write(
                k, v, eta, tau, held_k, held_v, held_eta, token, fill, last, loaded, i, out, b, h,
                T, N, m, P, B, H, D, AXIS, CAUSAL, FLUSH, HAS_GRID, HAS_PENDING,
            )  # fmt: skip
            if not AHEAD:
                keys, values, there, step = following
            new = written(
                keys, values, there, old, old_bias, gain, square, offset, out, D, EPS, AXIS,
                PRECISION,
            )  # fmt: skip
            slot = inputs_of(row * N * m + n * m + i, AXIS) * D + out
            tl.store(g + slot, new.to(keys.dtype), mask=inputs_of(i < m, AXIS) & (out < D))
            change = new * step
            weight += outer(change.to(keys.dtype), keys, AXIS, PRECISION)
            bias += tl.sum(change, 1 - AXIS)
    store_change(
        dw_out, db_out, weight, bias, w, b0, dw, db, kept, first, row, b, d, D, AXIS, HAS_STATE,
        HAS_DOCUMENTS,
    )  # fmt: skip


@triton.jit(do_not_specialize=SIZES)
def read_kernel(
    q,
    k,
    eta,
    tau,
    gamma,
    beta,
    held_k,
    held_eta,
    token,
    fill,
    last,
    g,
    weights,
    biases,
    o,
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
):
    """Outputs `q + LN(z)` of the tokens of a group, z what their queries read."""
    group, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = row // H, row % H
    d = tl.arange(0, BD)[None, :]
    n, i, inside = slots_of(group, S, m, N, BG)
    t, there = places(token, b, n, i, inside, B, T, P, m, HAS_GRID)
    e = load_etas(eta, held_eta, t, there, b, h, T, P, H, HAS_PENDING)
    factor, _ = closing_factors(tau, fill, last, n, b, B, N, T, m, CAUSAL, FLUSH, HAS_GRID)
    t, there = t[:, None], there[:, None]
    keys = load_tokens(k, held_k, t, there, d, b, h, T, P, H, D, HAS_PENDING)
    asked = there & (t >= 0)
    queries = load_tokens(q, q, t, asked, d, b, h, T, P, H, D, False)
    new = load_slots(g, (row * N * m + n * m + i)[:, None], d, inside[:, None], D)
    c = reading_coefficients(tau, e, earlier_coefficients(e, factor, n, SINGLE), n, i, CAUSAL)
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    mixed = (c * (scores + 1.0)).to(keys.dtype)
    at = row * tl.cdiv(N, S) + group
    lane = tl.arange(0, BD)
    z = readings(queries, weights, biases, at, lane, D, AXIS, PRECISION)
    z = centred(z + tl.dot(mixed, new, input_precision=PRECISION), lane, D)
    zh = z * tl.rsqrt(tl.sum(z * z, 1) / D + EPS)[:, None]
    gain = tl.load(gamma + h * D + d, mask=d < D, other=0.0)
    shift = tl.load(beta + h * D + d, mask=d < D, other=0.0)
    out = queries.to(z.dtype) + gain * zh + shift
    place = ((b * T + t) * H + h) * D + d
    tl.store(o + place, out.to(queries.dtype), mask=asked & (d < D))
