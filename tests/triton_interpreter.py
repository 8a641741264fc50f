"""Kernels on a CPU by Triton's interpreter (`conftest.py` switches it on)."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the GPU runs the kernels here", allow_module_level=True)

from triton.runtime import interpreter

_patch = interpreter._patch_lang_tensor


def _patch_with_index(tensor: type, scope: interpreter._LangPatchScope) -> None:
    """NumPy >= 2.4 makes no integer of an array of one element, as the interpreter's range does."""
    _patch(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_with_index
_call = interpreter.GridExecutor.__call__


def _call_as_the_compiler(self: interpreter.GridExecutor, *args: Any, **keywords: Any) -> None:
    """The interpreter drops arguments that a kernel does not have; compiled, they are errors."""
    unknown = keywords.keys() - {*self.arg_names, "num_warps", "num_stages"}
    assert not unknown, f"{self.fn.__name__} has no {unknown}"
    _call(self, *args, **keywords)


interpreter.GridExecutor.__call__ = _call_as_the_compiler
_reduce = interpreter.ReduceOps.apply_impl


def _reduce_fast(self: interpreter.ReduceOps, inputs: tuple[Any, ...]) -> Any:
    """Two sums in one reduction, which the interpreter would do number by number."""
    if getattr(self.combine_fn, "__name__", "") == "_add_both":
        return tuple(map(self.sum, inputs))
    return _reduce(self, inputs)


interpreter.ReduceOps.apply_impl = _reduce_fast
