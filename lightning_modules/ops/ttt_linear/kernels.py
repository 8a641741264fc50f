"""TTT-Linear in Triton: what the kernels share, and the two of the forward pass.

A mini-batch of m tokens waits for the weights that the one before it leaves behind, so one program
for each row and head walks through them (`write_kernel`) and does nothing but that: it finds the
gradients `G_j` and adds them to W. All that does not have to wait is left to kernels that take the
mini-batches of a *group* at once: up to 64 tokens, seen as one tile. With W, b the weights at the
start of the group, token i reads

    x_i W + b + sum_j c_ij (x_i . k_j + 1) G_j

with `c_ij` the *coefficient* of `reading_coefficients`, so that a group needs the weights of its
first mini-batch only. Slot i of mini-batch n has index `n m + i` in what kernels hand each other,
`[B, H, N m, D]`; the tokens stay where they are.

W and b are kept less their mean over the outputs. No LayerNorm sees it, and no gradient changes it,
as `sum(G_j) = 0`. Matrix products take their operands in the dtype of q.
"""

import triton
import triton.language as tl

# --- tokens and slots ---


@triton.jit
def places(token, b, n, i, inside, B, T, P, m, HAS_GRID: tl.constexpr):
    """Positions in the call of the tokens in slots (n, i), and which slots have one.

    The P tokens of the state come first: their positions are negative.
    """
    if HAS_GRID:
        found = tl.load(token + (n * B + b) * m + i, mask=inside, other=-1)
        t = found - b * (P + T) - P
        there = inside & (found >= 0)
    else:
        t = n * m + i
        there = inside & (t < T)
    return t, there


@triton.jit
def load_tokens(
    call, held, t, there, d, b, h, T, P, H, D: tl.constexpr, HAS_PENDING: tl.constexpr
):
    """Vectors from `[B, T, H, D]`, or from the state's `[B, P, H, D]`; 0 where no token is."""
    real = there & (d < D)
    x = tl.load(call + ((b * T + t) * H + h) * D + d, mask=real & (t >= 0), other=0.0)
    if HAS_PENDING:
        place = ((b * P + P + t) * H + h) * D + d
        x = x + tl.load(held + place, mask=real & (t < 0), other=0.0).to(x.dtype)
    return x


@triton.jit
def load_etas(call, held, t, there, b, h, T, P, H, HAS_PENDING: tl.constexpr):
    """Step sizes from `[B, T, H]`, or from the state's `[B, P, H]`; 0 where no token is."""
    eta = tl.load(call + (b * T + t) * H + h, mask=there & (t >= 0), other=0.0)
    if HAS_PENDING:
        eta += tl.load(held + (b * P + P + t) * H + h, mask=there & (t < 0), other=0.0)
    return eta


@triton.jit
def closing_factors(
    tau,
    fill,
    last,
    n,
    b,
    B,
    N,
    T,
    m,
    CAUSAL: tl.constexpr,
    FLUSH: tl.constexpr,
    HAS_GRID: tl.constexpr,
):
    """tau of the token that closes mini-batch n, 0 if it stays open, and how many it holds."""
    if HAS_GRID:
        held = tl.load(fill + n * B + b, mask=n < N, other=0)
        final = tl.load(last + b)
    else:
        held = tl.minimum(m, T - n * m)
        final = N - 1
    closed = held == m
    if FLUSH:
        closed = closed | ((n == final) & (held > 0))
    if CAUSAL:
        factor = tl.load(tau + tl.maximum(held - 1, 0), mask=closed, other=0.0)
    else:
        factor = tl.where(n < N, 1.0, 0.0)
    return factor, tl.where(closed, held, 0)


@triton.jit
def initial_weights(
    w, b0, dw, db, first, row, keep, d, D: tl.constexpr, HAS_STATE: tl.constexpr
):
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


@triton.jit
def store_weights(weights, biases, at, weight, bias, d, D: tl.constexpr):
    """Put a transposed weight `[out, in]` and a bias to place `at` of `[..., D, D]`, `[..., D]`."""
    real = (d[:, None] < D) & (d[None, :] < D)
    place = at * D * D + d[:, None] * D + d[None, :]
    tl.store(weights + place, weight.to(weights.dtype.element_ty), mask=real)
    tl.store(biases + at * D + d, bias, mask=d < D)


# --- forward ---


