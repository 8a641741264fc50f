"""Weak scaling: every variant under DDP and FSDP2, on 1, 2 and 4 GPUs of one machine.

    python benchmarks/scaling.py --out scaling.md            # on a machine with GPUs
    python benchmarks/scaling.py --tiny                      # two processes on a CPU, minutes

Every process reads rows of its own, so that twice the processes train twice the tokens (a token of
the action expert is an action). A cell is a run of Lightning's Trainer in processes of its own,
the first of which is a copy of one that has imported everything (of the others each imports):
forward, backward, AdamW, the callbacks of `cli.py`, bf16-mixed (float32 on a CPU), random data from
memory, carried state. Step times are of device events, without the first `--warmup` steps: their
median, 10th and 90th percentile. Efficiency is tokens per second over n times those of one process
of the same strategy. Peak memory is of the first process. Pretrained models have random weights;
adapters alone are trained in them.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO

import lightning.pytorch as pl
import torch
from scaling_cases import FULL, TINY, VARIANTS, Size, make_batch, save_base
from training_runs import machine, write_json

from callbacks import FileBoundaryReset, StreamStateCheckpoint

STRATEGIES = ("ddp", "fsdp2")
COLUMNS = "variant | strategy | processes | step ms [p10, p90] | tokens/s | efficiency | peak GiB"


class Batches:
    """So many random batches of one file per row, in memory."""

    def __init__(self, variant: str, size: Size, steps: int, rank: int) -> None:
        self.batches = [make_batch(variant, size, step, rank) for step in range(steps)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        return iter(self.batches)


class Data(pl.LightningDataModule):
    """What a variant takes its sizes from, and its batches."""

    def __init__(self, variant: str, size: Size, steps: int) -> None:
        super().__init__()
        self.variant, self.size, self.steps = variant, size, steps
        self.features = VARIANTS[variant].features(size)
        self.statistics = None

    def train_dataloader(self) -> Batches:
        return Batches(self.variant, self.size, self.steps, self.trainer.global_rank)


class Clock(pl.Callback):
    """When each step has ended, by the device's clock; nothing waits before the last one."""

    def __init__(self) -> None:
        self.ends: list[Any] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.strategy.root_device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.ends.append(event)
        else:
            self.ends.append(time.perf_counter())

    def milliseconds(self, warmup: int) -> list[float]:
        """Time of every step behind the warm-up."""
        ends = self.ends[warmup - 1 :]
        if isinstance(ends[0], float):
            return [1e3 * (b - a) for a, b in pairwise(ends)]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in pairwise(ends)]


def run_cell(options: argparse.Namespace) -> None:
    """One cell, in as many processes as it has: this one starts the others."""
    variant, strategy, processes = options.cell[0], options.cell[1], int(options.cell[2])
    torch.manual_seed(0)
    module = VARIANTS[variant].module(TINY if options.tiny else FULL, options.base)
    result = train(options, variant, module, devices=processes, strategy=strategy)
    if module.trainer.is_global_zero:
        write_json(options.result, {**result, "tokens": processes * result["tokens"]})


def train(
    options: argparse.Namespace,
    variant: str,
    module: pl.LightningModule,
    *callbacks: pl.Callback,
    **trainer: Any,
) -> dict[str, Any]:
    """Milliseconds of the steps, tokens that a process reads in one, and the peak in GiB.

    Args:
        options: of the command line.
        variant: whose data and sizes are taken.
        module: what is trained.
        callbacks: beside those of `cli.py`.
        trainer: options of the Trainer beside those of every cell.
    """
    size, case = TINY if options.tiny else FULL, VARIANTS[variant]
    cuda = on_gpu(options)
    clock, steps = Clock(), options.warmup + options.repeats
    pl.Trainer(
        accelerator="gpu" if cuda else "cpu",
        precision="bf16-mixed" if cuda else "32-true",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[FileBoundaryReset(), StreamStateCheckpoint(), clock, *callbacks],
        **trainer,
    ).fit(module, Data(variant, size, steps))
    return {
        "milliseconds": clock.milliseconds(options.warmup),
        "tokens": size.rows * case.tokens(size),
        "peak": torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0,
    }


def measure(options: argparse.Namespace, folder: Path) -> Iterator[str]:
    """Lines of the table, one for every cell; a cell that fails says so and ends nothing."""
    for variant in options.variants:
        for strategy in STRATEGIES:
            alone = None
            for processes in options.processes:
                cell = in_process(main, (variant, strategy, processes), options, folder)
                name = f"| {variant} | {strategy} | {processes} |"
                if isinstance(cell, str):
                    yield f"{name} failed: {cell} | | | |"
                    continue
                speed = cell["tokens"] / statistics.median(cell["milliseconds"]) * 1e3
                alone = speed if processes == 1 else alone
                share = "" if alone is None else f"{speed / (processes * alone):.1%}"
                yield f"{name} {times(cell['milliseconds'])} | {speed:,.0f} | {share} | " + (
                    f"{cell['peak']:.2f} |"
                )


