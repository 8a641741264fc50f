"""The benchmark of whole training steps, shortened, on a CPU."""

import pytest
from benchmark_cases import run


@pytest.mark.slow
def test_every_arm_is_measured_and_kernels_get_the_flops_of_torch() -> None:
    options = ["--tiny", "--variants", "lact", "ttt_lora", "--repeats", "3", "--warmup", "1"]
    text = run("end_to_end.py", *options)
    table = text.rpartition("| variant |")[2]
    rows = [[cell.strip() for cell in line.split("|")] for line in table.splitlines()]
    cells = {tuple(row[1:3]): row[3:] for row in rows if row[1:2] in (["lact"], ["ttt_lora"])}
    arms = [("lact", arm) for arm in ("plain", "torch", "auto")]
    assert [*cells] == arms + [("ttt_lora", arm) for arm in ("plain", "lora", "torch", "auto")]
    for variant in ("lact", "ttt_lora"):
        flops = {arm: float(cells[variant, arm][2]) for arm in ("plain", "torch", "auto")}
        assert flops["auto"] == flops["torch"] > 0 < flops["plain"], text
    assert all(float(row[3].rstrip("%")) > 0 for row in cells.values()), text
