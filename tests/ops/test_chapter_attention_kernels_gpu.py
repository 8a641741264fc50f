"""The Triton kernels of chapter attention on a GPU: as torch in float64, same bits, no waits."""

from typing import Any

import pytest
import torch
from chapter_cases import Case, differentiate, make_case
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SIZES = {"rows": 128, "num_chapters": 16, "heads": 4, "kv_heads": 4, "size": 64}
WAYS: dict[str, dict[str, Any]] = {
    "by_chapter": {"time": 777, "top_k": 4},
    "by_chapter_blocks": {"time": 333, "top_k": 4, "block_size": 8},
    "by_block": {"time": 777, "top_k": 4, "block_size": 128},
}
# float32: three tf32 products keep about 21 bits; bfloat16: 8 bits of every operand and part
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 0.015}
every_way = pytest.mark.parametrize("way", WAYS)
every_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


def case_of(way: str, **sizes: Any) -> Case:
    """A case whose tensors bfloat16 can represent, the weights those of a softmax."""
    case = make_case(**{**SIZES, **WAYS[way], **sizes})
    rounded = {n: x.bfloat16().double() for n, x in case.tensors.items()}
    rounded["log_weights"] = rounded["log_weights"].log_softmax(-1).float().double()
    return case.with_tensors(**rounded)


def on_gpu(case: Case, dtype: torch.dtype) -> Case:
    """The call on the GPU; weights stay float32."""
    moved = case.on("cuda").to(dtype)
    return moved.with_tensors(log_weights=case.tensors["log_weights"].cuda().float())


def run(case: Case, backend: str = "triton") -> dict[str, Tensor]:
    return differentiate(case, lambda call: call.outputs(backend))


def check(case: Case, dtype: torch.dtype) -> None:
    """`|| actual - expected || / || expected ||` of all outputs and gradients."""
    expected, actual = run(case.on("cuda"), "torch"), run(on_gpu(case, dtype))
    errors = {
        name: float((actual[name].double() - x).norm() / x.norm()) for name, x in expected.items()
    }
    assert all(error <= TOLERANCES[dtype] for error in errors.values()), errors


@every_dtype
@every_way
@pytest.mark.parametrize("mixing", ["joint", "mixture"])
def test_triton_is_torch_in_float64(mixing: str, way: str, dtype: torch.dtype) -> None:
    check(case_of(way, mixing=mixing, shared=2), dtype)


@pytest.mark.parametrize("size", [32, 96, 128])
@pytest.mark.parametrize("way", ["by_chapter", "by_block"])
@every_dtype
def test_triton_is_torch_for_head_sizes(dtype: torch.dtype, way: str, size: int) -> None:
    check(case_of(way, size=size, time=260), dtype)


@pytest.mark.parametrize("rows", [5, 23, 64, 300])
@pytest.mark.parametrize("way", ["by_chapter", "by_block"])
def test_triton_is_torch_for_rows(way: str, rows: int) -> None:
    check(case_of(way, rows=rows), torch.bfloat16)


@every_way
def test_triton_is_torch_with_grouped_heads(way: str) -> None:
    check(case_of(way, heads=6, kv_heads=2), torch.bfloat16)


@every_way
def test_triton_is_torch_when_all_tokens_choose_alike(way: str) -> None:
    case = case_of(way, top_k=1)
    assert case.chapters is not None
    case.chapters.fill_(3)
    check(case, torch.bfloat16)


@pytest.mark.parametrize("time", [1, 3])
def test_triton_is_torch_for_few_tokens(time: int) -> None:
    check(case_of("by_chapter", time=time), torch.bfloat16)
    check(case_of("by_block", time=time, mixing="mixture"), torch.bfloat16)


@every_way
def test_every_run_gives_the_same_bits(way: str) -> None:
    case = on_gpu(case_of(way, time=3000), torch.bfloat16)
    first, second = run(case), run(case)
    for name, x in first.items():
        assert torch.equal(x, second[name]), name


@every_way
def test_rows_of_the_batch_do_not_depend_on_each_other(way: str) -> None:
    case = on_gpu(case_of(way, batch=3), torch.bfloat16)
    together = case.outputs("triton")
    alone = case.rows(slice(1, 2)).outputs("triton")
    assert all(torch.equal(together[name][1:2], x) for name, x in alone.items())


@every_way
def test_call_never_waits_for_the_gpu(way: str) -> None:
    case = on_gpu(case_of(way, shared=1), torch.bfloat16)
    leaves = {name: x.detach().clone().requires_grad_() for name, x in case.tensors.items()}
    call = case.with_tensors(**leaves)

    def step() -> None:
        o = call.run("triton")
        torch.autograd.grad(o, list(leaves.values()), torch.ones_like(o))

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@every_way
def test_another_length_or_batch_compiles_nothing(way: str) -> None:
    from lightning_modules.ops.chapter_attention.kernels import backward, forward

    kernels = [
        forward.read_blocks_kernel,
        forward.read_pairs_kernel,
        forward.merge_kernel,
        backward.delta_kernel,
        backward.query_gradient_kernel,
        backward.bank_gradient_kernel,
        backward.sum_groups_kernel,
    ]

    def compiled() -> list[int]:
        return [sum(len(found[0]) for found in kernel.device_caches.values()) for kernel in kernels]

    def again(time: int, batch: int) -> None:
        run(on_gpu(case_of(way, time=time, batch=batch), torch.bfloat16))

    again(256, 2)
    before = compiled()
    for time, batch in ((128, 1), (129, 1), (333, 3), (1000, 16)):
        again(time, batch)
    assert compiled() == before


def test_bank_in_float32_is_read_in_the_dtype_of_autocast() -> None:
    case = case_of("by_block")
    expected = on_gpu(case, torch.bfloat16).run("triton")
    with torch.autocast("cuda", torch.bfloat16):
        actual = on_gpu(case, torch.float32).run("triton")
    assert torch.equal(actual, expected.float())


def test_auto_is_triton_on_a_gpu_and_torch_where_kernels_end() -> None:
    case = on_gpu(case_of("by_chapter"), torch.bfloat16)
    assert torch.equal(case.run("auto"), case.run("triton"))
    wide = on_gpu(case_of("by_chapter", size=160), torch.bfloat16)
    assert torch.equal(wide.run("auto"), wide.run("torch"))
