"""The benchmark of the monitors runs, tiny, for every variant, and adds up what was put in."""

import random
from pathlib import Path

import pytest
from benchmark_cases import load, run


@pytest.mark.slow
def test_every_variant_is_measured_with_and_without_monitors(tmp_path: Path) -> None:
    out = tmp_path / "monitors.md"
    run("monitors.py", "--tiny", "--steps", "40", "--out", str(out))
    rows = [line.split(" | ") for line in out.read_text().splitlines() if line.startswith("|")][2:]
    assert [row[0] for row in rows] == [
        f"| {name}" for name in ("action expert", "LaCT", "memory bank", "TTT-LoRA")
    ]
    for row in rows:
        # Two steps of five are without monitors, and two of the others flush in forty.
        assert row[1].endswith("(16)") and row[4].endswith("(2)"), row
        assert "nan" not in row[6]


def test_overhead_is_that_of_a_machine_that_drifts_and_is_known() -> None:
    """100 ms without; 0.5 more with, 8 a look, 40 a flush, 500 for figures; drift of a third."""
    benchmark, noise = load("monitors.py"), random.Random(0)
    more = {"without": 0.0, "ordinary": 0.5, "look": 8.5, "flush": 40.5}
    windows = []
    for number in range(40):
        drift = 100 + 30 * number / 40
        kinds = ["flush" if number % 4 == 0 else "look", "without", "ordinary", "without"]
        windows.append([(k, drift + more[k] + noise.gauss(0, 0.1)) for k in [*kinds, "ordinary"]])
    cells = benchmark.line(windows, 500.0).split(" | ")
    middle, low, high = (float(x.strip("[],")) for x in cells[-1].split())
    # 0.5 + 8 / 20 + 40 / 100 + 500 / 5000 = 1.4 ms of 115 ms at the middle of the run.
    assert low < 100 * 1.4 / 115 < high and high - low < 0.1, cells
    assert middle == pytest.approx(1.4 / 1.15, abs=0.05)
