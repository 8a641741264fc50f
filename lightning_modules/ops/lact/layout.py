"""The chunks of a LaCT call: which tokens are read and written when, and which stay pending.

Every row goes through its chunks in step. In step n a row reads the tokens it has in chunk n,
after it has written chunk n - 1 if chunk n continues its document: a full chunk is not written
before the next token is there.

`Even` rows are all cut alike (views), `Uneven` ones each on its own (a gather). Both have the same
methods. Tokens are `[B, T, H, E]`, chunks `[H, B, m, E]`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_modules.ops.grid import MoveRows


class Step(NamedTuple):
    """What happens at a chunk, in this order.

    Attributes:
        restart: rows that begin a document, bool `[B]`; None: none.
        tokens: what is written: k, v, lr (and momentum) of the chunk before, `[H, B, C, E]`; None:
            nothing.
        rows: rows that write, bool `[B]`; None: all.
        q: what is read, `[H, B, m, D]`.
    """

    restart: Tensor | None
    tokens: tuple[Tensor, ...] | None
    rows: Tensor | None
    q: Tensor


class Counts(NamedTuple):
    """The integer fields of a state, `[B]` each."""

    pending_count: Tensor
    updates: Tensor
    tokens_seen: Tensor
    document_id: Tensor


class Even(NamedTuple):
    """Rows without masks and documents that have come equally far.

    Attributes:
        time: T.
        size: C.
        ahead: tokens that the state left pending.
        adapt: whether chunks are written.
        carries: whether there is a state that has seen something.
        counts: after the call.
    """

    time: int
    size: int
    ahead: int
    adapt: bool
    carries: bool
    counts: Counts

    @property
    def fresh(self) -> None:
        """Rows whose state has seen nothing, if only some: none."""

    def steps(
        self, q: Tensor, tokens: Sequence[Tensor], held: Sequence[Tensor] | None
    ) -> list[Step]:
        """All steps of the call; `held` are the pending tokens of the state, or None."""
        queries = self._cut(q)
        writes: list[tuple[Tensor, ...] | None] = [None] * len(queries)
        if self.adapt and len(queries) > 1:
            chunks = [self._cut(x) for x in tokens]
            if held is not None:
                for own, before in zip(chunks, held, strict=True):
                    first = before[:, : self.ahead].permute(2, 0, 1, 3)
                    own[0] = torch.cat([first, own[0]], dim=2)
            writes[1:] = list(zip(*chunks, strict=True))[:-1]
        return [Step(None, w, None, chunk) for w, chunk in zip(writes, queries, strict=True)]

    @property
    def widths(self) -> list[int]:
        """Tokens that each chunk reads."""
        first = min(self.size - self.ahead, self.time)
        full, rest = divmod(self.time - first, self.size)
        return [first] + [self.size] * full + [rest] * (rest > 0)

    def _cut(self, x: Tensor) -> list[Tensor]:
        return [part.permute(2, 0, 1, 3) for part in x.split(self.widths, dim=1)]

    def join(self, chunks: list[Tensor]) -> Tensor:
        """The outputs of the steps as `[B, T, H, D]`."""
        return torch.cat([x.permute(1, 2, 0, 3) for x in chunks], dim=1)

    def pending(self, x: Tensor, held: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Those tokens of x that are in an open chunk, `[B, C, H, E]`, zero after the last."""
        count = (self.ahead + self.time - 1) % self.size + 1
        own = x[:, max(self.time - count, 0) :].to(dtype)
        parts = [own, own.new_zeros(len(x), self.size - count, *x.shape[2:])]
        if held is not None and count > self.time:
            parts.insert(0, held[:, : self.ahead].to(dtype))
        return torch.cat(parts, dim=1)


