"""The Triton kernels of chapter attention, compiled for an H100 without one."""

import pytest

pytest.importorskip("triton")

from triton_ahead import SHARED, compiled_by

SPILLED = {"bank_gradient_kernel": 128}
"""Bytes a thread may keep outside of registers, where a larger tile without took longer."""

CODE = """
import json, torch
from triton_ahead import record
from lightning_modules.ops.chapter_attention.launch import Call, Read

size, block = {size}, {block}
with torch.device("meta"), record() as compiled:
    q, k, v = (
        torch.empty(shape, dtype=torch.bfloat16, requires_grad=True)
        for shape in ((64 * 4096, 8, size), (512, 128, 8, size), (512, 128, 8, size))
    )
    weights = torch.empty(64, 4096 // block, 8, requires_grad=True)
    chapters = torch.empty(64, 4096 // block, 8, dtype=torch.int32)
    call = Call(4096, block, size**-0.5, False, block > 1)
    o, lse = Read.apply(call, q, k, v, weights, chapters)
    torch.autograd.grad((o, lse), (q, k, v, weights), (o, lse))
print(json.dumps(compiled))
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize(
    ("block", "kernels"),
    [
        (1, {"read_pairs", "merge", "delta", "bank_gradient", "sum_groups"}),
        (128, {"read_blocks", "delta", "query_gradient", "bank_gradient", "sum_groups"}),
    ],
)
def test_kernels_of_the_published_bank_fit_into_registers(
    block: int, kernels: set[str], size: int
) -> None:
    compiled = compiled_by(CODE.format(size=size, block=block))
    assert {name.removesuffix("_kernel") for name, *_ in compiled} == kernels
    for name, registers, spilled, shared in compiled:
        assert 16 <= registers <= 255 and shared <= SHARED, name
        assert spilled <= SPILLED.get(name, 0), name
