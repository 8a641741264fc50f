"""The benchmark of single ops, shortened."""

from benchmark_cases import run


def test_every_op_is_timed_beside_its_floor_and_checked_against_float64() -> None:
    text = run("ops.py", "--tiny", "--repeats", "2")
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| ttt_lora")]
    assert len(rows) == 4 and "TFLOP/s" in text
    assert all(float(row[7]) < 1e-3 for row in rows)  # float32
