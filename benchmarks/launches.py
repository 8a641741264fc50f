"""How many operations a training step launches per decoder layer, counted on a CPU.

Triton's kernels are counted where they would be launched, and do not run: what a step computes is
without meaning then. Operations on a GPU that are several kernels count as many; views and
allocations count as none.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_modules.adapters.ttt_lora import layer as adapter_layer
from lightning_modules.ops import triton_backend

NONE = frozenset(
    [
        "view",
        "_unsafe_view",
        "reshape",
        "_reshape_alias",
        "t",
        "transpose",
        "permute",
        "expand",
        "slice",
        "select",
        "unsqueeze",
        "squeeze",
        "alias",
        "detach",
        "as_strided",
        "split",
        "split_with_sizes",
        "unbind",
        "unfold",
        "lift_fresh",
        "is_same_size",
        "empty",
        "new_empty",
        "empty_like",
        "empty_strided",
        "new_empty_strided",
        "_local_scalar_dense",
        "promote_types",
    ]
)
SEVERAL = {"addmm": 2, "constant_pad_nd": 2}
"""A copy of the summand, or a fill, and the operation itself."""

Build = Callable[[int, bool], Callable[[], Tensor]]
"""Number of layers, and whether the tiny ones -> forward pass with a loss."""


class Launches(TorchDispatchMode):
    """Counts what is launched, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        empty = isinstance(result, Tensor) and not result.numel()
        if name not in NONE and not empty:
            self.counts[name] += SEVERAL.get(name, 1)
        return result


class PerLayer(NamedTuple):
    """Operations of a layer by name, forward and backward, and milliseconds of the host."""

    forward: Counter[str]
    backward: Counter[str]
    host: float


@contextmanager
def kernels_replaced(kernels: Callable[[str], None]) -> Iterator[None]:
    """Take the path of a GPU on a CPU, and call `kernels` with the name of each Triton kernel."""
    from triton.runtime.jit import JITFunction

    def launch(kernel: Any, grid: Any) -> Callable[..., None]:
        return lambda *given, **named: kernels(kernel.__name__)

    replaced = [
        (JITFunction, "__getitem__", launch),
        (triton_backend, "unable", lambda *call: None),
        *((adapter_layer, name, _without_modes(name)) for name in ("may_overwrite", "is_plain")),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    try:
        for owner, name, value in replaced:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _without_modes(name: str) -> Callable[..., bool]:
    """A function of the adapters' layers as it answers without the mode that counts."""
    function = getattr(adapter_layer, name)

    def answer(*given: Any) -> bool:
        if not torch._C._len_torch_dispatch_stack():  # only the host's time is taken
            return function(*given)
        with torch.utils._python_dispatch._disable_current_modes():
            return function(*given)

    return answer


def per_layer(build: Build) -> PerLayer:
    """The difference of two layers and one; the time is of tiny ones."""
    (a, b), (c, d) = (_counted(build(depth, False)) for depth in (1, 2))
    times = [_host(build(depth, True)) for depth in (1, 5)]
    return PerLayer(_minus(c, a), _minus(d, b), (times[1] - times[0]) / 4)


def _minus(x: Counter[str], y: Counter[str]) -> Counter[str]:
    return Counter({name: x[name] - y[name] for name in x | y if x[name] != y[name]})


def _counted(forward: Callable[[], Tensor]) -> tuple[Counter[str], Counter[str]]:
    """Of the second call, which continues the first one's state."""
    mode = Launches()
    with kernels_replaced(lambda name: mode.counts.update({f"[{name}]": 1})):
        forward().backward()
        mode.counts.clear()
        with mode:
            loss = forward()
        ahead, mode.counts = mode.counts, Counter()
        with mode:
            loss.backward()
    return ahead, mode.counts


def _host(forward: Callable[[], Tensor], repeats: int = 20) -> float:
    """Least milliseconds of a step's host, the launches of kernels left out."""
    times = []
    with kernels_replaced(lambda name: None):
        for _ in range(repeats):
            began = time.thread_time()
            forward().backward()
            times.append(1e3 * (time.thread_time() - began))
    return min(times)
