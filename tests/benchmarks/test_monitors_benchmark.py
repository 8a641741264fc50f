"""The benchmark of the monitors runs, tiny, for every variant, and adds up what was put in."""

import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from benchmark_cases import load, run
from toy_streams import ToyModule, fit, toy_batches

from callbacks import GateMonitor


@pytest.mark.slow
def test_every_variant_is_measured_with_and_without_monitors(tmp_path: Path) -> None:
    out = tmp_path / "monitors.md"
    run("monitors.py", "--tiny", "--steps", "40", "--out", str(out))
    rows = [line.split(" | ") for line in out.read_text().splitlines() if line.startswith("|")][2:]
    assert [row[0] for row in rows] == [
        f"| {name}" for name in ("action expert", "LaCT", "memory bank", "TTT-LoRA")
    ]
    for row in rows:
        # Two steps of five are without monitors, and every tenth flushes.
        assert row[1].endswith("(16)") and row[4].endswith("(4)"), row
        assert "nan" not in row[6]


def test_overhead_is_that_of_a_machine_that_drifts_and_is_known() -> None:
    """100 ms without; 0.5 in the hooks, 8 a look, 40 a flush, 500 for figures; drift of a third."""
    benchmark, noise = load("monitors.py"), random.Random(0)
    more = {"without": 0.0, "look": 8.0, "flush": 40.0}
    windows = []
    for number in range(40):
        drift = 100 + 30 * number / 40
        kinds = ["flush" if number % 4 == 0 else "look", "without", "look", "without"]
        steps = [(kind, drift + more[kind] + noise.gauss(0, 0.1)) for kind in kinds]
        windows.append([*steps, ("ordinary", 0.5 + noise.gauss(0, 0.01))])
    cells = benchmark.line(windows, 500.0).split(" | ")
    middle, low, high = (float(x.strip("[],")) for x in cells[-1].split())
    # 0.94 * 0.5 + 8 / 20 + 40 / 100 + 500 / 5000 = 1.37 ms of 115 ms at the middle of the run.
    assert low < 100 * 1.37 / 115 < high and high - low < 0.15, cells
    assert middle == pytest.approx(1.37 / 1.15, abs=0.05)
    ordinary, look, flush = (float(cell.split()[0]) for cell in cells[1:4])
    assert (ordinary, look, flush) == pytest.approx((0.5, 8, 40), rel=0.01), cells


class LaunchesAlways(GateMonitor):
    """The mistake: an operation in a step that is not looked at."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        pl_module.alpha.sum()
        super().on_train_batch_end(trainer, pl_module, *args)


@pytest.mark.parametrize(("mistake", "error"), [(None, ""), (LaunchesAlways, "launches .*sum")])
def test_an_ordinary_step_that_launches_something_is_an_error(
    tmp_path: Path, mistake: Any, error: str
) -> None:
    benchmark = load("monitors.py")
    stopwatch = benchmark.Stopwatch(benchmark.WARM_UP, watch=False)
    stopwatch.monitors += [mistake(10, 2)] if mistake else []
    with pytest.raises(RuntimeError, match=error) if mistake else nullcontext():
        fit(ToyModule(), toy_batches(25), tmp_path, [stopwatch])
    kinds = [kind for steps in stopwatch.windows.values() for kind, _ in steps]
    assert mistake or set(kinds) == set(benchmark.KINDS)
