"""The Triton kernels of chapter attention in the interpreter: as the naive loop and as torch."""

import logging
from itertools import product
from typing import Any

import pytest
import torch
import triton_interpreter as triton_interpreter
from chapter_cases import PATHS, Case, differentiate, make_case, relative_error
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_modules.ops import triton_backend
from lightning_modules.ops.chapter_attention import groups, launch
from lightning_modules.ops.chapter_attention.groups import group_width, sorted_groups

ROUNDING = 1e-11
"""float64, sums in another order."""

SMALL = {"batch": 1, "heads": 2, "kv_heads": 1, "num_chapters": 4}
ONE_HEAD = {**SMALL, "heads": 1, "num_chapters": 3}
BY = {
    "by_chapter": {"time": 11, "top_k": 2},
    "by_chapter_blocks": {"time": 7, "top_k": 2, "block_size": 3},
    "by_block": {"time": 37, "top_k": 2, "block_size": 32},
}
"""The two ways to read; `by_block` has a short last block."""

every_way = pytest.mark.parametrize("way", BY)
every_path = pytest.mark.parametrize("path", PATHS)


def run(case: Case, backend: str = "triton") -> dict[str, Tensor]:
    """Outputs, lse and every gradient."""
    return differentiate(case, lambda call: call.outputs(backend))


def check(case: Case, *, against: tuple[str, ...] = ("naive", "torch")) -> None:
    actual = run(case)
    for backend in against:
        assert relative_error(actual, run(case, backend)) < ROUNDING, backend


# --- quick ---


@every_way
def test_triton_is_naive_and_torch(way: str) -> None:
    check(make_case(**SMALL, **BY[way], shared=1, scale=0.7))


def test_triton_is_naive_and_torch_for_a_mixture_with_shared_chapters() -> None:
    check(make_case(time=5, top_k=1, shared=2, mixing="mixture", **ONE_HEAD))


@pytest.mark.parametrize("way", ["by_chapter", "by_block"])
def test_triton_is_naive_and_torch_when_rows_come_in_several_tiles(way: str) -> None:
    check(make_case(**ONE_HEAD, **{**BY[way], "time": 9}, rows=70))


def test_triton_is_naive_with_a_head_size_that_is_no_power_of_two() -> None:
    check(make_case(time=9, top_k=2, size=96, **ONE_HEAD), against=("naive",))


@every_way
def test_float32_is_close_to_naive_float64(way: str) -> None:
    case = make_case(**ONE_HEAD, **BY[way])
    single = case.to(torch.float32)
    actual = run(single)
    assert all(x.dtype == torch.float32 for x in actual.values())
    # float32 has 6e-8, sums of some ten terms
    assert relative_error(actual, run(single.to(torch.float64), "naive")) < 2e-6


def test_errors_in_the_gradient_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Power of the comparisons: without delta, softmax would have no normalization."""
    case = make_case(**ONE_HEAD, **BY["by_chapter"])
    right, deltas = run(case), launch.deltas
    monkeypatch.setattr(launch, "deltas", lambda *given: 0 * deltas(*given))
    wrong = run(case)
    for name in ("q", "mem_k", "log_weights"):
        assert (wrong[f"grad/{name}"] - right[f"grad/{name}"]).abs().max() > 0.01


@pytest.mark.parametrize("way", ["by_chapter", "by_block"])
def test_weight_of_zero_switches_a_chapter_off(way: str) -> None:
    """The first of a token's chapters, too, where the running softmax has seen nothing yet."""
    case = make_case(**ONE_HEAD, **BY[way])
    weights = case.tensors["log_weights"].clone()
    weights[..., 0] = -torch.inf
    off = case.with_tensors(log_weights=weights)
    actual, expected = run(off), run(case.choices(slice(1, None)))
    assert torch.equal(actual["grad/log_weights"][..., 0], torch.zeros_like(weights[..., 0]))
    actual["grad/log_weights"] = actual["grad/log_weights"][..., 1:]
    assert relative_error(actual, expected) < ROUNDING


@pytest.mark.parametrize("way", ["by_chapter", "by_block"])
def test_another_run_and_checkpointing_change_no_bit(way: str) -> None:
    case = make_case(**ONE_HEAD, **BY[way])

    def checkpointed(call: Case) -> dict[str, Tensor]:
        return {"o": checkpoint(call.run, "triton", use_reentrant=False)}

    expected = differentiate(case, lambda call: {"o": call.run("triton")})
    for name, x in differentiate(case, checkpointed).items():
        assert torch.equal(x, expected[name]), name