class Slots(NamedTuple):
    """A slot for every token: chunk after chunk, row after row inside one.

    Attributes:
        slot: of each token, -1 if it has none, `[B * S]`.
        token: the inverse, the token in each slot, -1 if it is empty.
        widths: slots of a row in each chunk.
    """

    slot: Tensor
    token: Tensor
    widths: list[int]

    def cut(self, x: Tensor) -> list[Tensor]:
        """Tokens `[B, S, H, E]` as chunks `[H, B, m, E]` (views), empty slots 0."""
        batch, time, *inner = x.shape
        rows = MoveRows.apply(x.reshape(batch * time, -1), self.token, self.slot)
        parts = rows.split([batch * width for width in self.widths])
        return [
            part.view(batch, width, *inner).permute(2, 0, 1, 3)
            for part, width in zip(parts, self.widths, strict=True)
        ]

    def join(self, chunks: list[Tensor]) -> Tensor:
        """The inverse of `cut`, 0 for tokens without a slot."""
        heads, batch, _, size = chunks[0].shape
        rows = torch.cat([x.permute(1, 2, 0, 3).reshape(-1, heads * size) for x in chunks])
        return MoveRows.apply(rows, self.slot, self.token).view(batch, -1, heads, size)


class Uneven(NamedTuple):
    """Rows that differ in what they hold: N chunks; S tokens, the state's before the call's.

    Attributes:
        reads: slots of the call's tokens; a chunk is as wide as some row needs it.
        writes: slots of the S tokens in the first N - 1 chunks, of width C if some row writes it.
        rows: rows that write the chunk before, for each chunk, bool `[B]`.
        restarts: rows that begin a document, for each chunk; None: none does.
        fresh: rows of the state that have seen nothing, bool `[B]`; None: none.
        place: slot of each of the call's tokens in its chunk, `[B, T]`.
        waits: the call's tokens that are pending after it, bool `[B, T]`.
        kept: slots of the state's tokens that are still pending after the call, bool `[B, C]`.
        drops: whether some are not.
        size: C.
        carries: whether there is a state.
        counts: after the call.
    """

    reads: Slots
    writes: Slots
    rows: Sequence[Tensor]
    restarts: Sequence[Tensor | None]
    fresh: Tensor | None
    place: Tensor
    waits: Tensor
    kept: Tensor
    drops: bool
    size: int
    carries: bool
    counts: Counts

    def steps(
        self, q: Tensor, tokens: Sequence[Tensor], held: Sequence[Tensor] | None
    ) -> list[Step]:
        """As in `Even`."""
        writes: list[tuple[Tensor, ...] | None] = [None] * len(self.rows)
        if any(self.writes.widths):
            if held is not None:
                tokens = [torch.cat(pair, dim=1) for pair in zip(held, tokens, strict=True)]
            chunks = zip(*(self.writes.cut(x) for x in tokens), strict=True)
            for n, (width, chunk) in enumerate(zip(self.writes.widths, chunks, strict=True)):
                writes[n + 1] = chunk if width else None
        queries = self.reads.cut(q)
        parts = zip(self.restarts, writes, self.rows, queries, strict=True)
        return [Step(*part) for part in parts]

    def join(self, chunks: list[Tensor]) -> Tensor:
        """As in `Even`."""
        return self.reads.join(chunks)

    def pending(self, x: Tensor, held: Tensor | None, dtype: torch.dtype) -> Tensor:
        """As in `Even`."""
        return self.add_waiting(self.empty(x, dtype) if held is None else self.keep(held, dtype), x)

    def empty(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Slots `[B, C, H, E]` for tokens like x, zero."""
        return x.new_zeros(len(x), self.size, *x.shape[2:], dtype=dtype)

    def keep(self, held: Tensor, dtype: torch.dtype) -> Tensor:
        """What stays pending of the state's tokens, `[B, C, H, E]`."""
        kept, held = self.kept[..., None, None], held.to(dtype)
        # A product is much faster on a CPU; only of what is dropped may it not keep a NaN.
        return torch.where(kept, held, 0) if self.drops else held * kept

    def add_waiting(self, buffer: Tensor, x: Tensor) -> Tensor:
        """Put those of the call's tokens that become pending into free slots, in place."""
        # A free slot is 0: adding is writing, and tokens that do not wait add 0 somewhere.
        waiting = x.masked_fill(~self.waits[..., None, None], 0).to(buffer.dtype)
        return buffer.scatter_add_(1, self.place[..., None, None].expand_as(x), waiting)
