"""A training step of every variant on one GPU: tokens per second, and how much of the chip it uses.

    python benchmarks/end_to_end.py --out end_to_end.md      # on a GPU
    python benchmarks/end_to_end.py --tiny                   # on a CPU, minutes

Arms: `plain`, the model without what the variant adds and all weights trained; `lora`, peft's
LoRA in it, frozen; and the variant with its ops as torch operations (`torch`), with the kernels
that `auto` takes (`auto`), and compiled (`compiled`, not by default: minutes). Sizes and runs are
those of `scaling.py`: Lightning's Trainer, forward, backward, AdamW, the callbacks of `cli.py`,
bf16-mixed (float32 on a CPU), random data from memory, carried state; every cell is a process.

FLOPs are those of the products and attentions of a step, forward and backward, as torch counts
them in the first step; kernels of Triton are not counted, so that `auto` and `compiled` get the
number of `torch`. Used: FLOPs per second by those of a bfloat16 product of 8192, measured first.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from op_timing import ceilings
from scaling import in_process, times, train
from scaling_cases import FULL, TINY, VARIANTS, save_base, ttt_lora
from torch.utils.flop_counter import FlopCounterMode
from training_runs import machine, write_json

from lightning_modules.ops import triton_backend
from lightning_modules.ops.ttt_lora import choose

ARMS = ("plain", "lora", "torch", "auto", "compiled")
LORA = ("memory_bank", "ttt_lora", "in_place")
"""Variants in whose base LoRA is measured: one and the same, so once for those that are asked."""

COLUMNS = "variant | arm | step ms [p10, p90] | tokens/s | TFLOP a step | used | peak GiB"


class CountFlops(pl.Callback):
    """FLOPs of the first step."""

    def __init__(self) -> None:
        self.flops, self._mode = 0, FlopCounterMode(display=False)

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == 0:
            self._mode.__enter__()

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == 1:
            self._mode.__exit__(None, None, None)
            self.flops = self._mode.get_total_flops()


def run_cell(options: argparse.Namespace) -> None:
    """One cell, in this process."""
    variant, arm = options.cell
    case, size = VARIANTS[variant], TINY if options.tiny else FULL
    torch.manual_seed(0)
    make = {"plain": case.plain, "lora": ttt_lora("lora")}.get(arm, case.module)
    module = make(size, options.base)
    if arm == "torch":
        for user in (triton_backend, choose):
            user.unable = lambda *call: "this arm is without kernels"  # type: ignore[attr-defined]
    module.compile_model = arm == "compiled"
    counted = CountFlops()
    counting = [counted] if arm in ("plain", "lora", "torch") else []
    result = train(options, variant, module, *counting, devices=1)
    write_json(options.result, {**result, "flops": counted.flops})


def measure(options: argparse.Namespace, folder: Path, peak: float) -> Iterator[str]:
    """Lines of the table; a cell that fails says so and ends nothing.

    Args:
        options: of the command line.
        folder: for the base and the results.
        peak: TFLOP/s of the chip.
    """
    base = save_base(TINY if options.tiny else FULL, folder)
    for variant in options.variants:
        flops = 0
        for arm in options.arms:
            if arm == "lora" and variant != next((v for v in options.variants if v in LORA), None):
                continue
            cell = in_process(__file__, (variant, arm), options, folder, base)
            if isinstance(cell, str):
                yield f"| {variant} | {arm} | failed: {cell} | | | | |"
                continue
            flops = cell["flops"] or flops
            yield f"| {variant} | {arm} | {_line(cell, flops / 1e12, peak)} |"


def _line(cell: dict[str, Any], tflop: float, peak: float) -> str:
    seconds = statistics.median(cell["milliseconds"]) / 1e3
    used = f"{tflop / seconds / peak:.1%}" if tflop else ""
    speed = f"{cell['tokens'] / seconds:,.0f}"
    return f"{times(cell['milliseconds'])} | {speed} | {tflop:.3g} | {used} | {cell['peak']:.1f}"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="small models on the CPU")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--arms", nargs="+", default=list(ARMS[:-1]), choices=ARMS)
    parser.add_argument("--repeats", type=int, default=20, help="steps that are timed")
    parser.add_argument("--warmup", type=int, default=5, help="steps before, at least 1")
    parser.add_argument("--out", type=Path, help="file to write")
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure all cells, print the table, and write it after every cell."""
    options = arguments()
    if options.cell:
        run_cell(options)
        return
    cuda = torch.cuda.is_available() and not options.tiny
    found = ceilings() if cuda else ceilings(256, 3, "cpu", 2**16)
    about = f"A product of bfloat16 reaches {found.matmul:.3g} TFLOP/s. "
    about += "TINY, on a CPU: no figure says anything. " if options.tiny else ""
    about += str(machine(("torch", "triton", "lightning", "transformers", "peft")))
    lines = [f"| {COLUMNS} |", "|---" * 7 + "|"]
    with tempfile.TemporaryDirectory() as folder:
        for line in measure(options, Path(folder), found.matmul):
            lines.append(line)
            print(line, flush=True)
            if options.out:
                options.out.write_text("\n".join([*lines, "", about]) + "\n")
    print("\n".join(["", *lines, "", about]))


if __name__ == "__main__":
    main()
