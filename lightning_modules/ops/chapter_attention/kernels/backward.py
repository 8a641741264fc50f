"""Chapter attention in Triton: the kernels of the backward pass (see `tiles.py`).

With `p = exp(scale q k^T + log w - lse)` computed again, as in Dao et al., "FlashAttention", 2022,
arXiv:2205.14135, section 3.1,

    dv = p^T do,  ds = p (do v^T - delta),  dq = scale ds k,  dk = scale ds^T q,  dlog w = sum ds

and `delta = <do, o> - dlse`. In a mixture lse and o are those of a part, and `dlog w = w delta`.
"""

import triton
import triton.language as tl

from lightning_modules.ops.chapter_attention.kernels.forward import block_tokens
from lightning_modules.ops.chapter_attention.kernels.tiles import (
    LOG2E,
    SIZES,
    load_heads,
    load_rows,
    products,
    slot_tokens,
)


@triton.jit(do_not_specialize=SIZES)
def delta_kernel(
    o,
    do,
    dlse,
    delta,
    rows_of_output,
    H,
    J: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    HAS_DLSE: tl.constexpr,
):
    """`<do, o_j> - dlse` of the J parts of every token and head."""
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    there, d = row < rows_of_output, tl.arange(0, BD)
    upper = load_heads(do, row, there, d, D).to(delta.dtype.element_ty)
    part = row // H * J * H + row % H
    for j in range(J):
        read = load_heads(o, part + j * H, there, d, D).to(upper.dtype)
        found = tl.sum(upper * read, 1)
        if HAS_DLSE:
            found -= tl.load(dlse + row, mask=there, other=0.0)
        tl.store(delta + part + j * H, found, mask=there)


