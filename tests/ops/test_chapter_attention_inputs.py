"""Chapter attention refuses what does not fit together, and says what to pass instead."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from chapter_cases import BACKENDS, Case, make_case

TENSORS = {
    "q": [(2, 6, 5), (2, 0, 4, 5), (0, 6, 4, 5)],
    "mem_k": [(6, 3, 5), (6, 0, 2, 5), (6, 3, 2, 4)],
    "mem_v": [(6, 3, 2, 4), (6, 3, 4, 5), (5, 3, 2, 5)],
    "log_weights": [(2, 6, 3), (2, 6), (2, 5, 2)],
}
OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "block_size": ({"block_size": 0}, "block_size must be at least 1"),
    "shared_mode": ({"shared_mode": "all"}, "'together' or 'per_chapter', but is 'all'"),
    "mixing": ({"mixing": "both"}, "'joint' or 'mixture', but is 'both'"),
    "scale": ({"scale": 0.0}, r"scale must be positive.*D \*\* -0\.5"),
    "dropout": ({"dropout": 1.0}, "dropout must be at least 0 and less than 1"),
    "lse_of_mixture": (
        {"mixing": "mixture", "return_lse": True},
        "mixture.*use mixing='joint', or return_lse=False",
    ),
    "shared_negative": ({"shared": -1}, "shared=-1.*at least 0"),
    "shared_all": ({"shared": 6}, "shared=6 of 6 chapters.*leave one"),
    "too_many_chosen": ({"shared": 5}, "only 1 can be chosen"),
    "backend": ({"backend": "cuda"}, r"'cuda'.*'auto'.*'torch'.*'naive'"),
}


@pytest.fixture
def case() -> Case:
    return make_case(time=6, top_k=2)


def call(case: Case, **options: Any) -> Any:
    return case.run(options.pop("backend", "auto"), **options)


def test_the_case_itself_runs(case: Case) -> None:
    assert call(case).shape == (2, 6, 4, 5)


@pytest.mark.parametrize(
    ("name", "shape"), [(n, x) for n, shapes in TENSORS.items() for x in shapes]
)
def test_wrong_shape_names_the_tensor(name: str, shape: tuple[int, ...], case: Case) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must"):
        call(case.with_tensors(**{name: torch.ones(shape)}))


@pytest.mark.parametrize("name", TENSORS)
def test_integers_are_an_error(name: str, case: Case) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be floating point"):
        call(case.with_tensors(**{name: case.tensors[name].long()}))


def test_heads_that_do_not_share_evenly_are_an_error(case: Case) -> None:
    three = {name: torch.ones(6, 3, 3, 5) for name in ("mem_k", "mem_v")}
    with pytest.raises(ValueError, match=r"4 heads.*the 3 of mem_k.*multiple"):
        call(case.with_tensors(**three))


@pytest.mark.parametrize("mistake", OPTIONS)
def test_wrong_option_names_the_option(mistake: str, case: Case) -> None:
    options, message = OPTIONS[mistake]
    with pytest.raises(ValueError, match=message):
        call(case, **options)


def test_chapters_are_int64(case: Case) -> None:
    assert case.chapters is not None
    for wrong in (case.chapters.int(), case.chapters.double()):
        with pytest.raises(ValueError, match=r"chapters must be int64.*chapters\.long\(\)"):
            call(replace(case, chapters=wrong))


@pytest.mark.parametrize("shape", [(2, 6), (2, 6, 0)])
def test_no_chapter_is_an_error_that_says_what_none_means(
    shape: tuple[int, ...], case: Case
) -> None:
    with pytest.raises(ValueError, match=r"chapters must be \[B, 6, k\].*None reads the whole"):
        call(replace(case, chapters=torch.zeros(shape, dtype=torch.int64)))


@pytest.mark.parametrize(("size", "blocks"), [(1, 6), (4, 2), (5, 2), (6, 1), (7, 1)])
def test_chapters_are_for_each_block(size: int, blocks: int, case: Case) -> None:
    """The last block may be short."""
    case = case.with_options(block_size=size)
    for given in range(1, 8):
        cut = make_case(time=given, top_k=2)
        assert cut.chapters is not None
        other = replace(case, chapters=cut.chapters)
        other = other.with_tensors(log_weights=cut.tensors["log_weights"])
        if given == blocks:
            assert call(other).shape == (2, 6, 4, 5)
        else:
            with pytest.raises(ValueError, match=rf"chapters must have shape \[2, {blocks}, 2\]"):
                call(other)


def test_whole_bank_has_no_weights_and_no_shared_chapters(case: Case) -> None:
    with pytest.raises(ValueError, match="log_weights weigh chapters: pass chapters too"):
        call(replace(case, chapters=None))
    tensors = {name: x for name, x in case.tensors.items() if name != "log_weights"}
    with pytest.raises(ValueError, match="shared=1 without chapters.*shared=0"):
        call(Case(tensors, None, {"shared": 1}))


@pytest.mark.parametrize("backend", BACKENDS)
def test_scale_is_one_by_root_of_size_if_not_given(backend: str, case: Case) -> None:
    assert torch.equal(call(case, backend=backend), call(case, backend=backend, scale=5**-0.5))
    assert not torch.equal(call(case, backend=backend), call(case, backend=backend, scale=1.0))
