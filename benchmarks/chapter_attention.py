"""Chapter attention on a GPU or CPU: time, memory and error, beside a plain gather and SDPA.

    python benchmarks/chapter_attention.py            # on a GPU
    python benchmarks/chapter_attention.py --tiny     # a few seconds on a CPU, to see that it runs

Medians of `--repeats` calls after two warm-up calls, forward and forward with backward (gradients
of queries, bank and weights). `gather` is what the op replaces: every block or token gathers its
rows and attends to them with `scaled_dot_product_attention`. `whole` reads the whole bank by SDPA.
The error is the largest difference to the naive loop in float64, over the scale of its output, on
the first tokens. Peak memory is what a call with backward adds to its inputs (GPU only).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from training_runs import machine

from lightning_modules.ops import chapter_attention

CHECKED = 64
"""Tokens that are compared with the naive loop."""


class Case(NamedTuple):
    """Sizes: batch, tokens, heads, channels of a head, chapters, rows of one, chosen, block."""

    batch: int
    tokens: int
    heads: int
    head_dim: int
    chapters: int
    rows: int
    top_k: int
    block: int

    def __str__(self) -> str:
        names = ("B", "T", "H", "D", "C", "R", "k", "block")
        return " ".join(f"{name}{value}" for name, value in zip(names, self, strict=True))


CASES = (
    Case(8, 2048, 12, 64, 64, 64, 8, 128),
    Case(8, 2048, 12, 64, 64, 64, 8, 1),
    Case(8, 2048, 12, 64, 4096, 64, 8, 128),
    Case(8, 2048, 12, 64, 4096, 64, 8, 1),
    Case(16, 1024, 8, 32, 64, 128, 4, 64),
    Case(16, 1024, 8, 32, 64, 128, 4, 1),
    Case(3, 777, 5, 48, 37, 23, 3, 100),
    Case(3, 777, 5, 48, 37, 23, 3, 1),
)
TINY = (Case(2, 70, 2, 8, 6, 5, 2, 16), Case(2, 70, 2, 8, 6, 5, 2, 1))
GATHERED = 2**31
"""Elements of gathered keys above which `gather` is not tried."""


def inputs(case: Case, device: str, dtype: torch.dtype) -> list[Tensor]:
    """q, keys, values, chapters and log weights, all but the chapters with a gradient."""
    torch.manual_seed(0)
    blocks = -(-case.tokens // case.block)
    shapes = [(case.batch, case.tokens, case.heads, case.head_dim)]
    shapes += [(case.chapters, case.rows, case.heads, case.head_dim)] * 2
    q, k, v = (torch.randn(shape, device=device, dtype=dtype) for shape in shapes)
    logits = torch.randn(case.batch, blocks, case.chapters, device=device)
    chapters = logits.topk(case.top_k).indices
    weights = logits.softmax(-1).gather(-1, chapters).log()
    return [*(x.requires_grad_() for x in (q, k, v)), chapters, weights.requires_grad_()]


def gather(
    q: Tensor, k: Tensor, v: Tensor, chapters: Tensor, weights: Tensor, block: int
) -> Tensor:
    """The same by gathering the rows of every block."""
    (batch, time_, heads, size), (count, rows, _, _) = q.shape, k.shape
    blocks, choices = chapters.shape[1:]
    keys, values = (
        F.embedding(chapters, x.reshape(count, -1))
        .view(batch * blocks, choices * rows, heads, size)
        .transpose(1, 2)
        for x in (k, v)
    )
    padded = F.pad(q, (0, 0, 0, 0, 0, blocks * block - time_))
    queries = padded.view(batch * blocks, block, heads, size).transpose(1, 2)
    bias = weights.repeat_interleave(rows, dim=-1).view(batch * blocks, 1, 1, -1).to(q.dtype)
    o = F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias)
    return o.transpose(1, 2).reshape(batch, -1, heads, size)[:, :time_]


def measure(call: Callable[..., Tensor], given: list[Tensor], repeats: int) -> tuple[float, ...]:
    """Medians of forward, and of forward with backward, in ms, and the peak in GiB (0 on a CPU)."""
    cuda = given[0].is_cuda
    wanted = [x for x in given if x.requires_grad]

    def step(backward: bool) -> None:
        o = call(*given)
        if backward:
            torch.autograd.grad(o, wanted, torch.ones_like(o), allow_unused=True)

    medians = []
    for backward in (False, True):
        times = []
        for number in range(repeats + 2):
            if cuda:
                torch.cuda.synchronize()
            began = time.perf_counter()
            step(backward)
            if cuda:
                torch.cuda.synchronize()
            if number >= 2:
                times.append(time.perf_counter() - began)
        medians.append(1e3 * statistics.median(times))
    if not cuda:
        return (*medians, 0.0)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(True)
    return (*medians, (torch.cuda.max_memory_allocated() - before) / 2**30)


def error(call: Callable[..., Tensor], given: list[Tensor], block: int) -> float:
    """Largest difference to the naive loop in float64 on the first tokens, over its scale."""
    tokens = min(CHECKED, given[0].shape[1])
    blocks = -(-tokens // block)
    q, k, v, chapters, weights = (
        x.detach()[:1].cpu() if i in (0, 3, 4) else x.detach().cpu() for i, x in enumerate(given)
    )
    expected = chapter_attention(
        q[:, :tokens].double(),
        k.double(),
        v.double(),
        chapters[:, :blocks],
        weights[:, :blocks].double(),
        block_size=block,
        backend="naive",
    )
    found = call(*given)[:1, :tokens].detach().cpu().double()
    return ((found - expected).abs().max() / expected.abs().max()).item()


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--repeats", type=int, default=10)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print("| case | dtype | form | forward ms | with backward ms | TFLOP/s | peak GiB | error |")
    print("|---|---|---|---|---|---|---|---|")
    for case in TINY if options.tiny else CASES:
        for dtype in (torch.float32,) if device == "cpu" else (torch.bfloat16, torch.float32):
            for line in rows(case, inputs(case, device, dtype), options.repeats):
                print(f"| {case} | {str(dtype).removeprefix('torch.')} | {line} |", flush=True)
    print(f"\n{machine(('torch',))}")


def rows(case: Case, given: list[Tensor], repeats: int) -> list[str]:
    """A line of the table for every form."""
    blocks = -(-case.tokens // case.block)
    gathered = case.batch * blocks * case.top_k * case.rows * case.heads * case.head_dim
    forms: dict[str, Callable[..., Tensor]] = {
        "op": lambda *x: chapter_attention(*x, block_size=case.block)
    }
    if gathered < GATHERED:
        forms["gather"] = lambda *x: gather(*x, case.block)
    forms["whole"] = lambda q, k, v, c, w: chapter_attention(q, k, v)
    lines = []
    for name, call in forms.items():
        forward, both, peak = measure(call, given, repeats)
        read = case.chapters if name == "whole" else case.top_k
        products = 4 * case.batch * case.tokens * case.heads * case.head_dim * read * case.rows
        wrong = "" if name == "whole" else f"{error(call, given, case.block):.1e}"
        rate = 3.5 * products / both / 1e9
        lines.append(f"{name} | {forward:.2f} | {both:.2f} | {rate:.1f} | {peak:.2f} | {wrong}")
    return lines


if __name__ == "__main__":
    main()
