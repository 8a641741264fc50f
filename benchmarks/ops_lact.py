"""`ops.lact` on a GPU: kernels against the torch backend and a compiled loop over chunks.

    python benchmarks/ops_lact.py --out ops_lact.md
    python benchmarks/ops_lact.py --cases B1 --kernels       # time of each kernel
    python benchmarks/ops_lact.py --cases tiny --device cpu  # whether it runs

Ceilings come first, then the error against float64 of outputs, state and gradients (on a part of
each case), then forward, and forward plus backward: medians of device events, of calls from Python
and of the same launches replayed as one CUDA graph, peak memory above the inputs, launches. FLOPs
are those of the maths (18 D F a token and head in a chunk that is written, 6 in the last, 90 D^3 a
head and chunk with Muon; three times that with backward), bytes what must move at least: q, k, v, o
and their gradients.

The peer, the op published with LaCT under `torch.compile`, cannot be installed. Its figures on one
H100 (torch 2.11), never to be set beside those of another GPU: B = 1 (4 heads, D = F = 384,
T = 32,768, C = 2,048) 4.13 ms forward, 12.7 with backward; B = 4 6.24 and 22.8 (7.3 GiB); B = 1
with Muon and momentum 25.1 and 69.7; B = 1 with D = F = 768 5.16 and 33.7. In its place
`peer_lact` runs here: the same rule as a plain loop over chunks with bfloat16 products, compiled
(for its errors it is not).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from op_timing import Ceilings, Timing, attempt, ceilings, kernel_times, relative, replayed
from torch import Tensor
from torch.nn.functional import normalize, silu

from lightning_modules.ops.lact import lact
from lightning_modules.ops.lact.muon import newton_schulz

LOOP = "compiled loop"
NAMES = ("q", "k", "v", "lr", "w0", "w1", "w2")
TOLERANCE = 0.05
"""Of bfloat16 factors: 8 bits each, through a dozen products; NaN does not pass."""
MUON_TOLERANCE = 0.5
"""Gradients through five steps in bfloat16 are 20 to 47 % off in every implementation."""


@dataclass(frozen=True)
class Case:
    """Sizes of a call; `flags` are of mask, state, documents, momentum, muon, prenorm."""

    batch: int
    time: int
    heads: int
    size: int
    hidden: int
    chunk: int
    blocks: int = 1
    flags: tuple[str, ...] = ()

    @property
    def has_peer(self) -> bool:
        """Whether the compiled loop can run it."""
        return self.blocks == 1 and not {"mask", "state", "documents", "prenorm"} & {*self.flags}

    def bytes(self, backward: bool) -> int:
        """Fewest bytes: q, k, v, o; then q, k, v, do, dq, dk, dv."""
        return self.batch * self.time * self.heads * self.size * 2 * (11 if backward else 4)

    def flops(self, backward: bool) -> int:
        """Those of the maths, as if there were one document without masks."""
        chunks = (self.time - 1) // self.chunk
        written, read = (24 * self.blocks - 6), 6 * self.blocks
        tokens = written * chunks * self.chunk + read * (self.time - chunks * self.chunk)
        total = self.batch * self.heads * tokens * self.size * self.hidden
        if "muon" in self.flags:
            total += self.batch * self.heads * chunks * 90 * self.blocks * self.size**3
        return total * (3 if backward else 1)


CASES = {
    "B1": Case(1, 32768, 4, 384, 384, 2048),
    "B4": Case(4, 32768, 4, 384, 384, 2048),
    "B1_muon": Case(1, 32768, 4, 384, 384, 2048, flags=("momentum", "muon")),
    "B1_D768": Case(1, 32768, 4, 768, 768, 2048),
    "B3_T5001_D96_all": Case(
        3, 5001, 5, 96, 96, 512, flags=("mask", "state", "documents", "momentum")
    ),
    "B2_T9000_D64_r2": Case(2, 9000, 8, 64, 160, 1024, blocks=2, flags=("prenorm",)),
    "tiny": Case(1, 40, 2, 8, 8, 16, flags=("momentum",)),
    "tiny_muon": Case(1, 40, 2, 8, 8, 16, flags=("momentum", "muon")),
}


def draw(case: Case, device: str, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Random tensors on the scale of a layer, and the other keywords."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator)

    lead, d, f = (case.batch, case.time, case.heads), case.size, case.hidden
    x = {name: normalize(normal(*lead, d), dim=-1).bfloat16() for name in ("q", "k")}
    x["v"] = normal(*lead, d).bfloat16()
    x["lr"] = 0.01 * torch.rand(*lead, 3, device=device, generator=generator)
    x["w0"] = normal(case.blocks, case.heads, f, d) / d**0.5
    x["w1"] = normal(case.blocks, case.heads, d, f) / f**0.5
    x["w2"] = normal(case.blocks, case.heads, f, d) / d**0.5
    options: dict[str, Any] = {"chunk_size": case.chunk, "residual": case.blocks > 1}
    options |= {name: name in case.flags for name in ("muon", "prenorm")}
    if "momentum" in case.flags:
        options["momentum"] = 0.2 + 0.6 * torch.rand(*lead, device=device, generator=generator)
    before = dict(options)
    if "mask" in case.flags:
        options["mask"] = torch.rand(lead[:2], device=device, generator=generator) > 0.1
    if "documents" in case.flags:
        starts = torch.rand(lead[:2], device=device, generator=generator) < 2 / case.time
        options["document_ids"] = starts.cumsum(1)
    if "state" in case.flags:
        if "momentum" in before:
            before["momentum"] = before["momentum"][:, :700]
        tokens = [x[name][:, :700] for name in NAMES[:4]] + [x[name] for name in NAMES[4:]]
        options["state"] = lact(*tokens, **before, backend="torch")[1]
    return x, options


def forward(op: Callable[..., Any], x: dict[str, Tensor]) -> Callable[[], Any]:
    """A call without gradients."""

    def run() -> Any:
        with torch.no_grad():
            return op(*(x[name] for name in NAMES))

    return run


def training(op: Callable[..., Any], x: dict[str, Tensor]) -> Callable[[], Any]:
    """A call and the gradients of everything."""
    leaves = [x[name].detach().clone().requires_grad_() for name in NAMES]
    generator = torch.Generator(x["q"].device).manual_seed(2)
    upper = torch.randn(x["q"].shape, device=x["q"].device, generator=generator).to(x["q"].dtype)

    def run() -> Any:
        o, state = op(*leaves)
        return o, state, torch.autograd.grad(o, leaves, upper)

    return run


def backend(name: str, options: dict[str, Any]) -> Callable[..., Any]:
    """The op with a backend."""
    return lambda *tensors: lact(*tensors, **options, backend=name)


def peer_lact(
    q: Tensor, k: Tensor, v: Tensor, lr: Tensor, w0: Tensor, w1: Tensor, w2: Tensor,
    *, chunk_size: int, momentum: Tensor | None = None, muon: bool = False, **_: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One block as a loop over chunks, products in bfloat16, weights in float32."""
    batch, time, heads, _ = q.shape
    q, k, v, lr = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v, lr))
    masters = [w[0].repeat(batch, 1, 1) for w in (w0, w1, w2)]
    norms = [w.norm(dim=-1, keepdim=True) for w in masters]
    kept = [torch.zeros_like(w) for w in masters]
    if momentum is not None:
        momentum = momentum.transpose(1, 2).flatten(0, 1)
    parts = []
    for begin in range(0, time, chunk_size):
        at = slice(begin, begin + chunk_size)
        a, b, c = (w.bfloat16() for w in masters)
        parts.append((silu(q[:, at] @ a.mT) * (q[:, at] @ c.mT)) @ b.mT)
        if begin + chunk_size >= time:
            break
        x, d, rate = k[:, at], v[:, at], lr[:, at].bfloat16()
        p, h, u = x @ a.mT, x @ c.mT, d @ b
        s, g = p.sigmoid(), silu(p)
        slope = s * (1 + p * (1 - s))
        changes = [
            (rate[..., :1] * u * h * slope).mT @ x,
            d.mT @ (rate[..., 1:2] * g * h),
            (rate[..., 2:] * u * g).mT @ x,
        ]
        if momentum is not None:
            mean = momentum[:, at].mean(1).view(-1, 1, 1)
            changes = kept = [g + mean * m for g, m in zip(changes, kept, strict=True)]
        if muon:
            changes = [newton_schulz(g, torch.bfloat16) for g in changes]
        masters = [w + change for w, change in zip(masters, changes, strict=True)]
        masters = [
            w / (w.norm(dim=-1, keepdim=True) + 1e-5) * n
            for w, n in zip(masters, norms, strict=True)
        ]
    o = torch.cat(parts, dim=1).unflatten(0, (batch, heads)).transpose(1, 2)
    return o, masters[0]


