"""LaCT in Triton: what happens to hidden channels between two matrix products.

With `p = W0 x, h = W2 x, g = silu(p)`, side by side in a row of `p h`, and `u = W1^T d`. Numbers
are widened for the arithmetic and rounded when they are stored.
"""

import triton
import triton.language as tl

UNALIGNED = ("rates", "drates")
"""Slices whose address 16 may divide or not, which must not make a kernel compile again."""


@triton.jit
def sigmoid(x):
    """`1 / (1 + exp(-x))`, in the dtype of x, without an overflow."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0 / (1.0 + small), small / (1.0 + small))


@triton.jit
def load_wide(pointer, mask, WIDE: tl.constexpr):
    """Numbers in the dtype of the arithmetic, 0 where the mask is False."""
    return tl.load(pointer, mask=mask, other=0.0).to(WIDE)


@triton.jit
def store_narrow(pointer, x, mask):
    """Round and store."""
    tl.store(pointer, x.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def written(p, h, u):
    """`a = u h silu'(p)`, `u g` and `g h`."""
    s = sigmoid(p)
    g = p * s
    return u * h * (s + g * (1.0 - s)), u * g, g * h


@triton.jit
def written_backward(p, h, u, da, dug, dgh):
    """Gradients of p, h, u from those of what `written` gave."""
    s = sigmoid(p)
    g = p * s
    slope = s + g * (1.0 - s)  # silu'
    curve = (1.0 - s) * (2.0 * slope - g)  # silu''
    steep = da * slope
    dp = (dgh * h + dug * u) * slope + da * u * h * curve
    return dp, steep * u + dgh * g, steep * h + dug * g


@triton.jit
def element_tile(M, F: tl.constexpr, BT: tl.constexpr, BF: tl.constexpr):
    """Tokens `[BT, 1]`, channels `[1, BF]`, and which exist."""
    m = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)[:, None]
    f = tl.program_id(1) * BF + tl.arange(0, BF)[None, :]
    return m, f, (m < M) & (f < F)


@triton.jit(do_not_specialize=("M",))
def read_gate_kernel(
    ph,
    hidden,
    M,
    F: tl.constexpr,
    PARTS: tl.constexpr,
    WIDE: tl.constexpr,
    BT: tl.constexpr,
    BF: tl.constexpr,
):
    """`g h`, `[M, F]`, from rows of PARTS times F numbers, the first of them p and h."""
    m, f, real = element_tile(M, F, BT, BF)
    at = ph + m * PARTS * F + f
    p, h = load_wide(at, real, WIDE), load_wide(at + F, real, WIDE)
    store_narrow(hidden + m * F + f, p * sigmoid(p) * h, real)


@triton.jit(do_not_specialize=("M",))
def read_gate_backward_kernel(
    ph,
    dhidden,
    dph,
    hidden,
    M,
    F: tl.constexpr,
    PARTS: tl.constexpr,
    WIDE: tl.constexpr,
    BT: tl.constexpr,
    BF: tl.constexpr,
):
    """Gradients of p and h, `[M, 2 F]`, and `g h` again; may write over what it reads."""
    m, f, real = element_tile(M, F, BT, BF)
    at, out = ph + m * PARTS * F + f, dph + m * 2 * F + f
    p, h = load_wide(at, real, WIDE), load_wide(at + F, real, WIDE)
    upper = load_wide(dhidden + m * F + f, real, WIDE)
    s = sigmoid(p)
    g = p * s
    store_narrow(out, upper * h * (s + g * (1.0 - s)), real)
    store_narrow(out + F, upper * g, real)
    store_narrow(hidden + m * F + f, g * h, real)


@triton.jit(do_not_specialize=("M",), do_not_specialize_on_alignment=UNALIGNED)
def write_gate_kernel(
    ph,
    u,
    rates,
    scaled,
    plain,
    hidden,
    M,
    F: tl.constexpr,
    R: tl.constexpr,
    PARTS: tl.constexpr,
    U_PARTS: tl.constexpr,
    WIDE: tl.constexpr,
    BT: tl.constexpr,
    BF: tl.constexpr,
    SCALED: tl.constexpr,
    PLAIN: tl.constexpr,
):
    """Operands of the change: `lr0 a, lr2 u g` (SCALED), `[M, 2 F]`, and `lr1 g h`, `[M, F]`.

    `a = u h silu'(p)`. PLAIN: `a, u g` as they are, `[M, 2 F]`. The rates are rows of R numbers.
    """
    m, f, real = element_tile(M, F, BT, BF)
    at = ph + m * PARTS * F + f
    p, h = load_wide(at, real, WIDE), load_wide(at + F, real, WIDE)
    up = load_wide(u + m * U_PARTS * F + f, real, WIDE)
    a, ug, gh = written(p, h, up)
    if SCALED:
        rate = rates + m * R
        lr0, lr1 = load_wide(rate, m < M, WIDE), load_wide(rate + 1, m < M, WIDE)
        lr2 = load_wide(rate + 2, m < M, WIDE)
        store_narrow(scaled + m * 2 * F + f, lr0 * a, real)
        store_narrow(scaled + m * 2 * F + F + f, lr2 * ug, real)
        store_narrow(hidden + m * F + f, lr1 * gh, real)
    if PLAIN:
        store_narrow(plain + m * 2 * F + f, a, real)
        store_narrow(plain + m * 2 * F + F + f, ug, real)


@triton.jit(do_not_specialize=("M",), do_not_specialize_on_alignment=UNALIGNED)
def write_gate_backward_kernel(
    pa,
    ud,
    rates,
    extra,
    pa_out,
    ud_out,
    drates,
    M,
    F: tl.constexpr,
    R: tl.constexpr,
    WIDE: tl.constexpr,
    BT: tl.constexpr,
    BF: tl.constexpr,
    EXTRA: tl.constexpr,
    ADD: tl.constexpr,
):
    """Backward of `write_gate_kernel`, and its outputs again; may write over what it reads.

    In: `p, h` and the gradients of `lr0 a, lr2 u g`, `[M, 4 F]`; `u` and that of `lr1 g h`,
    `[M, 2 F]`; EXTRA: those of `a, u g`, `[M, 2 F]`. Out: `dp, dh, lr0 a, lr2 u g`;
    `du, lr1 g h`; the gradients of the rates, rows of R numbers (ADD: added to what is there).
    """
    m = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    rate = m * R
    lr0, lr1 = load_wide(rates + rate, m < M, WIDE), load_wide(rates + rate + 1, m < M, WIDE)
    lr2 = load_wide(rates + rate + 2, m < M, WIDE)
    d0, d1 = tl.zeros([BT], WIDE), tl.zeros([BT], WIDE)
    d2 = tl.zeros([BT], WIDE)
    row = m[:, None]
    for begin in range(0, F, BF):
        f = begin + tl.arange(0, BF)[None, :]
        real = (row < M) & (f < F)
        four, two = row * 4 * F + f, row * 2 * F + f
        p, h = load_wide(pa + four, real, WIDE), load_wide(pa + four + F, real, WIDE)
        da = load_wide(pa + four + 2 * F, real, WIDE)
        dug = load_wide(pa + four + 3 * F, real, WIDE)
        u, dhidden = load_wide(ud + two, real, WIDE), load_wide(ud + two + F, real, WIDE)
        a, ug, gh = written(p, h, u)
        d0 += tl.sum(da * a, 1)
        d1 += tl.sum(dhidden * gh, 1)
        d2 += tl.sum(dug * ug, 1)
        da, dug, dhidden = da * lr0[:, None], dug * lr2[:, None], dhidden * lr1[:, None]
        if EXTRA:
            da += load_wide(extra + two, real, WIDE)
            dug += load_wide(extra + two + F, real, WIDE)
        dp, dh, du = written_backward(p, h, u, da, dug, dhidden)
        store_narrow(pa_out + four, dp, real)
        store_narrow(pa_out + four + F, dh, real)
        store_narrow(pa_out + four + 2 * F, lr0[:, None] * a, real)
        store_narrow(pa_out + four + 3 * F, lr2[:, None] * ug, real)
        store_narrow(ud_out + two, du, real)
        store_narrow(ud_out + two + F, lr1[:, None] * gh, real)
    if ADD:
        d0 += load_wide(drates + rate, m < M, WIDE)
        d1 += load_wide(drates + rate + 1, m < M, WIDE)
        d2 += load_wide(drates + rate + 2, m < M, WIDE)
    store_narrow(drates + rate, d0, m < M)
    store_narrow(drates + rate + 1, d1, m < M)
    store_narrow(drates + rate + 2, d2, m < M)
