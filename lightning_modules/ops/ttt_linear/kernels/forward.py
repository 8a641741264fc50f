"""TTT-Linear in Triton: the two kernels of the forward pass (see `tiles.py`)."""

import triton
import triton.language as tl

from lightning_modules.ops.ttt_linear.kernels.tiles import (
    SIZES,
    both_sums,
    closing_factors,
    load_etas,
    load_slots,
    load_tokens,
    places,
    predictions,
    reading_coefficients,
    slots_of,
    store_weights,
)


@triton.jit
def initial_weights(w, b0, dw, db, first, row, keep, d, D: tl.constexpr, HAS_STATE: tl.constexpr):
    """Transposed weight `[out, in]` and bias `[out]` at the start, less their mean over out.

    The state's change counts where `keep` is not 0.
    """
    real = (d[:, None] < D) & (d[None, :] < D)
    place = d[None, :] * D + d[:, None]
    weight = tl.load(w + first * D * D + place, mask=real, other=0.0)
    bias = tl.load(b0 + first * D + d, mask=d < D, other=0.0)
    if HAS_STATE:
        weight += tl.load(dw + row * D * D + place, mask=real & (keep != 0), other=0.0)
        bias += tl.load(db + row * D + d, mask=(d < D) & (keep != 0), other=0.0)
    weight = tl.where(real, weight - (tl.sum(weight, 0) / D)[None, :], 0.0)
    bias = tl.where(d < D, bias - tl.sum(bias, 0) / D, 0.0)
    return weight, bias


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
    gain = tl.load(gamma + h * D + d, mask=d < D, other=0.0)[:, None]
    offset = tl.load(beta + h * D + d, mask=d < D, other=0.0)[:, None]
    square = gain * gain
    weight, bias = initial_weights(w, b0, dw, db, first, row, 1, d, D, HAS_STATE)
    for n in range(0, N):
        if HAS_DOCUMENTS:  # noqa: SIM102  (known when the kernel is compiled)
            if tl.load(restart + n * B + b) != 0:
                weight, bias = initial_weights(w, b0, dw, db, first, row, 0, d, D, False)
        if n % S == 0:
            group = row * tl.cdiv(N, S) + n // S
            store_weights(weights, biases, group, weight, bias, d, D)
        old, old_bias = weight.to(k.dtype.element_ty), bias
        for part in range(0, PARTS):
            i = part * BT + tl.arange(0, BT)
            t, there = places(token, b, n, i, i < m, B, T, P, m, HAS_GRID)
            e = load_etas(eta, held_eta, t, there, b, h, T, P, H, HAS_PENDING)
            factor, _ = closing_factors(tau, fill, last, n, b, B, N, T, m, CAUSAL, FLUSH, HAS_GRID)
            t, there = t[None, :], there[None, :]
            keys = load_tokens(k, held_k, t, there, d[:, None], b, h, T, P, H, D, HAS_PENDING)
            values = load_tokens(v, held_v, t, there, d[:, None], b, h, T, P, H, D, HAS_PENDING)
            miss = offset + (keys.to(weight.dtype) - values.to(weight.dtype))
            z = tl.dot(old, keys, input_precision=PRECISION) + old_bias[:, None]
            total, squares = both_sums(z, z * z)
            mean = total / D  # of rounding errors: see `tiles.py`
            rstd = tl.rsqrt(tl.maximum(squares / D - mean * mean, 0.0) + EPS)[None, :]
            zh = (z - mean[None, :]) * rstd
            error = square * zh + gain * miss
            total, along = both_sums(error, zh * error)
            new = rstd * (error - (total / D)[None, :] - zh * (along / D)[None, :])
            new = tl.where(there & (d[:, None] < D), new, 0.0)
            slot = (row * N * m + n * m + i)[None, :] * D + d[:, None]
            tl.store(g + slot, new.to(keys.dtype), mask=(i[None, :] < m) & (d[:, None] < D))
            change = new * (-factor * e)[None, :]
            weight += tl.dot(change.to(keys.dtype), tl.trans(keys), input_precision=PRECISION)
            bias += tl.sum(change, 1)
    keep = 1
    if HAS_DOCUMENTS:
        keep = tl.load(kept + b)
    start, start_bias = initial_weights(w, b0, dw, db, first, row, keep, d, D, HAS_STATE)
    weight, bias = weight - start, bias - start_bias
    real = (d[:, None] < D) & (d[None, :] < D)
    place = row * D * D + d[None, :] * D + d[:, None]
    if HAS_STATE:
        weight += tl.load(dw + place, mask=real & (keep != 0), other=0.0)
        bias += tl.load(db + row * D + d, mask=(d < D) & (keep != 0), other=0.0)
    tl.store(dw_out + place, weight, mask=real)
    tl.store(db_out + row * D + d, bias, mask=d < D)


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
    c = reading_coefficients(tau, e, factor, n, i, m, True, CAUSAL)
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    mixed = (c * (scores + 1.0)).to(keys.dtype)
    at = row * tl.cdiv(N, S) + group
    lane = tl.arange(0, BD)
    z = predictions(queries, mixed, new, weights, biases, at, lane, D, PRECISION)
    zh = z * tl.rsqrt(tl.sum(z * z, 1) / D + EPS)[:, None]
    gain = tl.load(gamma + h * D + d, mask=d < D, other=0.0)
    shift = tl.load(beta + h * D + d, mask=d < D, other=0.0)
    out = queries.to(z.dtype) + gain * zh + shift
    place = ((b * T + t) * H + h) * D + d
    tl.store(o + place, out.to(queries.dtype), mask=asked & (d < D))
