"""The order in which the weights of a call change, and which tokens are read with which of them.

Only what is written waits for what was written before it. All weights that a call goes through are
kept (*versions*: 0 is what it begins with), so that chunks of the same width are read at once.
"""

from typing import NamedTuple

from torch import Tensor

from lightning_modules.ops.lact.layout import Even, Uneven

ROWS = 2**17
"""Tokens times heads that are read at once: enough for a GPU, little beside a long call."""


class Block(NamedTuple):
    """Chunks of one width; chunk i of S has slots `[B, w]`.

    Attributes:
        version: the weights that its first chunk reads with; each next chunk the next ones.
        number: S.
        width: w.
        start: token of the call in the first slot, negative in the state; without a map, the
            others follow.
        token: index of the token in each slot, among those of the state and of the call, -1 for
            none, `[S * B * w]`; None: without a map.
        pending: tokens of the state before those of the call, in each row.
    """

    version: int
    number: int
    width: int
    start: int
    token: Tensor | None
    pending: int


class Change(NamedTuple):
    """How a version follows from the one before.

    Attributes:
        restart: rows that begin a document, bool `[B]`; None: none.
        renewed: rows that have begun one in this call, up to here, bool `[B]`; None: none.
        write: index of the chunk that is written, None: none.
        rows: rows that write, bool `[B]`; None: all.
    """

    restart: Tensor | None
    renewed: Tensor | None
    write: int | None
    rows: Tensor | None


class Walk(NamedTuple):
    """All of a call.

    Attributes:
        reads: every token is in one of them.
        changes: one for every version after the first.
        writes: the chunks that are written.
    """

    reads: list[Block]
    changes: list[Change]
    writes: Block


def walk(layout: Even | Uneven, batch: int, heads: int) -> Walk:
    """The walk through a layout of B rows and H heads."""
    if isinstance(layout, Even):
        return _even(layout, batch, heads)
    return _uneven(layout, batch, heads)


def _even(layout: Even, batch: int, heads: int) -> Walk:
    widths = layout.widths
    count = len(widths) - 1 if layout.adapt else 0
    versions = list(range(len(widths)))
    if not count:
        most = max(1, ROWS // (batch * heads))
        full, rest = divmod(layout.time, most)
        widths = [most] * full + [rest] * (rest > 0)
        versions = [0] * len(widths)
    changes = [Change(None, None, n, None) for n in range(count)]
    reads, start = [], 0
    for version, length, width in _runs(versions, widths, batch * heads):
        reads.append(Block(version, length, width, start, None, 0))
        start += length * width
    writes = Block(0, count, layout.size, -layout.ahead, None, layout.ahead)
    return Walk(reads, changes, writes)


def _uneven(layout: Uneven, batch: int, heads: int) -> Walk:
    changes: list[Change] = []
    versions, index, renewed = [0], 0, None
    for n, restart in enumerate(layout.restarts):
        some = n > 0 and layout.writes.widths[n - 1] > 0
        if restart is not None:
            renewed = restart if renewed is None else renewed | restart
        if some or restart is not None:
            rows = layout.rows[n] if some else None
            changes.append(Change(restart, renewed, index if some else None, rows))
            index += some
        versions.append(len(changes))
    reads, start = [], 0
    for version, length, width in _runs(versions[1:], layout.reads.widths, batch * heads):
        stop = start + length * batch * width
        reads.append(Block(version, length, width, 0, layout.reads.token[start:stop], 0))
        start = stop
    pending = layout.size if layout.carries else 0
    writes = Block(0, index, layout.size, 0, layout.writes.token, pending)
    return Walk([block for block in reads if block.width], changes, writes)


def _runs(versions: list[int], widths: list[int], rows: int) -> list[tuple[int, int, int]]:
    """Version, number and width of chunks that can be read at once."""
    runs: list[tuple[int, int, int]] = []
    for version, width in zip(versions, widths, strict=True):
        if runs:
            first, length, before = runs[-1]
            fits = (length + 1) * rows * width <= max(ROWS, rows * width)
            if fits and width == before and version == first + length:
                runs[-1] = (first, length + 1, width)
                continue
        runs.append((version, 1, width))
    return runs
