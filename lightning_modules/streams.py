"""Fast state as a value: what a stream has learned while it was read.

A *stream* is one row of consecutive chunks of one file. Every layer with fast weights owns one
slot per row; a `FastState` is the handle on all slots of one chunk and travels by value as the
keyword `fast_state=` through the forward call. Layers read the slot as it was when the chunk
began and write the slot for the next chunk, so nothing is ever looked up on a "current" object
and recomputation under activation checkpointing sees what the first forward saw.

`StreamState` chains the handles of the k chunks of a step (truncated backpropagation through
time runs through them), keeps what is committed between steps, and checks on the host that
rows really continue the file they continue.

Every state is a NamedTuple of tensors whose first dimension is the row and for which **all zeros
means fresh**: states are deltas from the learned initial weights, so a reset is a multiplication
by zero and the learned part keeps its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

Slots = dict[str, dict[str, Tensor]]
Published = dict[str, dict[str, dict[str, Tensor]]]
StateT = TypeVar("StateT", bound=tuple[Any, ...])

NO_STREAM = -1
"""Stream id of a row that has run out of files: it counts nowhere and is always fresh."""


class StreamPlan(NamedTuple):
    """What the host knows of a chunk's rows, so that no check has to wait for the device."""

    stream_id: tuple[int, ...]
    chunk_index: tuple[int, ...]
    is_first: tuple[bool, ...]

    @classmethod
    def of(cls, chunk: Mapping[str, Any]) -> StreamPlan:
        """The plan that collate put into the chunk, or one read from its tensors (one wait)."""
        if "plan" in chunk:
            return cls(*chunk["plan"])
        return cls(*(tuple(chunk[name].tolist()) for name in cls._fields))


class StreamGapError(ValueError):
    """A row continues a file at another place than where its state stands."""


def reset_rows(slots: Slots, rows: Tensor) -> Slots:
    """Zero the rows where `rows [B]` (bool) is true; differentiable, nothing waits.

    Returns new tensors; the others' rows keep their values and their graph.
    """

    def zero(value: Tensor) -> Tensor:
        mask = rows.to(value.device).view(-1, *[1] * (value.dim() - 1))
        return torch.where(mask, torch.zeros_like(value), value)

    return _map_fields(slots, zero)


def select_rows(slots: Slots, rows: Tensor) -> Slots:
    """The given rows (`[n]` int64) of every slot, in that order."""
    return _map_fields(slots, lambda value: value.index_select(0, rows.to(value.device)))


def merge_rows(slots: Slots, rows: Tensor, update: Slots, size: int | None = None) -> Slots:
    """Replace the given rows (`[n]` int64) of every slot by `update`, whose slots have n rows.

    Args:
        slots: state of all rows.
        rows: which rows.
        update: their new state. A slot that only `update` has (of a layer that now wrote for the
            first time) is fresh in the other rows.
        size: number of all rows; None takes that of `slots`, or n where there are none.
    """
    if size is None:
        known = [len(value) for fields in slots.values() for value in fields.values()]
        size = known[0] if known else len(rows)
    merged = dict(slots)
    for slot, fields in update.items():
        old = slots.get(slot, {})
        merged[slot] = {
            name: old.get(name, value.new_zeros(size, *value.shape[1:])).index_copy(
                0, rows.to(value.device), value
            )
            for name, value in fields.items()
        }
    return merged


def _map_fields(slots: Slots, function: Callable[[Tensor], Tensor]) -> Slots:
    return {
        slot: {name: function(value) for name, value in fields.items()}
        for slot, fields in slots.items()
    }


