"""Reading and writing a stack of SwiGLU blocks, each with its backward pass, without autograd.

The equations are those of `block.py`; here products are large, take their operands in one dtype and
give what belongs to a weight in a wide one, and all between two of them is one kernel. Tokens are
`[G, C, D]`; a block's weights a `Pair`: W0 over W2, `[G, 2 F, D]`, and W1, `[G, D, F]`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_modules.ops.lact import few
from lightning_modules.ops.lact.launch_tokens import (
    read_gate,
    read_gate_backward,
    write_gate,
    write_gate_backward,
)
from lightning_modules.ops.lact.sizes import Pair
from lightning_modules.ops.products import wide_product


class Form(NamedTuple):
    """What a stack is beside its weights: F, two keywords of the op, and whether launches count.

    `few`: products are so small, and blocks hand nothing to each other, that chunks are written in
    few launches (see `few.py`).
    """

    hidden: int
    residual: bool
    greedy: bool
    few: bool


def read(form: Form, blocks: Sequence[Pair], x: Tensor) -> Tensor:
    """`x_r` of `x_0 = x`."""
    for j, (w02, w1) in enumerate(blocks):
        y = torch.bmm(read_gate(torch.bmm(x, w02.mT), form.hidden), w1.mT)
        x = _add(y, x) if form.residual and j < len(blocks) - 1 else y
    return x


def read_backward(
    form: Form, blocks: Sequence[Pair], x: Tensor, upper: Tensor
) -> tuple[Tensor, list[Pair]]:
    """Gradients of x and of each block's weights, from that of `read`."""
    inside: list[tuple[Tensor, Tensor]] = []
    for j, (w02, w1) in enumerate(blocks):
        ph = torch.bmm(x, w02.mT)
        inside.append((x, ph))
        if j < len(blocks) - 1:
            y = torch.bmm(read_gate(ph, form.hidden), w1.mT)
            x = _add(y, x) if form.residual else y
    changes: list[Pair] = []
    for j in reversed(range(len(blocks))):
        (w02, w1), (x, ph) = blocks[j], inside.pop()
        hidden = read_gate_backward(ph, torch.bmm(upper, w1), ph)
        changes.insert(0, (_wide(ph.mT, x), _wide(upper.mT, hidden)))
        below = torch.bmm(ph, w02)
        upper = _add(below, upper) if form.residual and j < len(blocks) - 1 else below
    return upper, changes


def rooms(form: Form, blocks: int, k: Tensor, *, backward: bool) -> list[few.Room]:
    """Where `write` or `write_backward` put what they compute of the chunks k, `[N, G, C, D]`.

    None without form.few, or without chunks.
    """
    return few.rooms(blocks, k[0], form.hidden, backward=backward) if form.few and len(k) else []


def write(
    form: Form,
    blocks: Sequence[Pair],
    k: Tensor,
    v: Tensor,
    rates: Tensor,
    rooms: Sequence[few.Room],
) -> list[Pair]:
    """The change of each block: sums over the tokens, wide."""
    if form.few:
        return few.write(blocks, k, v, rates, rooms)
    inside, x = [], k
    for j, (w02, w1) in enumerate(blocks):
        ph = torch.bmm(x, w02.mT)
        inside.append((x, ph))
        if j < len(blocks) - 1 and not form.greedy:
            y = torch.bmm(read_gate(ph, form.hidden), w1.mT)
            x = _add(y, x) if form.residual else y
    changes: list[Pair] = []
    d = v
    for j in reversed(range(len(blocks))):
        (w02, w1), (x, ph) = blocks[j], inside.pop()
        goes_on = j > 0 and not form.greedy
        u = torch.bmm(d, w1)
        scaled, hidden, plain = write_gate(ph, u, rates, form.hidden, scaled=True, plain=goes_on)
        assert scaled is not None and hidden is not None
        changes.insert(0, (_wide(scaled.mT, x), _wide(d.mT, hidden)))
        if plain is not None:
            below = torch.bmm(plain, w02)
            d = _add(below, d) if form.residual and j < len(blocks) - 1 else below
    return changes


class _Inside(NamedTuple):
    """What `write` saw in a block, beside what comes back from above.

    Attributes:
        x: what the block read.
        d: the gradient of the inner objective by what it gave.
        pa: `p, h` and the gradients of `lr0 a`, `lr2 u g`, `[G, C, 4 F]`.
        ud: `u` and the gradient of `lr1 g h`, `[G, C, 2 F]`.
        plain: `a, u g`, if d of a block below came of it.
    """

    x: Tensor
    d: Tensor
    pa: Tensor
    ud: Tensor
    plain: Tensor | None


