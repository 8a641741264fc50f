"""A spy on everything that makes the host wait for the device, usable on a machine without one.

On a CPU nothing waits, but the same calls are made: reading a number (`item`, `bool`, `float`)
dispatches `_local_scalar_dense` there too, operations whose output size depends on the data have
names, and a copy to the host ends in `tolist`, `numpy` or `cpu`.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

WAITING_OPERATIONS = {
    "_local_scalar_dense",
    "is_nonzero",
    "equal",
    "nonzero",
    "nonzero_numpy",
    "argwhere",
    "masked_select",
    "allclose",
    "bincount",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
    "unique_dim_consecutive",
    "_unique",
    "_unique2",
}
COPIES_TO_HOST = {"tolist", "numpy", "cpu", "__array__"}


class SyncSpy:
    """Context manager that records `(label, operation)` of everything that waits.

    `label` is what the test says is going on (a step's number); set it as the test proceeds.
    """

    def __init__(self) -> None:
        self.label: Any = None
        self.events: list[tuple[Any, str]] = []
        self._stack = ExitStack()

    def __enter__(self) -> SyncSpy:
        self._stack.enter_context(_FunctionSpy(self))
        self._stack.enter_context(_DispatchSpy(self))
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()

    def record(self, name: str) -> None:
        """Note an operation under the current label."""
        self.events.append((self.label, name))

    def during(self, label: Any) -> list[str]:
        """Operations recorded under a label."""
        return [name for at, name in self.events if at == label]


class _DispatchSpy(TorchDispatchMode):
    def __init__(self, spy: SyncSpy) -> None:
        super().__init__()
        self.spy = spy

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if name in WAITING_OPERATIONS or _indexes_with_a_mask(name, args):
            self.spy.record(name)
        if name in ("_to_copy", "copy_") and _leaves_the_device(name, args, kwargs):
            self.spy.record("device_to_host")
        return func(*args, **kwargs)


class _FunctionSpy(TorchFunctionMode):
    def __init__(self, spy: SyncSpy) -> None:
        super().__init__()
        self.spy = spy

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in COPIES_TO_HOST:
            self.spy.record(name)
        return func(*args, **(kwargs or {}))


def _indexes_with_a_mask(name: str, args: Any) -> bool:
    if name not in ("index", "index_put", "index_put_"):
        return False
    return any(index is not None and index.dtype == torch.bool for index in args[1])


def _leaves_the_device(name: str, args: Any, kwargs: Any) -> bool:
    if name == "_to_copy":
        source, target = args[0].device, kwargs.get("device") or args[0].device
    else:
        source, target = args[1].device, args[0].device
    return source.type != "cpu" and torch.device(target).type == "cpu"


class OperationCount(TorchDispatchMode):
    """Counts operations that compute (views do not, nor what a product of 4-D tensors ends in)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += not func.is_view and func is not torch.ops.aten._unsafe_view.default
        return func(*args, **(kwargs or {}))
