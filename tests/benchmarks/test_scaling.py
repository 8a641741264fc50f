"""The scaling benchmark, shortened: two processes on the CPU, both strategies."""

import pytest
from benchmark_cases import run


@pytest.mark.slow
def test_every_cell_is_measured() -> None:
    options = ["--tiny", "--variants", "in_place", "--repeats", "3", "--warmup", "1"]
    text = run("scaling.py", *options)
    table = text.rpartition("| variant |")[2]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| in_place")]
    cells = [(row[2].strip(), row[3].strip()) for row in rows]
    assert cells == [("ddp", "1"), ("ddp", "2"), ("fsdp2", "1"), ("fsdp2", "2")]
    assert all(float(row[6].strip().rstrip("%")) > 0 for row in rows), text
