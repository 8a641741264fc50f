"""What the host knows of the rows of a batch: which file each reads, where it stands, what is kept.

Nothing here looks at a tensor of the device, so that no check waits for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from lightning_modules.ops.states import TokensRead
from lightning_modules.slots import Slots

NO_STREAM = -1
"""Stream id of a row that has run out of files: it counts nowhere and always begins anew."""


class StreamPlan(NamedTuple):
    """What the host knows of a chunk's rows, so that no check has to wait for the device."""

    stream_id: tuple[int, ...]
    chunk_index: tuple[int, ...]
    is_first: tuple[bool, ...]

    @classmethod
    def of(cls, chunk: Mapping[str, Any]) -> StreamPlan:
        """The plan that collate put into the chunk, or one read from its tensors (one wait).

        Raises:
            TypeError: not a chunk, e.g. a batch that is a mapping was gone through like a list.
            ValueError: the chunk does not say which file each row reads.
        """
        if not isinstance(chunk, Mapping):
            raise TypeError(
                f"a chunk is a mapping of names to tensors, not a {type(chunk).__name__}: a batch "
                "is a list of chunks (one chunk: [chunk])"
            )
        if "plan" in chunk:
            return cls(*chunk["plan"])
        if missing := [name for name in cls._fields if name not in chunk]:
            raise ValueError(
                f"the chunk has no {', '.join(missing)}: beside your tensors it needs "
                f"{', '.join(cls._fields)}, [B] each, which say what file a row reads and where"
            )
        return cls(*(tuple(chunk[name].tolist()) for name in cls._fields))


class StreamGapError(ValueError):
    """A row continues a file at another place than where its state stands."""


class Rows:
    """Host-side record of where each row stands: the guard against gaps."""

    def __init__(self, stream_id: Iterable[int] = (), chunk_index: Iterable[int] = ()) -> None:
        self.stream_id = tuple(stream_id)
        self.chunk_index = tuple(chunk_index)

    def ended(self, plan: StreamPlan | None) -> Iterator[tuple[int, int, int]]:
        """Row, stream id and last chunk of every file that ends where `plan` follows.

        None follows at the end of a loop: all files end that are being read.
        """
        goes_on = [False] * len(self.stream_id)
        if plan is not None and len(plan.is_first) == len(goes_on):
            goes_on = [not first for first in plan.is_first]
        for row, stream_id in enumerate(self.stream_id):
            if stream_id != NO_STREAM and not goes_on[row]:
                yield row, stream_id, self.chunk_index[row]

    def check(self, plan: StreamPlan) -> None:
        if not self.stream_id:
            self._check_all_first(plan, "no state is known for it")
        elif len(plan.stream_id) != len(self.stream_id):
            rows = f"the batch now has {len(plan.stream_id)} rows instead of {len(self.stream_id)}"
            self._check_all_first(plan, rows)
        else:
            self._check_continuation(plan)

    @staticmethod
    def _check_all_first(plan: StreamPlan, reason: str) -> None:
        if not all(plan.is_first):
            row = plan.is_first.index(False)
            raise StreamGapError(
                f"row {row} continues stream {plan.stream_id[row]} at chunk "
                f"{plan.chunk_index[row]}, but {reason}; start files with is_first=True, "
                "or restore the stream state together with the sampler's position"
            )

    def _check_continuation(self, plan: StreamPlan) -> None:
        for row, first in enumerate(plan.is_first):
            here = (plan.stream_id[row], plan.chunk_index[row])
            expected = (self.stream_id[row], self.chunk_index[row] + 1)
            if not first and here != expected:
                raise StreamGapError(
                    f"row {row} brings chunk {here[1]} of stream {here[0]} where chunk "
                    f"{expected[1]} of stream {expected[0]} was expected; chunks of a file must "
                    "come in order in one row, and a deliberate restart needs is_first=True"
                )


class Namespace:
    """What one loop (train, validate, ...) has committed."""

    def __init__(self) -> None:
        self.slots: Slots = {}
        self.reading: Slots = {}
        self.rows = Rows()
        self.tokens_read: TokensRead | None = None  # by the rows, if the host knows
        self.restart = False
        self.told = False  # that the files of these rows have ended
        self.resets = 0
        self.continuations = 0

    def count(self, plan: StreamPlan) -> None:
        rows = zip(plan.stream_id, plan.is_first, strict=True)
        live = [first for stream_id, first in rows if stream_id != NO_STREAM]
        self.resets += sum(live)
        self.continuations += len(live) - sum(live)


class StreamCounts(NamedTuple):
    """How many rows of committed chunks began a file, and how many continued one."""

    resets: int
    continuations: int


def begin_files(before: TokensRead | None, plan: StreamPlan) -> TokensRead | None:
    """Tokens that the rows of a chunk have read of their files; None if the host does not know."""
    if all(plan.is_first):
        return TokensRead((0,) * len(plan.is_first))
    if before is None or len(before.rows) != len(plan.is_first):
        return None
    pairs = zip(before.rows, plan.is_first, strict=True)
    return TokensRead(tuple(0 if first else read for read, first in pairs))


def read_on(before: TokensRead | None, chunk: Mapping[str, Any]) -> TokensRead | None:
    """Tokens that rows have read behind a chunk; None if the host does not know."""
    counts = chunk.get("token_counts", ())
    if before is None or len(counts) != len(before.rows) or "document_ids" in chunk:
        return None
    return TokensRead(tuple(read + new for read, new in zip(before.rows, counts, strict=True)))
