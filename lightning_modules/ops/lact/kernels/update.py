"""LaCT in Triton: what happens to the weights between two chunks.

A program has some rows of a head's weights. These lie behind each other, W0 and W2 `[2 F, D]` and
then W1 `[D, F]` (*packed*, `[G, 3 F D]`, G = H * B); a *pair* is the same as two tensors.
Numbers are wide (float32 or float64) but for what products read.
"""

import triton
import triton.language as tl

UNALIGNED = ("mean", "dmean", "restart", "renewed", "rows")
"""Slices of small tensors: whether 16 divides their addresses must not make a kernel compile."""


@triton.jit
def weight_rows(F: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BR: tl.constexpr):
    """Head; numbers of BR rows, `[BR]`; `[BR, BLOCK]`: their places among packed ones, and which

    lanes exist; `[BR, 1]`: whether they are W1's.
    """
    tiles: tl.constexpr = (2 * F + D + BR - 1) // BR
    program = tl.program_id(0).to(tl.int64)
    g = program // tiles
    i = program % tiles * BR + tl.arange(0, BR)
    row, lane = i[:, None], tl.arange(0, BLOCK)[None, :]
    of_w1 = row >= 2 * F
    place = tl.where(of_w1, 2 * F * D + (row - 2 * F) * F, row * D)
    real = (lane < tl.where(of_w1, F, D)) & (row < 2 * F + D)
    return g, i, g * 3 * F * D + place + lane, real, of_w1


@triton.jit
def load_pair(first, second, g, at, real, of_w1, F: tl.constexpr, D: tl.constexpr):
    """Rows of a pair `[G, 2 F, D]`, `[G, D, F]`; `at` is their place among packed ones."""
    x = tl.load(first + at - g * F * D, mask=real & (of_w1 == 0), other=0.0)
    return x + tl.load(second + at - (g + 1) * 2 * F * D, mask=real & of_w1, other=0.0)


@triton.jit
def flag(rows, g, B, GIVEN: tl.constexpr, ELSE: tl.constexpr):
    """Whether the row of the batch is among these; ELSE if there are none given."""
    if GIVEN:  # noqa: SIM108  (known when the kernel is compiled)
        answer = tl.load(rows + g % B) != 0
    else:
        answer = ELSE
    return answer


@triton.jit
def add_to(place, x, real):
    """Add to what one program alone writes."""
    tl.store(place, tl.load(place, mask=real, other=0.0) + x, mask=real)


