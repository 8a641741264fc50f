"""What an op costs on a GPU, beside what its bytes and products must take.

    python benchmarks/ops_ttt_lora.py --out ops.md     # on a GPU
    python benchmarks/ops_ttt_lora.py --tiny           # seconds on a CPU: torch alone

Ceilings first (a product of bfloat16 matrices, a copy on the device). Every row is checked against
float64 in the same run, on fresh random inputs: the largest error of outputs and gradients,
relative to the largest number. Medians of `--repeats` calls after three, from device events; the
peak is what a forward and backward pass adds. The floor is the larger of bytes over the copy's rate
and FLOPs over the product's.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from op_timing import Ceilings, ceilings, time_call
from torch import Tensor

from lightning_modules.ops import ttt_lora_cell


class Row(NamedTuple):
    """One op at one size.

    Attributes:
        name: of the line in the table.
        inputs: makes new leaves on a device.
        run: the op; returns what is differentiated.
        exact: the same in float64, of some of the rows.
        bytes: that forward and backward must move, `(forward, backward)`.
        flops: of products, likewise.
    """

    name: str
    inputs: Callable[[str], list[Tensor]]
    run: Callable[[list[Tensor]], Tensor]
    exact: Callable[[list[Tensor]], Tensor]
    bytes: tuple[int, int]
    flops: tuple[int, int]


def ttt_lora_rows(tiny: bool, backends: list[str]) -> Iterator[Row]:
    """TTT-LoRA's groups in a layer of a 0.6B decoder: q, k, v; o and down; gate and up."""
    batch, length = (2, 64) if tiny else (8, 2048)
    for group, d, m in [(1, 6, 16), (3, 8, 16), (2, 10, 16), (3, 8, 64)]:
        used = 3 * group * d
        width = used + -used % 8

        def inputs(device: str, group: int = group, d: int = d, width: int = width) -> list[Tensor]:
            dtype = torch.bfloat16 if device == "cuda" else torch.float32
            projected = torch.randn(batch, length, width, device=device, dtype=dtype)
            base = 0.02 * torch.randn(group, d + 1, d, device=device)
            norm = torch.stack([torch.ones(group, d), torch.zeros(group, d)], 1).to(device)
            gate = torch.full((group,), -2.0, device=device)
            return [x.requires_grad_() for x in (projected, gate, base, norm)]

        def run(given: list[Tensor], backend: str = "torch", m: int = m, d: int = d) -> Tensor:
            projected, gate, base, norm = given
            options = {"mini_batch_size": m, "norm": norm, "backend": backend}
            return ttt_lora_cell(projected, gate.sigmoid(), base, **options)[0][..., :d]

        tokens, changes = batch * length, batch * group * -(-length // m) * (d + 1) * d * 4
        moved = tokens * (width + group * (d + -d % 8)) * 2
        products = 2 * tokens * group * (d + 1) * d
        for backend in backends:

            def call(given: list[Tensor], backend: str = backend, run: Callable = run) -> Tensor:
                return run(given, backend)

            yield Row(
                f"ttt_lora G={group} d={d} m={m} T={length} B={batch}, {backend}",
                *(inputs, call, run),
                bytes=(moved + changes, 2 * moved + 5 * changes),
                flops=(3 * products, 9 * products),
            )


def errors(row: Row, device: str) -> float:
    """Largest relative error of outputs and gradients against float64."""
    leaves = row.inputs(device)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    results, weight = [], None
    for run, given in ((row.run, leaves), (row.exact, exact)):
        y = run(given)
        # At random: a smooth weighting of the outputs makes gradients cancel to their errors.
        weight = torch.randn_like(y, dtype=torch.float64) if weight is None else weight
        gradients = torch.autograd.grad((y.double() * weight).sum(), given)
        results.append([y, *gradients])
    pairs = zip(*results, strict=True)
    return max(((x.double() - y).abs().max() / y.abs().max()).item() for x, y in pairs)


def measure(row: Row, limits: Ceilings, repeats: int, device: str) -> str:
    """A line of the table."""
    leaves = row.inputs(device)
    grad = torch.ones_like(row.run(leaves))

    def both() -> None:
        torch.autograd.grad(row.run(leaves), leaves, grad)

    with torch.no_grad():
        forward = time_call(lambda: row.run(leaves), repeats, device=device).median
    total, _, _, peak = time_call(both, repeats, device=device)
    cells = []
    parts = ((forward, row.bytes[0], row.flops[0]), (total, sum(row.bytes), sum(row.flops)))
    for milliseconds, moved, flops in parts:
        floor = max(1e-6 * moved / limits.copy, 1e-9 * flops / limits.matmul)
        cells.append(f"{milliseconds:.3f} | {100 * floor / milliseconds:.1f} %")
    return f"| {row.name} | {' | '.join(cells)} | {1024 * peak:.0f} | {errors(row, device):.1e} |"


def main() -> None:
    """Print a table, and write it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--out", type=Path, help="file to write")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = {} if device == "cuda" else {"width": 256, "copied": 2**16}
    limits = ceilings(repeats=options.repeats, device=device, **sizes)
    lines = [
        f"Product in bfloat16: {limits.matmul:.1f} TFLOP/s; copy: {limits.copy:.0f} GB/s.",
        "",
        "| op | forward ms | of floor | both ms | of floor | adds MiB | error |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    backends = ["triton", "torch"] if device == "cuda" else ["torch"]
    for row in ttt_lora_rows(options.tiny, backends):
        lines.append(measure(row, limits, options.repeats, device))
        print(lines[-1], flush=True)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