def in_process(
    main: Callable[[], None], cell: Sequence[Any], options: argparse.Namespace, folder: Path
) -> dict[str, Any] | str:
    """What a cell measures in a process of its own; the last line of its error if it fails.

    Args:
        main: of the program; it is called with the cell's command line.
        cell: names of the cell.
        options: of the command line.
        folder: of the base, and for the result.
    """
    names = [str(part) for part in cell]
    result = folder / f"{'_'.join(names)}.json"
    command = [os.path.abspath(sys.argv[0]), "--cell", *names, "--result", str(result)]
    command += ["--base", str(folder / "base"), "--repeats", str(options.repeats)]
    command += ["--warmup", str(options.warmup), *(["--tiny"] if options.tiny else [])]
    error = in_copy(partial(_as_command, main, command), result.with_suffix(".log"), options.ends)
    return error or dict(json.loads(result.read_text()))


def _as_command(main: Callable[[], None], command: list[str]) -> None:
    """Lightning starts the other processes of a cell by the command of the first."""
    sys.argv = command
    if torch.cuda._is_in_bad_fork():  # something of an import has touched the device
        os.execv(sys.executable, [sys.executable, *command])
    main()


def in_copy(call: Callable[[], None], log: Path, ends: float) -> str | None:
    """Call in a copy of this process, which has imported but never touched the device.

    Args:
        call: what is called.
        log: file for its errors.
        ends: time (`time.monotonic`) when it is ended at the latest.

    Returns:
        The last line of its error, None without one.
    """
    left = ends - time.monotonic()
    if left <= 0:
        return "--seconds were over"
    fork = multiprocessing.get_context("fork")
    with open(os.devnull, "w") as nothing, log.open("w") as errors:
        process = fork.Process(target=_call, args=(call, nothing, errors))
        process.start()
    try:
        process.join(None if left == math.inf else left)
        late = process.is_alive()
    finally:
        if process.is_alive():
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
    if late:
        return "ended, as --seconds were over"
    if process.exitcode:
        lines = log.read_text().strip().splitlines()
        return (lines or [f"exit code {process.exitcode}"])[-1]
    return None


def _call(call: Callable[[], None], out: TextIO, errors: TextIO) -> None:
    os.setpgrp()  # to end it with the processes that it starts
    sys.stdout, sys.stderr = out, errors
    os.dup2(out.fileno(), 1)
    os.dup2(errors.fileno(), 2)
    call()


def prepare(
    options: argparse.Namespace, folder: Path, survey: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """Save the base into a folder, and take stock of the machine.

    Args:
        options: of the command line.
        folder: for the base.
        survey: gives what is known of the machine.

    Raises:
        SystemExit: one of them fails.
    """
    size, found = TINY if options.tiny else FULL, folder / "machine.json"

    def call() -> None:
        save_base(size, folder, "cuda" if on_gpu(options) else "cpu")
        write_json(found, survey())

    error = in_copy(call, folder / "machine.log", options.ends)
    if error:
        raise SystemExit(error)
    return dict(json.loads(found.read_text()))


def on_gpu(options: argparse.Namespace) -> bool:
    """Whether the cells run on GPUs."""
    return torch.cuda.is_available() and not options.tiny


def times(milliseconds: list[float]) -> str:
    """Median and spread."""
    low, *_, high = statistics.quantiles(milliseconds, n=10, method="inclusive")
    return f"{statistics.median(milliseconds):.1f} [{low:.1f}, {high:.1f}]"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = parser_of_cells(__doc__, warmup=5, repeats=30)
    parser.add_argument("--processes", nargs="+", type=int, help="default: 1 2 4; tiny: 1 2")
    options = parse(parser)
    options.processes = options.processes or ([1, 2] if options.tiny else [1, 2, 4])
    return options


def parser_of_cells(description: str | None, warmup: int, repeats: int) -> argparse.ArgumentParser:
    """The options of a table of cells, and those that a cell's own process gets."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="small models on the CPU")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--repeats", type=int, default=repeats, help="steps that are timed")
    parser.add_argument("--warmup", type=int, default=warmup, help="steps before, at least 1")
    seconds = "after the imports, until the table ends at the latest; cells that are left say so"
    parser.add_argument("--seconds", type=float, default=math.inf, help=seconds)
    parser.add_argument("--out", type=Path, help="file to write")
    parser.add_argument("--cell", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line, and when it ends (`time.monotonic`)."""
    options = parser.parse_args()
    options.ends = time.monotonic() + options.seconds
    return options


def write_table(columns: str, rows: Iterator[str], about: str, out: Path | None) -> None:
    """Print a table, and write it after every row."""
    lines = [f"| {columns} |", "|---" * (1 + columns.count("|")) + "|"]
    for row in rows:
        lines.append(row)
        print(row, flush=True)
        if out:
            out.write_text("\n".join([*lines, "", about]) + "\n")
    print("\n".join(["", *lines, "", about]))


def note(options: argparse.Namespace) -> str:
    """What a reader must know of the figures first."""
    return "TINY, on a CPU: no figure says anything. " if options.tiny else ""


def main() -> None:
    """Measure all cells, print the table, and write it after every cell."""
    options = arguments()
    if options.cell:
        run_cell(options)
        return
    survey = partial(machine, ("torch", "lightning", "transformers"))
    with tempfile.TemporaryDirectory() as name:
        about = note(options) + str(prepare(options, Path(name), survey))
        write_table(COLUMNS, measure(options, Path(name)), about, options.out)


if __name__ == "__main__":
    main()
