"""Launches of compiled kernels, against what Triton's own binder says of the same arguments."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")
from triton import language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import make_backend  # noqa: E402
from triton.runtime.jit import JITFunction, create_function_from_signature  # noqa: E402

from lightning_modules.ops.launcher import Launcher, Options  # noqa: E402

GRID = (3, 2, 1)


def _kernel(x, y, size, stride, eps, SIZE: tl.constexpr, WIDE: tl.constexpr):
    """Never run."""


class Kernel:
    """A kernel that keeps what Triton specialises each of its compiled forms for."""

    def __init__(self) -> None:
        function = JITFunction(_kernel, do_not_specialize=["size"])
        backend = make_backend(GPUTarget("cuda", 90, 32))
        self.bind = create_function_from_signature(function.signature, function.params, backend)
        self.arg_names = function.arg_names
        self.compiled: list[Compiled] = []

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return self.compile

    def compile(self, *given: Any, **named: Any) -> Any:
        _, *seen = self.bind(*given, **named)
        self.compiled.append(Compiled(seen))
        return self.compiled[-1]


class Compiled:
    """A form of the kernel, and how it was launched."""

    def __init__(self, seen: list[Any]) -> None:
        self.seen, self.launched = seen, []

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *given: self.launched.append((grid, given))


def _call(launch: Launcher, kernel: Kernel, call: tuple[Any, ...]) -> None:
    """Launch, and check whatever compiled form was taken."""
    launch(GRID, *call)
    tensors, numbers, options = call
    _, *seen = kernel.bind(*tensors, *numbers, **options)
    taken = [x for x in kernel.compiled if x.launched] or kernel.compiled[-1:]
    assert [x.seen for x in taken] == [seen]
    for compiled in taken:
        pointers = tuple(x.data_ptr() for x in tensors)
        want = (GRID, (*pointers, *numbers, None, None))
        assert compiled.launched in ([], [want])
        compiled.launched.clear()


def _tensors() -> list[Tensor]:
    whole = torch.zeros(64)
    return [whole, whole[4:], whole[1:], whole.bfloat16(), whole.long(), whole[:0]]


def test_a_known_kernel_is_the_one_that_tritons_binder_would_take() -> None:
    kernel = Kernel()
    launch = Launcher(kernel)
    integers = (1, 2, 15, 16, 2**31 - 1, 2**31, 2**31 + 16, -16, True)
    numbers = [*product((7, 16, 2**33), integers, (1e-5, 1.0))]
    options = [
        Options(SIZE=size, WIDE=wide, num_warps=warps)
        for size, wide, warps in product((8, 16), (False, True), (1, 4))
    ]
    calls = [((x, y), n, options[0]) for x, y in product(_tensors(), repeat=2) for n in numbers]
    calls += [((x, x), n, o) for x in _tensors()[:3] for n in numbers[:4] for o in options]
    for call in (*calls, *calls):
        _call(launch, kernel, call)
    assert len(kernel.compiled) < len(calls)


def test_a_second_launch_looks_nothing_up() -> None:
    kernel = Kernel()
    launch, x = Launcher(kernel), torch.zeros(64)
    for stride in (3, 5, 7):
        launch(GRID, (x, x[4:]), (stride, stride, 1e-5), Options(SIZE=8, WIDE=True))
    assert len(kernel.compiled) == 1
    assert [given[3] for _, given in kernel.compiled[0].launched] == [5, 7]


def test_what_does_not_compile_is_launched_as_it_is() -> None:
    calls = []

    class Interpreted:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *given, **named: calls.append((grid, given, named))

    launch, x = Launcher(Interpreted()), torch.zeros(4)
    for _ in range(2):
        launch(GRID, (x,), (2, 1e-5), Options(SIZE=8))
    assert calls == [(GRID, (x, 2, 1e-5), {"SIZE": 8})] * 2
