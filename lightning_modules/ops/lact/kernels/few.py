"""LaCT in Triton: writing a chunk in few launches, for calls whose products are small.

The gates of `gates.py` happen where their products end, and two products whose results nothing
waits for in between are one launch. Tokens are `[G, C, .]`; weights are rows of a head, `GROUP`
numbers from one head to the next. Products accumulate in WIDE.
"""

import triton
import triton.language as tl

from lightning_modules.ops.lact.kernels.gates import (
    UNALIGNED,
    load_wide,
    store_narrow,
    written,
    written_backward,
)

LENGTH = ("C",)
"""Arguments whose value must not make a kernel compile again."""


@triton.jit
def tile_of(x, row, column, row_stride, rows, columns):
    """Numbers at rows `[M, 1]` and columns `[1, N]` of a matrix, 0 outside of it."""
    return tl.load(x + row * row_stride + column, mask=(row < rows) & (column < columns), other=0.0)


@triton.jit
def load_rates(rates, row, m, C, R: tl.constexpr, WIDE: tl.constexpr):
    """The three rates of tokens m, `[BT, 1]` each, of rows of R numbers."""
    at = rates + (row + m) * R
    lr0 = load_wide(at, m < C, WIDE)
    return lr0, load_wide(at + 1, m < C, WIDE), load_wide(at + 2, m < C, WIDE)


@triton.jit(do_not_specialize=LENGTH, do_not_specialize_on_alignment=UNALIGNED)
def operands_kernel(
    k,
    v,
    w02,
    w1,
    rates,
    scaled,
    hidden,
    C,
    GROUP: tl.constexpr,
    F: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BF: tl.constexpr,
    BK: tl.constexpr,
):
    """`lr0 a | lr2 u g`, `[G, C, 2 F]`, and `lr1 g h`, `[G, C, F]`, of keys and values."""
    g = tl.program_id(2).to(tl.int64)
    m = (tl.program_id(1) * BT + tl.arange(0, BT))[:, None]
    f = tl.program_id(0) * BF + tl.arange(0, BF)
    row, first, last = g * C, w02 + g * GROUP, w1 + g * GROUP
    p, h = tl.zeros([BT, BF], WIDE), tl.zeros([BT, BF], WIDE)
    u = tl.zeros([BT, BF], WIDE)
    for begin in range(0, D, BK):
        d = begin + tl.arange(0, BK)
        keys = tile_of(k + row * D, m, d[None, :], D, C, D)
        w0 = tile_of(first, f[:, None], d[None, :], D, F, D)
        w2 = tile_of(first + F * D, f[:, None], d[None, :], D, F, D)
        values = tile_of(v + row * D, m, d[None, :], D, C, D)
        down = tile_of(last, d[:, None], f[None, :], F, D, F)
        p += tl.dot(keys, tl.trans(w0), input_precision=PRECISION)
        h += tl.dot(keys, tl.trans(w2), input_precision=PRECISION)
        u += tl.dot(values, down, input_precision=PRECISION)
    a, ug, gh = written(p, h, u)
    lr0, lr1, lr2 = load_rates(rates, row, m, C, R, WIDE)
    real, at = (m < C) & (f[None, :] < F), (row + m) * F + f[None, :]
    two = at + (row + m) * F
    store_narrow(scaled + two, lr0 * a, real)
    store_narrow(scaled + two + F, lr2 * ug, real)
    store_narrow(hidden + at, lr1 * gh, real)


@triton.jit(do_not_specialize=LENGTH, do_not_specialize_on_alignment=UNALIGNED)
def operands_backward_kernel(
    k,
    v,
    first,
    second,
    rates,
    pa,
    ud,
    drates,
    C,
    F: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    BF: tl.constexpr,
    BK: tl.constexpr,
):
    """`dp | dh | lr0 a | lr2 u g`, `[G, C, 4 F]`, and `du | lr1 g h`, `[G, C, 2 F]`.

    `first [G, 4 F, D]` is W0, W2 and the gradients of their changes, `second [G, D, 2 F]` W1 and
    its, in rows of 6 F D numbers. The gradients of the rates are sums over the channels of a
    program: `[F / BF, G, C, R]`.
    """
    g = tl.program_id(2).to(tl.int64)
    m = (tl.program_id(1) * BT + tl.arange(0, BT))[:, None]
    f = tl.program_id(0) * BF + tl.arange(0, BF)
    row = g * C
    first += g * 6 * F * D
    second += g * 6 * F * D
    p, h = tl.zeros([BT, BF], WIDE), tl.zeros([BT, BF], WIDE)
    da, dug = tl.zeros([BT, BF], WIDE), tl.zeros([BT, BF], WIDE)
    u, dgh = tl.zeros([BT, BF], WIDE), tl.zeros([BT, BF], WIDE)
    up, across = f[:, None], f[None, :]
    for begin in range(0, D, BK):
        d = begin + tl.arange(0, BK)
        keys = tile_of(k + row * D, m, d[None, :], D, C, D)
        w0 = tile_of(first, up, d[None, :], D, F, D)
        w2 = tile_of(first + F * D, up, d[None, :], D, F, D)
        of_w0 = tile_of(first + 2 * F * D, up, d[None, :], D, F, D)
        of_w2 = tile_of(first + 3 * F * D, up, d[None, :], D, F, D)
        p += tl.dot(keys, tl.trans(w0), input_precision=PRECISION)
        h += tl.dot(keys, tl.trans(w2), input_precision=PRECISION)
        da += tl.dot(keys, tl.trans(of_w0), input_precision=PRECISION)
        dug += tl.dot(keys, tl.trans(of_w2), input_precision=PRECISION)
        values = tile_of(v + row * D, m, d[None, :], D, C, D)
        w1 = tile_of(second, d[:, None], across, 2 * F, D, F)
        of_w1 = tile_of(second + F, d[:, None], across, 2 * F, D, F)
        u += tl.dot(values, w1, input_precision=PRECISION)
        dgh += tl.dot(values, of_w1, input_precision=PRECISION)
    lr0, lr1, lr2 = load_rates(rates, row, m, C, R, WIDE)
    real, two = (m < C) & (across < F), (row + m) * 2 * F + across
    four, a_rate = two + (row + m) * 2 * F, (tl.program_id(0) * tl.num_programs(2) + g) * C + m
    a, ug, gh = written(p, h, u)
    at = drates + a_rate * R
    store_narrow(at, tl.sum(da * a, 1)[:, None], m < C)
    store_narrow(at + 1, tl.sum(dgh * gh, 1)[:, None], m < C)
    store_narrow(at + 2, tl.sum(dug * ug, 1)[:, None], m < C)
    store_narrow(pa + four + 2 * F, lr0 * a, real)
    store_narrow(pa + four + 3 * F, lr2 * ug, real)
    store_narrow(ud + two + F, lr1 * gh, real)
    dp, dh, du = written_backward(p, h, u, lr0 * da, lr2 * dug, lr1 * dgh)
    store_narrow(pa + four, dp, real)
    store_narrow(pa + four + F, dh, real)
    store_narrow(ud + two, du, real)


