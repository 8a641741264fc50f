"""Blocks by a gather and a fused kernel: as the naive loop, and used where it pays."""

from itertools import product

import pytest
import torch
from chapter_cases import PATHS, Case, differentiate, make_case, relative_error

from lightning_modules.ops.chapter_attention import eager, gathered
from lightning_modules.ops.chapter_attention.gathered import pays

BLOCKS = [name for name in PATHS if not name.startswith("sorted")]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Take the path on every device, and count how often."""
    taken: list[int] = []

    def counted(*arguments: object, **options: object) -> torch.Tensor:
        taken.append(1)
        return gathered.gathered_attention(*arguments, **options)

    monkeypatch.setattr(eager, "pays", lambda *_: True)
    monkeypatch.setattr(eager, "gathered_attention", counted)
    return taken


def outputs(case: Case, backend: str) -> dict[str, torch.Tensor]:
    return {"o": case.run(backend)}


def check(case: Case) -> None:
    expected = differentiate(case, lambda c: outputs(c, "naive"))
    # float64, sums in another order
    assert relative_error(differentiate(case, lambda c: outputs(c, "torch")), expected) < 1e-11


@pytest.mark.parametrize("path", BLOCKS)
def test_outputs_and_gradients_are_those_of_the_loop(path: str, calls: list[int]) -> None:
    for (top_k, shared), heads in product(((1, 2), (3, 0), (3, 2)), ((4, 2), (4, 4), (6, 1))):
        sizes = {"heads": heads[0], "kv_heads": heads[1], **PATHS[path]}
        check(make_case(top_k=top_k, shared=shared, **sizes))
    assert len(calls) == 9


def test_weights_count_by_their_differences(calls: list[int]) -> None:
    """In 16 bits, logarithms far from zero would lose what tells them apart."""
    case = make_case(time=70, block_size=32, top_k=3, size=16, scale=1e-3, dtype=torch.float32)
    weights = torch.tensor([0.0, 0.25, 0.5]) + torch.zeros_like(case.tensors["log_weights"])
    near, far = (
        case.with_tensors(log_weights=weights - shift)
        .to(torch.bfloat16)
        .with_tensors(log_weights=weights - shift)
        for shift in (0.0, 90.0)
    )
    assert torch.equal(near.run("torch"), far.run("torch"))
    assert len(calls) == 2


@pytest.mark.parametrize("options", [{"mixing": "mixture"}, {"return_lse": True}])
def test_what_a_fused_kernel_cannot_give_is_read_as_tiles(
    options: dict[str, object], calls: list[int]
) -> None:
    make_case(top_k=2, **PATHS["blocks"]).run("torch", **options)
    assert not calls


def test_a_cpu_reads_tiles() -> None:
    assert not pays(torch.zeros(3, 2, 8), 128)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnAGPU:
    """Odd sizes, against the naive loop in float64."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("size", [8, 48, 64, 96, 128])
    def test_is_the_loop(self, size: int, dtype: torch.dtype) -> None:
        sizes = {"time": 150, "block_size": 64, "rows": 23, "heads": 6, "kv_heads": 2}
        case = make_case(top_k=3, shared=1, size=size, seed=size, **sizes)
        rounded = case.to(dtype)
        assert pays(rounded.on("cuda").tensors["q"].flatten(0, 1), 64)
        expected = differentiate(rounded.to(torch.float64), lambda c: outputs(c, "naive"))
        actual = differentiate(rounded.on("cuda"), lambda c: outputs(c, "torch"))
        actual = {name: x.cpu() for name, x in actual.items()}
        assert relative_error(actual, expected) < (2e-5 if dtype == torch.float32 else 3e-2)

    def test_deterministic_algorithms_are_tiles(self) -> None:
        q = torch.zeros(3, 2, 8, device="cuda")
        assert pays(q, 64) and not pays(q, 63) and not pays(q.double(), 64)
        torch.use_deterministic_algorithms(True)
        try:
            assert not pays(q, 64)
        finally:
            torch.use_deterministic_algorithms(False)

    def test_nothing_waits_for_the_gpu(self) -> None:
        sizes = {"time": 150, "block_size": 64, "top_k": 3, "shared": 1}
        case = make_case(**sizes, dtype=torch.float32).on("cuda")
        leaves = {name: x.requires_grad_() for name, x in case.tensors.items()}
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            case.with_tensors(**leaves).run("torch").sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(x.grad is not None for x in leaves.values())
