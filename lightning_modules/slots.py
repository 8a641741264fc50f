"""Slots of fast state, layer -> field -> tensor with one row per stream, as values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Slots = dict[str, dict[str, Tensor]]


def reset_rows(slots: Slots, rows: Tensor, start: Slots | None = None) -> Slots:
    """Begin anew in the rows where `rows [B]` (bool) is true; differentiable, nothing waits.

    Returns new tensors; the others' rows keep their values and their graph.

    Args:
        slots: state of all rows, `[B, ...]`.
        rows: which begin anew.
        start: with what, one row (`[1, ...]`); None, and what it does not have, is zero. What
            only `start` has is zero in the rows that go on.

    Raises:
        ValueError: `start` has other fields, or fields of another shape.
    """

    def begin(value: Tensor, first: Tensor) -> Tensor:
        mask = rows.to(value.device).view(-1, *[1] * (value.dim() - 1))
        return torch.where(mask, first.to(value), value)

    start = start or {}
    _check_alike(slots, start)
    begun: Slots = {}
    for slot in {**slots, **start}:
        first = start.get(slot) or {n: torch.zeros_like(v) for n, v in slots[slot].items()}
        known = slots.get(slot) or {
            name: value.new_zeros(len(rows), *value.shape[1:]) for name, value in first.items()
        }
        begun[slot] = {name: begin(value, first[name]) for name, value in known.items()}
    return begun


def _check_alike(slots: Slots, start: Slots) -> None:
    for slot in slots.keys() & start.keys():
        here, there = (
            {name: tuple(value.shape[1:]) for name, value in fields[slot].items()}
            for fields in (slots, start)
        )
        if here != there:
            names = [name for name in {**here, **there} if here.get(name) != there.get(name)]
            raise ValueError(
                f"what is attached does not fit the state of {slot}: a row of {names[0]} has shape "
                f"{there.get(names[0])}, but in this model {here.get(names[0])}; use the options "
                "with which it was saved (chunk and mini-batch sizes, a window), and a window "
                "without bound only where all rows begin together"
            )


def row_of(slots: Slots, row: int) -> Slots:
    """One row of every slot, `[1, ...]`, detached; nothing is copied, and nothing waits."""
    return map_fields(slots, lambda value: value.detach().narrow(0, row, 1))


def repeat_row(slots: Slots, rows: int) -> Slots:
    """Slots of one row (`[1, ...]`) as those of `rows` equal rows, each with its own memory."""
    return map_fields(slots, lambda value: value.repeat(rows, *[1] * (value.dim() - 1)))


def check_one_row(slots: Slots) -> None:
    """Raise ValueError unless every field is of one row, `[1, ...]`."""
    for slot, fields in slots.items():
        for name, value in fields.items():
            if value.dim() < 1 or len(value) != 1:
                raise ValueError(
                    f"{slot} has {name} of shape {tuple(value.shape)}, but one row is needed, "
                    "[1, ...]: choose it with select_rows, or take StreamMemory.slots"
                )


def select_rows(slots: Slots, rows: Tensor) -> Slots:
    """The given rows (`[n]` int64) of every slot, in that order."""
    return map_fields(slots, lambda value: value.index_select(0, rows.to(value.device)))


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


def map_fields(slots: Slots, function: Callable[[Tensor], Tensor]) -> Slots:
    """`function` applied to every tensor."""
    return {
        slot: {name: function(value) for name, value in fields.items()}
        for slot, fields in slots.items()
    }
