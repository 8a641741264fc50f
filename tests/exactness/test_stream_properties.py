"""Streams under any sequence of calls, against what their docstrings say in plain Python."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import Tensor

import lightning_modules.streams as streams_module
from lightning_modules.streams import NO_STREAM, FastState, StreamGapError, StreamPlan, StreamState

NAMESPACES = ("train", "validate")
SLOT = "layer"
namespaces = st.sampled_from(NAMESPACES)
row_kinds = st.lists(
    st.sampled_from(["on", "on", "on", "new", "idle", "gap"]), min_size=1, max_size=3
)
mostly = st.sampled_from([True, True, True, False])


class Value(NamedTuple):
    value: Tensor


def follow(value: float, token: float) -> float:
    """What a layer makes of its state and a token: no two histories have the same value."""
    return 0.5 * value + token


@dataclass
class Row:
    """A row: what it reads, and what it has learned (0: fresh)."""

    stream: int
    index: int
    value: float = 0.0


@dataclass
class Space:
    """What a namespace has committed, as the docstrings describe it."""

    rows: list[Row] = field(default_factory=list)
    reading: list[float] | None = None
    restart: bool = False
    told: bool = False
    resets: int = 0
    continuations: int = 0


@dataclass
class Step:
    """A step that is open: its last chunk, and what its chunks count."""

    namespace: str
    rows: list[Row] | None = None
    reading: list[float] | None = None
    firsts: list[bool] = field(default_factory=list)


class Streams(RuleBasedStateMachine):
    """`StreamState` beside a dict per namespace."""

    @initialize(persistent=st.sampled_from([True, True, False]))
    def begin_run(self, persistent: bool) -> None:
        self.persistent = persistent
        self.real = self.make()
        self.spaces = {name: Space() for name in NAMESPACES}
        self.step: Step | None = None
        self.files = 0
        self.tokens = 0

    def make(self) -> StreamState:
        streams = StreamState(self.persistent)
        self.told: list[tuple[int, int, float]] = []
        streams.finished.append(
            lambda stream, index, slots: self.told.append(
                (stream, index, slots[SLOT]["value"].item() if slots else 0.0)
            )
        )
        return streams

    @rule(namespace=namespaces)
    def begin_step(self, namespace: str) -> None:
        self.real.begin_step(namespace)
        self.step = Step(namespace)

    @precondition(lambda self: self.step is None)
    @rule()
    def begin_without_a_step(self) -> None:
        fresh = StreamState(self.persistent)
        with pytest.raises(RuntimeError, match="no step is open"):
            fresh.begin(self._chunk([Row(0, 0)], [True]))

    def _chunk(self, rows: list[Row], first: list[bool]) -> dict[str, Any]:
        plan = StreamPlan(tuple(r.stream for r in rows), tuple(r.index for r in rows), tuple(first))
        return {**{n: torch.tensor(v) for n, v in plan._asdict().items()}, "plan": plan}

    @precondition(lambda self: self.step is not None)
    @rule(kinds=row_kinds, same_rows=mostly, adapt=mostly)
    def begin(self, kinds: list[str], same_rows: bool, adapt: bool) -> None:
        step, space = self.step, self.spaces[self.step.namespace]
        before = space.rows if step.rows is None else step.rows
        if same_rows and before:
            kinds = [kinds[row % len(kinds)] for row in range(len(before))]
        rows, first = self._next(before, kinds)
        restart = space.restart and step.rows is None
        chunk = self._chunk(rows, first)
        if not restart and not self._fits(before, rows, first):
            with pytest.raises(StreamGapError):
                self.real.begin(chunk, adapt=adapt)
            return
        self._expect_told(before, first, space, step)
        handle = self.real.begin(chunk, adapt=adapt)
        fresh = not self.persistent or restart or len(before) != len(rows)
        reading = space.reading if step.rows is None else step.reading
        learned = self._after_reset([row.value for row in before], first, fresh)
        stands = None if fresh or adapt or reading is None else reading
        stands = learned if stands is None else self._after_reset(stands, first, fresh)
        self._read(handle, rows, learned, stands, adapt)
        step.firsts += [f for f, r in zip(first, rows, strict=True) if r.stream != NO_STREAM]

    @staticmethod
    def _after_reset(values: list[float], first: list[bool], fresh: bool) -> list[float]:
        """What rows begin with, of what there was."""
        if fresh:
            return [0.0] * len(first)
        return [0.0 if f else value for f, value in zip(first, values, strict=True)]

    @staticmethod
    def _fits(before: list[Row], rows: list[Row], first: list[bool]) -> bool:
        """Whether every row that goes on goes on where it stood."""
        if len(before) != len(rows):
            return all(first)
        return all(
            f or (row.stream, row.index) == (last.stream, last.index + 1)
            for f, row, last in zip(first, rows, before, strict=True)
        )

    def _next(self, before: list[Row], kinds: list[str]) -> tuple[list[Row], list[bool]]:
        """Rows of the next chunk, and which of them begin a file."""
        rows, first = [], []
        for number, kind in enumerate(kinds):
            last = before[number] if number < len(before) else Row(NO_STREAM, 0)
            if kind in ("on", "gap") and last.stream != NO_STREAM:
                rows.append(Row(last.stream, last.index + 1 + (kind == "gap")))
                first.append(False)
                continue
            self.files += 1
            rows.append(Row(NO_STREAM if kind == "idle" else self.files, 0))
            first.append(True)
        return rows, first

    def _expect_told(self, before: list[Row], first: list[bool], space: Space, step: Step) -> None:
        self.told.clear()
        self.expected = []
        if self.persistent and not (step.rows is None and space.told):
            same = len(before) == len(first)
            self.expected = [
                (row.stream, row.index, row.value)
                for number, row in enumerate(before)
                if row.stream != NO_STREAM and not (same and not first[number])
            ]

    def _read(
        self,
        handle: FastState,
        rows: list[Row],
        learned: list[float],
        stands: list[float],
        adapt: bool,
    ) -> None:
        """A layer reads the state and writes the next one, in both worlds."""
        assert self.told == self.expected
        state = handle.read(SLOT, Value)
        value = torch.zeros(len(rows), 1, dtype=torch.float64) if state is None else state.value
        assert value[:, 0].tolist() == stands
        tokens = [float(self.tokens + number + 1) for number in range(len(rows))]
        self.tokens += len(rows)
        weight = torch.ones((), dtype=torch.float64, requires_grad=True)
        token = torch.tensor(tokens, dtype=torch.float64)[:, None]
        handle.write(SLOT, Value(0.5 * value + token * weight))
        after = [follow(v, t) for v, t in zip(value[:, 0].tolist(), tokens, strict=True)]
        for row, old, new in zip(rows, learned, after, strict=True):
            row.value = new if adapt else old
        self.step.rows, self.step.reading = rows, None if adapt else after

    @precondition(lambda self: self.step is not None)
    @rule()
    def commit(self) -> None:
        self.real.commit()
        step, self.step = self.step, None
        if step.rows is None:
            return
        space = self.spaces[step.namespace]
        space.rows, space.reading = step.rows, step.reading
        space.restart = space.told = False
        space.resets += sum(step.firsts)
        space.continuations += len(step.firsts) - sum(step.firsts)

    @rule(
        namespace=namespaces,
        chunks=st.lists(st.tuples(row_kinds, mostly, mostly), min_size=1, max_size=3),
    )
    def whole_step(self, namespace: str, chunks: list[tuple[list[str], bool, bool]]) -> None:
        """As a loop goes through it."""
        self.begin_step(namespace)
        for chunk in chunks:
            self.begin(*chunk)
        self.commit()

    @precondition(lambda self: self.step is None)
    @rule(namespace=namespaces)
    def clear(self, namespace: str) -> None:
        self.real.clear(namespace)
        self.spaces[namespace] = Space()

    @precondition(lambda self: self.step is None)
    @rule(namespace=namespaces)
    def restart(self, namespace: str) -> None:
        self.real.restart(namespace)
        self.spaces[namespace] = Space(restart=True)

    @rule(namespace=namespaces)
    def finish(self, namespace: str) -> None:
        space = self.spaces[namespace]
        self.told.clear()
        self.real.finish(namespace)
        ended = [(r.stream, r.index, r.value) for r in space.rows if r.stream != NO_STREAM]
        assert self.told == (ended if self.persistent and not space.told else [])
        space.told = True

    @precondition(lambda self: not any(space.restart for space in self.spaces.values()))
    @rule()
    def save_and_restore(self) -> None:
        """The process is lost: what was not committed is, too."""
        saved = {name: self.real.state_dict(name) for name in NAMESPACES}
        self.real, self.step = self.make(), None
        for name, state in saved.items():
            self.real.load_state_dict(state, name)
            self.spaces[name].told = False

    @invariant()
    def committed_is_what_was_expected(self) -> None:
        for name, space in getattr(self, "spaces", {}).items():
            assert self.real.counts(name) == (space.resets, space.continuations)
            slots = self.real.slots(name)
            assert self.persistent or not slots
            learned = [row.value for row in space.rows] if self.persistent else []
            assert slots or not any(learned)
            for value in (fields["value"] for fields in slots.values()):
                assert value.grad_fn is None and not value.requires_grad
                assert value[:, 0].tolist() == learned
            for row in space.rows:
                if row.stream != NO_STREAM:
                    assert self.real.row(name, row.stream)[0] == row.index


MANY = settings(max_examples=60, stateful_step_count=30)
QUICK = settings(max_examples=40, stateful_step_count=30, phases=[Phase.generate])


def test_any_sequence_of_calls_does_what_the_docstrings_say() -> None:
    run_state_machine_as_test(Streams, settings=MANY)


def never_resets(slots: Any, rows: Tensor, start: Any = None) -> Any:
    return slots


def resets_all(slots: Any, rows: Tensor, start: Any = None) -> Any:
    return reset_rows(slots, rows.any() | torch.zeros_like(rows), start)


def keeps_graph(slots: Any, function: Callable[[Tensor], Tensor]) -> Any:
    return map_fields(slots, lambda x: x if function is Tensor.detach else function(x))


reset_rows, map_fields = streams_module.reset_rows, streams_module.map_fields


@pytest.mark.parametrize(
    ("name", "wrong"),
    [("reset_rows", never_resets), ("reset_rows", resets_all), ("map_fields", keeps_graph)],
    ids=["never resets", "resets all rows", "keeps the graph"],
)
def test_power_wrong_streams_are_found(
    name: str, wrong: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams_module, name, wrong)
    with pytest.raises(AssertionError):
        run_state_machine_as_test(Streams, settings=QUICK)


def test_power_a_commit_that_is_forgotten_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StreamState, "commit", lambda self: None)
    with pytest.raises((AssertionError, StreamGapError)):
        run_state_machine_as_test(Streams, settings=QUICK)
