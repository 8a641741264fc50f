"""The torch backend of chapter attention against the naive loop: outputs, lse, every gradient."""

import sys
from itertools import product
from typing import Any

import pytest
import torch
from chapter_cases import BACKENDS, PATHS, Case, differentiate, make_case, relative_error
from torch.autograd import gradcheck

from lightning_modules.ops.chapter_attention import reading
from lightning_modules.ops.chapter_attention.eager import eager_chapter_attention
from lightning_modules.ops.chapter_attention.tiles import block_tiles, sorted_tiles, tile_width

ROUNDING = 1e-11
"""float64, sums in another order."""


def check_backends(case: Case) -> None:
    expected, actual = (
        differentiate(case, lambda c, backend=backend: c.outputs(backend)) for backend in BACKENDS
    )
    assert relative_error(actual, expected) < ROUNDING


@pytest.mark.parametrize("path", PATHS)
def test_paths_are_what_their_names_say(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    spied = lambda *arguments: calls.append(1) or sorted_tiles(*arguments)  # noqa: E731
    monkeypatch.setattr(sys.modules[eager_chapter_attention.__module__], "sorted_tiles", spied)
    make_case(top_k=3, **PATHS[path]).run("torch")
    assert len(calls) == path.startswith("sorted")


@pytest.mark.quick("*-joint", "one_block-mixture", "decoding-mixture")
@pytest.mark.parametrize("mixing", ["joint", "mixture"])
@pytest.mark.parametrize("path", PATHS)
def test_torch_is_naive_on_every_path(path: str, mixing: str) -> None:
    for top_k, shared in product((1, 3), (0, 1, 2)):
        check_backends(make_case(top_k=top_k, shared=shared, mixing=mixing, **PATHS[path]))


@pytest.mark.parametrize("path", PATHS)
def test_torch_is_naive_with_one_softmax_for_each_shared_chapter(path: str) -> None:
    options = {"shared": 2, "mixing": "mixture", "shared_mode": "per_chapter"}
    check_backends(make_case(top_k=2, **options, **PATHS[path]))


@pytest.mark.quick("*-heads1")
@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (6, 2)])
@pytest.mark.parametrize("path", PATHS)
def test_torch_is_naive_with_grouped_heads(path: str, heads: tuple[int, int]) -> None:
    case = make_case(top_k=2, heads=heads[0], kv_heads=heads[1], shared=1, seed=3, **PATHS[path])
    check_backends(case)
    check_backends(Case({n: x for n, x in case.tensors.items() if n != "log_weights"}, None, {}))


@pytest.mark.parametrize("path", PATHS)
def test_torch_is_naive_when_all_chapters_are_chosen(path: str) -> None:
    check_backends(make_case(top_k=PATHS[path].get("num_chapters", 6), seed=4, **PATHS[path]))


@pytest.mark.parametrize("path", PATHS)
def test_torch_is_naive_when_all_tokens_choose_alike(path: str) -> None:
    """All pairs in one chapter, all others empty: the sorted form's tiles are all needed."""
    case = make_case(top_k=1, shared=1, **PATHS[path])
    assert case.chapters is not None
    case.chapters.fill_(5)
    check_backends(case)
    check_backends(case.with_options(mixing="mixture", scale=0.7))


def test_torch_is_naive_without_weights() -> None:
    case = make_case(time=37, top_k=2)
    tensors = {name: x for name, x in case.tensors.items() if name != "log_weights"}
    check_backends(Case(tensors, case.chapters, {}))


