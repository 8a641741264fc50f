"""What test-time training costs the action expert: a training step and a sampling call, timed.

    python benchmarks/expert_gpu.py --out expert_gpu.md
    python benchmarks/expert_gpu.py --tiny                  # seconds, also on a CPU

The Gemma 300M expert of pi0 on one observation token and 50 actions, bf16 autocast as Lightning's
bf16-mixed, with TTT-Linear in all 18 layers (state reset, static gate) and without. Checks come
first: a gate of 0 equals no TTT bit for bit, precisions agree with float64, compiled calls and
CUDA graphs with eager ones. Then a training step (forward, backward, fused AdamW) and
`sample_actions` (10 Euler steps; B = 1 and 64): eager, as a CUDA graph, with the regions that
repeat in every layer compiled, and (training) as `compile_model` compiles it. The table is
rewritten to --out after every case; --seconds ends the run with what there is. On an
H200 400 s were too few for the last case, the compiled model with TTT.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

sys.path[:0] = [str(Path(__file__).parents[index]) for index in (0, 1)]

import torch  # noqa: E402
from expert_gpu_cases import (  # noqa: E402
    FULL,
    TINY,
    TOLERANCES,
    Call,
    Chunk,
    Measurement,
    Size,
    build,
    closed_gate_difference,
    compile_regions,
    draw_chunk,
    fresh_memory,
    kernels,
    measure,
    precision_errors,
    synchronize,
)

NAMES = {
    "eager": "eager",
    "graph": "eager",
    "regions": "compiled regions",
    "model": "compiled model",
}
"""Modes, in this order: nothing is compiled, the same as a graph; norms, MLP, attention and TTT
are compiled; the model in place. On a GPU the compiled ones are also captured as graphs."""

RATIO_GOALS = {True: 1.25, False: 1.20}
"""Of a training step, and of a sampling call: TTT / none."""

LATENCY_GOAL = 100.0
"""Milliseconds of a sampling call with TTT at B = 1."""


class OutOfTime(BaseException):
    """The run has lasted --seconds; no `except Exception` on the way swallows it."""


class Case(NamedTuple):
    """A row of the table."""

    train: bool
    rows: int
    mode: str
    graph: bool


class Cell(NamedTuple):
    """What was measured of a case without or with TTT; `note` says why there is nothing."""

    time: Measurement | None = None
    kernels: int | None = None
    error: float | None = None
    note: str = ""


class Report:
    """The results so far, on the screen and in a file.

    Args:
        path: file that is rewritten whenever something is known; None for none.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.lines: list[str] = []
        self.cells: dict[tuple[Case, bool], Cell] = {}

    def say(self, line: str) -> None:
        """Add a line above the table."""
        print(line, flush=True)
        self.lines.append(line)
        self.write()

    def add(self, case: Case, ttt: bool, cell: Cell) -> None:
        """Add a result."""
        self.cells[case, ttt] = cell
        what = cell.note or f"{cell.time.median:.2f} ms"
        print(f"  {title(case)}, {'TTT' if ttt else 'no TTT'}: {what}", flush=True)
        self.write()

    def write(self) -> None:
        """Rewrite the file."""
        if self.path is not None:
            self.path.write_text("\n".join([*self.lines, "", *table(self.cells)]) + "\n")


