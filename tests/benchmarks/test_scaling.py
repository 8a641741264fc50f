"""The scaling benchmark, shortened: two processes on the CPU, both strategies; cells that fail."""

import math
import time
from pathlib import Path

import pytest
from benchmark_cases import load, run


def fail() -> None:
    print("so far")
    raise ValueError("too large")


def test_a_cell_that_fails_or_hangs_is_named_and_ends_nothing(tmp_path: Path) -> None:
    scaling, log = load("scaling.py"), tmp_path / "log"
    assert scaling.in_copy(lambda: None, log, math.inf) is None
    assert scaling.in_copy(fail, log, math.inf) == "ValueError: too large"
    soon = time.monotonic() + 1
    assert "--seconds" in scaling.in_copy(lambda: time.sleep(60), log, soon)
    assert time.monotonic() < soon + 20
    assert "--seconds" in scaling.in_copy(fail, log, soon)


@pytest.mark.slow
def test_every_cell_is_measured() -> None:
    options = ["--tiny", "--variants", "in_place", "--repeats", "3", "--warmup", "1"]
    text = run("scaling.py", *options)
    table = text.rpartition("| variant |")[2]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| in_place")]
    cells = [(row[2].strip(), row[3].strip()) for row in rows]
    assert cells == [("ddp", "1"), ("ddp", "2"), ("fsdp2", "1"), ("fsdp2", "2")]
    assert all(float(row[6].strip().rstrip("%")) > 0 for row in rows), text