class FastState:
    """Handle on the fast state of one chunk, one slot per layer with fast weights.

    Args:
        incoming: state with which the chunk begins, slot -> field -> `[B, ...]`.
        adapt: False reads the state without writing: layers leave their fast weights alone.
        listening: topics for which a monitor wants statistics (see `publish`).
        reading: where readers that do not adapt stand (see `reading`), shaped as `incoming`.
        live: rows that have a file, bool `[B]`; None for all. The others count in no loss.
    """

    def __init__(
        self,
        incoming: Slots | None = None,
        *,
        adapt: bool = True,
        listening: Iterable[str] = frozenset(),
        reading: Slots | None = None,
        live: Tensor | None = None,
    ) -> None:
        self.adapt = adapt
        self.live = live
        self.published: Published = {}
        self.losses: dict[str, dict[str, Tensor]] = {}
        self._incoming: Slots = incoming or {}
        self._reading: Slots = {} if adapt else reading or {}
        self._outgoing: Slots = {}
        self._listening = frozenset(listening)

    @classmethod
    def transient(cls, listening: Iterable[str] = frozenset()) -> FastState:
        """A handle that belongs to no stream: starts fresh and is never committed."""
        return cls(listening=listening)

    def read(self, slot: str, state_class: type[StateT]) -> StateT | None:
        """State of `slot` at the beginning of this chunk; None means fresh."""
        fields = self._reading.get(slot, self._incoming.get(slot))
        return None if fields is None else state_class(**fields)

    def write(self, slot: str, state: Any) -> None:
        """Set the state of `slot` for the next chunk. The last write wins.

        Without `adapt` it is what later readers go on from (see `reading`), and nothing else.
        """
        self._outgoing[slot] = state._asdict()

    @property
    def outgoing(self) -> Slots:
        """State after this chunk: what was written, and what was not touched."""
        return {**self._incoming, **self._outgoing} if self.adapt else self._incoming

    @property
    def reading(self) -> Slots:
        """Where readers that do not adapt stand after this chunk; empty with `adapt`.

        What was learned stays, but who reads on inside a mini-batch stands elsewhere in it: its
        positions have moved, and it may have closed the mini-batch that learning left open.
        """
        return {} if self.adapt else {**self._reading, **self._outgoing}

    def advance(self) -> FastState:
        """Handle on what comes next (a chunk, an Euler step): it reads what this one wrote."""
        return self.map(lambda value: value)

    def map(self, function: Callable[[Tensor], Tensor]) -> FastState:
        """`advance` with `function` applied to every tensor, e.g. a choice of rows."""
        return FastState(
            _map_fields(self.outgoing, function),
            adapt=self.adapt,
            listening=self._listening,
            reading=_map_fields(self.reading, function),
            live=None if self.live is None else function(self.live),
        )

    @property
    def rows(self) -> int | None:
        """B of the states with which the chunk begins; None if all of them are fresh."""
        slots = (*self._reading.values(), *self._incoming.values())
        return next((len(value) for fields in slots for value in fields.values()), None)

    def add_loss(self, slot: str, **losses: Tensor) -> None:
        """Leave weighted auxiliary losses (scalars of a router) for the training step.

        Differentiable, unlike what is published. The last write wins, so that a layer recomputed
        under activation checkpointing counts once.
        """
        self.losses.setdefault(slot, {}).update(losses)

    def listens(self, topic: str) -> bool:
        """Whether a monitor wants this topic: without one, statistics cost this one test."""
        return topic in self._listening

    def publish(self, topic: str, slot: str, **values: Tensor) -> None:
        """Leave statistics for the monitors, detached, on the device. The last write wins."""
        fields = self.published.setdefault(topic, {}).setdefault(slot, {})
        fields.update({name: value.detach() for name, value in values.items()})


class _Rows:
    """Host-side record of where each row stands: the guard against gaps."""

    def __init__(self, stream_id: Iterable[int] = (), chunk_index: Iterable[int] = ()) -> None:
        self.stream_id = tuple(stream_id)
        self.chunk_index = tuple(chunk_index)

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


class _Namespace:
    """What one loop (train, validate, ...) has committed."""

    def __init__(self) -> None:
        self.slots: Slots = {}
        self.reading: Slots = {}
        self.rows = _Rows()
        self.restart = False
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


