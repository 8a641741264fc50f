"""The benchmark of the monitors runs, tiny, for every variant."""

from pathlib import Path

import pytest
from benchmark_cases import run


@pytest.mark.slow
def test_every_variant_is_measured_with_and_without_monitors(tmp_path: Path) -> None:
    out = tmp_path / "monitors.md"
    run(
        "monitors.py",
        "--tiny",
        "--warm-up",
        "2",
        "--steps",
        "3",
        "--repeats",
        "1",
        "--out",
        str(out),
    )
    rows = [line for line in out.read_text().splitlines() if line.startswith("|")][2:]
    names = [row.split(" | ")[0].removeprefix("| ") for row in rows]
    assert names == ["action expert", "LaCT", "memory bank", "TTT-LoRA"]
