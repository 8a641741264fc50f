"""The way back through LaCT's versions (see `chain.py`)."""

import torch
from torch import Tensor

from lightning_modules.ops.lact import few, stack
from lightning_modules.ops.lact.call import (
    Call,
    Inputs,
    Versions,
    mean_of,
    rows_of,
    written_tokens,
)
from lightning_modules.ops.lact.launch_tokens import gather, scatter
from lightning_modules.ops.lact.launch_weights import (
    Carry,
    Norms,
    momentum_backward,
    update_backward,
)
from lightning_modules.ops.lact.orthogonal import orthogonal_backward
from lightning_modules.ops.lact.sizes import Pair
from lightning_modules.ops.lact.walk import Block, Change


def run_backward(
    call: Call,
    x: Inputs,
    versions: Versions,
    do: Tensor | None,
    dnow: Tensor | None,
    dmain: Tensor | None,
    dmomentum: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs, in their order, from those of the outputs (None: zero)."""
    carry = _carries(x, dnow, dmain, dmomentum)
    reading, writing = Reading(call, x.q, versions, do), Writing(call, x, versions)
    for n in range(len(call.walk.changes), 0, -1):
        writing.step(n, carry, reading.at(n))
    for changes in (reading.at(0), writing.left):
        for one, (of_w02, of_w1) in zip(carry, changes or (), strict=False):
            w02, w1 = call.sizes.pair(one.weights)
            w02 += of_w02
            w1 += of_w1

    def stacked(name: str) -> Tensor | None:
        parts = [getattr(one, name) for one in carry]
        return None if parts[0] is None else torch.stack(parts)

    of_norms = [one.norms for one in carry]
    learned_norms = [norms.learned for norms in of_norms if norms.learned is not None]
    return (
        reading.dq,
        *writing.token_gradients(x),
        stacked("weights"),
        stacked("main"),
        stacked("momentum"),
        torch.stack([norms.start for norms in of_norms]),
        stacked("learned"),
        torch.stack(learned_norms) if learned_norms else None,
    )


def _carries(
    x: Inputs, dnow: Tensor | None, dmain: Tensor | None, dmomentum: Tensor | None
) -> list[Carry]:
    """The gradients at the last version, block by block; copies, as they change in place."""

    def begin(upper: Tensor | None, like: Tensor) -> Tensor:
        if upper is None:
            return torch.zeros_like(like)
        return upper.clone(memory_format=torch.contiguous_format)

    def maybe(upper: Tensor | None, like: Tensor | None, j: int) -> Tensor | None:
        return None if like is None else begin(None if upper is None else upper[j], like[j])

    return [
        Carry(
            begin(None if dnow is None else dnow[j], start),
            maybe(dmain, x.main, j),
            maybe(dmomentum, x.momentum, j),
            Norms(torch.zeros_like(x.norms[j]), maybe(None, x.learned_norms, j)),
            maybe(None, x.learned, j),
        )
        for j, start in enumerate(x.start)
    ]


class Reading:
    """The gradients of what was read, block of chunks by block from the last.

    Args:
        call: the call.
        q: its queries.
        versions: its weights.
        do: gradient of its outputs; None: zero.
    """

    def __init__(self, call: Call, q: Tensor, versions: Versions, do: Tensor | None) -> None:
        self.call, self.q, self.low, self.do = call, q, versions.low, do
        self.left = [] if do is None else list(call.walk.reads)
        self.found: dict[int, list[Pair]] = {}
        new = torch.zeros if call.masked or do is None else torch.empty
        self.dq = new(q.shape, dtype=q.dtype, device=q.device)

    def at(self, n: int) -> list[Pair] | None:
        """Gradients of each block's weights of version n; None: nothing read them."""
        while self.left and self.left[-1].version + self.left[-1].number > n:
            self._back(self.left.pop())
        return self.found.pop(n, None)

    def _back(self, block: Block) -> None:
        call, groups = self.call, self.call.sizes.groups
        assert self.do is not None
        x, upper = (gather(t, None, block, self.q.dtype).flatten(0, 1) for t in (self.q, self.do))
        pairs = call.pairs(self.low, block.version, block.number)
        dx, changes = stack.read_backward(call.form, pairs, x, upper)
        scatter(dx.unflatten(0, (block.number, -1)), self.dq, None, block)
        parts = [zip(*(x.split(groups) for x in pair), strict=True) for pair in changes]
        for s, here in enumerate(map(list, zip(*parts, strict=True))):
            before = self.found.get(block.version + s)
            if before is not None:
                here = [(a + c, b + d) for (a, b), (c, d) in zip(here, before, strict=True)]
            self.found[block.version + s] = here


class Writing:
    """The gradients of what was written, version by version from the last.

    Args:
        call: the call.
        x: its tensors.
        versions: its weights.
    """

    def __init__(self, call: Call, x: Inputs, versions: Versions) -> None:
        self.call, self.versions = call, versions
        self.k, self.v, self.rates = written_tokens(call, x)
        parts = 1
        if call.form.few:
            parts = few.rate_parts(call.form.hidden, len(versions.low))
        number, *slots = self.rates.shape
        self.drates = self.rates.new_empty(number, parts, *slots)
        tokens = (self.k, self.v, self.rates, self.drates)
        self.chunks = list(zip(*(each.unbind() for each in tokens), strict=True))
        self.rows = rows_of(x, versions)
        self.rooms = stack.rooms(call.form, len(self.rows), self.k, backward=True)
        shape, sizes = versions.low.shape, call.sizes
        self.both = versions.low.new_empty(shape[0], shape[2], 2 * shape[3]).unbind()
        self.operands = [sizes.operands(both) for both in self.both]
        self.dchange, self.dmean = None, None
        if versions.momentum is not None:
            self.dchange = x.start.new_empty(x.start.shape)
        if versions.mean is not None:
            self.dmean = x.start.new_empty(len(self.k), shape[0], sizes.groups, sizes.rows)
        self.left: list[Pair] | None = None
        """What the change after version n left at its weights."""

    def step(self, n: int, carry: list[Carry], read: list[Pair] | None) -> None:
        """Through the change that made version n; what it leaves at version n - 1 is in `left`."""
        call, change = self.call, self.call.walk.changes[n - 1]
        for j, (one, rows) in enumerate(zip(carry, self.rows, strict=True)):
            update_backward(
                call.sizes,
                change,
                one,
                read[j] if read else None,
                self.left[j] if self.left else None,
                rows.main[n],
                rows.low[n - 1],
                self.both[j],
                None if self.dchange is None else self.dchange[j],
                rows.norms,
            )
        if self.dchange is not None:
            self._through_momentum(n, carry, change)
        self.left = None
        if change.write is not None:
            k, v, rates, drates = self.chunks[change.write]
            self.left = stack.write_backward(
                call.form, self.operands, k, v, rates, drates, self.rooms
            )

    def _through_momentum(self, n: int, carry: list[Carry], change: Change) -> None:
        call, versions, dchange = self.call, self.versions, self.dchange
        assert versions.momentum is not None and dchange is not None
        if call.muon_dtype is not None and change.write is not None:
            size = (call.form.hidden, call.sizes.size)
            kept = versions.momentum[:, n]
            dchange = orthogonal_backward(kept, dchange, *size, call.muon_dtype)
        for j, one in enumerate(carry):
            dmean = None
            if self.dmean is not None and change.write is not None:
                dmean = self.dmean[change.write, j]
            momentum_backward(
                call.sizes,
                change,
                dchange[j],
                one.momentum,
                versions.momentum[j, n - 1],
                mean_of(versions, change),
                self.rows[j].low[n - 1],
                self.both[j],
                dmean,
            )

    def token_gradients(self, x: Inputs) -> tuple[Tensor | None, ...]:
        """Of k, v, rates, and of those that the state held."""
        drates = self.drates[:, 0] if self.drates.shape[1] == 1 else self.drates.sum(1)
        if self.dmean is not None:
            mean = self.dmean.sum((1, 3)) / self.call.size
            drates[..., -1] = mean.unsqueeze(-1)
        own, held = [], []
        for name in ("k", "v", "rates"):
            like, before = getattr(x, name), getattr(x, f"held_{name}")
            out = self._room(like)
            back = None if before is None else torch.zeros_like(before)
            slots = drates if name == "rates" else getattr(self, name)
            scatter(slots, out, back, self.call.walk.writes)
            own.append(out)
            held.append(back)
        return *own, *held

    def _room(self, like: Tensor) -> Tensor:
        """For gradients of tokens: 0 where one is not written."""
        block = self.call.walk.writes
        if block.token is not None:
            return like.new_zeros(like.shape)
        out = like.new_empty(like.shape)
        out[:, max(0, block.number * block.width - block.pending) :] = 0
        return out
