"""TTT-Linear in Triton: the kernel that ends the backward pass (see `backward.py`)."""

import triton
import triton.language as tl

from lightning_modules.ops.ttt_linear.kernels.tiles import (
    SIZES,
    add_to,
    closing_factors,
    earlier_coefficients,
    load_etas,
    load_slots,
    load_tokens,
    load_weights,
    places,
    reading_coefficients,
    slots_of,
)


@triton.jit
def store_tokens(
    call, held, x, t, there, d, b, h, T, P, H, D: tl.constexpr, HAS_PENDING: tl.constexpr
):
    """The inverse of `load_tokens`."""
    real = there & (d < D)
    place = ((b * T + t) * H + h) * D + d
    tl.store(call + place, x.to(call.dtype.element_ty), mask=real & (t >= 0))
    if HAS_PENDING:
        tl.store(held + ((b * P + P + t) * H + h) * D + d, x, mask=real & (t < 0))


@triton.jit
def store_etas(call, held, x, t, there, b, h, T, P, H, HAS_PENDING: tl.constexpr):
    """The inverse of `load_etas`."""
    tl.store(call + (b * T + t) * H + h, x, mask=there & (t >= 0))
    if HAS_PENDING:
        tl.store(held + (b * P + P + t) * H + h, x, mask=there & (t < 0))


@triton.jit
def add_readings_of_keys(out, dstep, read, new, keys, before, n, PRECISION: tl.constexpr):
    """Add `(x + x^T) k`, what keys read of earlier mini-batches, and its gradients of steps."""
    x = tl.dot(read, tl.trans(new), input_precision=PRECISION)
    scores = tl.dot(keys, tl.trans(keys), input_precision=PRECISION) + 1.0
    dstep += tl.sum(tl.where(n[:, None] > n[None, :], x * scores, 0.0), 0)
    x = (x * before).to(keys.dtype)
    out += tl.dot(x, keys, input_precision=PRECISION)
    out += tl.dot(tl.trans(x), keys, input_precision=PRECISION)
    return out, dstep