class StreamState:
    """Owner of the fast state of all streams of a module; not a submodule, never a parameter.

    The loop calls `begin_step(namespace)`, the module `begin(chunk)` for each of the step's k
    chunks, the loop `commit()` once after backward. Namespaces never touch each other's state.

    Args:
        persistent: False gives every chunk a fresh, transient handle (nothing is carried), with
            the same bookkeeping and the same statistics.
    """

    def __init__(self, persistent: bool = True) -> None:
        self.persistent = persistent
        self.listening: set[str] = set()
        self.published: list[Published] = []
        self.plans: list[StreamPlan] = []
        self._namespaces: dict[str, _Namespace] = {}
        self._current: str | None = None
        self._last: FastState | None = None

    def begin_step(self, namespace: str) -> None:
        """Open a step: whatever an earlier step left uncommitted is forgotten."""
        self._current = namespace
        self._last = None
        self.published = []
        self.plans = []

    def begin(self, chunk: Mapping[str, Any], *, adapt: bool = True) -> FastState:
        """Handle on this chunk's state; rows with `is_first` start from the initial state.

        Args:
            chunk: batch-contract dict with `stream_id`, `chunk_index`, `is_first`, all `[B]`, and
                (from collate) the host's `plan` of them.
            adapt: False reads without writing.

        Raises:
            StreamGapError: a row that is not first does not follow its predecessor.
            RuntimeError: no step is open.
        """
        space = self._open_namespace()
        plan = StreamPlan.of(chunk)
        rows = _Rows(self.plans[-1].stream_id, self.plans[-1].chunk_index) if self.plans else None
        restart = space.restart and rows is None
        if not restart:
            (rows or space.rows).check(plan)
        slots, reading = self._incoming(space, plan, chunk["is_first"], restart)
        live = chunk["stream_id"] != NO_STREAM if NO_STREAM in plan.stream_id else None
        handle = FastState(slots, adapt=adapt, listening=self.listening, reading=reading, live=live)
        self.plans.append(plan)
        self.published.append(handle.published)
        self._last = handle
        return handle

    def _incoming(
        self, space: _Namespace, plan: StreamPlan, is_first: Tensor, restart: bool
    ) -> tuple[Slots, Slots]:
        """What was learned, and where readers stand."""
        other_rows = not self.plans and len(plan.stream_id) != len(space.rows.stream_id)
        if not self.persistent or restart or other_rows:
            return {}, {}
        slots, reading = space.slots, space.reading
        if self._last is not None:
            slots, reading = self._last.outgoing, self._last.reading
        return reset_rows(slots, is_first), reset_rows(reading, is_first)

    def commit(self) -> None:
        """Make the state after the step's last chunk current, detached. Once per step."""
        if self._last is None or self._current is None:
            return
        space = self._namespaces[self._current]
        if self.persistent:
            space.slots = _map_fields(self._last.outgoing, Tensor.detach)
            space.reading = _map_fields(self._last.reading, Tensor.detach)
        space.rows = _Rows(self.plans[-1].stream_id, self.plans[-1].chunk_index)
        space.restart = False
        for plan in self.plans:
            space.count(plan)
        self._last = None

    def clear(self, namespace: str) -> None:
        """Forget a namespace's state, as before its first step."""
        self._namespaces.pop(namespace, None)

    def restart(self, namespace: str) -> None:
        """Declare that the next chunk begins afresh in every row, wherever its files stand."""
        self.clear(namespace)
        self._namespaces[namespace] = _Namespace()
        self._namespaces[namespace].restart = True

    def counts(self, namespace: str) -> StreamCounts:
        """Resets and continuations committed so far."""
        space = self._namespaces.get(namespace, _Namespace())
        return StreamCounts(space.resets, space.continuations)

    def slots(self, namespace: str) -> Slots:
        """Committed state of a namespace, slot -> field -> `[B, ...]`."""
        space = self._namespaces.get(namespace)
        return {} if space is None else space.slots

    def state_dict(self, namespace: str = "train") -> dict[str, Any]:
        """What exact continuation of a namespace needs: plain dicts, CPU tensors and ints."""
        space = self._namespaces.get(namespace, _Namespace())
        return {
            "slots": _map_fields(space.slots, lambda value: value.detach().cpu().clone()),
            "reading": _map_fields(space.reading, lambda value: value.detach().cpu().clone()),
            "stream_id": list(space.rows.stream_id),
            "chunk_index": list(space.rows.chunk_index),
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
        space = _Namespace()
        space.slots = _map_fields(state["slots"], lambda value: value.to(device))
        space.reading = _map_fields(state.get("reading", {}), lambda value: value.to(device))
        space.rows = _Rows(state["stream_id"], state["chunk_index"])
        space.resets = state["resets"]
        space.continuations = state["continuations"]
        self._namespaces[namespace] = space

    def _open_namespace(self) -> _Namespace:
        if self._current is None:
            raise RuntimeError(
                "no step is open: add callbacks.FileBoundaryReset to trainer.callbacks (cli.py "
                "always does), or call streams.begin_step(namespace) before and commit() after"
            )
        return self._namespaces.setdefault(self._current, _Namespace())
