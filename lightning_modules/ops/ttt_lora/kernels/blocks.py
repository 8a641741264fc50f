"""What the Triton kernels of TTT-as-LoRA share: blocks of tokens, tiles, and the inner loss.

A row is read in blocks of consecutive tokens that see the same weights. A block ends where its
mini-batch is full, before a document, or after M tokens (masked ones take places in a block, none
in a mini-batch), so that a mini-batch may be several blocks. With `k~ = [k, 1]`, learned weights
`W = [w_base; b_base]`, their change D and A, what the open mini-batch has written, block n is

    z = k~ (W + D),    e = dl/dz,    A <- A - 1/m sum_j eta_j k~_j^T e_j,    and if it fills
    its mini-batch,    D <- D + A,   A <- 0;  a document begins with D = A = 0.

Tiles are padded with zeros to powers of two: M tokens, BD columns for d, BK for d + 1.
"""

import triton
import triton.language as tl

PRECISION = tl.constexpr("ieee")
FIELDS = tl.constexpr(5)
"""Integers of a planned block: start, stop, 1 (restarts) + 2 (fills), tokens before, slot."""


@triton.jit
def extent_of(plan_rows, waiting, row, time, SIZE: tl.constexpr, PLANNED: tl.constexpr):
    """Number of a row's blocks, and the first one of the mini-batch that stays open.

    The latter is the number of blocks if none does, -1 if it began before the call.
    """
    if PLANNED:
        count = tl.load(plan_rows + row * 2)
        opened = tl.load(plan_rows + row * 2 + 1)
    else:
        total = time + waiting
        count = (total + SIZE - 1) // SIZE
        opened = total // SIZE
        opened = tl.where((opened == 0) & (waiting > 0), -1, opened)
    return count, opened


@triton.jit
def block_of(plan, waiting, row, n, blocks, time, SIZE: tl.constexpr, PLANNED: tl.constexpr):
    """Start, stop, whether it restarts and fills, tokens of its mini-batch before it, its slot.

    The slot is where its change of the weights is kept, -1 if that is zero.
    """
    if PLANNED:
        entry = plan + (row * blocks + n) * FIELDS
        flags = tl.load(entry + 2)
        start, stop = tl.load(entry), tl.load(entry + 1)
        restarts, fills = (flags & 1) != 0, (flags & 2) != 0
        before, slot = tl.load(entry + 3), tl.load(entry + 4)
    else:
        end = (n + 1) * SIZE - waiting
        start, stop = tl.maximum(end - SIZE, 0), tl.minimum(end, time)
        restarts, fills = end < 0, end <= time
        before, slot = tl.where(n == 0, waiting, 0), n
    return start, stop, restarts, fills, before, slot


@triton.jit
def written(mask, start, stop, M: tl.constexpr, MASKED: tl.constexpr):
    """Places of a block that hold tokens which exist, bool `[M]`; `mask` is that of the row."""
    place = tl.arange(0, M)
    live = start + place < stop
    if MASKED:
        live = live & (tl.load(mask + start + place, mask=live, other=0) != 0)
    return live


@triton.jit
def load_rows(
    pointer, start, stride, live, D: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr
):
    """Rows from `start` on, 0 where not live, `[M, WIDTH]`."""
    place, column = tl.arange(0, live.shape[0]), tl.arange(0, WIDTH)
    inside = live[:, None] & (column < D)[None, :]
    first = pointer + tl.cast(start, tl.int64) * stride
    return tl.load(first + place[:, None] * stride + column[None, :], mask=inside, other=0).to(ACC)


@triton.jit
def store_rows(pointer, start, stride, live, tile, D: tl.constexpr):
    """The inverse of `load_rows`: writes live rows."""
    place, column = tl.arange(0, tile.shape[0]), tl.arange(0, tile.shape[1])
    inside = live[:, None] & (column < D)[None, :]
    first = pointer + tl.cast(start, tl.int64) * stride
    value = tile.to(pointer.dtype.element_ty)
    tl.store(first + place[:, None] * stride + column[None, :], value, mask=inside)