def main() -> int:
    """Parse the command line, check, measure, print the table."""
    options = arguments()
    device, size = torch.device(options.device), TINY if options.tiny else FULL
    size = replace(size, expert=replace(size.expert, adarms=options.adarms))
    report, start = Report(options.out), time.perf_counter()
    signal.signal(signal.SIGALRM, _out_of_time)
    signal.alarm(options.seconds)
    passed = False
    try:
        report.say(machine(device) + (", TINY: no figure says anything" if options.tiny else ""))
        passed = check(report, size, device)
        describe(report, size, device)
        measure_all(report, size, device, options)
    except OutOfTime:
        report.say(f"Ended by --seconds {options.seconds}.")
    signal.alarm(0)
    report.say(f"{time.perf_counter() - start:.0f} s in all.")
    print("\n" + "\n".join(table(report.cells)))
    return 0 if passed and all(within(cell) for cell in report.cells.values()) else 1


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="two layers of width 32")
    parser.add_argument(
        "--adarms",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="with the timestep modulation of pi0.5, or plain norms as in pi0",
    )
    parser.add_argument("--modes", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--repeats", type=int, default=20, help="timed calls per case")
    parser.add_argument("--seconds", type=int, default=570, help="end the run after this time")
    parser.add_argument("--out", type=Path, help="file for the table")
    return parser.parse_args()


def _out_of_time(*_: Any) -> None:
    raise OutOfTime


def check(report: Report, size: Size, device: torch.device) -> bool:
    """Whether the model computes what it should."""
    different = closed_gate_difference(size, device)
    report.say(f"A gate of 0 against no TTT: {different} values differ.")
    passed = different == 0
    fresh_memory(device)
    for name, error in precision_errors(size, device, rows=4).items():
        good = error <= TOLERANCES[name]  # NaN is not
        verdict = "as it should" if good else "WRONG"
        report.say(f"{name} against float64: {error:.1e} (<= {TOLERANCES[name]:.0e}, {verdict})")
        passed = passed and good
    return passed


def describe(report: Report, size: Size, device: torch.device) -> None:
    """Numbers of parameters; the machine's rate and what it makes of a training step at best."""
    rate = matmul_rate(device, 64 if size.backend == TINY.backend else 8192)
    tokens, floors = size.rows * (size.horizon + 1), []
    report.say(f"bf16 matrix product: {rate / 1e12:.3g} TFLOP/s")
    for ttt in (False, True):
        module = build(size, device, ttt)
        count = sum(parameter.numel() for parameter in module.parameters())
        # The maps of the condition see two tokens a row, not all.
        maps = sum(p.numel() for n, p in module.named_parameters() if ".dense." not in n)
        floors.append(6 * maps * tokens / rate * 1000)
        report.say(
            f"{'TTT' if ttt else 'no TTT'}: {count:,} parameters, {maps:,} without modulation; "
            f"6 * {maps:,} * {tokens} tokens at that rate: {floors[-1]:.3g} ms a training step"
        )
    report.say(f"These two, TTT / none: {floors[1] / floors[0]:.2f}")


def matmul_rate(device: torch.device, width: int) -> float:
    """FLOP/s of a bf16 matrix product on random data, the mean of ten."""
    a, b = (torch.randn(width, width, device=device).bfloat16() for _ in range(2))
    for _ in range(3):
        a @ b
    synchronize(device)
    start = time.perf_counter()
    for _ in range(10):
        a @ b
    synchronize(device)
    return 10 * 2 * width**3 / (time.perf_counter() - start)


def measure_all(
    report: Report, size: Size, device: torch.device, options: argparse.Namespace
) -> None:
    """Fill the table, what is quick first."""
    for mode in options.modes:
        for train, rows in ((True, size.rows), (False, 1), (False, size.rows)):
            if mode == "model" and not train:
                continue  # `sample_actions` leaves a model compiled for training alone
            for ttt in (False, True):
                measure_one(report, Case(train, rows, mode, False), ttt, size, device, options)


def measure_one(
    report: Report,
    case: Case,
    ttt: bool,
    size: Size,
    device: torch.device,
    options: argparse.Namespace,
) -> None:
    """One call, and on a GPU the same as a graph; a failure takes only its own cell along."""
    call = None
    for graph in graphs(case.mode, device):
        fresh_memory(device, forget=call is None)
        case = case._replace(graph=graph)
        try:
            call = call or prepare(case, ttt, size, device)
            if graph:
                call.capture()
            cell = Cell(
                error=None if case.mode == "eager" else call.error(),
                time=measure(call, chunks(size, case.rows, device), options.repeats),
                kernels=kernels(call, draw_chunk(size, case.rows, device)) if case.train else None,
            )
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            cell = Cell(note=f"failed: {reason[:80]}")
        report.add(case, ttt, cell)


def graphs(mode: str, device: torch.device) -> tuple[bool, ...]:
    """Whether a mode is measured launch by launch, captured as a graph, or both."""
    if mode == "eager" or device.type != "cuda":
        return () if mode == "graph" else (False,)
    return (True,) if mode == "graph" else (False, True)


def prepare(case: Case, ttt: bool, size: Size, device: torch.device) -> Call:
    """The module of a case, compiled as it says."""
    module = build(size, device, ttt).train(case.train)
    if case.mode == "regions":
        compile_regions(module, size.backend)
    elif case.mode == "model":
        module.model.compile(dynamic=False, backend=size.backend)
    return Call(module, draw_chunk(size, case.rows, device), case.train)


def chunks(size: Size, rows: int, device: torch.device) -> Iterator[Chunk]:
    """Fresh random inputs."""
    while True:
        yield draw_chunk(size, rows, device)


def within(cell: Cell) -> bool:
    """Whether the call was measured, and agreed with the eager one."""
    return not cell.note and (cell.error is None or cell.error <= TOLERANCES["call"])


def title(case: Case) -> str:
    """Words for a case."""
    what = "training step" if case.train else "sampling call"
    return f"{what} B={case.rows}, {NAMES[case.mode]}{' + CUDA graph' if case.graph else ''}"


def table(cells: dict[tuple[Case, bool], Cell]) -> list[str]:
    """One row per case."""
    lines = [
        "| case | none ms [p10, p90] | TTT ms [p10, p90] | TTT / none | goal | peak GiB none, TTT "
        "| kernels none, TTT | error none, TTT |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for case in dict.fromkeys(case for case, _ in cells):
        pair = [cells.get((case, ttt), Cell(note="-")) for ttt in (False, True)]
        columns = [
            title(case),
            *(milliseconds(cell) for cell in pair),
            *judged(case, *pair),
            ", ".join("-" if c.time is None else f"{c.time.memory:.2f}" for c in pair),
            ", ".join("-" if c.kernels is None else str(c.kernels) for c in pair),
            ", ".join("-" if c.error is None else f"{c.error:.0e}" for c in pair),
        ]
        lines.append(f"| {' | '.join(columns)} |")
    return lines


def milliseconds(cell: Cell) -> str:
    """Median and spread."""
    if cell.time is None:
        return cell.note
    return f"{cell.time.median:.2f} [{cell.time.low:.2f}, {cell.time.high:.2f}]"


def judged(case: Case, none: Cell, ttt: Cell) -> tuple[str, str]:
    """The ratio, and the goals with whether they are met."""
    if none.time is None or ttt.time is None:
        return "-", "-"
    ratio = ttt.time.median / none.time.median
    goals = [(f"<= {RATIO_GOALS[case.train]:.2f}", ratio <= RATIO_GOALS[case.train])]
    if not case.train and case.rows == 1:
        goals.append((f"TTT <= {LATENCY_GOAL:.0f} ms", ttt.time.median <= LATENCY_GOAL))
    return f"{ratio:.2f}", "; ".join(f"{goal} {'met' if met else 'MISSED'}" for goal, met in goals)


def machine(device: torch.device) -> str:
    """Where and with what this runs."""
    name = platform.machine()
    if device.type == "cuda":
        name = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    versions = ", ".join(f"{p} {version(p)}" for p in ("torch", "transformers", "lightning"))
    return f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}"


if __name__ == "__main__":
    sys.exit(main())
