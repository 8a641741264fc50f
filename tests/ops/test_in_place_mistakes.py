"""Known mistakes of In-Place TTT, and that comparing with the naive loop shows each of them."""

from collections.abc import Callable

import pytest
import torch
from in_place_cases import Case, make_case
from torch import Tensor
from ttt_cases import relative_error

C = 3


def parallel(
    case: Case,
    *,
    visible: Callable[[Tensor, Tensor], Tensor] = lambda i, j: j < i,
    outer: str = "btd,btf->bdf",
    clip: Callable[[Tensor], Tensor] = lambda change: change,
) -> Tensor:
    """Outputs with `S_i = sum of the chunks j for which visible(i, j)`."""
    z, v, w, eta = (case.tensors[name] for name in ("z", "v", "w_down", "eta"))
    pieces = zip(z.split(C, 1), v.split(C, 1), eta.split(C, 1), strict=True)
    chunks = [(z, eta.unsqueeze(-1) * v) for z, v, eta in pieces]
    adds = torch.stack([clip(torch.einsum(outer, v, z)) for z, v in chunks])
    index = torch.arange(len(chunks))
    seen = visible(index.unsqueeze(1), index.unsqueeze(0)).to(z.dtype)
    changes = torch.einsum("ij,j...->i...", seen, adds)
    read = [
        torch.einsum("bdf,btf->btd", w + s, z) for s, (z, _) in zip(changes, chunks, strict=True)
    ]
    return torch.cat(read, dim=1)


def error(case: Case, wrong: Tensor) -> float:
    return relative_error(wrong, case.run("naive")[0])


def test_exclusive_prefix_sum_is_naive_loop() -> None:
    case = make_case(time=14, chunk_size=C)
    assert error(case, parallel(case)) < 1e-12


def test_chunk_that_reads_its_own_update_differs() -> None:
    """It sees the future: the inclusive sum."""
    case = make_case(time=14, chunk_size=C)
    assert error(case, parallel(case, visible=lambda i, j: j <= i)) > 1e-2


def test_chunk_that_reads_the_last_update_alone_differs() -> None:
    case = make_case(time=14, chunk_size=C)
    assert error(case, parallel(case, visible=lambda i, j: j == i - 1)) > 1e-2


def test_transposed_update_of_a_square_weight_differs() -> None:
    """`Z^T V` has the same shape where D equals F."""
    case = make_case(time=14, chunk_size=C, hidden=5, size=5)
    assert error(case, parallel(case)) < 1e-12
    assert error(case, parallel(case, outer="btf,btd->bdf")) > 1e-2


def test_update_averaged_over_rows_differs() -> None:
    case = make_case(time=14, chunk_size=C)
    wrong = parallel(case, clip=lambda change: change.mean(0, keepdim=True).expand_as(change))
    assert error(case, wrong) > 1e-2


@pytest.mark.parametrize("detached", [False, True])
def test_clip_outside_of_the_gradient_has_another_gradient(detached: bool) -> None:
    """The release clips at inference only."""

    def clip(change: Tensor) -> Tensor:
        norm = change.flatten(1).norm(dim=1).view(-1, 1, 1)
        factor = 1 / norm.clamp(min=1)
        return change * (factor.detach() if detached else factor)

    case = make_case(time=14, chunk_size=C, clip=1.0)
    v = case.tensors["v"].requires_grad_()
    wrong = parallel(case, clip=clip)
    assert error(case, wrong.detach()) < 1e-12
    (found,) = torch.autograd.grad(wrong.sum(), v)
    (expected,) = torch.autograd.grad(case.run("naive")[0].sum(), v)
    assert (
        relative_error(found, expected) > 1e-2
        if detached
        else relative_error(found, expected) < 1e-10
    )


def test_clip_of_the_whole_sum_differs() -> None:
    case = make_case(time=14, chunk_size=C, clip=1.0)
    whole = case.run("naive", clip=None)[1].dw
    norm = whole.flatten(1).norm(dim=1).view(-1, 1, 1)
    assert relative_error(whole / norm.clamp(min=1), case.run("naive")[1].dw) > 1e-2


@pytest.mark.parametrize("backend", ["naive", "torch"])
@pytest.mark.parametrize("name", ["dw", "pending_dw", "pending_count"])
def test_dropping_a_part_of_the_state_differs(name: str, backend: str) -> None:
    case = make_case(time=14, chunk_size=C)
    o, _ = case.run(backend)
    _, state = case.tokens(slice(0, 8)).run(backend)
    rest = case.tokens(slice(8, None))
    assert relative_error(rest.with_state(state).run(backend)[0], o[:, 8:]) < 1e-12
    wrong = state._replace(**{name: torch.zeros_like(getattr(state, name))})
    assert relative_error(rest.with_state(wrong).run(backend)[0], o[:, 8:]) > 1e-2


@pytest.mark.parametrize("backend", ["naive", "torch"])
def test_learned_weight_gets_its_gradient_through_a_detached_state(backend: str) -> None:
    case = make_case(time=6, chunk_size=C)
    _, state = case.run(backend)
    w = case.tensors["w_down"].clone().requires_grad_()
    kept = type(state)(*(x.detach() for x in state))
    o, _ = case.with_tensors(w_down=w).with_state(kept).run(backend)
    (gradient,) = torch.autograd.grad(o.sum(), w)
    expected = case.tensors["z"].sum((0, 1)).expand_as(w)
    assert relative_error(gradient, expected) < 1e-12
