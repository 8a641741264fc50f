"""LaCT whose chunks are shared by two processes, against one process that has all tokens."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lact_cases import TOKENS, WEIGHTS, Case, make_case
from torch import Tensor
from torch.distributed import all_reduce
from ttt_cases import assert_same, relative_error
from two_processes import in_two_processes

CHUNK, OWN = 8, 11
"""Tokens of a chunk, half of them of each process; tokens of a process: two chunks and a rest."""

FORMS: dict[str, dict[str, Any]] = {
    "plain": {"momentum": False},
    "momentum": {},
    "everything": {
        "blocks": 2,
        "residual": True,
        "prenorm": True,
        "muon": True,
        "muon_dtype": torch.float64,
        "recompute": True,
    },
}


def own_tokens(rank: int) -> list[int]:
    """Which tokens of the whole sequence a process has: the `rank`th part of every chunk."""
    bounds = range(0, OWN, CHUNK // 2)
    widths = [min(CHUNK // 2, OWN - start) for start in bounds]
    starts = [2 * start + rank * width for start, width in zip(bounds, widths, strict=True)]
    return [start + i for start, width in zip(starts, widths, strict=True) for i in range(width)]


def run(case: Case, cuts: list[int], **options: Any) -> tuple[Tensor, Any, dict[str, Tensor]]:
    """Outputs, the state, and gradients of `sum(weight * o)`, the weights those of the tokens."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in case.tensors.items()}
    weight = leaves.pop("weight").detach()
    parts, state = [], None
    for start, stop in pairwise([0, *cuts, weight.shape[1]]):
        call = Case(leaves, case.options).tokens(slice(start, stop)).with_state(state)
        o, state = call.run("torch", **options)
        parts.append(o)
    o = torch.cat(parts, dim=1)
    gradients = torch.autograd.grad((weight * o).sum(), list(leaves.values()))
    return o.detach(), state, dict(zip(leaves, gradients, strict=True))


def share_chunks(rank: int, folder: Path) -> None:
    """What a process does."""
    for form in FORMS:
        compare(rank, form)


def compare(rank: int, form: str) -> None:
    """A process's part of the tokens against what all of them give."""
    whole = make_case(time=2 * OWN, chunk_size=CHUNK, **FORMS[form])
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(whole.tensors["q"].shape, dtype=torch.float64, generator=generator)
    expected, final, gradients = run(whole.with_tensors(weight=weight), [])
    own = own_tokens(rank)
    case = whole.tokens(own).with_tensors(weight=weight[:, own])
    group = torch.distributed.group.WORLD
    for cuts in ([], [4], [1, 7, 8]):
        o, state, found = run(case, cuts, group=group)
        assert relative_error(o, expected[:, own]) < 1e-12
        weights = {name: getattr(state, name) for name in WEIGHTS}
        assert_same(weights, {name: getattr(final, name) for name in WEIGHTS}, 1e-12, form)
        assert state.updates.tolist() == [2, 2]
        assert state.pending_count.tolist() == [OWN - CHUNK] * 2
        for name, gradient in found.items():
            if name in TOKENS:
                assert relative_error(gradient, gradients[name][:, own]) < 1e-10, name
            else:  # a process has its share of what the learned weights get
                assert relative_error(gradient, gradients[name]) > 1e-2, name
                all_reduce(gradient)
                assert relative_error(gradient, gradients[name]) < 1e-10, name

    alone, _, _ = run(case.with_options(chunk_size=CHUNK // 2), [])
    assert relative_error(alone, expected[:, own]) > 1e-3
    check_errors(case.tokens(slice(0, 4)), group)


def check_errors(case: Case, group: Any) -> None:
    """A group with rows that are cut differently, or chunks that cannot be shared."""
    four = torch.ones(2, 4)
    for options, message in (
        ({"mask": four.bool()}, "mask cannot be combined with a group"),
        ({"document_ids": four.long()}, "document_ids cannot be combined with a group"),
        ({"chunk_size": 7}, "chunk_size must be a multiple of the 2 processes"),
    ):
        with pytest.raises(ValueError, match=message):
            case.run("torch", group=group, **options)
    _, state = case.run("torch")
    with pytest.raises(ValueError, match=r"another chunk_size \(of a process\), 8, .* has 4"):
        case.with_state(state).run("torch", group=group)


@pytest.mark.slow
def test_two_processes_that_share_chunks_are_one_with_all_tokens(tmp_path: Path) -> None:
    in_two_processes(share_chunks, tmp_path)
