"""The benchmark of LaCT, shortened, on a CPU."""

from benchmark_cases import run


def test_every_arm_is_timed_and_checked_against_float64() -> None:
    text = run("ops_lact.py", "--cases", "tiny", "tiny_muon", "--device", "cpu", "--repeats", "2")
    checked = [line for line in text.splitlines() if line.startswith("tiny")]
    assert len(checked) == 4
    assert all(line.endswith("good") for line in checked)
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| tiny")]
    assert {row[2].strip() for row in rows} == {"torch", "compiled loop"}
    assert all(float(row[column].split()[0]) > 0 for row in rows for column in (3, 8))
