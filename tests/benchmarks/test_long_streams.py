"""The benchmark of long streams, tiny: its table, and that it sees a state that differs."""

from pathlib import Path

import pytest
import torch
from benchmark_cases import load, run


@pytest.mark.slow
def test_the_command_writes_a_table(tmp_path: Path) -> None:
    out = tmp_path / "table.md"
    options = ["--variants", "in_place", "action_expert", "--tokens", "4096"]
    printed = run(
        "long_streams.py", *options, "--training-tokens", "2048", "--calls", "16", "--out", str(out)
    )
    assert printed.strip() == out.read_text().strip()
    rows = [line.split(" | ") for line in printed.splitlines() if line.startswith(("| in", "| ac"))]
    assert [row[1] for row in rows] == ["inference", "training"] * 2
    text, expert = rows[0], rows[2]
    assert float(text[8]) < 1e-5 and float(text[9].rstrip(" |")) < 1e-12
    assert float(expert[8]) == 0  # committing later changes nothing
    assert all("->" not in row[7] for row in rows), "what is carried has one size"


def test_a_state_that_differs_is_seen() -> None:
    benchmark = load("long_streams_run.py")
    one = {"slot": {"dw": torch.ones(2, 3), "count": torch.tensor([3]), "none": torch.ones(0)}}
    other = {"slot": {**one["slot"], "dw": torch.full((2, 3), 1.5)}}
    assert benchmark.difference(one, one) == 0
    assert benchmark.difference(one, other) == 0.5
    moved = {"slot": {**one["slot"], "count": torch.tensor([4])}}
    assert benchmark.difference(one, moved) == float("inf")
