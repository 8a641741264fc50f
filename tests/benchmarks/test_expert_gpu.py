"""The benchmark of the 300M expert, with a tiny one on the CPU."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import expert_gpu

    return expert_gpu


@pytest.mark.slow
def test_a_tiny_run_checks_measures_and_writes_its_table(tmp_path: Path) -> None:
    out = tmp_path / "table.md"
    command = [sys.executable, str(FOLDER / "expert_gpu.py"), "--tiny", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--repeats", "2", "--out", str(out)], capture_output=True, text=True
    )
    assert done.returncode == 0, (done.stdout, done.stderr)
    text = out.read_text()
    assert "A gate of 0 against no TTT: 0 values differ." in text and "WRONG" not in text
    rows = [line for line in text.splitlines() if line.startswith(("| training", "| sampling"))]
    assert len(rows) == 7 and "\n".join(rows) in done.stdout
    assert all(row.count("|") == 9 and "failed" not in row for row in rows)
    assert rows[1].startswith("| sampling call B=1, eager |") and "TTT <= 100 ms met" in rows[1]


@pytest.mark.slow
def test_what_the_time_does_not_allow_is_left_out_and_the_rest_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "table.md"
    command = [sys.executable, str(FOLDER / "expert_gpu.py"), "--tiny", "--device", "cpu"]
    options = ["--modes", "eager", "--repeats", "1000000", "--seconds", "4"]
    done = subprocess.run([*command, *options, "--out", str(out)], capture_output=True, text=True)
    assert "Ended by --seconds 4." in out.read_text() and "| case |" in done.stdout


def test_the_expert_has_the_published_size(program) -> None:
    with torch.device("meta"):
        model = program.FULL.expert.build({"state_dim": 32, "action_dim": 32})
    layers = [p.numel() for n, p in model.named_parameters() if n.startswith("layers.")]
    norms = 2 * (1024 + 1) * 3 * 1024  # pi0.5's modulation
    assert sum(layers) == 18 * (1024 * (2 * 2048 + 2 * 256) + 3 * 1024 * 4096 + norms)


def test_a_failing_case_takes_only_its_own_cell_along(program, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no kernel for this\nlong trace")

    report = program.Report(None)
    options = SimpleNamespace(repeats=2)
    cpu, case = torch.device("cpu"), program.Case(False, 1, "eager", False)
    program.measure_one(report, case, False, program.TINY, cpu, options)
    monkeypatch.setattr(program, "measure", fail)
    program.measure_one(report, case, True, program.TINY, cpu, options)
    row = program.table(report.cells)[2]
    assert "| failed: no kernel for this | - | - |" in row
    assert [program.within(cell) for cell in report.cells.values()] == [True, False]


def test_ratio_and_goals(program) -> None:
    def cell(ms: float, error: float | None = None):
        return program.Cell(program.Measurement(ms, ms, ms, 1.0), error=error)

    case = program.Case(False, 1, "eager", False)
    assert program.judged(case, cell(90.0), cell(99.0)) == (
        "1.10",
        "<= 1.20 met; TTT <= 100 ms met",
    )
    slow = program.judged(case._replace(train=True, rows=64), cell(80.0), cell(101.0))
    assert slow == ("1.26", "<= 1.25 MISSED")
    assert program.within(cell(1.0, 0.01))
    assert not program.within(cell(1.0, 0.1)) and not program.within(cell(1.0, float("nan")))


def test_kernels_are_counted_without_copies_and_ranges(program) -> None:
    from expert_gpu_cases import count_kernels

    events = [
        SimpleNamespace(name=name, device_type=device)
        for name, device in (
            ("ampere_gemm", DeviceType.CUDA), ("triton_poi", DeviceType.CUDA),
            ("Memcpy DtoD (Device -> Device)", DeviceType.CUDA),
            ("Memset (Device)", DeviceType.CUDA),
            ("Optimizer.step#AdamW.step", DeviceType.CUDA), ("cudaLaunchKernel", DeviceType.CPU),
        )
    ]  # fmt: skip
    assert count_kernels(events) == 2


def test_a_broken_ttt_is_seen_before_anything_is_measured(program, monkeypatch) -> None:
    import expert_gpu_cases as cases

    cpu, tiny = torch.device("cpu"), program.TINY
    right = cases.TTTAdapterConfig
    monkeypatch.setattr(
        cases, "TTTAdapterConfig", lambda **options: right(**{**options, "alpha_init": 1e-3})
    )
    assert cases.closed_gate_difference(tiny, cpu) > 0