@pytest.mark.parametrize("mixing", ["joint", "mixture"])
@pytest.mark.parametrize("path", ["sorted", "blocks"])
def test_torch_is_naive_when_tiles_are_read_one_at_a_time(
    path: str, mixing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(reading.LOGITS_AT_ONCE, "cpu", 1)
    check_backends(make_case(top_k=3, shared=2, mixing=mixing, **PATHS[path]))


@pytest.mark.parametrize("mixing", ["joint", "mixture"])
@pytest.mark.parametrize("path", ["sorted", "blocks", "decoding"])
def test_gradients_are_numerical(path: str, mixing: str) -> None:
    sizes = {"batch": 1, "heads": 2, "kv_heads": 1, "size": 2, **PATHS[path], "rows": 2}
    sizes["time"] = min(sizes["time"], 35)
    case = make_case(top_k=2, num_chapters=5, shared=1, mixing=mixing, **sizes)
    leaves = [x.requires_grad_() for x in case.tensors.values()]

    def run(*tensors: Any) -> Any:
        named = dict(zip(case.tensors, tensors, strict=True))
        return tuple(case.with_tensors(**named).outputs("torch").values())

    assert gradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("mixing", ["joint", "mixture"])
@pytest.mark.parametrize("path", ["sorted", "blocks", "decoding"])
def test_gradients_with_dropout_are_numerical(path: str, mixing: str) -> None:
    case = make_case(top_k=2, shared=1, mixing=mixing, dropout=0.4, **PATHS[path])
    leaves = [x.requires_grad_() for x in case.tensors.values()]

    def run(*tensors: Any) -> Any:
        torch.manual_seed(0)
        return case.with_tensors(**dict(zip(case.tensors, tensors, strict=True))).run("torch")

    assert gradcheck(run, leaves, fast_mode=True)
    assert relative_error({"o": run(*leaves)}, {"o": case.run("torch", dropout=0.0)}) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("path", ["sorted", "blocks", "decoding"])
def test_dropout_keeps_the_mean(path: str, backend: str) -> None:
    """A draw deviates by about 1 at most: five standard errors of the mean of so many."""
    torch.manual_seed(0)
    options = {**PATHS[path], "time": min(PATHS[path]["time"], 17)}
    case = make_case(top_k=2, shared=1, batch=1, **options)
    expected = case.run("torch")
    draws = 1600 if backend == "torch" else 100
    mean = torch.stack([case.run(backend, dropout=0.2) for _ in range(draws)]).mean(0)
    assert (mean - expected).abs().max() < 5 / draws**0.5


@pytest.mark.parametrize("path", PATHS)
def test_bfloat16_is_close_to_float64(path: str) -> None:
    case = make_case(top_k=2, shared=1, **PATHS[path]).to(torch.bfloat16)
    expected = differentiate(case.to(torch.float64), lambda c: c.outputs("naive"))
    actual = differentiate(case, lambda c: c.outputs("torch"))
    assert actual["o"].dtype == torch.bfloat16
    assert actual["lse"].dtype == torch.float32
    outputs = {name: actual.pop(name) for name in ("o", "lse")}
    # those of the oracles' README for bfloat16
    assert relative_error(outputs, {name: expected.pop(name) for name in outputs}) < 2e-2
    assert relative_error(actual, expected) < 3e-2


@pytest.mark.parametrize("path", PATHS)
def test_autocast_is_a_call_in_its_dtype(path: str) -> None:
    case = make_case(top_k=2, shared=1, dtype=torch.float32, **PATHS[path])
    low = {name: case.tensors[name].bfloat16() for name in ("q", "mem_k", "mem_v")}
    expected = case.with_tensors(**low).run("torch")
    with torch.autocast("cpu", torch.bfloat16):
        actual = case.run("torch")
        double = case.to(torch.float64).run("torch")
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected.float())
    assert torch.equal(double, case.to(torch.float64).run("torch"))


@pytest.mark.parametrize("width", [1, 2, 8, 64])
def test_sorted_tiles_hold_every_pair_once_in_a_tile_of_its_chapter(width: int) -> None:
    chapters = torch.randint(7, (29, 3), generator=torch.Generator().manual_seed(0))
    tiles = sorted_tiles(chapters, 7, width)
    assert tiles.filled is not None
    assert tiles.filled.sum() == chapters.numel()
    assert len(tiles.chapters) == chapters.numel() // width + 7
    slots = tiles.slots.flatten()
    assert torch.equal(tiles.parts.flatten()[slots], torch.arange(chapters.numel()))
    assert tiles.filled.flatten()[slots].all()
    assert torch.equal(tiles.chapters.flatten()[slots // width], chapters.flatten())
    held = tiles.parts.flatten()[tiles.filled.flatten()]
    by_chapter = chapters.flatten().argsort(stable=True)
    assert torch.equal(held, by_chapter)  # in a chapter, in the order of the tokens


@pytest.mark.parametrize("separate", [False, True])
def test_block_tiles_hold_every_part_once(separate: bool) -> None:
    chapters = torch.randint(9, (2, 3, 4), generator=torch.Generator().manual_seed(0))
    tiles = block_tiles(chapters, 11, 4, separate)
    assert tiles.filled is not None
    slots = tiles.slots.flatten()
    parts = 2 * 11 * (4 if separate else 1)
    assert torch.equal(tiles.parts.flatten()[slots], torch.arange(parts))
    assert torch.equal(tiles.filled.flatten().nonzero().squeeze(1), slots.sort().values)


def test_tiles_are_as_wide_as_choices_of_a_chapter_allow() -> None:
    sizes = ((12, 64), (64, 64, 12))
    widths = [tile_width(pairs, *sizes) for pairs in (1, 64, 2048 * 8, 2**30)]
    assert widths == [1, 4, 64, 128]
