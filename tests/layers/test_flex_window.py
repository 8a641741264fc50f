"""The one-kernel form of window attention, against torch's own block masks and against SDPA."""

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from lightning_modules.layers import flex_window
from lightning_modules.layers.flex_window import BLOCK, FlexWindow
from lightning_modules.layers.window_attention import (
    WindowState,
    plan_window,
    window_attention,
)

ROWS, LENGTH, HEADS, SIZE, WINDOW = 2, 3 * BLOCK, 2, 16, 150


def _call(kind: str, device: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(ROWS, LENGTH, generator=generator) > 0.2
    lengths = torch.tensor([[40, 300, LENGTH - 340], [200, 100, LENGTH - 300]])
    ids = torch.stack([torch.repeat_interleave(torch.arange(3), n) for n in lengths])
    given = {"mask": {"mask": mask}, "both": {"mask": mask, "document_ids": ids}}
    return {name: value.to(device) for name, value in given.get(kind, {}).items()}


def _tokens(device: str = "cpu", dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (ROWS, LENGTH, HEADS, SIZE)
    return [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3)]


def _carried(window: int | None, device: str = "cpu") -> WindowState:
    q, k, v = _tokens(device)
    _, state = window_attention(q, k, v, plan_window(q, window)._replace(flex=None))
    return state


@pytest.mark.parametrize("window", [None, 1, BLOCK, WINDOW])
@pytest.mark.parametrize("kind", ["plain", "mask", "both"])
def test_blocks_equal_those_that_torch_finds_in_the_mask_of_all_pairs(
    kind: str, window: int | None
) -> None:
    for state in (None, _carried(window)):
        plan = plan_window(_tokens()[0], window, state=state, **_call(kind, "cpu"))
        first = plan.first.expand(ROWS, -1)
        mine = FlexWindow(first, plan.carried).block_mask
        columns = plan.carried + LENGTH
        theirs = create_block_mask(mine.mask_mod, ROWS, 1, LENGTH, columns, device="cpu")
        for own, known in (
            ((mine.kv_num_blocks, mine.kv_indices), (theirs.kv_num_blocks, theirs.kv_indices)),
            (
                (mine.full_kv_num_blocks, mine.full_kv_indices),
                (theirs.full_kv_num_blocks, theirs.full_kv_indices),
            ),
        ):
            torch.testing.assert_close(own[0], known[0].expand(ROWS, 1, -1), rtol=0, atol=0)
            lists = (own[0].flatten(), own[1].flatten(0, 2), known[1].flatten(0, 2))
            for count, a, b in zip(*lists, strict=True):
                assert a[:count].tolist() == b[:count].tolist()


def test_fewer_blocks_than_all_are_visited() -> None:
    plan = plan_window(torch.zeros(1, 40 * BLOCK, 1), 2 * BLOCK)
    blocks = FlexWindow(plan.first, 0).block_mask
    assert (blocks.kv_num_blocks + blocks.full_kv_num_blocks).max() == 3


@pytest.mark.quick("both-16")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("size", [SIZE, 8])
@pytest.mark.parametrize("kind", ["plain", "mask", "both"])
def test_interpreted_kernel_equals_sdpa(
    kind: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flex_window, "_compiled", lambda: flex_attention)
    _compare(kind, "cpu", size, 1e-5, backward=False)  # which torch has for GPUs only


def _compare(kind: str, device: str, size: int, tolerance: float, *, backward: bool) -> None:
    call = _call(kind, device)
    for window, carry in ((WINDOW, False), (WINDOW, True), (None, True)):
        state = _carried(window, device) if carry else None
        if state is not None:
            state = WindowState(state.keys[..., :size], state.values[..., :size], *state[2:])
        results = []
        for flex in (False, True):
            q, k, v = (x[..., :size].detach() for x in _tokens(device))
            q, k, v = (x.requires_grad_(backward) for x in (q, k, v))
            plan = plan_window(q, window, state=state, **call)
            kernel = FlexWindow(plan.first.expand(ROWS, -1), plan.carried) if flex else None
            out, _ = window_attention(q, k, v, plan._replace(flex=kernel), state)
            results.append([out])
            if backward:
                results[-1] += torch.autograd.grad(out.square().sum(), (q, k, v))
        for actual, expected in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_the_kernel_is_for_long_calls_on_a_gpu() -> None:
    assert plan_window(_tokens()[0], WINDOW).flex is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["plain", "mask", "both"])
def test_compiled_kernel_equals_sdpa_in_outputs_and_gradients(kind: str) -> None:
    assert plan_window(_tokens("cuda")[0], WINDOW).flex is not None
    _compare(kind, "cuda", SIZE, 1e-2, backward=True)  # products of a GPU's float32 may be TF32