@triton.jit
def load_matrix(
    pointer,
    LIMIT: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACC: tl.constexpr,
):
    """The first LIMIT rows of a matrix `[.., d]`, 0 elsewhere, `[ROWS, COLUMNS]`."""
    row, column = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    inside = (row < LIMIT)[:, None] & (column < D)[None, :]
    return tl.load(pointer + row[:, None] * D + column[None, :], mask=inside, other=0).to(ACC)


@triton.jit
def store_matrix(pointer, tile, LIMIT: tl.constexpr, D: tl.constexpr):
    """The inverse of `load_matrix`."""
    row, column = tl.arange(0, tile.shape[0]), tl.arange(0, tile.shape[1])
    inside = (row < LIMIT)[:, None] & (column < D)[None, :]
    tl.store(pointer + row[:, None] * D + column[None, :], tile, mask=inside)


@triton.jit
def product(x, y, ACC: tl.constexpr):
    """`x y`, not rounded to TF32."""
    return tl.dot(x, y, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def unit(x, UNIT: tl.constexpr):
    """Rows of length 1 (`torch.nn.functional.normalize`) if UNIT, else x."""
    if UNIT:
        x = x / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), 1e-12)[:, None]
    return x


@triton.jit
def unit_backward(grad, x, UNIT: tl.constexpr):
    """Gradient of `unit` at x."""
    if UNIT:
        length = tl.sqrt(tl.sum(x * x, 1))
        scale = 1 / tl.maximum(length, 1e-12)
        y = x * scale[:, None]
        along = tl.where(length > 1e-12, tl.sum(y * grad, 1), 0)
        grad = (grad - y * along[:, None]) * scale[:, None]
    return grad


@triton.jit
def with_one(x, D: tl.constexpr):
    """`[x, 1]`: the input of a matrix whose last row is a bias."""
    return tl.where((tl.arange(0, x.shape[1]) == D)[None, :], 1.0, x).to(x.dtype)


@triton.jit
def normalise(z, eps, D: tl.constexpr):
    """`(z - mean) / std` over d columns, and `1 / std`."""
    column = (tl.arange(0, z.shape[1]) < D)[None, :]
    centred = tl.where(column, z - (tl.sum(z, 1) / D)[:, None], 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, 1) / D + eps)
    return centred * rstd[:, None], rstd


@triton.jit
def project(x, normalised, D: tl.constexpr):
    """`P x = x - mean(x) - zh mean(zh x)`, the symmetric factor of a LayerNorm's gradient."""
    mean, along = tl.sum(x, 1) / D, tl.sum(x * normalised, 1) / D
    column = (tl.arange(0, x.shape[1]) < D)[None, :]
    return tl.where(column, x - mean[:, None] - normalised * along[:, None], 0.0)


@triton.jit
def load_norm(norm, D: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr):
    """Scale and shift `[1, BD]` of one adapter's norm, `[2, d]`."""
    column = tl.arange(0, BD)
    scale = tl.load(norm + column, mask=column < D, other=0).to(ACC)
    shift = tl.load(norm + D + column, mask=column < D, other=0).to(ACC)
    return scale[None, :], shift[None, :]


@triton.jit
def error_of(z, target, norm, eps, D: tl.constexpr, LN: tl.constexpr, ACC: tl.constexpr):
    """`e = dl/dz`: `z - target`, or `r P h` with `h = gamma^2 zh + gamma (beta - target)`."""
    if LN:
        gamma, beta = load_norm(norm, D, z.shape[1], ACC)
        normalised, rstd = normalise(z, eps, D)
        h = gamma * (gamma * normalised + beta - target)
        error = project(h, normalised, D) * rstd[:, None]
    else:
        error = z - target
    return error


@triton.jit
def error_backward(
    grad, z, target, norm, eps, D: tl.constexpr, LN: tl.constexpr, ACC: tl.constexpr
):
    """Gradients by z, target, gamma and beta (of each token) of a gradient by e."""
    if LN:
        gamma, beta = load_norm(norm, D, z.shape[1], ACC)
        zh, rstd = normalise(z, eps, D)
        h = gamma * (gamma * zh + beta - target)
        error = project(h, zh, D) * rstd[:, None]
        dh = project(grad, zh, D) * rstd[:, None]
        along_h, along_grad = tl.sum(zh * h, 1) / D * rstd, tl.sum(zh * grad, 1) / D * rstd
        dz = gamma * gamma * dh - grad * along_h[:, None] - h * along_grad[:, None]
        scale = tl.sum(grad * error, 1) / D * rstd
        dz = project(dz, zh, D) * rstd[:, None] - zh * scale[:, None]
        dtarget, dgamma, dbeta = -gamma * dh, dh * (2 * gamma * zh + beta - target), gamma * dh
    else:
        dz, dtarget, dgamma, dbeta = grad, -grad, grad, grad
    return dz, dtarget, dgamma, dbeta