def errors(case: Case, device: str, names: list[str]) -> dict[str, dict[str, float]]:
    """Errors of backends against float64 on a part of the case, with as many chunks.

    With Muon of three: whatever rounding leaves grows by half from each to the next (NOTES).
    """
    scale = max(1, case.chunk // max(2 * case.size, 128))
    chunk, time = case.chunk // scale, -(-case.time // scale)
    part = replace(case, batch=min(case.batch, 2), heads=min(case.heads, 2), chunk=chunk,
                   time=min(time, 3 * chunk) if "muon" in case.flags else time)  # fmt: skip
    x, options = draw(part, device, seed=1)
    exact, given = {n: t.double() for n, t in x.items()}, dict(options)
    if "state" in options:
        state = options["state"]
        given["state"] = type(state)(*(s.double() if s.is_floating_point() else s for s in state))
    if "momentum" in options:
        given["momentum"] = options["momentum"].double()
    given["muon_dtype"] = torch.float64
    expected = training(backend("torch", given), exact)()
    ops = {name: backend(name, options) for name in names}
    if case.has_peer:
        ops[LOOP] = lambda *tensors: peer_lact(*tensors, **options)
    found = {}
    for name, op in ops.items():
        o, state, gradients = training(op, x)()
        last, exact_last = (s if torch.is_tensor(s) else s.w0 for s in (state, expected[1]))
        found[name] = {"o": relative(o, expected[0])}
        found[name]["w0"] = relative(last.view_as(exact_last), exact_last)
        pairs = zip(NAMES, gradients, expected[2], strict=True)
        found[name] |= {f"d{n}": relative(g, e) for n, g, e in pairs}
    return found


def rows(name: str, case: Case, top: Ceilings, options: argparse.Namespace) -> list[str]:
    """The lines of a case: backends, and the loop."""
    x, given = draw(case, options.device)
    arms = {arm: backend(arm, given) for arm in options.backends}
    if case.has_peer and not options.no_peer:
        loop = peer_lact if options.device == "cpu" else torch.compile(peer_lact)
        arms[LOOP] = lambda *tensors: loop(*tensors, **given)
    lines = []
    for arm, op in arms.items():
        cells, graphed = [name, arm], [name, f"{arm}, as a graph"]
        for make in (forward, training):
            call, backward = make(op, x), make is training
            measured = attempt(lambda call=call: call, options.repeats, options.device)
            cells += row_part(case, measured, backward, top)
            if options.device == "cuda" and isinstance(measured, Timing):
                cells[-1] = str(sum(count for _, _, count in kernel_times(call, 2)))
                graph = attempt(lambda call=call: replayed(call), options.repeats)
                graphed += [*row_part(case, graph, backward, top)[:3], "", "1"]
        for line in (cells, graphed)[: 1 + (len(graphed) > 2)]:
            lines.append(f"| {' | '.join(line)} |")
            print(lines[-1], flush=True)
    return lines


def row_part(case: Case, measured: Timing | str, backward: bool, top: Ceilings) -> list[str]:
    """Cells of one measurement; that of the launches is filled in by `rows`."""
    if isinstance(measured, str):
        return [measured, "", "", "", ""]
    floor = max(case.flops(backward) / top.matmul / 1e9, case.bytes(backward) / top.copy / 1e6)
    return [
        f"{measured.median:.3f} [{measured.low:.3f}, {measured.high:.3f}]",
        f"{case.flops(backward) / measured.median / 1e9:.1f}",
        f"{100 * floor / measured.median:.0f} %",
        f"{measured.memory:.2f}",
        "",
    ]


def report_errors(name: str, case: Case, options: argparse.Namespace) -> None:
    """Print the errors of every backend, and whether they are those of bfloat16."""
    bound = MUON_TOLERANCE if "muon" in case.flags else TOLERANCE
    for arm, found in errors(case, options.device, options.backends).items():
        good = all(e <= bound for e in found.values())
        text = ", ".join(f"{n} {e:.1e}" for n, e in found.items())
        print(f"{name} {arm}: {text}: {'good' if good else 'WRONG'}", flush=True)


def main() -> None:
    """Print the tables, and write the last one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases", nargs="+", choices=CASES, default=[c for c in CASES if "tiny" not in c]
    )
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--backends", nargs="+", help="default: triton and torch; on a CPU torch")
    parser.add_argument("--no-peer", action="store_true", help="leave the compiled loop out")
    parser.add_argument("--kernels", action="store_true", help="time of each kernel instead")
    parser.add_argument("--out", type=Path, help="file to write")
    options = parser.parse_args()
    on_gpu = options.device == "cuda"
    options.backends = options.backends or (["triton", "torch"] if on_gpu else ["torch"])
    top = ceilings() if on_gpu else ceilings(256, 3, "cpu", 2**20)
    machine = torch.cuda.get_device_name() if on_gpu else "a CPU"
    print(
        f"{machine}, torch {torch.__version__}: bf16 matmul {top.matmul:.2f} TFLOP/s, "
        f"copy {top.copy:.0f} GB/s",
        flush=True,
    )
    head = "ms [p10, p90] | TFLOP/s | of the floor | GiB | launches"
    lines = [f"| case | arm | forward {head} | forward + backward {head} |", "|---" * 12 + "|"]
    for name in options.cases:
        case = CASES[name]
        if options.kernels:
            x, given = draw(case, options.device)
            print(name)
            for kernel, ms, count in kernel_times(training(backend("triton", given), x)):
                print(f"  {ms:8.4f} ms {count:4d} x {kernel[:90]}")
            continue
        report_errors(name, case, options)
        lines += rows(name, case, top, options)
        if options.out:
            options.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
