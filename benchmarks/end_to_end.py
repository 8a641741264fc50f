"""A training step of every variant on one GPU: tokens per second, and how much of the chip it uses.

    python benchmarks/end_to_end.py --out end_to_end.md      # on a GPU
    python benchmarks/end_to_end.py --tiny                   # on a CPU, minutes

Arms: `plain`, the model without what the variant adds and all weights trained; `lora`, peft's
LoRA in it, frozen; and the variant with its ops as torch operations (`torch`), with the kernels
that `auto` takes (`auto`), and compiled (`compiled`, not by default: minutes). Sizes and runs are
those of `scaling.py`: Lightning's Trainer, forward, backward, AdamW, the callbacks of `cli.py`,
bf16-mixed (float32 on a CPU), random data from memory, carried state. Every cell is a process of
its own, a copy of one that has imported everything.

FLOPs are those of the products and attentions of a step, forward and backward, as operations of
torch compute them (`callbacks/flops.py`), whichever kernels an arm takes; `compiled` gets the
number of `auto`. Used: FLOPs per second by those of a bfloat16 product of 8192, measured first.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from op_timing import ceilings
from scaling import (
    in_process,
    note,
    on_gpu,
    parse,
    parser_of_cells,
    prepare,
    times,
    train,
    write_table,
)
from scaling_cases import FULL, TINY, VARIANTS, ttt_lora
from training_runs import machine, write_json

from callbacks import Throughput
from lightning_modules.ops import triton_backend

ARMS = ("plain", "lora", "torch", "auto", "compiled")
ONE_BASE = ("memory_bank", "ttt_lora", "in_place")
"""Variants of one and the same base: it is measured once, plain and with LoRA, by the first."""

COLUMNS = "variant | arm | step ms [p10, p90] | tokens/s | TFLOP a step | used | peak GiB"


def run_cell(options: argparse.Namespace) -> None:
    """One cell, in this process."""
    variant, arm = options.cell
    case, size = VARIANTS[variant], TINY if options.tiny else FULL
    torch.manual_seed(0)
    make = {"plain": case.plain, "lora": ttt_lora("lora")}.get(arm, case.module)
    module = make(size, options.base)
    if arm == "torch":
        triton_backend.unable = lambda *call: "this arm is without kernels"
    module.compile_model = arm == "compiled"
    result = train(options, variant, module, Throughput(), devices=1)
    write_json(options.result, {**result, "flops": getattr(module, "flops_per_batch", None)})


def measure(options: argparse.Namespace, folder: Path, peak: float) -> Iterator[str]:
    """Lines of the table; a cell that fails says so and ends nothing.

    Args:
        options: of the command line.
        folder: for the base and the results.
        peak: TFLOP/s of the chip.
    """
    others = [variant for variant in options.variants if variant in ONE_BASE][1:]
    for variant in options.variants:
        flops: dict[str, int] = {}
        for arm in options.arms:
            if variant in others and arm in ("plain", "lora"):
                continue
            if arm == "lora" and variant not in ONE_BASE:
                continue
            cell = in_process(main, (variant, arm), options, folder)
            if isinstance(cell, str):
                yield f"| {variant} | {arm} | failed: {cell} | | | | |"
                continue
            flops[arm] = cell["flops"]
            counted = flops[arm] or flops.get("auto")
            yield f"| {variant} | {arm} | {_line(cell, counted, peak)} |"


def _line(cell: dict[str, Any], flops: int | None, peak: float) -> str:
    seconds = statistics.median(cell["milliseconds"]) / 1e3
    speed, used = f"{cell['tokens'] / seconds:,.0f}", " | "
    if flops is not None:
        used = f"{flops / 1e12:.3g} | {flops / 1e12 / seconds / peak:.1%}"
    return f"{times(cell['milliseconds'])} | {speed} | {used} | {cell['peak']:.1f}"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = parser_of_cells(__doc__, warmup=4, repeats=8)
    parser.add_argument("--arms", nargs="+", default=list(ARMS[:-1]), choices=ARMS)
    return parse(parser)


def survey(cuda: bool) -> dict[str, Any]:
    """The machine, and what a product of bfloat16 reaches on it, in TFLOP/s."""
    found = ceilings() if cuda else ceilings(256, 3, "cpu", 2**16)
    packages = ("torch", "triton", "lightning", "transformers", "peft")
    return {**machine(packages), "matmul": found.matmul}


def main() -> None:
    """Measure all cells, print the table, and write it after every cell."""
    options = arguments()
    if options.cell:
        run_cell(options)
        return
    with tempfile.TemporaryDirectory() as name:
        found = prepare(options, Path(name), lambda: survey(on_gpu(options)))
        peak = found.pop("matmul")
        about = f"{note(options)}A product of bfloat16 reaches {peak:.3g} TFLOP/s. {found}"
        write_table(COLUMNS, measure(options, Path(name), peak), about, options.out)


if __name__ == "__main__":
    main()