@triton.jit
def waiting_in(counts, row, time, STATE: tl.constexpr):
    """Tokens in the mini-batch that was open before the call."""
    waiting = time * 0
    if STATE:
        waiting = tl.load(counts + row).to(tl.int32)
    return waiting


@triton.jit
def load_keys(
    k, start, stride, live, D: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr, ACC: tl.constexpr
):
    """Keys as they are given, `[M, BK]` and `[M, BD]`."""
    wide = load_rows(k, start, stride, live, D, BK, ACC)
    narrow = wide
    if BK != BD:
        narrow = load_rows(k, start, stride, live, D, BD, ACC)
    return wide, narrow


@triton.jit
def load_step(eta, start, stride, live, SIZE: tl.constexpr, ACC: tl.constexpr):
    """`-eta/m`, 0 for tokens that do not exist, `[M]`."""
    first = eta + tl.cast(start, tl.int64) * stride
    rates = tl.load(first + tl.arange(0, live.shape[0]) * stride, mask=live, other=0)
    return rates.to(ACC) * (-1.0 / SIZE)


@triton.jit
def load_writers(
    k,
    v,
    eta,
    start,
    stride,
    eta_stride,
    live,
    SIZE: tl.constexpr,
    D: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    ACC: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Tokens of a block as they write: `k~`, k as given and as used, `v - k`, `-eta/m`."""
    wide, narrow = load_keys(k, start, stride, live, D, BK, BD, ACC)
    used = unit(narrow, UNIT)
    target = load_rows(v, start, stride, live, D, BD, ACC) - used
    step = load_step(eta, start, eta_stride, live, SIZE, ACC)
    return with_one(unit(wide, UNIT), D), narrow, used, target, step


@triton.jit
def kept_matrix(
    saved,
    slot,
    LIMIT: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACC: tl.constexpr,
):
    """What is kept in a slot, 0 without one."""
    place = saved + tl.cast(tl.maximum(slot, 0), tl.int64) * (D + 1) * D
    return tl.where(slot >= 0, load_matrix(place, LIMIT, D, ROWS, COLUMNS, ACC), 0.0)


@triton.jit
def mixing(queries, keys, step, ACC: tl.constexpr):
    """What mode B multiplies with the errors of the own block: `(q~_i . k~_j) step_j`, j <= i."""
    place = tl.arange(0, step.shape[0])
    own = tl.where(place[:, None] >= place[None, :], product(queries, tl.trans(keys), ACC), 0.0)
    return own * step[None, :]


@triton.jit
def read_of(
    queries,
    weights,
    keys,
    step,
    error,
    saved_open,
    slot,
    D: tl.constexpr,
    MODE_B: tl.constexpr,
    ACC: tl.constexpr,
):
    """What the queries of a block read: `q~ W`, in mode B also what its mini-batch has written."""
    read = product(queries, weights, ACC)
    if MODE_B:
        BK: tl.constexpr = weights.shape[0]
        BD: tl.constexpr = weights.shape[1]
        read += product(queries, kept_matrix(saved_open, slot, D + 1, D, BK, BD, ACC), ACC)
        read += product(mixing(queries, keys, step, ACC), error, ACC)
    return read


@triton.jit
def read_gradient(
    grad, read, output_norm, eps, OUTPUT_NORM: tl.constexpr, D: tl.constexpr, ACC: tl.constexpr
):
    """Gradients by what is read, and by the output norm's gamma and beta (of each token)."""
    dread, dgamma = grad, grad
    if OUTPUT_NORM:
        gamma, _ = load_norm(output_norm, D, grad.shape[1], ACC)
        normalised, rstd = normalise(read, eps, D)
        dread = project(grad * gamma, normalised, D) * rstd[:, None]
        dgamma = grad * normalised
    return dread, dgamma
