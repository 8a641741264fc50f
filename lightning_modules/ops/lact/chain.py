"""LaCT's chunks as one differentiable function: only the writing of a chunk waits for another.

Forward: the changes of the weights one after the other, every version kept; then all reading, many
chunks at once. Backward: block by block of chunks from the last, first what was read, then the
chain of changes. Activations are computed again. The weights of a head are one row of numbers, W0,
W2, W1 behind each other (*packed*).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_modules.ops.lact import stack
from lightning_modules.ops.lact.launch_tokens import gather, scatter
from lightning_modules.ops.lact.launch_weights import Norms, add_momentum, update
from lightning_modules.ops.lact.orthogonal import orthogonal
from lightning_modules.ops.lact.sizes import Pair, Sizes
from lightning_modules.ops.lact.walk import Block, Change, Walk
from lightning_modules.ops.ttt_eager import refuse_second_derivatives


class Call(NamedTuple):
    """What a call is beside its tensors.

    Attributes:
        sizes: of its tensors.
        form: of its stacks.
        walk: through its chunks.
        size: C.
        muon_dtype: None: no Muon.
        prenorm: as in the op.
        masked: whether tokens of the call may be in no chunk.
        trains: whether there may be a backward pass.
    """

    sizes: Sizes
    form: stack.Form
    walk: Walk
    size: int
    muon_dtype: torch.dtype | None
    prenorm: bool
    masked: bool
    trains: bool

    def pairs(self, blocks: Tensor, first: int, count: int = 1) -> list[Pair]:
        """Versions `[r, V, G, 3 F D]` from `first` on, of each block a pair with S * G matrices."""
        return [self.sizes.pair(x[first : first + count].flatten(0, 1)) for x in blocks]


class Inputs(NamedTuple):
    """The tensors that `Chain` takes, in this order; gradients come in the same order.

    Attributes:
        q: `[B, T, H, D]`; so are k and v.
        k: keys.
        v: values.
        rates: `[B, T, H, 3]`, or 4 with the momentum's coefficient.
        held_k: of the state, `[B, C, H, D]`; None: nothing is held.
        held_v: likewise.
        held_rates: `[B, C, H, 3 or 4]`.
        start: packed weights, `[r, G, 3 F D]`.
        main: likewise, with pre-norm.
        momentum: likewise, with momentum.
        norms: of the rows, `[r, G, 2 F + D]`.
        learned: packed weights with which documents begin; None: none does.
        learned_norms: of their rows.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    rates: Tensor
    held_k: Tensor | None
    held_v: Tensor | None
    held_rates: Tensor | None
    start: Tensor
    main: Tensor | None
    momentum: Tensor | None
    norms: Tensor
    learned: Tensor | None
    learned_norms: Tensor | None


class Versions(NamedTuple):
    """All weights of a call, `[r, V, G, 3 F D]` each.

    Attributes:
        main: W before its rows are scaled, after every change; V = 1 without a backward pass.
        low: W as products read it.
        momentum: sums that momentum or Muon take, likewise; None without both.
        mean: of the momentum's coefficients of each written chunk, `[N, G]`; None without.
    """

    main: Tensor
    low: Tensor
    momentum: Tensor | None
    mean: Tensor | None


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
        from lightning_modules.ops.lact.chain_backward import run_backward

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
    for n, change in enumerate(changes, start=1):
        sums = None
        if change.write is not None:
            i = change.write
            sums = stack.write(call.form, call.pairs(low, n - 1), k[i], v[i], rates[i])
        _change(call, x, versions, now, n, change, sums)
    return versions, now


def written_tokens(call: Call, x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and rates of the chunks that are written, `[N, G, C, .]`."""
    block, low = call.walk.writes, call.sizes.low
    return (
        gather(x.k, x.held_k, block, low),
        gather(x.v, x.held_v, block, low),
        gather(x.rates, x.held_rates, block, x.start.dtype),
    )


def _change(
    call: Call,
    x: Inputs,
    versions: Versions,
    now: Tensor,
    n: int,
    change: Change,
    sums: list[Pair] | None,
) -> None:
    """Version n, from the one before and the sums over the chunk that is written."""
    by: list[Any] = [None] * len(now) if sums is None else list(sums)
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
    for j, main in enumerate(versions.main):
        learned = None if x.learned is None else x.learned[j]
        update(
            call.sizes, change, by[j], main[old], main[new], now[j], versions.low[j, n],
            norms_of(x, j), learned, call.prenorm,
        )  # fmt: skip


def mean_of(versions: Versions, change: Change) -> Tensor | None:
    """Mean coefficient of the chunk that a change writes, `[G]`; None without one."""
    if versions.mean is None or change.write is None:
        return None
    return versions.mean[change.write]


def norms_of(x: Inputs, j: int) -> Norms:
    """The row norms of a block."""
    return Norms(x.norms[j], None if x.learned_norms is None else x.learned_norms[j])


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
