"""Kernels on a CPU by Triton's interpreter (`conftest.py` switches it on)."""

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
