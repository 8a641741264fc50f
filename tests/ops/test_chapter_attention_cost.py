"""What chapter attention's torch backend costs: memory, waiting for the device, compilations."""

from typing import Any

import pytest
import torch
from chapter_cases import PATHS, Case, SizeSpy, differentiate, make_case, relative_error
from spy import SyncSpy
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from lightning_modules.ops.chapter_attention import reading

BIG: dict[str, dict[str, Any]] = {
    "sorted": {"time": 256, "block_size": 1},
    "blocks": {"time": 256, "block_size": 64},
    "decoding": {"time": 1},
}


def big_case(path: str, batch: int, **options: Any) -> Case:
    sizes = {"num_chapters": 16, "rows": 32, "heads": 4, "kv_heads": 4, "size": 16}
    return make_case(top_k=4, batch=batch, dtype=torch.float32, **sizes, **BIG[path], **options)


def leaves_of(case: Case) -> dict[str, Tensor]:
    return {name: x.clone().requires_grad_() for name, x in case.tensors.items()}


def saved_elements(case: Case) -> int:
    """Of the tensors that the backward pass needs and that are not the caller's."""
    storages: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // 4
        return x

    leaves = leaves_of(case)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        _held = case.with_tensors(**leaves).run("torch")
    own = {x.untyped_storage().data_ptr() for x in leaves.values()}
    return sum(size for pointer, size in storages.items() if pointer not in own)


@pytest.mark.parametrize("mixing", ["joint", "mixture"])
@pytest.mark.parametrize("path", ["sorted", "blocks"])
def test_no_gathered_row_is_kept_for_the_backward_pass(path: str, mixing: str) -> None:
    """The output, and for each query and head (in a mixture, for each of k) one number; indices."""
    case = big_case(path, batch=2, shared=1, mixing=mixing)
    outputs = case.tensors["q"].numel()
    gathered = 2 * 256 * 4 * 32 * 4 * 16
    assert outputs < saved_elements(case) < 6 * outputs < gathered / 20


@pytest.mark.quick("joint-*", "mixture-decoding")
@pytest.mark.parametrize("path", BIG)
@pytest.mark.parametrize("mixing", ["joint", "mixture"])
def test_rows_add_no_copies_of_the_bank(
    path: str, mixing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest tensor, forward and backward, is the bank or grows as the queries do."""
    monkeypatch.setitem(reading.LOGITS_AT_ONCE, "cpu", 1 << 13)
    bank = 16 * 32 * 4 * 16
    for batch in (1, 8):
        case = big_case(path, batch, shared=1, mixing=mixing)
        leaves = leaves_of(case)
        with SizeSpy() as spy:
            case.with_tensors(**leaves).run("torch").sum().backward()
        pairs = batch * case.tensors["q"][0].numel() * 4
        name, size = spy.largest
        blocks = batch * BIG[path]["time"] // BIG[path].get("block_size", 1)
        rows = blocks * 5 * 32 * 4 * 16 if path != "sorted" else 0
        assert size <= max(bank, 2 * pairs, rows), name
        if path == "sorted":
            # gathered for every token, rows alone would be so many times larger
            assert size * 20 < batch * 256 * 4 * 32 * 4 * 16


def test_the_whole_bank_is_read_once_for_all_rows() -> None:
    sizes = {"num_chapters": 16, "rows": 32, "heads": 4, "kv_heads": 2, "size": 32}
    case = make_case(time=1, top_k=1, batch=64, **sizes)
    whole = Case({n: x for n, x in case.tensors.items() if n != "log_weights"}, None, {})
    leaves = leaves_of(whole)
    with SizeSpy() as spy:
        whole.with_tensors(**leaves).run("torch").sum().backward()
    logits = 64 * 4 * 16 * 32
    assert spy.largest[1] <= max(logits, leaves["mem_k"].numel())
    expanded = 64 * leaves["mem_k"].numel()
    assert logits < expanded / 4


@pytest.mark.parametrize("mixing", ["joint", "mixture"])
@pytest.mark.parametrize("path", PATHS)
def test_nothing_waits_for_the_device(path: str, mixing: str) -> None:
    case = make_case(top_k=3, shared=2, mixing=mixing, dropout=0.1, **PATHS[path])
    with SyncSpy() as spy:
        case.with_tensors(**leaves_of(case)).run("torch").sum().backward()
    assert not spy.events


def test_the_spy_sees_the_naive_loop_wait() -> None:
    with SyncSpy() as spy:
        make_case(top_k=3, time=3).run("naive")
    assert spy.events


@pytest.mark.parametrize("path", PATHS)
def test_shapes_do_not_depend_on_the_data(path: str) -> None:
    """Tensors without data are enough."""
    case = make_case(top_k=3, shared=2, **PATHS[path])
    meta = case.on("meta")
    for x in meta.tensors.values():
        x.requires_grad_()
    o, lse = meta.run("torch", return_lse=True)
    (o.sum() + lse.sum()).backward()
    assert o.shape == case.tensors["q"].shape
    assert all(x.grad is not None and x.grad.shape == x.shape for x in meta.tensors.values())


@pytest.mark.slow
@pytest.mark.parametrize("mixing", ["joint", "mixture"])
@pytest.mark.parametrize("path", ["sorted", "blocks", "decoding"])
def test_compiles_to_one_graph(path: str, mixing: str) -> None:
    torch._dynamo.reset()
    case = make_case(top_k=2, shared=1, mixing=mixing, **PATHS[path])
    counter = CompileCounter()

    def run(tensors: dict[str, Tensor]) -> Tensor:
        return case.with_tensors(**tensors).run("torch")

    leaves = leaves_of(case)
    expected, actual = (
        f(leaves) for f in (run, torch.compile(run, backend=counter, fullgraph=True))
    )
    assert counter.frame_count == 1
    assert torch.equal(actual, expected)
    gradients = [torch.autograd.grad(x.sum(), list(leaves.values())) for x in (expected, actual)]
    assert all(torch.equal(x, y) for x, y in zip(*gradients, strict=True))
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.parametrize("path", PATHS)
def test_gpu_is_cpu(path: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device: compares it with the CPU")
    case = make_case(top_k=3, shared=2, **PATHS[path])
    on_gpu, on_cpu = (
        differentiate(c, lambda c: c.outputs("torch")) for c in (case.on("cuda"), case)
    )
    on_gpu = {name: x.cpu() for name, x in on_gpu.items()}
    assert relative_error(on_gpu, on_cpu) < 1e-11  # float64, sums in another order