@triton.jit(do_not_specialize=SIZES)
def input_gradient_kernel(
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
    dp,
    dh,
    dz,
    zh,
    dweights,
    dbiases,
    do,
    dq,
    dk,
    dv,
    deta,
    dheld_k,
    dheld_v,
    dheld_eta,
    dtau,
    sums,
    T,
    N,
    m,
    S,
    P,
    B,
    H,
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
    """Gradients of the tokens of a group, and its part of those of tau (per slot), gamma, beta.

    With `c_ij` what queries and `e_ij` what keys read, `u = c (dp G^T)` and `x = e (dz G^T)`:

        dq = do + dp W^T + u k
        dk = dz W^T + u^T q + (x + x^T) k + s (G L^T) + gamma dh,   dv = -gamma dh
    """
    group, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, h = row // H, row % H
    lane = tl.arange(0, BD)
    d = lane[None, :]
    n, i, inside = slots_of(group, S, m, N, BG)
    t, there = places(token, b, n, i, inside, B, T, P, m, HAS_GRID)
    e = load_etas(eta, held_eta, t, there, b, h, T, P, H, HAS_PENDING)
    factor, closes = closing_factors(tau, fill, last, n, b, B, N, T, m, CAUSAL, FLUSH, HAS_GRID)
    at, within = (row * N * m + n * m + i)[:, None], inside[:, None]
    tokens, here = t[:, None], there[:, None]
    state = row * tl.cdiv(N, S) + group
    keys = load_tokens(k, held_k, tokens, here, d, b, h, T, P, H, D, HAS_PENDING)
    asked = here & (tokens >= 0)
    queries = load_tokens(q, q, tokens, asked, d, b, h, T, P, H, D, False)
    new = load_slots(g, at, d, within, D)
    weight = load_weights(weights, state, d, lane[:, None], D, AXIS)
    asking = load_slots(dp, at, d, within, D)
    u = tl.dot(asking, tl.trans(new), input_precision=PRECISION)
    scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) + 1.0
    before = earlier_coefficients(e, factor, n, SINGLE)
    c = reading_coefficients(tau, e, before, n, i, CAUSAL)
    dstep, de, own = coefficient_gradients(tau, e, u * scores, n, i, CAUSAL, SINGLE)
    u = (u * c).to(keys.dtype)
    out = tl.dot(asking, weight, input_precision=PRECISION)
    out += tl.dot(u, keys, input_precision=PRECISION)
    out += load_tokens(do, do, tokens, asked, d, b, h, T, P, H, D, False).to(out.dtype)
    store_tokens(dq, dq, out, tokens, asked, d, b, h, T, P, H, D, False)
    out = tl.dot(tl.trans(u), queries, input_precision=PRECISION)
    read = load_slots(dz, at, d, within, D)
    if not SINGLE:
        out, dstep = add_readings_of_keys(out, dstep, read, new, keys, before, n, PRECISION)
    out += tl.dot(read, weight, input_precision=PRECISION)
    upper = load_weights(dweights, state, d, lane[:, None], D, AXIS)
    written = tl.dot(new, upper, input_precision=PRECISION)
    upper_bias = tl.load(dbiases + state * D + d, mask=d < D, other=0.0)
    dstep += tl.sum(written * keys.to(out.dtype) + new.to(out.dtype) * upper_bias, 1)
    out += written * (-factor * e)[:, None]
    below = load_slots(dh, at, d, within, D).to(out.dtype)
    below_k = below * tl.load(gamma + h * D + d, mask=d < D, other=0.0)
    values = load_tokens(v, held_v, tokens, here, d, b, h, T, P, H, D, HAS_PENDING)
    store_tokens(dv, dheld_v, -below_k, tokens, here, d, b, h, T, P, H, D, HAS_PENDING)
    store_tokens(dk, dheld_k, out + below_k, tokens, here, d, b, h, T, P, H, D, HAS_PENDING)
    norm_gradients(zh, keys, values, below, gamma, beta, sums, at, state, within, lane, h, D)
    de -= factor * dstep
    store_etas(deta, dheld_eta, de, t, there, b, h, T, P, H, HAS_PENDING)
    if CAUSAL:
        own += closing_gradients(e, closes, dstep, n, i)
        tl.store(dtau + at, own[:, None], mask=within)


@triton.jit
def norm_gradients(
    zh, keys, values, below, gamma, beta, sums, at, state, inside, lane, h, D: tl.constexpr
):
    """Add a group's part of the gradients of gamma and beta by way of `h`."""
    d = lane[None, :]
    z = load_slots(zh, at, d, inside, D).to(below.dtype)
    gain = tl.load(gamma + h * D + d, mask=d < D, other=0.0)
    shift = tl.load(beta + h * D + d, mask=d < D, other=0.0)
    error = 2.0 * gain * z + shift + keys.to(below.dtype) - values.to(below.dtype)
    place = sums + state * 2 * D + lane
    add_to(place, tl.sum(below * error, 0), lane < D)
    add_to(place + D, tl.sum(below * gain, 0), lane < D)


@triton.jit
def coefficient_gradients(tau, e, dc, n, i, CAUSAL: tl.constexpr, SINGLE: tl.constexpr):
    """Per slot, from the gradient dc of `c_ij`: of the step of `G_j` in later mini-batches, and, by

    way of its own mini-batch, of eta and (causal) of tau.
    """
    later = tl.zeros_like(e) if SINGLE else tl.sum(tl.where(n[:, None] > n[None, :], dc, 0.0), 0)
    seen = n[:, None] == n[None, :]
    if CAUSAL:
        seen = seen & (i[:, None] >= i[None, :])
        own = -tl.sum(tl.where(seen, dc * e[None, :], 0.0), 1)
        dc = dc * tl.load(tau + i)[:, None]
    else:
        own = later
    return later, -tl.sum(tl.where(seen, dc, 0.0), 0), own


@triton.jit
def closing_gradients(e, closes, dstep, n, i):
    """Gradient per slot of the tau of the token that closes a mini-batch: of all its steps."""
    same = n[:, None] == n[None, :]
    total = tl.sum(tl.where(same, (e * dstep)[None, :], 0.0), 1)
    return tl.where(i + 1 == closes, -total, 0.0)