@triton.jit
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

    With `zh = z / std` of `z = k W + b` and `h = gamma^2 zh + gamma (beta + k - v)`, the gradient
    is `G = (h - mean(h) - zh mean(zh h)) / std`.
    """
    row = tl.program_id(0).to(tl.int64)
    b, h = row // H, row % H
    first = row if PER_ROW else h
    d, i = tl.arange(0, BD), tl.arange(0, BT)
    gain = tl.load(gamma + h * D + d, mask=d < D, other=0.0)[:, None]
    offset = tl.load(beta + h * D + d, mask=d < D, other=0.0)[:, None]
    square = gain * gain
    weight, bias = initial_weights(w, b0, dw, db, first, row, 1, d, D, HAS_STATE)
    for n in range(0, N):
        if HAS_DOCUMENTS:
            if tl.load(restart + n * B + b) != 0:
                weight, bias = initial_weights(w, b0, dw, db, first, row, 0, d, D, False)
        if n % S == 0:
            group = row * tl.cdiv(N, S) + n // S
            store_weights(weights, biases, group, weight, bias, d, D)
        t, there = places(token, b, n, i, i < m, B, T, P, m, HAS_GRID)
        e = load_etas(eta, held_eta, t, there, b, h, T, P, H, HAS_PENDING)
        factor, _ = closing_factors(tau, fill, last, n, b, B, N, T, m, CAUSAL, FLUSH, HAS_GRID)
        t, there = t[None, :], there[None, :]
        keys = load_tokens(k, held_k, t, there, d[:, None], b, h, T, P, H, D, HAS_PENDING)
        values = load_tokens(v, held_v, t, there, d[:, None], b, h, T, P, H, D, HAS_PENDING)
        z = tl.dot(weight.to(keys.dtype), keys, input_precision=PRECISION) + bias[:, None]
        rstd = tl.rsqrt(tl.sum(z * z, 0) / D + EPS)[None, :]
        zh = z * rstd
        error = square * zh + gain * (offset + keys.to(z.dtype) - values.to(z.dtype))
        mean, along = tl.sum(error, 0) / D, tl.sum(zh * error, 0) / D
        new = rstd * (error - mean[None, :] - zh * along[None, :])
        new = tl.where(there & (d[:, None] < D), new, 0.0)
        slot = (row * N * m + n * m + i)[None, :] * D + d[:, None]
        tl.store(
            g + slot, new.to(keys.dtype), mask=(i[None, :] < m) & (d[:, None] < D)
        )
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


@triton.jit
def load_slots(x, at, d, inside, D: tl.constexpr):
    """Vectors of a group from `[B, H, N m, D]`, 0 outside."""
    return tl.load(x + at * D + d, mask=inside & (d < D), other=0.0)


@triton.jit
def reading_coefficients(
    tau, e, factor, n, i, m, OWN: tl.constexpr, CAUSAL: tl.constexpr
):
    """`c_ij`: what slot i reads of `G_j`: all that earlier mini-batches of the group wrote,

    `-factor_j eta_j`, and, if OWN, of its own one `-tau_i eta_j` for j <= i (not causal: `-eta_j`
    for all j).
    """
    c = tl.where(n[:, None] > n[None, :], (-factor * e)[None, :], 0.0)
    if OWN:
        seen = n[:, None] == n[None, :]
        own = -e[None, :]
        if CAUSAL:
            seen = seen & (i[:, None] >= i[None, :])
            own = own * tl.load(tau + i)[:, None]
        c = tl.where(seen, own, c)
    return c


@triton.jit
def predictions(
    x, scores, c, new, weights, biases, at, d, D: tl.constexpr, PRECISION: tl.constexpr
):
    """`x W + b + (c (x k^T + 1)) G`, `[slots, D]`, less its mean over D; scores are `x k^T`."""
    real = (d[:, None] < D) & (d[None, :] < D)
    place = at * D * D + d[None, :] * D + d[:, None]
    weight = tl.load(weights + place, mask=real, other=0.0)
    z = tl.dot(x, weight, input_precision=PRECISION)
    z += tl.load(biases + at * D + d, mask=d < D, other=0.0)[None, :]
    z += tl.dot((c * (scores + 1.0)).to(x.dtype), new, input_precision=PRECISION)
    return tl.where((d < D)[None, :], z - (tl.sum(z, 1) / D)[:, None], 0.0)


@triton.jit
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
    d, slot = tl.arange(0, BD)[None, :], tl.arange(0, BG)
    n, i = group * S + slot // m, slot % m
    inside = (slot < S * m) & (n < N)
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
    at = row * tl.cdiv(N, S) + group
    lane = tl.arange(0, BD)
    z = predictions(queries, scores, c, new, weights, biases, at, lane, D, PRECISION)
    zh = z * tl.rsqrt(tl.sum(z * z, 1) / D + EPS)[:, None]
    gain = tl.load(gamma + h * D + d, mask=d < D, other=0.0)
    shift = tl.load(beta + h * D + d, mask=d < D, other=0.0)
    out = queries.to(z.dtype) + gain * zh + shift
    place = ((b * T + t) * H + h) * D + d
    tl.store(o + place, out.to(queries.dtype), mask=asked & (d < D))
