"""Timing of an op: the machine's ceilings, medians, peak memory; of a GPU by device events."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Ceilings(NamedTuple):
    """What the machine does at best, in TFLOP/s and GB/s."""

    matmul: float
    copy: float


class Timing(NamedTuple):
    """Milliseconds (median, 10th and 90th percentile) and peak GiB above what was there before."""

    median: float
    low: float
    high: float
    memory: float


def ceilings(
    width: int = 8192, repeats: int = 20, device: str = "cuda", copied: int = 2**29
) -> Ceilings:
    """A bfloat16 product of `width`, and a copy of so many floats (bytes read plus written)."""
    a, b = (torch.randn(width, width, device=device).bfloat16() for _ in range(2))
    product = time_call(lambda: a @ b, repeats, device=device)
    x = torch.randn(copied, device=device)
    y = torch.empty_like(x)
    copy = time_call(lambda: y.copy_(x), repeats, device=device)
    return Ceilings(2 * width**3 / product.median / 1e9, 2 * 4 * x.numel() / copy.median / 1e6)


def time_call(
    call: Callable[[], Any], repeats: int = 20, seconds: float = 3.0, device: str = "cuda"
) -> Timing:
    """Time a call after three to warm up; slow ones are repeated less, at least three times.

    On a CPU the clock of the host counts, and the peak is 0.
    """
    elapsed = _elapsed if device == "cuda" else _elapsed_on_host
    for _ in range(3):
        call()
    before = 0
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    once = elapsed(call, 1)[0]
    repeats = max(3, min(repeats, int(1000 * seconds / max(once, 1e-3))))
    times = sorted(elapsed(call, repeats))
    tenth = len(times) // 10
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    memory = (peak - before) / 2**30
    return Timing(statistics.median(times), times[tenth], times[-1 - tenth], memory)


def attempt(
    make: Callable[[], Callable[[], Any]], repeats: int = 20, device: str = "cuda"
) -> Timing | str:
    """The timing of the call that is made, or why there is none."""
    try:
        return time_call(make(), repeats, device=device)
    except Exception as error:
        if device == "cuda":
            torch.cuda.synchronize()
        return f"failed: {reason(error)}"


def reason(error: Exception) -> str:
    """Kind, first and last line of an error: a compiler's says where, and what is wrong there."""
    lines = [text for text in map(str.strip, str(error).splitlines()) if text]
    ends = lines if len(lines) < 2 else [lines[0], lines[-1]]
    return ": ".join([type(error).__name__, *(text[:200] for text in ends)])


def _elapsed_on_host(call: Callable[[], Any], repeats: int) -> list[float]:
    """Milliseconds of each call."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - began))
    return times


def _elapsed(call: Callable[[], Any], repeats: int) -> list[float]:
    """Milliseconds of each call by the device's clock; nothing waits between them."""
    pairs = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in pairs]


def replayed(call: Callable[[], Any]) -> Callable[[], None]:
    """What a call launches as one CUDA graph: the GPU's part alone, nobody waits for the host."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def kernel_times(call: Callable[[], Any], repeats: int = 5) -> list[tuple[str, float, int]]:
    """Name, milliseconds and launches of each kernel in one call, the longest first."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    rows = [
        (event.key, event.self_device_time_total / repeats / 1000, event.count // repeats)
        for event in profile.key_averages()
        if event.self_device_time_total > 0
    ]
    return sorted(rows, key=lambda row: -row[1])


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """`|| actual - expected || / || expected ||`; NaN where something is NaN."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).norm() / expected.norm())
