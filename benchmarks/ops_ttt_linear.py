"""`ops.ttt_linear` on a GPU: kernels against the torch backend and flash-linear-attention.

    python benchmarks/ops_ttt_linear.py --out ops_ttt_linear.md
    python benchmarks/ops_ttt_linear.py --cases B8_T4096_m16 --kernels   # time of each kernel
    python benchmarks/ops_ttt_linear.py --cases B8_T4096_m16 --sweep     # of a few choices

Ceilings come first, then the error against float64 of outputs, state and gradients (bfloat16 on a
part of each case), then forward, and forward plus backward: medians of device events. FLOPs are
those of the maths (three products with W forward, twice that backward, and the dual form), bytes
what must move at least: q, k, v, o, their gradients. The peer (fla-core, if it is installed) has
one step size per position instead of one per key and adds its LayerNorm to what was read instead of
the query. With a constant eta its final state is ours, as its kernels in float32 and a loop in
float64 confirm to 2e-7; here the states of both are compared with the torch backend in float32.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from op_timing import Ceilings, Timing, attempt, ceilings, kernel_times, reason, relative
from torch import Tensor

from lightning_modules.ops import ttt_linear
from lightning_modules.ops.ttt_linear import launch, layout

NAMES = ("q", "k", "v", "eta", "norm_weight", "norm_bias", "w", "b")
NORM = ("norm_weight", "norm_bias")
WALKS = ("write", "weight_gradient")
TILES = ("read", "output_gradient", "input_gradient")
TOLERANCE = 0.03
"""Of bfloat16 operands: 8 bits each, through a dozen products; NaN does not pass."""


@dataclass(frozen=True)
class Case:
    """Sizes of a call; `flags` adds a mask, a carried state and documents."""

    batch: int
    time: int
    heads: int
    size: int
    mini_batch_size: int | None
    flags: tuple[str, ...] = ()

    @property
    def causal(self) -> bool:
        """Whether tokens read in order."""
        return self.mini_batch_size is not None

    @property
    def tokens(self) -> int:
        """Tokens times heads."""
        return self.batch * self.time * self.heads

    def bytes(self, backward: bool) -> int:
        """Fewest bytes: q, k, v, o; then q, k, v, do, dq, dk, dv; a float32 eta each time."""
        vectors, scalars = (11, 3) if backward else (4, 1)
        return self.tokens * (2 * self.size * vectors + 4 * scalars)

    def flops(self, backward: bool) -> int:
        """Products with W and inside mini-batches (half of them causal)."""
        inside = (self.mini_batch_size or 2 * self.time) // 2
        forward = 2 * self.size * (3 * self.size + 2 * inside)
        return self.tokens * forward * (3 if backward else 1)


CASES = {
    "B8_T4096_m16": Case(8, 4096, 16, 64, 16),
    "B8_T4096_m64": Case(8, 4096, 16, 64, 64),
    "B1_T32768_m16": Case(1, 32768, 16, 64, 16),
    "B8_T4096_m16_all": Case(8, 4096, 16, 64, 16, ("mask", "state", "documents")),
    "B8_T4096_m16_state": Case(8, 4096, 16, 64, 16, ("state",)),
    "B3_T1021_D96_m20": Case(3, 1021, 5, 96, 20, ("mask", "state")),
    "B64_T51_D128_call": Case(64, 51, 8, 128, None),
}


def draw(case: Case, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Random tensors on the scale of a trained layer, and the other keywords."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(*shape, device="cuda", generator=generator)

    shape, d = (case.batch, case.time, case.heads), case.size
    x = {name: normal(*shape, d).bfloat16() for name in ("q", "k", "v")}
    x["q"], x["k"] = (torch.nn.functional.normalize(x[n], dim=-1) for n in ("q", "k"))
    x["eta"] = torch.full(shape, 1.0 / (1 if case.causal else case.time), device="cuda")
    x["norm_weight"] = 1 + normal(case.heads, d, scale=0.1)
    x["norm_bias"] = normal(case.heads, d, scale=0.1)
    x["w"], x["b"] = normal(case.heads, d, d, scale=0.1), normal(case.heads, 1, d, scale=0.02)
    options: dict[str, Any] = {"causal": case.causal, "mini_batch_size": case.mini_batch_size}
    if "mask" in case.flags:
        options["mask"] = torch.rand(shape[:2], device="cuda", generator=generator) > 0.1
    if "documents" in case.flags:
        starts = torch.rand(shape[:2], device="cuda", generator=generator) < 0.002
        options["document_ids"] = starts.cumsum(1)
    if "state" in case.flags:
        before = [x[name][:, :21] for name in NAMES[:4]] + [x[name] for name in NAMES[4:]]
        given = {"causal": case.causal, "mini_batch_size": case.mini_batch_size}
        options["state"] = ttt_linear(*before, **given, backend="torch")[1]
    return x, options


def forward(x: dict[str, Tensor], options: dict[str, Any], backend: str) -> Callable[[], Any]:
    """A call without gradients."""

    def run() -> Any:
        with torch.no_grad():
            return ttt_linear(*(x[name] for name in NAMES), **options, backend=backend)

    return run


def training(x: dict[str, Tensor], options: dict[str, Any], backend: str) -> Callable[[], Any]:
    """A call and the gradients of everything."""
    leaves = {name: x[name].detach().clone().requires_grad_() for name in NAMES}
    generator = torch.Generator("cuda").manual_seed(2)
    upper = torch.randn(x["q"].shape, device="cuda", generator=generator).bfloat16()
    upper = upper.to(x["q"].dtype)

    def run() -> Any:
        o, state = ttt_linear(*leaves.values(), **options, backend=backend)
        return o, state, torch.autograd.grad(o, list(leaves.values()), upper)

    return run


def errors(case: Case, fp32: bool) -> dict[str, float]:
    """Errors against float64 on a part of the case."""
    part = Case(
        min(case.batch, 2), min(case.time, 200), min(case.heads, 2), case.size,
        case.mini_batch_size, case.flags,
    )  # fmt: skip
    x, options = draw(part, seed=1)
    if fp32:
        x = {name: value.float() for name, value in x.items()}
    exact, given = {n: v.double() for n, v in x.items()}, dict(options)
    if "state" in options:
        state = options["state"]
        given["state"] = type(state)(*(s.double() if s.is_floating_point() else s for s in state))
    expected = training(exact, given, "torch")()
    actual = training(x, options, "triton")()
    found = {"o": relative(actual[0], expected[0]), "state": relative(actual[1][0], expected[1][0])}
    pairs = zip(NAMES, actual[2], expected[2], strict=True)
    return found | {f"d{name}": relative(a, e) for name, a, e in pairs}


def peers(x: dict[str, Tensor], case: Case) -> dict[str, Callable[[bool], Callable[[], Any]]]:
    """The peer's ops on the same tensors; empty without it, or where it cannot.

    The weights of its LayerNorm and eta (each position's, times tau) are in bfloat16: its backward
    kernels convert the former to the dtype of k inside a loop, which compiles for no other.
    """
    try:
        from fla.ops.ttt import chunk_ttt_linear, fused_chunk_ttt_linear
    except ImportError as error:
        print(f"no peer: {error}")
        return {}
    if case.flags or not case.causal:
        return {}
    m = case.mini_batch_size
    steps = 1.0 / (torch.arange(case.time, device="cuda") % m + 1)
    eta = (x["eta"] * steps.view(1, -1, 1)).unsqueeze(-1).bfloat16()
    initial = [x[name].expand(case.batch, *x[name].shape).contiguous() for name in ("w", "b")]
    norm = [x[name].bfloat16() for name in NORM]
    tensors = [x["q"], x["k"], x["v"], *norm, eta, *initial]

    def build(op: Callable[..., Any], backward: bool) -> Callable[[], Any]:
        leaves = [t.detach().clone().requires_grad_(backward) for t in tensors]
        upper = torch.randn_like(x["q"])

        def run() -> Any:
            with torch.set_grad_enabled(backward):
                o, *state = op(
                    *leaves[:6], scale=1.0, chunk_size=m, initial_state=leaves[6],
                    initial_state_bias=leaves[7], output_final_state=True,
                )  # fmt: skip
                return torch.autograd.grad(o, leaves, upper) if backward else (o, *state)

        return run

    ops = {"fla chunk": chunk_ttt_linear, "fla fused": fused_chunk_ttt_linear}
    return {name: lambda backward, op=op: build(op, backward) for name, op in ops.items()}


def check_states(
    x: dict[str, Tensor], given: dict[str, Any], ops: dict[str, Callable[[bool], Any]]
) -> str:
    """Errors of the final weights of the kernels and the peer's ops, against float32."""
    x = x | {name: x[name].bfloat16().float() for name in NORM}  # as the peer has them
    given = given | {"flush": True}
    exact = forward({n: v.float() for n, v in x.items()}, given, "torch")()[1].dw + x["w"]
    found = {"triton": relative(forward(x, given, "triton")()[1].dw + x["w"], exact)}
    for name, build in ops.items():
        try:
            found[name] = relative(build(False)()[1], exact)
        except Exception as error:
            print(f"  {name}: {reason(error)}")
    return ", ".join(f"{n} {e:.1e}{'' if e <= TOLERANCE else ' WRONG'}" for n, e in found.items())


def rows(name: str, case: Case, top: Ceilings, options: argparse.Namespace) -> list[str]:
    """The lines of a case: kernels, torch, peers."""
    x, given = draw(case)
    arms = {
        backend: (forward(x, given, backend), training(x, given, backend))
        for backend in ("triton", *(() if options.no_torch else ("torch",)))
    }
    others = peers(x, case)
    for peer, build in others.items():
        arms[peer] = build(False), build(True)
    times: dict[str, list[Timing | str]] = {}
    for arm, calls in arms.items():
        times[arm] = [attempt(lambda call=call: call, options.repeats) for call in calls]
        print(f"  {name} {arm}: {times[arm]}", flush=True)
    if case.causal:
        print(f"  {name}, final weights: {check_states(x, given, others)}", flush=True)
    return [line(name, case, arm, times, top) for arm in arms]


def line(
    name: str, case: Case, arm: str, times: dict[str, list[Timing | str]], top: Ceilings
) -> str:
    """A row of the table."""
    cells = [name, arm]
    for index, measured in enumerate(times[arm]):
        if isinstance(measured, str):
            cells += [measured, "", "", "", "", ""]
            continue
        ms, backward = measured.median, index == 1
        floor = case.bytes(backward) / top.copy / 1e6
        peer = times.get("fla chunk", [""] * 2)[index]
        cells += [
            f"{ms:.3f} [{measured.low:.3f}, {measured.high:.3f}]",
            f"{case.flops(backward) / ms / 1e9:.1f}",
            f"{case.bytes(backward) / ms / 1e6:.0f}",
            f"{100 * floor / ms:.0f} %",
            "" if isinstance(peer, str) else f"{peer.median / ms:.2f}",
            f"{measured.memory:.2f}",
        ]
    return f"| {' | '.join(cells)} |"


WALK_CHOICES: list[dict[str, int]] = [
    *({"num_warps": warps} for warps in (4, 2, 8)),
    *({"num_stages": stages} for stages in (1, 2, 3)),
    *({"AHEAD": ahead} for ahead in (0, 1)),
    *({"AXIS": 0, "BT": tokens} for tokens in (16, 32, 64)),
    *({"AXIS": 0, "BT": tokens, "num_warps": 8} for tokens in (32, 64)),
]
TILE_CHOICES: list[dict[str, int]] = [{"num_warps": 4}, {"num_warps": 8}, {"slots": 32}]


def sweep(case: Case, repeats: int) -> None:
    """Time of each kernel that a choice of warps, stages, tokens at once, ... concerns."""
    x, given = draw(case)
    seen = []
    for which, names in (("_walk", WALKS), ("_tile", TILES)):
        for chosen in WALK_CHOICES if which == "_walk" else TILE_CHOICES:
            with changed(which, chosen) as used:
                try:
                    times = kernel_times(training(x, given, "triton"), repeats)
                    found = {name: ms for name, ms, _ in times}
                    text = ", ".join(f"{n} {found.get(f'{n}_kernel', nan):.3f}" for n in names)
                except Exception as error:
                    text = reason(error)
            if used not in seen:  # several choices are the same for small mini-batches
                seen.append(used)
                options = ", ".join(f"{n} {int(value)}" for n, value in used.items())
                print(f"  {which[1:]} {options}: {text}", flush=True)


@contextmanager
def changed(which: str, chosen: dict[str, int]) -> Iterator[dict[str, int]]:
    """Kernels with some options chosen; yields the place where all that they then got appear."""
    real = getattr(launch, which)
    used: dict[str, int] = {}

    def options(cut: layout.Layout, size: int) -> dict[str, int]:
        given = {n: x for n, x in chosen.items() if n not in ("AXIS", "slots")}
        found = real(cut, size) | given
        if which == "_walk":
            whole = launch.padded(cut.size)
            found["BT"] = min(found["BT"], whole)
            found["PARTS"] = whole // found["BT"]
            found["AHEAD"] = found["AHEAD"] and found["PARTS"] == 1
            used["AXIS"] = launch._axis(cut, size)
        used.update(found)
        return found

    with ExitStack() as stack:
        stack.enter_context(patch.object(launch, which, options))
        stack.enter_context(patch.object(layout, "GROUP", chosen.get("slots", layout.GROUP)))
        if "AXIS" in chosen:
            stack.enter_context(patch.object(launch, "_axis", lambda *_: chosen["AXIS"]))
        yield used


def main() -> None:
    """Print the tables, and write the last one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--no-torch", action="store_true", help="leave the torch backend out")
    parser.add_argument("--kernels", action="store_true", help="time of each kernel instead")
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="time of each kernel for a few warps, stages, tokens at once, ... instead",
    )
    parser.add_argument("--out", type=Path, help="file to write")
    options = parser.parse_args()
    top = ceilings()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}\n"
        f"bf16 matmul {top.matmul:.0f} TFLOP/s, copy {top.copy:.0f} GB/s",
        flush=True,
    )
    head = "ms [p10, p90] | TFLOP/s | GB/s | of byte floor | peer / this | GiB"
    lines = [f"| case | arm | forward {head} | forward + backward {head} |", "|---" * 14 + "|"]
    for name in options.cases:
        case = CASES[name]
        if options.sweep or options.kernels:
            print(name)
        if options.sweep:
            sweep(case, options.repeats)
        elif options.kernels:
            for kernel, ms, count in kernel_times(training(*draw(case), "triton")):
                print(f"  {ms:8.4f} ms {count:3d} x {kernel[:90]}")
        else:
            for fp32 in (False, True) if case.size <= 64 else (False,):
                found = errors(case, fp32)
                good = all(e <= (1e-4 if fp32 else TOLERANCE) for e in found.values())
                text = ", ".join(f"{n} {e:.1e}" for n, e in found.items())
                print(f"{name} {'fp32' if fp32 else 'bf16'}: {text}: {'good' if good else 'WRONG'}")
            lines += rows(name, case, top, options)
            if options.out:
                options.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
