"""TTT-Linear in Triton: how the work is cut, and what the kernels share.

A mini-batch of m tokens waits for the weights that the one before it leaves behind, so one program
for each row and head walks through them (`forward.write_kernel`) and does nothing but that: it
finds the gradients `G_j` and adds them to W. All that does not have to wait is left to kernels that
take the mini-batches of a *group* at once: up to 64 tokens, seen as one tile. With W, b the weights
at the start of the group, token i reads

    x_i W + b + sum_j c_ij (x_i . k_j + 1) G_j

with `c_ij` the *coefficient* of `reading_coefficients`, so that a group needs the weights of its
first mini-batch only. Slot i of mini-batch n has index `n m + i` in what kernels hand each other,
`[B, H, N m, D]`; the tokens stay where they are.

W and b are kept less their mean over the outputs: no LayerNorm sees it, and no gradient changes it,
as `sum(G_j) = 0`. What rounding leaves of it must be taken off wherever it is read all the same:
with a z that is not centred `G` is not, either, and from mini-batch to mini-batch the mean grows
exponentially. Matrix products take their operands in the dtype of q.
"""

import triton
import triton.language as tl

SIZES = ("T", "N", "m", "S", "P", "B", "H")
"""Arguments whose value must not make a kernel compile again."""


@triton.jit
def _add_both(a, b, c, d):
    return a + c, b + d


@triton.jit
def both_sums(x, y, AXIS: tl.constexpr):
    """Sums of x and of y over an axis: warps hand both on together."""
    return tl.reduce((x, y), AXIS, _add_both)


@triton.jit
def outputs_of(x, AXIS: tl.constexpr):
    """A vector of outputs as a tile of a walk, whose outputs lie along AXIS."""
    return tl.expand_dims(x, 1 - AXIS)


@triton.jit
def inputs_of(x, AXIS: tl.constexpr):
    """A vector of tokens, or of inputs of a weight, as a tile of a walk: along the other axis."""
    return tl.expand_dims(x, AXIS)


@triton.jit
def applied(weight, x, AXIS: tl.constexpr, PRECISION: tl.constexpr):
    """What tokens x read from a weight."""
    if AXIS == 0:
        z = tl.dot(weight, x, input_precision=PRECISION)
    else:
        z = tl.dot(x, weight, input_precision=PRECISION)
    return z


@triton.jit
def outer(g, x, AXIS: tl.constexpr, PRECISION: tl.constexpr):
    """The change of a weight that answers tokens x with g."""
    if AXIS == 0:
        change = tl.dot(g, tl.trans(x), input_precision=PRECISION)
    else:
        change = tl.dot(tl.trans(x), g, input_precision=PRECISION)
    return change


@triton.jit
def slots_of(group, S, m, N, BG: tl.constexpr):
    """Mini-batch n and slot i in it of the up to 64 slots of a group, and which are real.

    Divisions would be 240 to 330 instructions of a kernel: with 4096 / m, rounded up, the error is
    below 1 / 64, which no quotient notices.
    """
    slot = tl.arange(0, BG)
    before = (slot * ((4095 + m) // m)) >> 12
    n = group * S + before
    return n, slot - before * m, (slot < S * m) & (n < N)


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
def load_tokens(call, held, t, there, d, b, h, T, P, H, D: tl.constexpr, HAS_PENDING: tl.constexpr):
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
def store_weights(weights, biases, at, weight, bias, d, D: tl.constexpr):
    """Put a weight as it is, outputs along AXIS, and a bias to place `at` of their groups."""
    real = (d[:, None] < D) & (d[None, :] < D)
    place = at * D * D + d[:, None] * D + d[None, :]
    tl.store(weights + place, weight.to(weights.dtype.element_ty), mask=real)
    tl.store(biases + at * D + d, bias, mask=d < D)


@triton.jit
def load_slots(x, at, d, inside, D: tl.constexpr):
    """Vectors of a group from `[B, H, N m, D]`, 0 outside."""
    return tl.load(x + at * D + d, mask=inside & (d < D), other=0.0)


@triton.jit
def reading_coefficients(tau, e, before, n, i, CAUSAL: tl.constexpr):
    """`c_ij`: what the query of slot i reads of `G_j`: `before` of earlier mini-batches' and

    of its own one's `-tau_i eta_j` for j <= i (not causal: `-eta_j` for all j).
    """
    seen = n[:, None] == n[None, :]
    own = -e[None, :]
    if CAUSAL:
        seen = seen & (i[:, None] >= i[None, :])
        own = own * tl.load(tau + i)[:, None]
    return tl.where(seen, own, before)


@triton.jit
def earlier_coefficients(e, factor, n, SINGLE: tl.constexpr):
    """What slot i reads of `G_j` if an earlier mini-batch of the group wrote it:

    `-factor_j eta_j`; nothing where mini-batches are SINGLE in their groups.
    """
    return 0.0 if SINGLE else tl.where(n[:, None] > n[None, :], (-factor * e)[None, :], 0.0)


@triton.jit
def load_weights(weights, at, inputs, outputs, D: tl.constexpr, AXIS: tl.constexpr):
    """What `store_weights` put there, a tile as inputs and outputs lie in it."""
    first, second = (outputs, inputs) if AXIS == 0 else (inputs, outputs)
    place = at * D * D + first * D + second
    return tl.load(weights + place, mask=(first < D) & (second < D), other=0.0)


@triton.jit
def readings(
    x, weights, biases, at, d, D: tl.constexpr, AXIS: tl.constexpr, PRECISION: tl.constexpr
):
    """`x W + b`, `[slots, D]`, of the weights at the start of a group."""
    weight = load_weights(weights, at, d[:, None], d[None, :], D, AXIS)
    z = tl.dot(x, weight, input_precision=PRECISION)
    return z + tl.load(biases + at * D + d, mask=d < D, other=0.0)[None, :]


@triton.jit
def centred(z, d, D: tl.constexpr):
    """Predictions less their mean over D."""
    return tl.where((d < D)[None, :], z - (tl.sum(z, 1) / D)[:, None], 0.0)


@triton.jit
def add_to(place, x, real):
    """Add to what one program alone writes."""
    tl.store(place, tl.load(place, mask=real, other=0.0) + x, mask=real)
