"""The chunks of a LaCT call whose rows are shared by the processes of a group.

Every process brings the p-th of P parts of each row. A chunk depends on the weights that the chunk
before it left, so that the parts would wait for each other: instead each of them is dealt out,
token i to process `i mod P`, and every process has its share of every chunk. The updates are sums
over tokens; the sum over the processes is the chunk's (see `memory.written`), so that all hold the
same weights. What a state holds of an open chunk is the same on all processes, too, and written by
`slot mod P`: the state does not show how many processes there were.
Source: Zhang et al. 2025, arXiv:2505.23884 (context parallelism inside of a chunk).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import pad

from lightning_modules.ops.lact.layout import Counts, Step, Uneven
from lightning_modules.ops.processes import exchange, sum_over


class Shared(NamedTuple):
    """As `Uneven`, of the own share of the tokens.

    Attributes:
        rows: the layout: `reads` and `writes` are those of the share, what becomes pending is that
            of the own part.
        writing: chunks that some row of some process writes before the next, N - 1.
        group: the processes.
    """

    rows: Uneven
    writing: list[bool]
    group: ProcessGroup

    @property
    def fresh(self) -> Tensor | None:
        """As in `Uneven`."""
        return self.rows.fresh

    @property
    def carries(self) -> bool:
        """As in `Uneven`."""
        return self.rows.carries

    @property
    def counts(self) -> Counts:
        """As in `Uneven`."""
        return self.rows.counts

    def steps(
        self, q: Tensor, tokens: Sequence[Tensor], held: Sequence[Tensor] | None
    ) -> list[Step]:
        """As in `Even`; the tokens of the own part are dealt out first, in one message."""
        dtype = torch.promote_types(q.dtype, torch.float32)
        parts = [x.to(dtype) for x in (q, *tokens)]
        dealt = deal(torch.cat(parts, dim=-1), self.group)
        share, *own = dealt.split([x.shape[-1] for x in parts], dim=-1)
        if held is not None:
            own = [torch.cat([x.to(dtype), y], dim=1) for x, y in zip(held, own, strict=True)]
        writes: list[tuple[Tensor, ...] | None] = [None] * len(self.rows.rows)
        if any(self.writing):
            chunks = zip(*(self.rows.writes.cut(x) for x in own), strict=True)
            for n, (some, chunk) in enumerate(zip(self.writing, chunks, strict=True)):
                writes[n + 1] = chunk if some else None
        queries = self.rows.reads.cut(share)
        parts_of = zip(self.rows.restarts, writes, self.rows.rows, queries, strict=True)
        return [Step(*part) for part in parts_of]

    def join(self, chunks: list[Tensor]) -> Tensor:
        """The outputs of the own part, which go back to it, `[B, T, H, D]`."""
        return collect(self.rows.join(chunks), self.rows.place.shape[1], self.group)

    def pending(self, x: Tensor, held: Tensor | None, dtype: torch.dtype) -> Tensor:
        """As in `Uneven`, with the tokens of all processes."""
        own = self.rows.add_waiting(self.rows.empty(x, dtype), x)
        added = sum_over(own, self.group)
        return added if held is None else self.rows.keep(held, dtype) + added


def deal(x: Tensor, group: ProcessGroup) -> Tensor:
    """The share `[B, P ceil(T/P), H, E]` of a process, from its part of the row `[B, T, H, E]`.

    Token i of every part goes to process `i mod P`, in the order of the row; zeros fill it up.
    """
    world = group.size()
    x = pad(x, (0, 0, 0, 0, 0, -x.shape[1] % world)).unflatten(1, (-1, world))
    return exchange(x.movedim(2, 0), group).movedim(0, 1).flatten(1, 2)


def collect(x: Tensor, time: int, group: ProcessGroup) -> Tensor:
    """The inverse of `deal`: the part `[B, T, H, E]`."""
    parts = x.unflatten(1, (group.size(), -1)).movedim(1, 0)
    return exchange(parts, group).movedim(0, 2).flatten(1, 2)[:, :time]


def dealt(time: int, group: ProcessGroup, device: torch.device) -> Tensor:
    """Place in the whole row of each token of the share, -1 for what fills it up, `[S]`."""
    world, rank = group.size(), group.rank()
    inside = torch.arange(rank, rank + time + -time % world, world, device=device)
    place = torch.arange(world, device=device).unsqueeze(1) * time + inside
    return torch.where(inside < time, place, -1).flatten()


def compact(chunk: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Number of each token among those of its chunk, `[B, S]`, and how many there are, `[B, N]`.

    Args:
        chunk: of each token, ascending but for -1, which stands for none, `[B, S]`.
        count: N.
    """
    valid = chunk >= 0
    fill = chunk.new_zeros(len(chunk), count)
    fill = fill.scatter_add(1, chunk.clamp(min=0), valid.long())
    before = fill.cumsum(1) - fill
    return valid.cumsum(1) - 1 - before.gather(1, chunk.clamp(min=0)), fill


def share_of(
    chunk: Tensor, is_written: Tensor, pending: int, time: int, ends: int, group: ProcessGroup
) -> tuple[tuple[Tensor, Tensor, list[int]], tuple[Tensor, Tensor, list[int]]]:
    """Chunk, place and width, of what a process reads and of what it writes.

    Args:
        chunk: of the state's and of all tokens of the row, -1 for none, `[B, pending + P T]`.
        is_written: which of them are written in the call, likewise.
        pending: slots of the state.
        time: T.
        ends: N - 1, chunks that end in the call.
        group: the processes.
    """
    world, rank = group.size(), group.rank()
    column = dealt(time, group, chunk.device)
    own = torch.where(column < 0, -1, chunk[:, pending + column.clamp(min=0)])
    kept = torch.arange(pending, device=chunk.device) % world == rank
    held = torch.where(kept, chunk[:, :pending], -1)
    written = torch.cat([is_written[:, :pending], is_written[:, pending + column.clamp(min=0)]], 1)
    writes = torch.cat([held, own], dim=1).masked_fill(~written, -1)
    count = ends + 1
    (read_place, reads), (write_place, fill) = compact(own, count), compact(writes, count)
    widths = torch.stack([reads.amax(0), fill.amax(0)]).clamp(min=1).tolist()
    return (own, read_place, widths[0]), (writes, write_place, widths[1][:-1])
