"""LaCT's chunks as one differentiable function: only the writing of a chunk waits for another.

Forward: the changes of the weights one after the other, every version kept; then all reading, many
chunks at once. Backward: block by block of chunks from the last, first what was read, then the
chain of changes. Activations are computed again. The weights of a head are one row of numbers, W0,
W2, W1 behind each other (*packed*).
"""

from typing import Any

import torch
from torch import Tensor

from lightning_modules.ops.lact import stack
from lightning_modules.ops.lact.call import (
    Call,
    Inputs,
    Rows,
    Versions,
    mean_of,
    rows_of,
    written_tokens,
)
from lightning_modules.ops.lact.chain_backward import run_backward
from lightning_modules.ops.lact.launch_tokens import gather, scatter
from lightning_modules.ops.lact.launch_weights import add_momentum, update
from lightning_modules.ops.lact.orthogonal import orthogonal
from lightning_modules.ops.lact.sizes import Pair
from lightning_modules.ops.lact.walk import Block, Change
from lightning_modules.ops.ttt_eager import refuse_second_derivatives


class Chain(torch.autograd.Function):
    """`o [B, T, H, D]`, and the last W, main, momentum, packed; differentiable once."""

    @staticmethod
    def forward(ctx: Any, call: Call, *inputs: Any) -> tuple[Tensor | None, ...]:
        x = Inputs(*inputs)
        with torch.cuda.device_of(x.q):
            versions, now = _change_all(call, x)
            o = _read_all(call, x.q, versions)
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *versions)
        # Copies: a view would keep all versions alive as long as the state.
        main = versions.main[:, -1].clone() if call.prenorm else None
        momentum = None
        if x.momentum is not None and versions.momentum is not None:
            momentum = versions.momentum[:, -1].clone()
        return o, now, main, momentum

    @staticmethod
    def backward(ctx: Any, *upper: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivatives("lact", "triton")
        tensors, count = ctx.saved_tensors, len(Inputs._fields)
        inputs, versions = Inputs(*tensors[:count]), Versions(*tensors[count:])
        with torch.cuda.device_of(inputs.q):
            return None, *run_backward(ctx.call, inputs, versions, *upper)


def _change_all(call: Call, x: Inputs) -> tuple[Versions, Tensor]:
    """All versions, and the last W, `[r, G, 3 F D]`."""
    sizes, changes = call.sizes, call.walk.changes
    shape = (len(x.start), len(changes) + 1, sizes.groups, sizes.packed)
    kept = (shape[0], shape[1] if call.trains else 1, *shape[2:])
    main, low = x.start.new_empty(kept), x.start.new_empty(shape, dtype=sizes.low)
    main[:, 0] = x.start if x.main is None else x.main
    low[:, 0] = x.start
    momentum = mean = None
    if x.momentum is not None or call.muon_dtype is not None:
        momentum = x.start.new_empty(kept)
        momentum[:, 0] = 0 if x.momentum is None else x.momentum
    k, v, rates = written_tokens(call, x)
    if x.momentum is not None:
        mean = rates[..., -1].sum(-1) / call.size
    versions = Versions(main, low, momentum, mean)
    now = x.start.clone()
    blocks, pairs = list(zip(rows_of(x, versions), now, strict=True)), call.each_version(low)
    written = list(zip(k.unbind(), v.unbind(), rates.unbind(), strict=True))
    rooms = stack.rooms(call.form, len(blocks), k, backward=False)
    for n, change in enumerate(changes, start=1):
        sums = None
        if change.write is not None:
            sums = stack.write(call.form, pairs[n - 1], *written[change.write], rooms)
        _change(call, x, versions, blocks, n, change, sums)
    return versions, now


def _change(
    call: Call,
    x: Inputs,
    versions: Versions,
    blocks: list[tuple[Rows, Tensor]],
    n: int,
    change: Change,
    sums: list[Pair] | None,
) -> None:
    """Version n and W, from the version before and the sums over the chunk that is written."""
    by: list[Any] = [None] * len(blocks) if sums is None else list(sums)
    old, new = (n - 1, n) if call.trains else (0, 0)  # without a backward pass in place
    if versions.momentum is not None:
        for j, kept in enumerate(versions.momentum):
            before = None if x.momentum is None else kept[old]
            add_momentum(call.sizes, change, by[j], before, mean_of(versions, change), kept[new])
        if sums is not None:
            by = list(versions.momentum[:, new])
            if call.muon_dtype is not None:
                size = (call.form.hidden, call.sizes.size)
                by = list(orthogonal(versions.momentum[:, new], *size, call.muon_dtype))
    for g, (rows, now) in zip(by, blocks, strict=True):
        update(
            call.sizes, change, g, rows.main[old], rows.main[new], now, rows.low[n],
            rows.norms, rows.learned, call.prenorm,
        )  # fmt: skip


def _read_all(call: Call, q: Tensor, versions: Versions) -> Tensor:
    """What all tokens read, `[B, T, H, D]`."""
    o = q.new_zeros(q.shape) if call.masked else q.new_empty(q.shape)
    for block in call.walk.reads:
        x = gather(q, None, block, q.dtype).flatten(0, 1)
        pairs = call.pairs(versions.low, block.version, block.number)
        scatter(_blocks(stack.read(call.form, pairs, x), block), o, None, block)
    return o


def _blocks(x: Tensor, block: Block) -> Tensor:
    return x.unflatten(0, (block.number, -1))
