"""TTT-Linear's Triton kernels, compiled for an H100 without one."""

import pytest

pytest.importorskip("triton")

from triton_ahead import SHARED, compiled_by

CODE = """
import json, torch
from triton_ahead import record
from lightning_modules.ops.ttt_linear.launch import Call, Inputs, run_backward, run_forward
from lightning_modules.ops.ttt_linear.layout import GROUP, Layout

m, heads, size, dtype = {mini_batch_size}, 2, 64, torch.{dtype}
layout = Layout(m, 1024 // m, GROUP // m, 0, *[None] * 5)
call = Call(layout, causal=True, flush=False, masked=False, eps=1e-6)
with torch.device("meta"), record() as compiled:
    q, k, v = torch.empty(3, 1, 1024, heads, size, dtype=dtype).unbind()
    gamma, beta = torch.empty(2, heads, size).unbind()
    given = Inputs(
        q, k, v, torch.empty(1, 1024, heads), torch.empty(m), gamma, beta,
        torch.empty(heads, size, size), torch.empty(heads, 1, size), *[None] * 5,
    )
    *_, saved = run_forward(call, given)
    run_backward(call, given, saved, q, None, None)
print(json.dumps(compiled))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("mini_batch_size", "most"), [(16, 0), (64, 128)])
def test_walks_fit_into_registers(mini_batch_size: int, most: int) -> None:
    """What a step of theirs spills, hundreds of steps wait for; the others at most 160 bytes."""
    compiled = compiled_by(CODE.format(mini_batch_size=mini_batch_size, dtype="bfloat16"))
    names = ["write", "read", "output_gradient", "weight_gradient", "input_gradient"]
    assert [name.removesuffix("_kernel") for name, *_ in compiled] == names
    for name, registers, spilled, shared in compiled:
        walks = name in ("write_kernel", "weight_gradient_kernel")
        assert 16 <= registers <= 255 and shared <= SHARED, name
        assert spilled <= (most if walks else 160), name


@pytest.mark.slow
def test_pipelines_of_float32_fit_into_shared_memory() -> None:
    """Walks of mini-batches of 64 tokens hold the most: two steps that are still to come."""
    compiled = compiled_by(CODE.format(mini_batch_size=64, dtype="float32"))
    assert len(compiled) == 5 and max(x.shared for x in compiled) <= SHARED
