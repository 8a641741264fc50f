"""Chapter attention on a GPU or CPU: kernels and torch, beside a plain gather and SDPA.

    python benchmarks/ops_chapter_attention.py                             # on a GPU
    python benchmarks/ops_chapter_attention.py --cases published --kernels # time of each kernel
    python benchmarks/ops_chapter_attention.py --cases published --sweep   # of other tiles
    python benchmarks/ops_chapter_attention.py --tiny --device cpu         # a few seconds

Ceilings first (a product of bfloat16 matrices, a copy on the device), then for every form the
medians of `--repeats` calls after three, forward and forward with backward (gradients of queries,
bank and weights). `triton` and `torch` are the op's backends. `gather` is what the op replaces:
every block or token gathers its rows and attends to them with `scaled_dot_product_attention`.
`whole` reads the whole bank by SDPA. FLOPs are those of the maths (two products forward, five
backward); the floor is the larger of FLOPs by the rate of the matrix product and of the bytes of
queries, bank, outputs and their gradients by the rate of the copy. `ratio` is the time of `torch`
with backward by that of the form. The error is the largest `|| x - y || / || y ||` of outputs and
gradients to the torch backend in float64, on the first tokens. Peak memory is what a call with
backward adds to its inputs (GPU only). All inputs are drawn anew for each case.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from op_timing import Ceilings, Timing, ceilings, kernel_times, relative, time_call
from torch import Tensor
from training_runs import machine

from lightning_modules.ops import chapter_attention
from lightning_modules.ops.chapter_attention import launch
from lightning_modules.ops.chapter_attention.plan import Tile

CHECKED = 1024
"""Tokens of a row that are compared with float64."""

DTYPES = ("bfloat16", "float32")

Form = Callable[..., Tensor]


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

    def flops(self, read: int, backward: bool) -> float:
        """Of the products with so many chapters."""
        pairs = self.batch * self.tokens * read
        return 4.0 * pairs * self.rows * self.heads * self.head_dim * (3.5 if backward else 1)

    def bytes(self, size: int, backward: bool) -> int:
        """Fewest that move, with numbers of so many bytes."""
        queries, bank = self.batch * self.tokens, self.chapters * self.rows
        vectors = 6 * queries + 6 * bank if backward else 2 * queries + 2 * bank
        return vectors * self.heads * self.head_dim * size


PUBLISHED = Case(64, 4096, 8, 64, 512, 128, 8, 1)
"""262,144 queries of a bank of 65,536 rows."""

CASES = {
    "published": PUBLISHED,
    "published_blocks": PUBLISHED._replace(block=128),
    "small_bank_blocks": Case(8, 2048, 12, 64, 64, 64, 8, 128),
    "small_bank": Case(8, 2048, 12, 64, 64, 64, 8, 1),
    "large_bank_blocks": Case(8, 2048, 12, 64, 4096, 64, 8, 128),
    "large_bank": Case(8, 2048, 12, 64, 4096, 64, 8, 1),
    "narrow_blocks": Case(16, 1024, 8, 32, 64, 128, 4, 64),
    "narrow": Case(16, 1024, 8, 32, 64, 128, 4, 1),
    "odd_blocks": Case(3, 777, 5, 48, 37, 23, 3, 100),
    "odd": Case(3, 777, 5, 48, 37, 23, 3, 1),
}
TINY = {
    "tiny_blocks": Case(2, 70, 2, 8, 6, 5, 2, 32),
    "tiny": Case(2, 20, 2, 8, 6, 5, 2, 1),
}
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


def forms_of(case: Case, backends: Sequence[str], whole: bool = True) -> dict[str, Form]:
    """Ways to compute a case, by name; `whole` is the longest of them."""

    def op(backend: str) -> Form:
        return lambda *x: chapter_attention(*x, block_size=case.block, backend=backend)

    forms = {backend: op(backend) for backend in backends}
    blocks = -(-case.tokens // case.block)
    gathered = case.batch * blocks * case.top_k * case.rows * case.heads * case.head_dim
    if gathered < GATHERED:
        forms["gather"] = lambda *x: gather(*x, case.block)
    if whole:
        forms["whole"] = lambda q, k, v, c, w: chapter_attention(q, k, v, backend="torch")
    return forms


def training(call: Form, given: list[Tensor]) -> Callable[[], list[Tensor]]:
    """A call and its gradients, of a product with the same random numbers every time."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in given]
    wanted = [x for x in leaves if x.requires_grad]
    generator = torch.Generator(given[0].device).manual_seed(1)
    upper = torch.randn(given[0].shape, device=given[0].device, generator=generator)
    upper = upper.bfloat16().to(given[0].dtype)  # float64 compares with the same

    def run() -> list[Tensor]:
        o = call(*leaves)
        found = torch.autograd.grad(o, wanted, upper, allow_unused=True)
        return [o.detach(), *(x for x in found if x is not None)]

    return run


def inference(call: Form, given: list[Tensor]) -> Callable[[], Tensor]:
    """A call without gradients."""

    def run() -> Tensor:
        with torch.no_grad():
            return call(*given)

    return run


