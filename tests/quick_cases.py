"""Which cases of a test with many cases `make test` runs.

`@pytest.mark.quick("llama-ttt", "*-float64")` names them by their ids (`*` and `?` stand for any
text and any character) and leaves the others to `make test-all`, as `pytest.mark.slow` does for a
single case. One behaviour needs one quick case and perhaps its strangest, not every combination.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import pytest


def mark_the_others_slow(cases: list[Any]) -> None:
    """Mark the cases of one test slow that its mark `quick` does not name.

    Args:
        cases: all cases of the test, as pytest collects them.

    Raises:
        pytest.UsageError: a name in the mark is no case's.
    """
    names = [name for mark in cases[0].iter_markers("quick") for name in mark.args]
    if not names:
        return
    ids = [case.callspec.id for case in cases]
    for name in names:
        if not any(fnmatchcase(id_, name) for id_ in ids):
            raise pytest.UsageError(
                f"{cases[0].nodeid}: no case is called {name!r} as its mark quick says; there are "
                f"{', '.join(ids)}"
            )
    for case, id_ in zip(cases, ids, strict=True):
        if not any(fnmatchcase(id_, name) for name in names):
            case.add_marker(pytest.mark.slow)
