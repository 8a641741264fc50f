"""Every cell of the README's matrix is a test: what the documentation names exists, for all."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
from variant_cases import VARIANTS

ROOT = Path(__file__).parents[2]
TEST = re.compile(r"`(test_\w+\.py)::(test_\w+)`")


def table(text: str, first: str) -> list[list[str]]:
    """Cells of the table whose header begins with `first`, without the line below the header."""
    lines = text[text.index(f"| {first} |") :].split("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return rows[:1] + rows[2:]


def function(file: str, name: str) -> Any:
    """A test function."""
    spec = importlib.util.spec_from_file_location(
        file.removesuffix(".py"), ROOT / "tests/exactness" / file
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


@pytest.mark.slow
def test_every_column_names_tests_that_run_for_every_variant() -> None:
    header, *rows = table((ROOT / "README.md").read_text(), "bit for bit")
    assert all(cell == "✓" for row in rows for cell in row[1:]), "explain a cell that is not shown"
    assert len(rows) == len(VARIANTS)
    documented = table((ROOT / "docs/exactness.md").read_text(), "column of the README")[1:]
    assert [row[0] for row in documented] == header[1:]
    for column, _, tests in documented:
        found = TEST.findall(tests)
        assert found, column
        for file, name in found:
            marks = [m for m in function(file, name).pytestmark if m.name == "parametrize"]
            names = [m.args[1] for m in marks if m.args[0] == "name"]
            assert [list(values) for values in names] == [list(VARIANTS)], f"{column}: {name}"