def write_backward(
    form: Form,
    blocks: Sequence[Pair],
    k: Tensor,
    v: Tensor,
    rates: Tensor,
    drates: Tensor,
    rooms: Sequence[few.Room],
) -> list[Pair]:
    """Gradients of the weights; those of k, v take the place of k, v, those of rates go to drates.

    Args:
        form: of the stack.
        blocks: weights beside the gradients of their changes: W0, W2 and theirs, `[G, 4 F, D]`;
            W1 and its, `[G, D, 2 F]`.
        k: `[G, C, D]`.
        v: `[G, C, D]`.
        rates: `[G, C, 3 or 4]`.
        drates: in parts, as `few.write_backward` has them; without `few` there is one.
        rooms: of `rooms`.
    """
    if form.few:
        return few.write_backward(blocks, k, v, rates, drates, rooms)
    (drates,) = drates
    if len(blocks) > 1 and not form.greedy:
        return _through_stack(form, blocks, k, v, rates, drates)
    changes, after = [], []
    for j, (first, second) in enumerate(blocks):
        pa, ud = torch.bmm(k, first.mT), torch.bmm(v, second)
        write_gate_backward(pa, ud, rates, None, drates, j > 0, out=pa)
        changes.append(_own_changes(form, pa, ud, k, v))
        after.append((pa, ud))
    for j, (first, second) in enumerate(blocks):
        pa, ud = after[j]
        if j == 0:
            torch.bmm(pa, first, out=k)
            torch.bmm(ud, second.mT, out=v)
        else:
            k += torch.bmm(pa, first)
            v += torch.bmm(ud, second.mT)
    return changes


def _own_changes(form: Form, pa: Tensor, ud: Tensor, x: Tensor, d: Tensor) -> Pair:
    """Gradients of a block's weights by way of p, h and u."""
    return _wide(pa[..., : 2 * form.hidden].mT, x), _wide(d.mT, ud[..., : form.hidden])


def _through_stack(
    form: Form, blocks: Sequence[Pair], k: Tensor, v: Tensor, rates: Tensor, drates: Tensor
) -> list[Pair]:
    """`write_backward` where blocks hand x up and d down."""
    inside = _again(form, blocks, k, v, rates)
    upper: Tensor | None = None  # the gradient by d, which goes up as d went down
    outs, changes = [], []
    for j, ((first, second), one) in enumerate(zip(blocks, inside, strict=True)):
        w02 = first[:, : 2 * form.hidden]
        extra = None if upper is None else torch.bmm(upper, w02.mT)
        out = torch.empty_like(one.pa)
        write_gate_backward(one.pa, one.ud, rates, extra, drates, j > 0, out=out)
        of_w02, of_w1 = _own_changes(form, out, one.ud, one.x, one.d)
        if upper is not None and one.plain is not None:
            of_w02 += _wide(one.plain.mT, upper)
        above = torch.bmm(one.ud, second.mT)
        if upper is not None and form.residual and j < len(blocks) - 1:
            above = _add(above, upper)
        upper = above
        outs.append(out)
        changes.append((of_w02, of_w1))
    below = _down(form, blocks, inside, outs, changes)
    assert upper is not None
    k.copy_(below)
    v.copy_(upper)
    return changes


def _down(
    form: Form,
    blocks: Sequence[Pair],
    inside: list[_Inside],
    outs: list[Tensor],
    changes: list[Pair],
) -> Tensor:
    """The gradient by x, down through what the blocks read; adds to those of the weights."""
    hidden_size, dx = form.hidden, None
    for j in reversed(range(len(blocks))):
        (first, second), one, out = blocks[j], inside[j], outs[j]
        if dx is not None:
            dph = torch.empty_like(
                out[..., : 2 * hidden_size], memory_format=torch.contiguous_format
            )
            dhidden = torch.bmm(dx, second[..., :hidden_size])
            hidden = read_gate_backward(one.pa, dhidden, dph)
            out[..., : 2 * hidden_size] += dph
            changes[j][0].add_(_wide(dph.mT, one.x))
            changes[j][1].add_(_wide(dx.mT, hidden))
        below = torch.bmm(out, first)
        dx = _add(below, dx) if dx is not None and form.residual else below
    assert dx is not None
    return dx


def _again(
    form: Form, blocks: Sequence[Pair], k: Tensor, v: Tensor, rates: Tensor
) -> list[_Inside]:
    """What `write` saw, block by block, and what comes back to it from the gradients beside."""
    ups, x = [], k
    for j, (first, second) in enumerate(blocks):
        pa = torch.bmm(x, first.mT)
        ups.append((x, pa))
        if j < len(blocks) - 1:
            w1 = second[..., : form.hidden]
            y = torch.bmm(read_gate(pa, form.hidden), w1.mT)
            x = _add(y, x) if form.residual else y
    inside: list[_Inside] = []
    d = v
    for j in reversed(range(len(blocks))):
        (first, second), (x, pa) = blocks[j], ups[j]
        ud = torch.bmm(d, second)
        plain, given = None, d
        if j > 0:
            plain = write_gate(pa, ud, rates, form.hidden, scaled=False, plain=True)[2]
            assert plain is not None
            below = torch.bmm(plain, first[:, : 2 * form.hidden])
            d = _add(below, d) if form.residual and j < len(blocks) - 1 else below
        inside.insert(0, _Inside(x, given, pa, ud, plain))
    return inside


def _add(y: Tensor, x: Tensor) -> Tensor:
    """The sum, in the place of the first."""
    return y.add_(x)


def _wide(a: Tensor, b: Tensor) -> Tensor:
    """`a b`, not rounded to the dtype of bfloat16 factors."""
    return wide_product(a, b) if a.dtype == torch.bfloat16 else torch.bmm(a, b)
