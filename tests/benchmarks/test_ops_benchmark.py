"""The benchmarks of single ops, shortened."""

from pathlib import Path

import pytest
from benchmark_cases import load, run


def test_ttt_lora_is_timed_beside_its_floor_and_checked_against_float64() -> None:
    text = run("ops_ttt_lora.py", "--tiny", "--repeats", "2")
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| ttt_lora")]
    assert len(rows) == 4 and "TFLOP/s" in text
    assert all(float(row[7]) < 1e-3 for row in rows)  # float32


@pytest.mark.slow
def test_one_command_times_every_op_and_writes_one_file(tmp_path: Path) -> None:
    ops = load("ops.py")
    out = tmp_path / "ops.md"
    text = run("ops.py", "--tiny", "--out", str(out))
    for name in ops.TINY:
        assert f"## {name}" in text and f"## {name}" in out.read_text()
    programs = {path.stem.removeprefix("ops_") for path in ops.FOLDER.glob("ops_*.py")}
    assert programs == set(ops.OPS)
