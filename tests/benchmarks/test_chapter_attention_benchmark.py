"""The benchmark of chapter attention, shortened."""

import pytest
import triton_interpreter as triton_interpreter
from benchmark_cases import load, run


def test_forms_are_timed_beside_their_floor_and_compared_with_float64() -> None:
    text = run("ops_chapter_attention.py", "--tiny", "--repeats", "1", "--device", "cpu")
    lines = [[cell.strip() for cell in line.split("|")] for line in text.splitlines()]
    checked = [row for row in lines if len(row) == 15 and row[4] in ("torch", "gather")]
    assert len(checked) == 4 and "TFLOP/s" in text
    # float32; gradients are sums of some ten terms
    assert all(float(row[13]) < 1e-5 for row in checked)
    assert all(float(row[12]) == 1 for row in checked if row[4] == "torch")


@pytest.mark.parametrize("name", ["tiny", "tiny_blocks"])
def test_kernels_are_compared_with_float64_too(name: str) -> None:
    benchmark = load("ops_chapter_attention.py")
    case = benchmark.TINY[name]._replace(batch=1, heads=1, tokens=9)
    given = benchmark.inputs(case, "cpu", benchmark.torch.float32)
    call = benchmark.forms_of(case, ("triton",))["triton"]
    assert benchmark.error(call, case, given) < 1e-5  # float32, as above
    assert benchmark.error(lambda *x: 1.01 * call(*x), case, given) > 5e-3


def test_published_case_is_what_it_says() -> None:
    case = load("ops_chapter_attention.py").CASES["published"]
    assert case.batch * case.tokens == 262_144 and case.chapters * case.rows == 65_536
    assert (case.rows, case.top_k, case.heads, case.head_dim) == (128, 8, 8, 64)
    assert case.flops(case.top_k, backward=False) == 4 * 262_144 * 8 * 128 * 8 * 64
