"""Chapter attention in Triton: the kernels of the forward pass (see `tiles.py`)."""

import triton
import triton.language as tl

from lightning_modules.ops.chapter_attention.kernels.tiles import (
    LOG2E,
    SIZES,
    add_rows,
    load_heads,
    load_rows,
    products,
    slot_tokens,
)


@triton.jit(do_not_specialize=SIZES)
def read_blocks_kernel(
    q,
    mem_k,
    mem_v,
    log_weights,
    chapters,
    o,
    lse,
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
    """Outputs and lse of some tokens of a block, by block."""
    tile, h = tl.program_id(0) // H, tl.program_id(0) % H
    token, there, number = block_tokens(tile, T, block, blocks, BM)
    d, kv = tl.arange(0, BD), h // (H // KV)
    queries = load_heads(q, token * H + h, there, d, D)
    top = tl.full([BM], float("-inf"), lse.dtype.element_ty)
    total = tl.zeros([BM], lse.dtype.element_ty)
    out = tl.zeros([BM, BD], lse.dtype.element_ty)
    for i in range(0, K * tl.cdiv(R, BR)):
        pair = number * K + i // tl.cdiv(R, BR)
        r = i % tl.cdiv(R, BR) * BR + tl.arange(0, BR)
        chapter = tl.load(chapters + pair)
        keys = load_rows(mem_k, chapter, kv, KV, r[:, None], d[None, :], R, D)
        values = load_rows(mem_v, chapter, kv, KV, r[:, None], d[None, :], R, D)
        s, extra = products(queries, keys, r, R, BR, PRECISION), tl.load(log_weights + pair) * LOG2E
        top, total, out = add_rows(top, total, out, s, values, extra, SCALE * LOG2E, PRECISION)
    place = token.to(tl.int64) * H + h
    out = out / total[:, None]
    tl.store(
        o + place[:, None] * D + d[None, :],
        out.to(o.dtype.element_ty),
        mask=there[:, None] & (d < D)[None, :],
    )
    tl.store(lse + place, (top + tl.log2(total)) / LOG2E, mask=there)


@triton.jit
def block_tokens(tile, T, block, blocks, BM: tl.constexpr):
    """Tokens of a tile, which of them there are, and the number of their block in the batch."""
    tiles = tl.cdiv(block, BM)
    number, i = tile // tiles, tile % tiles * BM + tl.arange(0, BM)
    t = number % blocks * block + i
    return number // blocks * T + t, (i < block) & (t < T), number


@triton.jit(do_not_specialize=SIZES)
def read_pairs_kernel(
    q,
    mem_k,
    mem_v,
    order,
    chapter,
    first,
    count,
    parts,
    part_lse,
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
):
    """What every slot of a group reads in its chapter, and the lse, by chapter."""
    group, h = tl.program_id(0) // H, tl.program_id(0) % H
    here, begin = tl.load(chapter + group), tl.load(first + group)
    slots = tl.load(count + group) * block
    d, kv, lane = tl.arange(0, BD), h // (H // KV), tl.arange(0, BR)
    if R <= BR:  # the rows stay while the queries pass
        keys = load_rows(mem_k, here, kv, KV, lane[:, None], d[None, :], R, D)
        values = load_rows(mem_v, here, kv, KV, lane[:, None], d[None, :], R, D)
    for i in range(0, slots, BM):
        s = i + tl.arange(0, BM)
        _, token, choice, there = slot_tokens(
            order, begin, s, s < slots, T, block, blocks, K, BY_TOKEN
        )
        queries = load_heads(q, token * H + h, there, d, D)
        if R <= BR:
            scores = products(queries, keys, lane, R, BR, PRECISION)
            top = tl.max(scores, 1) * (SCALE * LOG2E)
            p = tl.exp2(scores * (SCALE * LOG2E) - top[:, None])
            total = tl.sum(p, 1)
            out = tl.dot(p.to(values.dtype), values, input_precision=PRECISION)
        else:
            top = tl.full([BM], float("-inf"), part_lse.dtype.element_ty)
            total = tl.zeros([BM], part_lse.dtype.element_ty)
            out = tl.zeros([BM, BD], part_lse.dtype.element_ty)
            for start in range(0, R, BR):
                r = start + lane
                some_keys = load_rows(mem_k, here, kv, KV, r[:, None], d[None, :], R, D)
                some_values = load_rows(mem_v, here, kv, KV, r[:, None], d[None, :], R, D)
                scores = products(queries, some_keys, r, R, BR, PRECISION)
                top, total, out = add_rows(
                    top, total, out, scores, some_values, 0.0, SCALE * LOG2E, PRECISION
                )
        place = (token.to(tl.int64) * K + choice) * H + h
        out = out / total[:, None]
        tl.store(
            parts + place[:, None] * D + d[None, :],
            out.to(parts.dtype.element_ty),
            mask=there[:, None] & (d < D)[None, :],
        )
        tl.store(part_lse + place, (top + tl.log2(total)) / LOG2E, mask=there)


@triton.jit(do_not_specialize=SIZES)
def merge_kernel(
    parts,
    part_lse,
    log_weights,
    o,
    lse,
    T,
    block,
    blocks,
    rows_of_output,
    H,
    K: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BD: tl.constexpr,
    MIXTURE: tl.constexpr,
):
    """The k parts of every token and head as one: `sum_j exp(lse_j + log w_j - lse) o_j` (joint),

    lse the logsumexp of `lse_j + log w_j`, or `sum_j w_j o_j`.
    """
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    there, d = row < rows_of_output, tl.arange(0, BD)
    token, h = row // H, row % H
    pair = (token // T * blocks + token % T // block) * K
    part = token * K * H + h
    top = tl.full([BM], float("-inf"), part_lse.dtype.element_ty)
    total = tl.zeros([BM], part_lse.dtype.element_ty)
    if not MIXTURE:
        for j in range(K):
            a = tl.load(part_lse + part + j * H, mask=there, other=0.0)
            a += tl.load(log_weights + pair + j, mask=there, other=0.0)
            new = tl.maximum(top, a)
            shift = tl.where(new == float("-inf"), 0.0, new)
            total = total * tl.exp(top - shift) + tl.exp(a - shift)
            top = new
        total = top + tl.log(total)
        tl.store(lse + row, total, mask=there)
    out = tl.zeros([BM, BD], part_lse.dtype.element_ty)
    for j in range(K):
        weight = tl.load(log_weights + pair + j, mask=there, other=0.0)
        if not MIXTURE:
            weight += tl.load(part_lse + part + j * H, mask=there, other=0.0) - total
        read = load_heads(parts, part + j * H, there, d, D)
        out += tl.exp(weight)[:, None] * read.to(out.dtype)
    tl.store(
        o + row[:, None] * D + d[None, :],
        out.to(o.dtype.element_ty),
        mask=there[:, None] & (d < D)[None, :],
    )
