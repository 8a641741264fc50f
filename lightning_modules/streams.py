"""Fast state as a value: what a stream has learned while it was read.

A *stream* is one row of consecutive chunks of one file. Every layer with fast weights owns one
slot per row; a `FastState` is the handle on all slots of one chunk and travels by value as the
keyword `fast_state=` through the forward call. Layers read the slot as it was when the chunk
began and write the slot for the next chunk, so nothing is ever looked up on a "current" object
and recomputation under activation checkpointing sees what the first forward saw.

`StreamState` chains the handles of the k chunks of a step (truncated backpropagation through
time runs through them), keeps what is committed between steps, and checks on the host that
rows really continue the file they continue. What a stream has learned can be taken out when its
file ends, and others can begin with it (`stream_memory.StreamMemory`).

Every state is a NamedTuple of tensors whose first dimension is the row and for which **all zeros
means fresh**: states are deltas from the learned initial weights, so a reset is a multiplication
by zero and the learned part keeps its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from lightning_modules.fast_state import FastState, Published
from lightning_modules.ops.states import TokensRead
from lightning_modules.slots import (
    Slots,
    check_one_row,
    map_fields,
    merge_rows,
    repeat_row,
    reset_rows,
    row_of,
    select_rows,
)
from lightning_modules.stream_rows import (
    NO_STREAM,
    Namespace,
    Rows,
    StreamCounts,
    StreamGapError,
    StreamPlan,
    begin_files,
    read_on,
)

__all__ = [
    "NO_STREAM",
    "FastState",
    "Published",
    "Slots",
    "StreamCounts",
    "StreamGapError",
    "StreamPlan",
    "StreamState",
    "merge_rows",
    "reset_rows",
    "select_rows",
]

Finished = Callable[[int, int, Slots], None]


class StreamState:
    """Owner of the fast state of all streams of a module; not a submodule, never a parameter.

    The loop calls `begin_step(namespace)`, the module `begin(chunk)` for each of the step's k
    chunks, the loop `commit()` once after backward. Namespaces never touch each other's state.

    Args:
        persistent: False gives every chunk a fresh, transient handle (nothing is carried), with
            the same bookkeeping and the same statistics.

    Attributes:
        group: processes that share the tokens of all rows (see `FastState`), or None.
        listening: topics that monitors want (see `FastState.publish`).
        finished: called with stream id, number of the last chunk, and slots `[1, ...]` of a row
            whose file has ended: by `begin`, when another file begins in the row, and by
            `finish`. A step that is begun again without a commit tells again. The slots are on
            the device and not copied; while streams do not persist there are none to tell of.
        driver: what opens and commits the steps (a callback), for the time of a run.
    """

    def __init__(self, persistent: bool = True) -> None:
        self.persistent = persistent
        self.group: ProcessGroup | None = None
        self.listening: set[str] = set()
        self.finished: list[Finished] = []
        self.driver: Any = None
        self.published: list[Published] = []
        self.plans: list[StreamPlan] = []
        self._namespaces: dict[str, Namespace] = {}
        self._current: str | None = None
        self._last: FastState | None = None
        self._tokens_read: TokensRead | None = None
        self._starts: dict[str | None, Slots] = {}

    def begin_step(self, namespace: str) -> None:
        """Open a step: whatever an earlier step left uncommitted is forgotten."""
        self._current = namespace
        self._last = None
        self.published = []
        self.plans = []

    def begin(self, chunk: Mapping[str, Any], *, adapt: bool = True) -> FastState:
        """Handle on this chunk's state; rows with `is_first` start from the initial state.

        Where something is attached (see `attach`), they start from that.

        Args:
            chunk: batch-contract dict with `stream_id`, `chunk_index`, `is_first`, all `[B]`, and
                (from collate) the host's `plan` of them.
            adapt: False reads without writing.

        Raises:
            StreamGapError: a row that is not first does not follow its predecessor.
            ValueError: what is attached does not fit the model's state, or the rows are packed.
            RuntimeError: no step is open.
        """
        space = self._open_namespace()
        plan = StreamPlan.of(chunk)
        start = self._start(chunk)
        rows = Rows(self.plans[-1].stream_id, self.plans[-1].chunk_index) if self.plans else None
        restart = space.restart and rows is None
        if not restart:
            (rows or space.rows).check(plan)
        if self._last is not None and rows is not None:
            self._tell_finished(rows, plan, self._last.outgoing)
        elif not space.told:
            self._tell_finished(space.rows, plan, space.slots)
        slots, reading = self._incoming(space, plan, chunk["is_first"], restart, start)
        before = self._tokens_read if self.plans else space.tokens_read
        tokens_read = None if start or restart else begin_files(before, plan)
        live = chunk["stream_id"] != NO_STREAM if NO_STREAM in plan.stream_id else None
        handle = FastState(
            slots,
            adapt=adapt,
            listening=self.listening,
            reading=reading,
            live=live,
            group=self.group,
            tokens_read=tokens_read,
        )
        # Who only reads stands elsewhere than what was learned: from there on the host cannot tell.
        self._tokens_read = read_on(tokens_read, chunk) if adapt else None
        self.plans.append(plan)
        self.published.append(handle.published)
        self._last = handle
        return handle

    def _incoming(
        self,
        space: Namespace,
        plan: StreamPlan,
        is_first: Tensor,
        restart: bool,
        start: Slots,
    ) -> tuple[Slots, Slots]:
        """What was learned, and where readers stand."""
        before = self.plans[-1] if self.plans else space.rows
        other_rows = len(plan.stream_id) != len(before.stream_id)
        all_begin = bool(start) and all(plan.is_first)
        if not self.persistent or restart or other_rows or all_begin:
            return repeat_row(start, len(plan.stream_id)), {}
        slots, reading = space.slots, space.reading
        if self._last is not None:
            slots, reading = self._last.outgoing, self._last.reading
        if not any(plan.is_first):  # known on the host: else every slot would be copied
            return slots, reading
        # A slot in which no reader stands yet is read from what was learned.
        stands = {slot: fields for slot, fields in start.items() if slot in reading}
        return reset_rows(slots, is_first, start), reset_rows(reading, is_first, stands)

    def _start(self, chunk: Mapping[str, Any]) -> Slots:
        """What is attached, on the chunk's device: copied there once."""
        key = self._current if self._current in self._starts else None
        start = self._starts.get(key)
        if not start:
            return {}
        if "document_ids" in chunk:
            raise ValueError(
                "a memory is attached, but the rows are packed (the chunk has document_ids): every "
                "document would forget it where it begins; read files as streams (data: mode: "
                "stream), or attach nothing"
            )
        device = chunk["is_first"].device
        self._starts[key] = map_fields(start, lambda value: value.to(device))
        return self._starts[key]

    def _tell_finished(self, rows: Rows, plan: StreamPlan | None, slots: Slots) -> None:
        if not self.finished or not self.persistent:
            return
        for row, stream_id, chunk_index in rows.ended(plan):
            for listener in self.finished:
                listener(stream_id, chunk_index, row_of(slots, row))

    def commit(self) -> None:
        """Make the state after the step's last chunk current, detached. Once per step."""
        if self._last is None or self._current is None:
            return
        space = self._namespaces[self._current]
        if self.persistent:
            space.slots = map_fields(self._last.outgoing, Tensor.detach)
            space.reading = map_fields(self._last.reading, Tensor.detach)
        space.rows = Rows(self.plans[-1].stream_id, self.plans[-1].chunk_index)
        space.tokens_read = self._tokens_read
        space.restart = space.told = False
        for plan in self.plans:
            space.count(plan)
        self._last = None

    def finish(self, namespace: str) -> None:
        """Tell `finished` of every file that is being read, as at the end of a loop.

        A row whose end was told is not told again when the next file begins in it.
        """
        space = self._namespaces.get(namespace)
        if space is not None and not space.told:
            self._tell_finished(space.rows, None, space.slots)
            space.told = True

    def attach(self, slots: Slots | None, namespace: str | None = None) -> None:
        """From now on rows that begin a file start with this instead of zeros.

        It is what "fresh" means until something else is attached: also for rows without a file,
        after `restart`, and, where streams do not persist, for every chunk. Rows that are in the
        middle of a file go on undisturbed. Nothing is written into it.

        Args:
            slots: of one row, slot -> field -> `[1, ...]`, on any device (`StreamMemory.slots`);
                None detaches.
            namespace: where; None is everywhere, in place of all that was attached before. What
                is attached to a namespace wins there.

        Raises:
            ValueError: the slots have another number of rows.
        """
        check_one_row(slots or {})
        if namespace is None:
            self._starts = {}
        self._starts.pop(namespace, None)
        if slots:
            self._starts[namespace] = map_fields(slots, Tensor.detach)

    def row(self, namespace: str, stream_id: int) -> tuple[int, Slots]:
        """Number of the last chunk that a stream has read, and its committed slots, `[1, ...]`.

        Raises:
            ValueError: no row of the namespace reads that stream.
        """
        space = self._namespaces.get(namespace, Namespace())
        found = {id_: (row, index) for row, id_, index in space.rows.ended(None)}
        if stream_id not in found:
            known = ", ".join(map(str, sorted(found))) or "none, nothing was read there"
            raise ValueError(
                f"no row of {namespace!r} reads stream {stream_id}; the streams that are being "
                f"read there: {known}. To keep every stream when its file ends, append a function "
                "to streams.finished, or use callbacks.StreamMemoryFiles"
            )
        row, chunk_index = found[stream_id]
        return chunk_index, row_of(space.slots, row)

    def clear(self, namespace: str) -> None:
        """Forget a namespace's state, as before its first step."""
        self._namespaces.pop(namespace, None)

    def restart(self, namespace: str) -> None:
        """Declare that the next chunk begins afresh in every row, wherever its files stand."""
        self.clear(namespace)
        self._namespaces[namespace] = Namespace()
        self._namespaces[namespace].restart = True

    def counts(self, namespace: str) -> StreamCounts:
        """Resets and continuations committed so far."""
        space = self._namespaces.get(namespace, Namespace())
        return StreamCounts(space.resets, space.continuations)

    def slots(self, namespace: str) -> Slots:
        """Committed state of a namespace, slot -> field -> `[B, ...]`."""
        space = self._namespaces.get(namespace)
        return {} if space is None else space.slots

    def state_dict(self, namespace: str = "train") -> dict[str, Any]:
        """What exact continuation of a namespace needs: plain dicts, CPU tensors and ints."""
        space = self._namespaces.get(namespace, Namespace())
        return {
            "slots": map_fields(space.slots, lambda value: value.detach().cpu().clone()),
            "reading": map_fields(space.reading, lambda value: value.detach().cpu().clone()),
            "stream_id": list(space.rows.stream_id),
            "chunk_index": list(space.rows.chunk_index),
            "tokens_read": None if space.tokens_read is None else list(space.tokens_read.rows),
            "resets": space.resets,
            "continuations": space.continuations,
        }

    def load_state_dict(
        self,
        state: Mapping[str, Any],
        namespace: str = "train",
        device: torch.device | str = "cpu",
    ) -> None:
        """Restore what `state_dict` returned; tensors go to `device`."""
        space = Namespace()
        space.slots = map_fields(state["slots"], lambda value: value.to(device))
        space.reading = map_fields(state.get("reading", {}), lambda value: value.to(device))
        space.rows = Rows(state["stream_id"], state["chunk_index"])
        known = state.get("tokens_read")
        space.tokens_read = None if known is None else TokensRead(tuple(known))
        space.resets = state["resets"]
        space.continuations = state["continuations"]
        self._namespaces[namespace] = space

    def _open_namespace(self) -> Namespace:
        if self._current is None:
            raise RuntimeError(
                "no step is open: add callbacks.FileBoundaryReset to trainer.callbacks (cli.py "
                "always does), or call streams.begin_step(namespace) before and commit() after"
            )
        return self._namespaces.setdefault(self._current, Namespace())
