"""What monitors wrote at their flushes, kept on the host for figures over steps."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

MAX_STEPS = 256
"""Columns of a figure: of a longer run every second step is dropped, as often as needed."""


class History:
    """Values by quantity, step and row (a layer); rows may come and go."""

    def __init__(self) -> None:
        self._values: dict[str, dict[int, dict[str, float]]] = {}

    @property
    def quantities(self) -> list[str]:
        """What has values."""
        return list(self._values)

    def add(self, quantity: str, step: int, values: Mapping[str, float]) -> None:
        """Keep the values of the rows at a step."""
        if not values:
            return
        steps = self._values.setdefault(quantity, {})
        steps.setdefault(step, {}).update(values)
        if len(steps) > MAX_STEPS:
            # The last one stays: the figure shall end where the run is.
            for old in list(steps)[-2::-2]:
                del steps[old]

    def table(self, quantity: str) -> tuple[np.ndarray, list[str], list[str]]:
        """Values `[rows, steps]`, NaN where there is none, and the names of rows and steps."""
        steps = self._values[quantity]
        rows = sorted({row for values in steps.values() for row in values})
        table = [[values.get(row, np.nan) for values in steps.values()] for row in rows]
        return np.array(table), rows, [str(step) for step in steps]
