"""The reference of config keys is what the docstrings say now."""

from __future__ import annotations

import importlib.util
from difflib import unified_diff
from pathlib import Path
from types import ModuleType

import pytest

import lightning_modules

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    path = DOCS / "make_config_reference.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_committed_reference_is_fresh(generator) -> None:
    committed = (DOCS / "config_reference.md").read_text().splitlines()
    stale = list(unified_diff(committed, generator.reference().splitlines(), "committed", n=0))
    assert not stale, "run: python docs/make_config_reference.py\n" + "\n".join(stale)


def test_every_key_has_a_meaning_and_every_link_a_table(generator) -> None:
    lines = generator.reference().splitlines()
    rows = [line for line in lines if line.startswith("| `")]
    assert len(rows) > 200
    assert not [row for row in rows if row.endswith("|  |")]
    headings = {line.removeprefix("### ") for line in lines if line.startswith("### ")}
    assert set(lightning_modules.__all__) <= headings
    links = {part.split("]")[0] for row in rows for part in row.split("[")[1:] if "](#" in part}
    assert links <= headings
    assert "TTTConfig" in links
