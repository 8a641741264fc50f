"""Launches of Triton kernels that cost the host less than `kernel[grid](...)`.

Triton looks at every argument of every launch, by name, until it knows which compiled kernel to
take; with 50 arguments that is longer than many kernels run. Here that kernel is kept, under all
that Triton compiles it for, and launched as Triton's tutorials do it: `compiled[grid](...)`.
"""

from collections.abc import Sequence
from functools import cache, lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

Grid = tuple[int, int, int]


class Options(dict[str, Any]):
    """Constants and options of a kernel, hashed once: to be made once and then left alone."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._hash = hash(tuple(self.items()))

    def __hash__(self) -> int:  # type: ignore[override]
        return self._hash


class Launcher:
    """A kernel, and what it was compiled to.

    Args:
        kernel: by `triton.jit`; its parameters are tensors, then numbers, then constants.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.compiled: dict[Any, tuple[Any, tuple[None, ...]]] = {}

    def __call__(
        self, grid: Grid, tensors: Sequence[Any], numbers: tuple[float, ...], options: Options
    ) -> None:
        """`kernel[grid](*tensors, *numbers, **options)`, on the tensors' device, the current one.

        Args:
            grid: how many programs.
            tensors: that the kernel gets pointers to.
            numbers: integers and floats.
            options: constants by name, `num_warps` and `num_stages`.
        """
        pointers = [x.data_ptr() for x in tensors]
        key = (
            tensors[0].get_device(),
            tuple([x.dtype for x in tensors]),
            tuple([x % 16 == 0 for x in pointers]),
            kinds(*numbers),
            options,
        )
        found = self.compiled.get(key)
        if found is not None:
            compiled, constants = found
            compiled[grid](*pointers, *numbers, *constants)
            return
        compiled = self.kernel[grid](*tensors, *numbers, **options)
        if compiled is not None:  # as it is where Triton interprets
            count = len(self.kernel.arg_names) - len(tensors) - len(numbers)
            self.compiled[key] = compiled, (None,) * count


@cache
def launcher(module: str, kernel: str) -> Launcher:
    """That of a kernel, whose module is imported when it is launched: there may be no triton."""
    return Launcher(getattr(import_module(module), kernel))


def given(tensors: Sequence[Tensor | None], other: Tensor) -> list[Tensor]:
    """Tensors, and for those that are not there another that the kernel does not touch."""
    return [other if x is None else x for x in tensors]


def wide(dtype: torch.dtype) -> Any:
    """The dtype in which a kernel computes with numbers of a dtype: float32, or float64."""
    import triton.language as tl

    return tl.float64 if dtype == torch.float64 else tl.float32


@lru_cache(maxsize=4096, typed=True)
def kinds(*numbers: float) -> str:
    """What Triton compiles a kernel for of its numbers; it may ignore some of it, not see more.

    A float is one. Of integers it sees if they are 1, if 16 divides them, and how many bits they
    take.
    """
    return " ".join(
        f"{type(n).__name__} {n == 1} {n % 16 == 0} {n >> 31}" if isinstance(n, int) else "float"
        for n in numbers
    )
