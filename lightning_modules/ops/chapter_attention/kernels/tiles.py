"""Chapter attention in Triton: how the work is cut, and what the kernels share.

Blocks of many tokens are read *by block*: a program takes tokens of a block and one head, and walks
through the rows of its k chapters with a running softmax. Tokens that choose each on their own are
read *by chapter*: a program takes a group of (block, choice) pairs of one chapter
(`groups.sorted_groups`) and one head, loads the chapter's rows once, and leaves for each of the
pairs' tokens, its *slots*, what it reads there and the lse; a second kernel merges the k parts of
each token. Part j of token t has the number `t k + j`.

Gradients of rows are always computed by chapter: each group leaves a sum, and sums of a chapter are
added in their order, so that no addition is atomic. Exponentials are powers of two, so logits are
multiplied by `log2 e`; lse and weights are natural logarithms outside of the kernels. With 64
channels the exponentials alone take as long as the products; so `scale log2 e` is multiplied where
an exponent is taken, together with what is subtracted there, as one operation for each logit.
"""

import triton
import triton.language as tl

SIZES = ("T", "blocks", "rows_of_output")
"""Arguments whose value must not make a kernel compile again."""

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(mem, chapter, head, KV, r, d, R: tl.constexpr, D: tl.constexpr):
    """Rows r of a chapter from `[C, R, Hkv, D]`, 0 outside."""
    place = ((chapter.to(tl.int64) * R + r) * KV + head) * D + d
    return tl.load(mem + place, mask=(r < R) & (d < D), other=0.0)


@triton.jit
def load_heads(x, row, inside, d, D: tl.constexpr):
    """Vectors from `[..., D]`, 0 outside."""
    place = row.to(tl.int64)[:, None] * D + d[None, :]
    return tl.load(x + place, mask=inside[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def slot_tokens(order, first, s, inside, T, block, blocks, K: tl.constexpr, BY_TOKEN: tl.constexpr):
    """Pair, token and choice of the slots s of a group, and which of them hold a token."""
    if BY_TOKEN:
        pair = tl.load(order + first + s, mask=inside, other=0)
        token, there = pair // K, inside
    else:
        pair = tl.load(order + first + s // block, mask=inside, other=0)
        place = pair // K
        t = place % blocks * block + s % block
        token, there = place // blocks * T + t, inside & (t < T)
    return pair, token, pair % K, there


@triton.jit
def products(q, keys, r, R: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr):
    """`q k^T`, -inf for rows that a chapter has not."""
    s = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
    if R % BR != 0:
        s = tl.where((r < R)[None, :], s, float("-inf"))
    return s


@triton.jit
def add_rows(top, total, out, s, values, extra, FACTOR: tl.constexpr, PRECISION: tl.constexpr):
    """A running softmax, with more logits `FACTOR s + extra`, FACTOR over 0.

    Its largest logit, sum of exponentials, and output.
    """
    new = tl.maximum(top, tl.max(s, 1) * FACTOR + extra)
    shift = tl.where(new == float("-inf"), 0.0, new)  # so far nothing but weights of 0
    p, keep = tl.exp2(s * FACTOR + (extra - shift)[:, None]), tl.exp2(top - shift)
    total = total * keep + tl.sum(p, 1)
    out = out * keep[:, None] + tl.dot(p.to(values.dtype), values, input_precision=PRECISION)
    return new, total, out