@triton.jit(do_not_specialize=SIZES)
def query_gradient_kernel(
    q,
    mem_k,
    mem_v,
    log_weights,
    chapters,
    lse,
    do,
    delta,
    dq,
    dlog,
    T,
    block,
    blocks,
    H,
    KV,
    K: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of some queries of a block, and their share of those of log weights, by block.

    The latter in `[blocks, tiles of a block, H, K, tiles of rows]`.
    """
    tile, h = tl.program_id(0) // H, tl.program_id(0) % H
    token, there, number = block_tokens(tile, T, block, blocks, BM)
    d, kv = tl.arange(0, BD), h // (H // KV)
    place = token.to(tl.int64) * H + h
    queries = load_heads(q, place, there, d, D)
    upper = load_heads(do, place, there, d, D)
    norm = tl.load(lse + place, mask=there, other=float("inf")) * LOG2E
    drop = tl.load(delta + place, mask=there, other=0.0)
    out = tl.zeros([BM, BD], lse.dtype.element_ty)
    share = dlog + tl.program_id(0).to(tl.int64) * (K * tl.cdiv(R, BR))
    for i in range(0, K * tl.cdiv(R, BR)):
        pair = number * K + i // tl.cdiv(R, BR)
        r = i % tl.cdiv(R, BR) * BR + tl.arange(0, BR)
        chapter = tl.load(chapters + pair)
        keys = load_rows(mem_k, chapter, kv, KV, r[:, None], d[None, :], R, D)
        values = load_rows(mem_v, chapter, kv, KV, r[:, None], d[None, :], R, D)
        shift = norm - tl.load(log_weights + pair) * LOG2E
        s = products(queries, keys, r, R, BR, PRECISION)
        p = tl.exp2(s * (SCALE * LOG2E) - shift[:, None])
        ds = tl.dot(upper, tl.trans(values), input_precision=PRECISION) - drop[:, None]
        ds = p * ds
        tl.store(share + i, tl.sum(tl.sum(ds, 1), 0))
        out += tl.dot(ds.to(keys.dtype), keys, input_precision=PRECISION)
    tl.store(
        dq + place[:, None] * D + d[None, :],
        (out * SCALE).to(dq.dtype.element_ty),
        mask=there[:, None] & (d < D)[None, :],
    )


@triton.jit(do_not_specialize=SIZES)
def bank_gradient_kernel(
    q,
    mem_k,
    mem_v,
    log_weights,
    order,
    chapter,
    first,
    count,
    lse,
    do,
    delta,
    dk,
    dv,
    dq,
    dlog,
    T,
    block,
    blocks,
    H,
    KV,
    K: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    BY_PART: tl.constexpr,
    WITH_QUERIES: tl.constexpr,
):
    """Gradients of some rows of a chapter by a group and the query heads of a key head, by chapter.

    Scores are transposed, `[rows, slots]`. BY_PART: lse and delta are those of parts, not of
    tokens. WITH_QUERIES (a chapter is one tile of rows): each slot also leaves its share of the
    gradients of its query and (summed over the rows) its log weight, at the number of its part.
    """
    group, tile, kv = tl.program_id(0) // KV, tl.program_id(1), tl.program_id(0) % KV
    here, begin = tl.load(chapter + group), tl.load(first + group)
    slots = tl.load(count + group) * block
    d, r, heads = tl.arange(0, BD), tile * BR + tl.arange(0, BR), H // KV
    keys = load_rows(mem_k, here, kv, KV, r[:, None], d[None, :], R, D)
    values = load_rows(mem_v, here, kv, KV, r[:, None], d[None, :], R, D)
    of_keys = tl.zeros([BR, BD], lse.dtype.element_ty)
    of_values = tl.zeros([BR, BD], lse.dtype.element_ty)
    for i in range(0, tl.cdiv(slots, BM) * heads):
        s, h = i // heads * BM + tl.arange(0, BM), kv * heads + i % heads
        pair, token, choice, there = slot_tokens(
            order, begin, s, s < slots, T, block, blocks, K, BY_TOKEN
        )
        place = token.to(tl.int64) * H + h
        part = (token.to(tl.int64) * K + choice) * H + h
        queries = load_heads(q, place, there, d, D)
        upper = load_heads(do, place, there, d, D)
        of_slot = part if BY_PART else place
        norm = tl.load(lse + of_slot, mask=there, other=float("inf"))
        norm -= tl.load(log_weights + pair, mask=there, other=0.0)
        drop = tl.load(delta + of_slot, mask=there, other=0.0)
        scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * (SCALE * LOG2E)
        p = tl.exp2(scores - (norm * LOG2E)[None, :])
        p = tl.where((r < R)[:, None], p, 0.0)
        of_values += tl.dot(p.to(upper.dtype), upper, input_precision=PRECISION)
        ds = tl.dot(values, tl.trans(upper), input_precision=PRECISION) - drop[None, :]
        ds = p * ds
        small = ds.to(queries.dtype)
        of_keys += tl.dot(small, queries, input_precision=PRECISION)
        if WITH_QUERIES:
            # transposed, too: otherwise ds would pass through shared memory into registers again
            of_queries = tl.dot(tl.trans(keys), small, input_precision=PRECISION) * SCALE
            tl.store(
                dq + part[None, :] * D + d[:, None],
                of_queries.to(dq.dtype.element_ty),
                mask=there[None, :] & (d < D)[:, None],
            )
            tl.store(dlog + part, tl.sum(ds, 0), mask=there)
    row = ((group.to(tl.int64) * R + r) * KV + kv)[:, None] * D + d[None, :]
    real = (r < R)[:, None] & (d < D)[None, :]
    tl.store(dk + row, of_keys * SCALE, mask=real)
    tl.store(dv + row, of_values, mask=real)


@triton.jit(do_not_specialize=SIZES)
def pair_gradient_kernel(
    q,
    mem_k,
    mem_v,
    log_weights,
    order,
    chapter,
    first,
    count,
    lse,
    do,
    delta,
    dq,
    dlog,
    T,
    block,
    blocks,
    H,
    KV,
    K: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    BY_TOKEN: tl.constexpr,
    BY_PART: tl.constexpr,
):
    """What `bank_gradient_kernel` leaves for queries and log weights, for chapters of several

    tiles of rows: over all of them, so that there is one share for each slot.
    """
    group, h = tl.program_id(0) // H, tl.program_id(0) % H
    here, begin = tl.load(chapter + group), tl.load(first + group)
    slots = tl.load(count + group) * block
    d, kv = tl.arange(0, BD), h // (H // KV)
    for i in range(0, slots, BM):
        s = i + tl.arange(0, BM)
        pair, token, choice, there = slot_tokens(
            order, begin, s, s < slots, T, block, blocks, K, BY_TOKEN
        )
        place = token.to(tl.int64) * H + h
        part = (token.to(tl.int64) * K + choice) * H + h
        queries = load_heads(q, place, there, d, D)
        upper = load_heads(do, place, there, d, D)
        of_slot = part if BY_PART else place
        norm = tl.load(lse + of_slot, mask=there, other=float("inf"))
        norm = (norm - tl.load(log_weights + pair, mask=there, other=0.0)) * LOG2E
        drop = tl.load(delta + of_slot, mask=there, other=0.0)
        out = tl.zeros([BM, BD], lse.dtype.element_ty)
        share = tl.zeros([BM], lse.dtype.element_ty)
        for start in range(0, R, BR):
            r = start + tl.arange(0, BR)
            keys = load_rows(mem_k, here, kv, KV, r[:, None], d[None, :], R, D)
            values = load_rows(mem_v, here, kv, KV, r[:, None], d[None, :], R, D)
            p = products(queries, keys, r, R, BR, PRECISION)
            p = tl.exp2(p * (SCALE * LOG2E) - norm[:, None])
            ds = tl.dot(upper, tl.trans(values), input_precision=PRECISION) - drop[:, None]
            ds = p * ds
            share += tl.sum(ds, 1)
            out += tl.dot(ds.to(keys.dtype), keys, input_precision=PRECISION)
        tl.store(
            dq + part[:, None] * D + d[None, :],
            (out * SCALE).to(dq.dtype.element_ty),
            mask=there[:, None] & (d < D)[None, :],
        )
        tl.store(dlog + part, share, mask=there)


@triton.jit
def sum_groups_kernel(sums, start, out, E, BE: tl.constexpr):
    """`[groups, E]` added by chapter, `[C, E]`, in the order of the groups."""
    chapter, e = tl.program_id(0), tl.program_id(1) * BE + tl.arange(0, BE)
    total = tl.zeros([BE], sums.dtype.element_ty)
    begin = tl.load(start + chapter)
    place = sums + begin.to(tl.int64) * E + e
    for _ in range(tl.load(start + chapter + 1) - begin):
        total += tl.load(place, mask=e < E, other=0.0)
        place += E
    tl.store(out + chapter.to(tl.int64) * E + e, total.to(out.dtype.element_ty), mask=e < E)
