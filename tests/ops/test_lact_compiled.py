"""LaCT's Triton kernels with products, compiled for an H100 without one."""

import pytest

pytest.importorskip("triton")

from triton_ahead import SHARED, compiled_by

CODE = """
import json, torch
from triton_ahead import record
from lightning_modules.ops.lact import few
from lightning_modules.ops.lact.sizes import Sizes

size = {size}
sizes = Sizes(1, 4, size, size, torch.bfloat16)
with torch.device("meta"), record() as compiled:
    low = torch.empty(4, sizes.packed, dtype=sizes.low)
    both = torch.empty(4, 2 * sizes.packed, dtype=sizes.low)
    k, v = torch.empty(2, 4, 2048, size, dtype=sizes.low).unbind()
    rates, drates = torch.empty(4, 2048, 3), torch.empty(few.rate_parts(size, 1), 4, 2048, 3)
    few.write([sizes.pair(low)], k, v, rates, few.rooms(1, k, size, backward=False))
    rooms = few.rooms(1, k, size, backward=True)
    few.write_backward([sizes.operands(both)], k, v, rates, drates, rooms)
print(json.dumps(compiled))
"""


@pytest.mark.slow
@pytest.mark.parametrize("size", [64, 384])
def test_kernels_of_small_chunks_fit_into_registers(size: int) -> None:
    compiled = compiled_by(CODE.format(size=size))
    names = ["operands", "changes", "operands_backward", "changes", "tokens"]
    assert [name.removesuffix("_kernel") for name, *_ in compiled] == names
    for name, registers, spilled, shared in compiled:
        assert 16 <= registers <= 255 and shared <= SHARED and spilled == 0, name