def test_rows_of_the_batch_do_not_depend_on_each_other() -> None:
    case = make_case(**{**ONE_HEAD, "batch": 3}, time=7, top_k=2)
    together = case.outputs("triton")
    alone = case.rows(slice(1, 2)).outputs("triton")
    assert all(torch.equal(together[name][1:2], x) for name, x in alone.items())


def test_chapters_that_nobody_reads_are_never_looked_at() -> None:
    case = make_case(**ONE_HEAD, time=9, top_k=1)
    assert case.chapters is not None
    case.chapters.fill_(2)
    expected = run(case)
    poisoned = {name: case.tensors[name].clone() for name in ("mem_k", "mem_v")}
    for x in poisoned.values():
        x[:2] = torch.nan
    for name, x in run(case.with_tensors(**poisoned)).items():
        assert torch.equal(x, expected[name]), name


def test_second_derivatives_are_an_error() -> None:
    case = make_case(**ONE_HEAD, time=3, top_k=1)
    q = case.tensors["q"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(
        case.with_tensors(q=q).run("triton").square().sum(), q, create_graph=False
    )
    assert not gradient.requires_grad
    o = case.with_tensors(q=q).run("triton").square().sum()
    with pytest.raises(RuntimeError, match=r"triton.*second derivatives.*'naive'"):
        torch.autograd.grad(o, q, create_graph=True)


# --- who reads a chapter ---


@pytest.mark.parametrize("width", [1, 3, 16])
@pytest.mark.parametrize("seed", [None, 1, 2])
def test_groups_hold_every_pair_once_in_order(width: int, seed: int | None) -> None:
    chapters = torch.full((40,), 4)
    if seed is not None:
        chapters = torch.randint(9, (40,), generator=torch.Generator().manual_seed(seed))
    found = sorted_groups(chapters, 9, width)
    order, chapter, first, count, start = (x.tolist() for x in found)
    assert start[0] == 0 and max(count) <= width
    for c in range(9):
        own = range(start[c], start[c + 1])
        assert all(chapter[g] == c and count[g] for g in own)
        held = [p for g in own for p in order[first[g] : first[g] + count[g]]]
        assert held == [p for p in range(40) if chapters[p] == c]
    assert not any(count[start[9] :])


def test_groups_of_many_chapters_are_the_same() -> None:
    """Chapters that 16 bits do not hold are sorted as they are."""
    chapters = torch.tensor([40_000, 3, 40_000, 39_999])
    found = sorted_groups(chapters, 40_001, 2)
    used = found.size > 0
    assert found.chapter[used].tolist() == [3, 39_999, 40_000]
    assert found.size[used].tolist() == [1, 1, 2]
    assert found.order.tolist() == [1, 3, 0, 2]


@pytest.mark.parametrize("slots", [1, 10_000, 2**21])
@pytest.mark.parametrize("num_chapters", [1, 64, 512, 2**17])
def test_sums_of_groups_are_few(slots: int, num_chapters: int) -> None:
    width = group_width(slots, num_chapters, 8)
    assert width >= groups.SMALLEST
    bound = max(num_chapters, 2 * groups.PROGRAMS // 8)  # a power of two below is up to half
    assert slots // width + min(num_chapters, slots) <= num_chapters + bound


# --- the matrix ---


@pytest.mark.slow
@every_path
def test_triton_is_naive_on_every_path(path: str) -> None:
    for (top_k, shared), mixing in product(((3, 0), (1, 2)), ("joint", "mixture")):
        sizes = {**SMALL, "num_chapters": 6, **PATHS[path]}
        check(make_case(top_k=top_k, shared=shared, mixing=mixing, **sizes))


@pytest.mark.slow
@every_path
def test_triton_is_naive_with_one_softmax_for_each_shared_chapter(path: str) -> None:
    options = {"shared": 2, "mixing": "mixture", "shared_mode": "per_chapter"}
    check(make_case(top_k=2, **options, **{**SMALL, "num_chapters": 6, **PATHS[path]}))


@pytest.mark.slow
@pytest.mark.parametrize("heads", [(2, 2), (6, 2)])
@pytest.mark.parametrize("path", ["sorted", "blocks"])
def test_triton_is_naive_with_grouped_heads(path: str, heads: tuple[int, int]) -> None:
    sizes = {"batch": 1, "heads": heads[0], "kv_heads": heads[1]}
    check(make_case(top_k=2, seed=3, **sizes, **PATHS[path]))


@pytest.mark.slow
@pytest.mark.parametrize("path", ["sorted", "sorted_blocks", "blocks"])
def test_triton_is_naive_when_all_tokens_choose_alike(path: str) -> None:
    case = make_case(top_k=1, shared=1, **{**SMALL, "num_chapters": 6, **PATHS[path]})
    assert case.chapters is not None
    case.chapters.fill_(5)
    check(case)
    check(case.with_options(mixing="mixture", scale=0.7))


@pytest.mark.slow
@pytest.mark.parametrize("mixing", ["joint", "mixture"])
@pytest.mark.parametrize("path", ["sorted", "sorted_blocks", "blocks"])
def test_triton_is_naive_when_a_chapter_has_several_groups(
    path: str, mixing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "group_width", lambda *_: 4)
    check(make_case(top_k=3, mixing=mixing, **{**SMALL, "num_chapters": 6, **PATHS[path]}))


@pytest.mark.slow
@pytest.mark.parametrize("mixing", ["joint", "mixture"])
@pytest.mark.parametrize("rows", [1, 16, 23, 130])
@pytest.mark.parametrize("way", ["by_chapter", "by_block"])
def test_triton_is_naive_for_rows(way: str, rows: int, mixing: str) -> None:
    check(make_case(**SMALL, **BY[way], rows=rows, mixing=mixing))


@pytest.mark.slow
@pytest.mark.parametrize("size", [32, 64, 96, 128])
@pytest.mark.parametrize("way", ["by_chapter", "by_block"])
def test_triton_is_naive_for_head_sizes_of_models(way: str, size: int) -> None:
    check(make_case(**SMALL, **BY[way], size=size, rows=40))


@pytest.mark.slow
def test_triton_is_naive_in_blocks_of_several_tiles() -> None:
    check(make_case(**SMALL, time=217, top_k=2, block_size=150, rows=5))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["by_chapter", "by_block"])
def test_triton_is_naive_without_weights(way: str) -> None:
    case = make_case(**SMALL, **BY[way])
    tensors = {name: x for name, x in case.tensors.items() if name != "log_weights"}
    check(Case(tensors, case.chapters, case.options))


# --- which backend ---


def obstructed(**changed: Any) -> Case:
    return make_case(**{**ONE_HEAD, "time": 2, "top_k": 1, **changed})


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (obstructed(dropout=0.1), r"dropout = 0\.1: use 0"),
        (obstructed(size=132), "head size 132"),
        (Case({n: obstructed().tensors[n] for n in ("q", "mem_k", "mem_v")}, None, {}), "dense"),
        (obstructed(dtype=torch.bfloat16), "bfloat16: convert"),
        (
            obstructed(dtype=torch.float32).with_tensors(
                **{n: obstructed().tensors[n].bfloat16() for n in ("mem_k", "mem_v")}
            ),
            None,
        ),
    ],
    ids=["dropout", "head size", "whole bank", "bfloat16", "none: products in float32"],
)
def test_call_that_the_kernels_cannot_run_names_cause_and_fix(
    case: Case, message: str | None
) -> None:
    if message is None:
        assert case.run("triton").dtype == torch.float32
        return
    with pytest.raises(ValueError, match=rf"{message}.*backend='torch'"):
        case.run("triton")


def test_products_in_a_dtype_of_autocast_that_kernels_lack_name_cause_and_fix() -> None:
    with (
        torch.autocast("cpu", torch.float16),
        pytest.raises(ValueError, match=r"products in torch\.float16 .*autocast.*backend='torch'"),
    ):
        obstructed(dtype=torch.float32).run("triton")


def test_without_gpu_and_interpreter_triton_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match=r"CUDA device.*'cpu'.*TRITON_INTERPRET"):
        obstructed().run("triton")


def test_auto_on_a_cpu_is_torch_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    triton_backend._announce.cache_clear()
    case = obstructed()
    with caplog.at_level(logging.INFO, logger=triton_backend.__name__):
        for _ in range(2):
            assert torch.equal(case.run("auto"), case.run("torch"))
    assert [record.getMessage() for record in caplog.records] == [
        "chapter_attention: backend 'torch', as q is on the device 'cpu'"
    ]