@triton.jit
def tile_place(program, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """Rows `[BM]` and columns `[BN]` of a program's tile of a matrix with N columns."""
    across: tl.constexpr = (N + BN - 1) // BN
    return program // across * BM + tl.arange(0, BM), program % across * BN + tl.arange(0, BN)


@triton.jit
def sum_over_tokens(
    a, b, out, program, C, A: tl.constexpr, B: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile of `a^T b`, `[M, N]`, from rows of A and B numbers."""
    m, n = tile_place(program, N, BM, BN)
    total = tl.zeros([BM, BN], out.dtype.element_ty)
    for begin in range(0, C, BK):
        c = (begin + tl.arange(0, BK))[:, None]
        left, right = tile_of(a, c, m[None, :], A, C, M), tile_of(b, c, n[None, :], B, C, N)
        total += tl.dot(tl.trans(left), right, input_precision=PRECISION)
    real = (m[:, None] < M) & (n[None, :] < N)
    tl.store(out + m[:, None] * N + n[None, :], total, mask=real)


@triton.jit(do_not_specialize=LENGTH)
def changes_kernel(
    scaled,
    x,
    d,
    hidden,
    of_w02,
    of_w1,
    C,
    F: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """`scaled^T x`, `[G, 2 F, D]`, and `d^T hidden`, `[G, D, F]`.

    The tokens of `scaled` are rows of WIDTH numbers, 2 F of them taken; `hidden` has HIDDEN.
    """
    g, program = tl.program_id(1).to(tl.int64), tl.program_id(0)
    tiles: tl.constexpr = (2 * F + BM - 1) // BM * ((D + BN - 1) // BN)
    row = g * C
    if program < tiles:
        sum_over_tokens(
            scaled + row * WIDTH, x + row * D, of_w02 + g * 2 * F * D, program, C, WIDTH, D,
            2 * F, D, PRECISION, BM, BN, BK,
        )  # fmt: skip
    else:
        sum_over_tokens(
            d + row * D, hidden + row * HIDDEN, of_w1 + g * F * D, program - tiles, C, D, HIDDEN,
            D, F, PRECISION, BM, BN, BK,
        )  # fmt: skip


@triton.jit
def token_tile(
    x, w, out, m, n, C, ROW: tl.constexpr, COLUMN: tl.constexpr, K: tl.constexpr, N: tl.constexpr,
    WIDE: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """Rows m and columns n of `out [C, N] = x [C, K] w`; w at ROW and COLUMN numbers from another.

    ADD: to what is there.
    """
    real = (m[:, None] < C) & (n[None, :] < N)
    place = out + m[:, None] * N + n[None, :]
    total = tl.zeros([m.shape[0], n.shape[0]], WIDE)
    for begin in range(0, K, BK):
        i = begin + tl.arange(0, BK)
        left = tile_of(x, m[:, None], i[None, :], K, C, K)
        inside = (i[:, None] < K) & (n[None, :] < N)
        right = tl.load(w + i[:, None] * ROW + n[None, :] * COLUMN, mask=inside, other=0.0)
        total += tl.dot(left, right, input_precision=PRECISION)
    if ADD:
        total += load_wide(place, real, WIDE)
    store_narrow(place, total, real)


@triton.jit(do_not_specialize=LENGTH)
def tokens_kernel(
    pa,
    ud,
    first,
    second,
    dk,
    dv,
    C,
    F: tl.constexpr,
    D: tl.constexpr,
    WIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    ADD: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """`dk = pa first` and `dv = ud second^T`, `[G, C, D]`; ADD: added to what is there.

    Weights are those of `operands_backward_kernel`.
    """
    g, program = tl.program_id(1).to(tl.int64), tl.program_id(0)
    tiles, row = tl.cdiv(C, BM) * ((D + BN - 1) // BN), g * C
    if program < tiles:
        m, n = tile_place(program, D, BM, BN)
        token_tile(
            pa + row * 4 * F, first + g * 6 * F * D, dk + row * D, m, n, C, D, 1, 4 * F, D, WIDE,
            PRECISION, BK, ADD,
        )  # fmt: skip
    else:
        m, n = tile_place(program - tiles, D, BM, BN)
        token_tile(
            ud + row * 2 * F, second + g * 6 * F * D, dv + row * D, m, n, C, 1, 2 * F, 2 * F, D,
            WIDE, PRECISION, BK, ADD,
        )  # fmt: skip