def error(call: Form, case: Case, given: list[Tensor]) -> float:
    """The largest error of outputs and gradients on the first tokens of the first rows."""
    tokens = min(CHECKED, case.tokens)
    cut = (tokens, None, None, -(-tokens // case.block), -(-tokens // case.block))
    part = [x if n is None else x[:2, :n].contiguous() for x, n in zip(given, cut, strict=True)]
    exact = [x.double() if x.is_floating_point() else x for x in part]
    expected = training(forms_of(case, ("torch",))["torch"], exact)()
    return max(map(relative, training(call, part)(), expected))


def attempt(call: Callable[[], object], repeats: int, device: str) -> Timing | str:
    """The timing, or why there is none (a form may not fit into memory)."""
    try:
        return time_call(call, repeats, device=device)
    except (RuntimeError, ValueError) as failure:
        return f"failed: {(str(failure).strip() or 'no reason').splitlines()[0][:60]}"


def rows(
    name: str, case: Case, given: list[Tensor], top: Ceilings, forms: dict[str, Form], repeats: int
) -> list[str]:
    """A line of the table for every form."""
    device, dtype = given[0].device.type, str(given[0].dtype).removeprefix("torch.")
    timed = {
        form: [attempt(make(call, given), repeats, device) for make in (inference, training)]
        for form, call in forms.items()
    }
    lines = []
    for form, call in forms.items():
        cells = [name, str(case), dtype, form]
        read = case.chapters if form == "whole" else case.top_k
        for backward, timing in enumerate(timed[form]):
            if isinstance(timing, str):
                cells += [timing, "", ""]
                continue
            flops = case.flops(read, bool(backward))
            size = given[0].element_size()
            floor = max(flops / top.matmul / 1e9, case.bytes(size, bool(backward)) / top.copy / 1e6)
            cells += [f"{timing.median:.3f} [{timing.low:.3f}, {timing.high:.3f}]"]
            cells += [f"{flops / timing.median / 1e9:.1f}", f"{100 * floor / timing.median:.0f} %"]
        own, torch_ = timed[form][1], timed["torch"][1]
        both = isinstance(own, Timing) and isinstance(torch_, Timing)
        cells += [f"{own.memory:.2f}" if isinstance(own, Timing) else ""]
        cells += [f"{torch_.median / own.median:.2f}" if both else ""]
        wrong = form == "whole" or isinstance(own, str)
        cells += ["" if wrong else f"{error(call, case, given):.1e}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


SWEPT = {
    "read_pairs": [(64, 128, 4, 2), (64, 128, 4, 3), (128, 128, 8, 2), (128, 128, 4, 1)],
    "read_blocks": [(128, 64, 8, 3), (64, 128, 4, 1), (64, 128, 4, 3), (64, 64, 4, 3)],
    "query_gradient": [(64, 64, 4, 2), (64, 64, 4, 4), (64, 128, 4, 2), (128, 64, 8, 2)],
    "bank_gradient": [(64, 128, 8, 2), (64, 128, 4, 1), (32, 128, 8, 2), (32, 128, 4, 1)],
}
"""Tiles of kernels beside those of the plan, for bfloat16 and heads of 64."""


def sweep(case: Case) -> None:
    """Time of each kernel with other tiles."""
    given, plan = inputs(case, "cuda", torch.bfloat16), launch._plan
    call = training(forms_of(case, ("triton",), False)["triton"], given)
    kernels = {name.partition("_kernel")[0]: ms for name, ms, _ in kernel_times(call)}
    for kernel, tiles in SWEPT.items():
        if kernel not in kernels:
            continue
        own = getattr(launch.plan_of(given[0], given[1], case.block), kernel)
        print(f"  {kernel}: {kernels[kernel]:.3f} ms with {tuple(own)}")
        for tile in tiles:
            changed = {kernel: Tile(*tile)}
            launch._plan = lambda *x, changed=changed: plan(*x)._replace(**changed)
            try:
                found = {n.partition("_kernel")[0]: ms for n, ms, _ in kernel_times(call)}
                print(f"    {found[kernel]:.3f} ms with {tile}", flush=True)
            except Exception as failure:
                print(f"    {tile} failed: {str(failure).strip().splitlines()[-1][:80]}")
            finally:
                launch._plan = plan


HEADER = (
    "| case | sizes | dtype | form | forward ms | TFLOP/s | floor | with backward ms | TFLOP/s | "
    "floor | peak GiB | ratio | error |\n" + "|---" * 13 + "|"
)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cases", nargs="+")
    parser.add_argument("--kernels", action="store_true")
    parser.add_argument("--sweep", action="store_true", help="other tiles, nothing else")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, help="default: both; float32 (CPU)")
    parser.add_argument("--no-whole", action="store_true", help="leave out the form `whole`")
    options = parser.parse_args()
    cases, cuda = TINY if options.tiny else CASES, options.device == "cuda"
    chosen = {name: cases[name] for name in options.cases or cases}
    sizes = {} if cuda else {"width": 256, "copied": 2**16}
    top = ceilings(repeats=options.repeats, device=options.device, **sizes)
    print(f"ceilings: {top.matmul:.1f} TFLOP/s in bfloat16, copy {top.copy:.0f} GB/s\n\n{HEADER}")
    if options.sweep:
        for name, case in chosen.items():
            print(name)
            sweep(case)
        return
    backends = ("torch", "triton") if cuda else ("torch",)
    for name, case in chosen.items():
        for dtype in options.dtypes or (DTYPES if cuda else ("float32",)):
            given = inputs(case, options.device, getattr(torch, dtype))
            forms = forms_of(case, backends, not options.no_whole)
            for line in rows(name, case, given, top, forms, options.repeats):
                print(line, flush=True)
            if options.kernels and cuda:
                for kernel, ms, count in kernel_times(training(forms["triton"], given)):
                    print(f"    {ms:8.3f} ms {count:3} x {kernel[:90]}", flush=True)
    print(f"\n{machine(('torch',))}")


if __name__ == "__main__":
    main()
