"""The handle on the fast state of one chunk, which travels by value through the forward call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from torch import Tensor
from torch.distributed import ProcessGroup

from lightning_modules.ops.states import TokensRead
from lightning_modules.slots import Slots, map_fields

Published = dict[str, dict[str, dict[str, Tensor]]]
StateT = TypeVar("StateT", bound=tuple[Any, ...])


class FastState:
    """Handle on the fast state of one chunk, one slot per layer with fast weights.

    Args:
        incoming: state with which the chunk begins, slot -> field -> `[B, ...]`.
        adapt: False reads the state without writing: layers leave their fast weights alone.
        listening: topics for which a monitor wants statistics (see `publish`).
        reading: where readers that do not adapt stand (see `reading`), shaped as `incoming`.
        live: rows that have a file, bool `[B]`; None for all. The others count in no loss.
        group: processes that share the tokens of the rows, each with its part; None: the tokens
            are all here. The state is the same on all of them.
        tokens_read: by the rows before this chunk, if the host knows.
    """

    def __init__(
        self,
        incoming: Slots | None = None,
        *,
        adapt: bool = True,
        listening: Iterable[str] = frozenset(),
        reading: Slots | None = None,
        live: Tensor | None = None,
        group: ProcessGroup | None = None,
        tokens_read: TokensRead | None = None,
    ) -> None:
        self.adapt = adapt
        self.tokens_read = tokens_read
        self.live = live
        self.group = group
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
            map_fields(self.outgoing, function),
            adapt=self.adapt,
            listening=self._listening,
            reading=map_fields(self.reading, function),
            live=None if self.live is None else function(self.live),
            group=self.group,
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
        for name, value in values.items():
            fields[name] = value.detach() if value.requires_grad else value
