"""Weak scaling: every variant under DDP and FSDP2, on 1, 2 and 4 GPUs of one machine.

    python benchmarks/scaling.py --out scaling.md            # on a machine with GPUs
    python benchmarks/scaling.py --tiny                      # two processes on a CPU, minutes

Every process reads rows of its own, so that twice the processes train twice the tokens (a token of
the action expert is an action). A cell is a run of Lightning's Trainer in processes of its own:
forward, backward, AdamW, the callbacks of `cli.py`, bf16-mixed (float32 on a CPU), random data from
memory, carried state. Step times are of device events, without the first `--warmup` steps: their
median, 10th and 90th percentile. Efficiency is tokens per second over n times those of one process
of the same strategy. Peak memory is of the first process. Pretrained models have random weights;
adapters alone are trained in them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

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
    cuda = torch.cuda.is_available() and not options.tiny
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
    base = save_base(TINY if options.tiny else FULL, folder)
    for variant in options.variants:
        for strategy in STRATEGIES:
            alone = None
            for processes in options.processes:
                cell = in_process(__file__, (variant, strategy, processes), options, folder, base)
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
    script: str, cell: Sequence[Any], options: argparse.Namespace, folder: Path, base: Path
) -> dict[str, Any] | str:
    """What a cell measures in a process of its own; the last line of its error if it fails."""
    names = [str(part) for part in cell]
    result = folder / f"{'_'.join(names)}.json"
    command = [sys.executable, script, "--cell", *names, "--result", str(result)]
    command += ["--base", str(base), "--repeats", str(options.repeats)]
    command += ["--warmup", str(options.warmup), *(["--tiny"] if options.tiny else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not result.exists():
        return (done.stderr.strip().splitlines() or ["no message"])[-1]
    return dict(json.loads(result.read_text()))


def times(milliseconds: list[float]) -> str:
    """Median and spread."""
    low, *_, high = statistics.quantiles(milliseconds, n=10)
    return f"{statistics.median(milliseconds):.1f} [{low:.1f}, {high:.1f}]"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = parser_of_cells(__doc__, repeats=30)
    parser.add_argument("--processes", nargs="+", type=int, help="default: 1 2 4; tiny: 1 2")
    options = parser.parse_args()
    options.processes = options.processes or ([1, 2] if options.tiny else [1, 2, 4])
    return options


def parser_of_cells(description: str | None, repeats: int) -> argparse.ArgumentParser:
    """The options of a table of cells, and those that a cell's own process gets."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="small models on the CPU")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--repeats", type=int, default=repeats, help="steps that are timed")
    parser.add_argument("--warmup", type=int, default=5, help="steps before, at least 1")
    parser.add_argument("--out", type=Path, help="file to write")
    parser.add_argument("--cell", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    return parser


def write_table(columns: str, rows: Iterator[str], about: str, out: Path | None) -> None:
    """Print a table, and write it after every row."""
    lines = [f"| {columns} |", "|---" * (1 + columns.count("|")) + "|"]
    for row in rows:
        lines.append(row)
        print(row, flush=True)
        if out:
            out.write_text("\n".join([*lines, "", about]) + "\n")
    print("\n".join(["", *lines, "", about]))


def main() -> None:
    """Measure all cells, print the table, and write it after every cell."""
    options = arguments()
    if options.cell:
        run_cell(options)
        return
    note = "TINY, on a CPU: no figure says anything. " if options.tiny else ""
    about = note + str(machine(("torch", "lightning", "transformers")))
    with tempfile.TemporaryDirectory() as folder:
        write_table(COLUMNS, measure(options, Path(folder)), about, options.out)


if __name__ == "__main__":
    main()
