"""LaCT in Triton: tokens `[B, T, H, E]` into the slots of chunks, `[S, H, B, w, E]`, and back."""

import triton
import triton.language as tl

SIZES = ("row_stride", "start", "S", "w", "B", "H", "T", "P", "Q")
"""Arguments whose value must not make a kernel compile again."""


@triton.jit
def slot_tile(token, start, S, w, B, T, P, BT: tl.constexpr, HAS_MAP: tl.constexpr):
    """Row, token (negative in the state), whether there is one, and the slot's chunk and place."""
    tiles = tl.cdiv(w, BT)
    chunk, tile = tl.program_id(0).to(tl.int64) // tiles, tl.program_id(0) % tiles
    s, b = chunk // B, chunk % B
    c = tile * BT + tl.arange(0, BT)
    inside = c < w
    if HAS_MAP:
        found = tl.load(token + chunk * w + c, mask=inside, other=-1)
        t = found - b * (P + T) - P
        there = inside & (found >= 0)
    else:
        t = start + s * w + c
        there = inside & (t < T)
    return s, b, c, inside, t, there


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=("token",))
def gather_kernel(
    x,
    held,
    token,
    out,
    row_stride,
    time_stride,
    head_stride,
    start,
    S,
    w,
    B,
    H,
    T,
    P,
    Q,
    E: tl.constexpr,
    BE: tl.constexpr,
    BT: tl.constexpr,
    HAS_MAP: tl.constexpr,
    HAS_HELD: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Slots filled from the call's x, or from the last P of `held [B, Q, H, E]`'s first; 0 else.

    Slot P - 1 of a row of `held` comes before token 0.
    """
    s, b, c, inside, t, there = slot_tile(token, start, S, w, B, T, P, BT, HAS_MAP)
    h = tl.program_id(1)
    e = tl.arange(0, BE)[None, :]
    t, real = t[:, None], there[:, None] & (e < E)
    row = b * row_stride
    if ALIGNED:
        row = tl.multiple_of(row, 16)
    place = row + t * time_stride + h * head_stride + e
    value = tl.load(x + place, mask=real & (t >= 0), other=0.0).to(out.dtype.element_ty)
    if HAS_HELD:
        before = ((b * Q + P + t) * H + h) * E + e
        value += tl.load(held + before, mask=real & (t < 0), other=0.0).to(value.dtype)
    slot = ((s * H + h) * B + b) * w + c
    tl.store(out + slot[:, None] * E + e, value, mask=inside[:, None] & (e < E))


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=("token",))
def scatter_kernel(
    x,
    held,
    token,
    slots,
    start,
    S,
    w,
    B,
    H,
    T,
    P,
    Q,
    E: tl.constexpr,
    BE: tl.constexpr,
    BT: tl.constexpr,
    HAS_MAP: tl.constexpr,
    HAS_HELD: tl.constexpr,
):
    """The inverse of `gather_kernel`, into a contiguous x."""
    s, b, c, _, t, there = slot_tile(token, start, S, w, B, T, P, BT, HAS_MAP)
    h = tl.program_id(1)
    e = tl.arange(0, BE)[None, :]
    t, real = t[:, None], there[:, None] & (e < E)
    slot = ((s * H + h) * B + b) * w + c
    value = tl.load(slots + slot[:, None] * E + e, mask=real, other=0.0)
    place = ((b * T + t) * H + h) * E + e
    tl.store(x + place, value.to(x.dtype.element_ty), mask=real & (t >= 0))
    if HAS_HELD:
        before = ((b * Q + P + t) * H + h) * E + e
        tl.store(held + before, value.to(held.dtype.element_ty), mask=real & (t < 0))