@triton.jit
def store_operands(both, old, change, g, i, at, real, of_w1, F: tl.constexpr, D: tl.constexpr):
    """Rows of weights beside those of the gradient at their change, as one product takes them.

    For each head `[4 F, D]`: W0, W2 and their gradients; then `[D, 2 F]`: W1 and its gradient.
    """
    row, lane = i[:, None], tl.arange(0, at.shape[1])[None, :]
    place = g * 6 * F * D + tl.where(of_w1, 4 * F * D + (row - 2 * F) * 2 * F, row * D) + lane
    beside = tl.where(of_w1, F, 2 * F * D)
    tl.store(both + place, tl.load(old + at, mask=real, other=0.0), mask=real)
    tl.store(both + place + beside, change.to(both.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=("B",), do_not_specialize_on_alignment=UNALIGNED)
def momentum_kernel(
    first,
    second,
    old,
    mean,
    out,
    restart,
    rows,
    B,
    F: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BR: tl.constexpr,
    WRITES: tl.constexpr,
    MOMENTUM: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_RESTART: tl.constexpr,
):
    """`M <- g + mean M` of rows that write, 0 of rows that restart; packed."""
    g, _, at, real, of_w1 = weight_rows(F, D, BLOCK, BR)
    m = tl.zeros([BR, BLOCK], out.dtype.element_ty)
    if MOMENTUM:
        m = tl.load(old + at, mask=real, other=0.0)
    if WRITES:
        new = load_pair(first, second, g, at, real, of_w1, F, D)
        if MOMENTUM:
            new += m * tl.load(mean + g)
        m = tl.where(flag(rows, g, B, HAS_ROWS, True), new, m)
    m = tl.where(flag(restart, g, B, HAS_RESTART, False), 0.0, m)
    tl.store(out + at, m, mask=real)


@triton.jit(do_not_specialize=("B",), do_not_specialize_on_alignment=UNALIGNED)
def update_kernel(
    first,
    second,
    packed,
    main_old,
    main,
    now,
    low,
    start_norm,
    learned_norm,
    learned,
    restart,
    renewed,
    rows,
    B,
    F: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BR: tl.constexpr,
    EPS: tl.constexpr,
    PRENORM: tl.constexpr,
    WRITES: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_RESTART: tl.constexpr,
    HAS_RENEWED: tl.constexpr,
):
    """`main <- (main or W) + change`, `W <- n0 main / (|main| + eps)`, row by row.

    `now` is W, in place; `low` is W as products read it. Rows that restart take the learned ones.
    """
    g, i, at, real, of_w1 = weight_rows(F, D, BLOCK, BR)
    w = tl.load(now + at, mask=real, other=0.0)
    base = w
    if PRENORM:
        base = tl.load(main_old + at, mask=real, other=0.0)
    if WRITES:
        if PACKED:
            change = tl.load(packed + at, mask=real, other=0.0)
        else:
            change = load_pair(first, second, g, at, real, of_w1, F, D)
        norm_at, exists = g * (2 * F + D) + i, i < 2 * F + D
        n0 = tl.load(start_norm + norm_at, mask=exists, other=0.0)
        if HAS_RENEWED:
            again = tl.load(renewed + g % B) != 0
            n0 = tl.load(learned_norm + norm_at, mask=exists & again, other=n0)
        new = base + change
        norm = tl.sqrt(tl.sum(new * new, 1))
        writes = flag(rows, g, B, HAS_ROWS, True)
        w = tl.where(writes, new * (n0 / (norm + EPS))[:, None], w)
        base = tl.where(writes, new, base)
    if HAS_RESTART:
        again = tl.load(restart + g % B) != 0
        begin = tl.load(learned + at, mask=real, other=0.0)
        w, base = tl.where(again, begin, w), tl.where(again, begin, base)
    tl.store(main + at, base, mask=real)
    tl.store(now + at, w, mask=real)
    tl.store(low + at, w.to(low.dtype.element_ty), mask=real)


@triton.jit(do_not_specialize=("B",), do_not_specialize_on_alignment=UNALIGNED)
def update_backward_kernel(
    main,
    carry,
    carry_main,
    read_first,
    read_second,
    write_first,
    write_second,
    old,
    both,
    dchange,
    start_norm,
    learned_norm,
    dstart_norm,
    dlearned_norm,
    dlearned,
    restart,
    renewed,
    rows,
    B,
    F: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BR: tl.constexpr,
    EPS: tl.constexpr,
    PRENORM: tl.constexpr,
    WRITES: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_READ: tl.constexpr,
    HAS_WRITE: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_RESTART: tl.constexpr,
    HAS_RENEWED: tl.constexpr,
):
    """Gradients of what `update_kernel` took from those of what it made; adds up the others.

    The gradient at W is `carry` plus what reading (HAS_READ) and writing (HAS_WRITE) with it left.
    `carry` and `carry_main` (PRENORM) then are those at the version before. That of the change
    goes to `dchange` (PACKED), or beside the old weights to `both`.
    """
    g, i, at, real, of_w1 = weight_rows(F, D, BLOCK, BR)
    total = tl.load(carry + at, mask=real, other=0.0)
    if HAS_READ:
        total += load_pair(read_first, read_second, g, at, real, of_w1, F, D)
    if HAS_WRITE:
        total += load_pair(write_first, write_second, g, at, real, of_w1, F, D)
    upper = tl.zeros([BR, BLOCK], total.dtype)
    if PRENORM:
        upper = tl.load(carry_main + at, mask=real, other=0.0)
    below = total
    if WRITES:
        writes = flag(rows, g, B, HAS_ROWS, True)
        x = tl.load(main + at, mask=real, other=0.0)
        norm = tl.sqrt(tl.sum(x * x, 1))
        scale = 1.0 / (norm + EPS)
        norm_at, exists = g * (2 * F + D) + i, i < 2 * F + D
        n0 = tl.load(start_norm + norm_at, mask=exists, other=0.0)
        if HAS_RENEWED:
            new = tl.load(renewed + g % B) != 0
            n0 = tl.load(learned_norm + norm_at, mask=exists & new, other=n0)
        along = tl.sum(total * x, 1) * scale
        inside = n0 * along * scale / tl.where(norm > 0, norm, 1.0)
        dmain = total * (n0 * scale)[:, None] - x * inside[:, None] + upper
        along = tl.where(writes, along, 0.0)
        if HAS_RENEWED:
            add_to(dlearned_norm + norm_at, tl.where(new, along, 0.0), exists)
            along = tl.where(new, 0.0, along)
        add_to(dstart_norm + norm_at, along, exists)
        change = tl.where(writes, dmain, 0.0)
        if PACKED:
            tl.store(dchange + at, change, mask=real)
        else:
            store_operands(both, old, change, g, i, at, real, of_w1, F, D)
        if PRENORM:
            below, upper = tl.where(writes, 0.0, total), tl.where(writes, dmain, upper)
        else:
            below = tl.where(writes, dmain, total)
    if HAS_RESTART:
        again = tl.load(restart + g % B) != 0
        add = tl.where(again, total + upper, 0.0)
        add_to(dlearned + at, add, real)
        below, upper = tl.where(again, 0.0, below), tl.where(again, 0.0, upper)
    tl.store(carry + at, below, mask=real)
    if PRENORM:
        tl.store(carry_main + at, upper, mask=real)


@triton.jit(do_not_specialize=("B",), do_not_specialize_on_alignment=UNALIGNED)
def momentum_backward_kernel(
    dchange,
    carry,
    momentum,
    mean,
    old,
    both,
    dmean,
    restart,
    rows,
    B,
    F: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BR: tl.constexpr,
    WRITES: tl.constexpr,
    MOMENTUM: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    HAS_RESTART: tl.constexpr,
):
    """From the gradient of the change (through Muon) that of the sum over the chunk, to `both`.

    `carry` is the gradient at M, then at the M before; `dmean` that of the mean, in parts.
    """
    g, i, at, real, of_w1 = weight_rows(F, D, BLOCK, BR)
    if MOMENTUM:
        upper = tl.load(carry + at, mask=real, other=0.0)
    if WRITES:
        writes = flag(rows, g, B, HAS_ROWS, True)
        total = tl.load(dchange + at, mask=real, other=0.0)
        if MOMENTUM:
            total += upper
            held = tl.load(momentum + at, mask=real, other=0.0)
            along = tl.where(writes, tl.sum(total * held, 1), 0.0)
            tl.store(dmean + g * (2 * F + D) + i, along, mask=i < 2 * F + D)
            upper = tl.where(writes, total * tl.load(mean + g), upper)
        change = tl.where(writes, total, 0.0)
        store_operands(both, old, change, g, i, at, real, of_w1, F, D)
    if MOMENTUM:
        upper = tl.where(flag(restart, g, B, HAS_RESTART, False), 0.0, upper)
        tl.store(carry + at, upper, mask=real)
