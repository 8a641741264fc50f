"""What the driver gets from a launch is what Triton's own `kernel[grid](...)` hands it."""

import shutil
import sysconfig
from pathlib import Path

import pytest

pytest.importorskip("triton")

from triton_ahead import printed_by

HEADER = Path(sysconfig.get_path("include")) / "Python.h"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("gcc") is None or not HEADER.exists(), reason="needs gcc and Python's headers"
    ),
]

BEGIN = """
import json, sys
from pathlib import Path
import torch
from cuda_stub import compare_launches, install
from lightning_modules import ops
from lightning_modules.ops import triton_backend

names = compare_launches(install(Path({folder!r})))
triton_backend._require = lambda *_: None
draw = lambda *shape: torch.randn(*shape).requires_grad_()
"""

TTT_LINEAR = """
B, T, H, D = 2, 51, 2, 16
x = [*(draw(B, T, H, D) for _ in "qkv"), draw(B, T, H), draw(H, D), draw(H, D), draw(H, D, D),
     draw(H, 1, D)]
mask, ids = torch.ones(B, T, dtype=torch.bool), torch.arange(T).expand(B, T) // 20
for causal, m in ((False, None), (True, 16)):
    options = {"causal": causal, "mini_batch_size": m}
    state = ops.ttt_linear(*x, **options, backend="torch")[1]
    state = type(state)(*(s.detach() for s in state))
    for more in ({}, {"state": state}, {"mask": mask}) + ({"document_ids": ids},) * causal:
        o, new = ops.ttt_linear(*x, **options, **more, backend="triton")
        torch.autograd.grad(o.sum() + new.dw.sum(), x, allow_unused=True)
print(json.dumps(names))
"""

LACT = """
B, T, H, D, F = 2, 40, 2, 16, 32
x = [*(draw(B, T, H, D) for _ in "qkv"), torch.rand(B, T, H, 3).requires_grad_(), draw(2, H, F, D),
     draw(2, H, D, F), draw(2, H, F, D)]
momentum, ids = torch.rand(B, T, H), torch.arange(T).expand(B, T) // 20
for more in ({"greedy": True}, {"residual": True}, {"momentum": momentum, "document_ids": ids}):
    o, new = ops.lact(*x, chunk_size=16, **more, backend="triton")
    torch.autograd.grad(o.sum() + new.w0.sum(), x, allow_unused=True)
print(json.dumps(names))
"""

KERNELS = {
    "ttt_linear": (TTT_LINEAR, "write read output_gradient weight_gradient input_gradient"),
    "lact": (
        LACT,
        "gather scatter read_gate read_gate_backward write_gate write_gate_backward momentum "
        "momentum_backward update update_backward operands operands_backward changes tokens",
    ),
}


@pytest.mark.parametrize("op", KERNELS)
def test_launches_hand_over_what_the_binder_does(op: str, tmp_path: Path) -> None:
    code, kernels = KERNELS[op]
    names = printed_by(BEGIN.format(folder=str(tmp_path)) + code)
    assert {name.removesuffix("_kernel") for name in names} == set(kernels.split())
