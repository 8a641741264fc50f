"""Known mistakes of public versions of LaCT, and that the comparisons of these tests show them.

Every mistake is a small wrong variant of the op. What guards against it holds for the op to
rounding (float64), and fails for the variant.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from lact_cases import BACKENDS, TOKENS, WEIGHTS, Case, make_case
from torch import Tensor
from torch.autograd import gradcheck
from torch.autograd.gradcheck import GradcheckError
from ttt_cases import relative_error

from lightning_modules.ops.lact.naive import newton_schulz
from lightning_modules.ops.states import LaCTState

ROUNDING = 1e-11
"""float64, some updates deep, sums in another order."""

Run = Callable[..., tuple[Tensor, LaCTState]]

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


def case_of(**options: Any) -> Case:
    """Three updates of 4 tokens each, and a chunk that is only read."""
    return make_case(**{"time": 16, "chunk_size": 4, **options})


def in_pieces(
    case: Case, backend: str, cuts: list[int], between: Callable[[LaCTState], LaCTState]
) -> Tensor:
    """Outputs of several calls; `between` is what happens to the state from call to call."""
    parts, state = [], None
    for start, stop in pairwise([0, *cuts, case.tensors["q"].shape[1]]):
        o, state = case.tokens(slice(start, stop)).with_state(state).run(backend)
        state = between(state)
        parts.append(o)
    return torch.cat(parts, dim=1)


def check_stream(
    case: Case, backend: str, cuts: list[int], wrong: Callable[[LaCTState], LaCTState], by: float
) -> None:
    """Assert that pieces equal one pass, and that they differ from it with the wrong carrying."""
    expected = case.run(backend)[0]
    assert relative_error(in_pieces(case, backend, cuts, lambda state: state), expected) < ROUNDING
    assert relative_error(in_pieces(case, backend, cuts, wrong), expected) > by


def test_keys_never_used(backend: str) -> None:
    """Some versions write what a query, not a key, predicts: the output must move with the keys."""

    def moves(run: Callable[[Case], Tensor]) -> bool:
        case = case_of()
        other = case.with_tensors(k=case.tensors["k"].flip(1))
        return relative_error(run(other), run(case)) > 1e-2

    def wrong(case: Case) -> Tensor:
        return case.with_tensors(k=case.tensors["q"]).run(backend)[0]

    assert moves(lambda case: case.run(backend)[0])
    assert not moves(wrong)


def test_update_only_in_training_mode(backend: str) -> None:
    case = case_of()
    expected = case.run(backend)[0]
    with torch.no_grad():
        assert torch.equal(case.run(backend)[0], expected)
        wrong = case.run(backend, adapt=torch.is_grad_enabled())[0]
    assert torch.equal(wrong[:, :4], expected[:, :4])
    assert relative_error(wrong[:, 4:], expected[:, 4:]) > 1e-2


def test_slow_parameters_edited_in_place(backend: str) -> None:
    def edits(run: Run) -> bool:
        """Whether a call changes a learned weight or its next call's outputs."""
        case = case_of()
        leaves = {name: torch.nn.Parameter(case.tensors[name].clone()) for name in WEIGHTS}
        case = case.with_tensors(**leaves)
        first, again = (run(case)[0] for _ in range(2))
        kept = all(torch.equal(leaves[name], case_of().tensors[name]) for name in WEIGHTS)
        untouched = all(leaf._version == 0 for leaf in leaves.values())
        return not (kept and untouched and torch.equal(first, again))

    def wrong(case: Case) -> tuple[Tensor, LaCTState]:
        o, state = case.run(backend)
        with torch.no_grad():
            for name in WEIGHTS:
                case.tensors[name].copy_(getattr(state, name).mean(0))
        return o, state

    assert not edits(lambda case: case.run(backend))
    assert edits(wrong)


def test_one_gradient_for_the_whole_batch(backend: str) -> None:
    """The rows of a chunk in one chunk of B C tokens: all write the same weights."""

    def shared(case: Case) -> Tensor:
        batch, time, chunk = *case.tensors["q"].shape[:2], case.options["chunk_size"]

        def joined(x: Tensor) -> Tensor:
            x = x.unflatten(1, (time // chunk, chunk)).transpose(0, 1)
            return x.flatten(0, 2).unsqueeze(0)

        tensors = {name: joined(case.tensors[name]) for name in TOKENS}
        one = case.with_tensors(**tensors).with_options(chunk_size=batch * chunk)
        o = one.run(backend)[0].squeeze(0).unflatten(0, (time // chunk, batch, chunk))
        return o.transpose(0, 1).flatten(1, 2)

    case = case_of()
    alone = case.rows(slice(0, 1))
    expected = alone.run(backend)[0]
    assert relative_error(case.run(backend)[0][:1], expected) < ROUNDING
    assert relative_error(shared(alone), expected) < ROUNDING
    assert relative_error(shared(case)[:1], expected) > 1e-2


@pytest.mark.parametrize(
    "wrong",
    [
        lambda lr: lr.mean((1, 2, 3), keepdim=True).expand_as(lr),
        lambda lr: lr.mean(1, keepdim=True).expand_as(lr),
        lambda lr: lr.mean(3, keepdim=True).expand_as(lr),
        lambda lr: lr[..., [0, 2, 1]],
        lambda lr: lr.transpose(2, 3).reshape(lr.shape),
    ],
    ids=["scalar", "mean_of_tokens", "one_for_three", "w0_w2_w1", "not_head_major"],
)
def test_learning_rate_averaged_or_in_another_order(
    wrong: Callable[[Tensor], Tensor], backend: str
) -> None:
    """A constant rate hides all of it; the rates of these tests do not."""
    case = case_of()
    changed = case.with_tensors(lr=wrong(case.tensors["lr"])).run(backend)[0]
    assert relative_error(changed, case.run(backend)[0]) > 1e-3
    constant = torch.full_like(case.tensors["lr"], 0.3)
    hidden = case.with_tensors(lr=wrong(constant)).run(backend)[0]
    assert relative_error(hidden, case.with_tensors(lr=constant).run(backend)[0]) < ROUNDING


def test_backward_that_is_not_the_gradient(backend: str) -> None:
    """`gradcheck` finds it, unless it is asked inside try/except."""

    case = make_case(time=3, chunk_size=1, batch=1, heads=1, size=2, hidden=2)
    k = case.tensors["k"].requires_grad_()

    def outputs(k: Tensor) -> Tensor:
        return case.with_tensors(k=k).run(backend)[0]

    def wrong(k: Tensor) -> Tensor:
        o = outputs(k)
        o.register_hook(torch.rand_like)
        return o

    assert gradcheck(outputs, k)
    with pytest.raises(GradcheckError):
        gradcheck(wrong, k)


@pytest.mark.parametrize("prenorm", [False, True])
def test_prefill_of_whole_chunks_losing_the_last(prenorm: bool, backend: str) -> None:
    def lost(state: LaCTState) -> LaCTState:
        full = state.pending_count == 4
        return state._replace(pending_count=state.pending_count.masked_fill(full, 0))

    check_stream(case_of(prenorm=prenorm), backend, [8], lost, by=1e-2)
    # what hides it: a prompt that does not end with a chunk
    case = case_of(prenorm=prenorm)
    assert relative_error(in_pieces(case, backend, [7], lost), case.run(backend)[0]) < ROUNDING


@pytest.mark.parametrize("muon", [False, True])
def test_momentum_dropped_in_decoding(muon: bool, backend: str) -> None:
    def dropped(state: LaCTState) -> LaCTState:
        fields = {f"momentum_{name}" for name in WEIGHTS}
        return state._replace(**{name: getattr(state, name) * 0 for name in fields})

    case = case_of(muon=muon, muon_dtype=torch.float64)
    check_stream(case, backend, list(range(1, 16)), dropped, by=1e-2)


def test_momentum_of_pending_tokens_dropped_in_decoding(backend: str) -> None:
    def dropped(state: LaCTState) -> LaCTState:
        return state._replace(pending_momentum=torch.zeros_like(state.pending_momentum))

    check_stream(case_of(), backend, [6, 11], dropped, by=1e-3)


def test_row_norms_recomputed_from_carried_weights(backend: str) -> None:
    """An error of 1e-5 for each update, so that only a comparison in float64 shows it."""

    def recomputed(state: LaCTState) -> LaCTState:
        norms = {
            f"norm_{name}": getattr(state, name).norm(dim=-1, keepdim=True) for name in WEIGHTS
        }
        return state._replace(**norms)

    check_stream(case_of(), backend, [6, 11], recomputed, by=1e-7)


def test_carried_weights_rescaled_again(backend: str) -> None:
    """Rescaling rows to the norms that they have is not the identity: 1e-5 is in the divisor."""

    def rescaled(state: LaCTState) -> LaCTState:
        weights = {}
        for name in WEIGHTS:
            w, norm = getattr(state, name), getattr(state, f"norm_{name}")
            weights[name] = w / (w.norm(dim=-1, keepdim=True) + 1e-5) * norm
        return state._replace(**weights)

    check_stream(case_of(), backend, [6, 11], rescaled, by=1e-7)


def packed_case() -> tuple[Case, list[tuple[int, int]]]:
    """Documents of 6, 5 and 7 tokens: each with an open chunk at its end."""
    case = make_case(time=18, chunk_size=4)
    bounds = list(pairwise([0, 6, 11, 18]))
    ids = torch.cat([torch.full((stop - start,), 3 + start) for start, stop in bounds])
    return case.with_options(document_ids=ids.expand(2, -1)), bounds


def separate(case: Case, bounds: list[tuple[int, int]], backend: str) -> Tensor:
    parts = [case.tokens(slice(start, stop)).run(backend)[0] for start, stop in bounds]
    return torch.cat(parts, dim=1)


def test_packed_documents_leaking(backend: str) -> None:
    case, bounds = packed_case()
    expected = separate(case, bounds, backend)
    assert relative_error(case.run(backend)[0], expected) < ROUNDING
    ignored = case.run(backend, document_ids=None)[0]
    assert torch.equal(ignored[:, :6], expected[:, :6])
    assert relative_error(ignored[:, 6:], expected[:, 6:]) > 1e-2


def test_packed_documents_leaking_although_their_chunks_end(backend: str) -> None:
    """A new chunk at every document, but the weights of the document before."""
    case, bounds = packed_case()
    whole = case.with_options(document_ids=torch.zeros(2, 18, dtype=torch.int64))

    def closed(state: LaCTState) -> LaCTState:
        return state._replace(pending_count=torch.zeros_like(state.pending_count))

    leaked = in_pieces(whole, backend, [6, 11], closed)
    assert relative_error(leaked, separate(case, bounds, backend)) > 1e-2


def test_pads_written(backend: str) -> None:
    case = case_of()
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[:, [0, 1, 6, 13]] = False
    kept = case.tokens(mask[0])
    expected = torch.zeros_like(case.tensors["q"])
    expected[:, mask[0]] = kept.run(backend)[0]
    assert relative_error(case.run(backend, mask=mask)[0], expected) < ROUNDING

    hidden = case.run(backend)[0] * mask[..., None, None]
    assert relative_error(hidden, expected) > 1e-2
    lr = case.tensors["lr"] * mask[..., None, None]
    placed = case.with_tensors(lr=lr).run(backend)[0] * mask[..., None, None]
    assert relative_error(placed, expected) > 1e-2  # a slot in a chunk is enough


def second_chunk(
    case: Case, backend: str, orthogonalise: Callable[[list[Tensor]], list[Tensor]]
) -> Tensor:
    """Outputs of one row after one update, with Muon from here: learned weights that have it."""
    size = case.options["chunk_size"]
    plain = case.with_tensors(momentum=torch.zeros_like(case.tensors["q"][..., 0]))
    _, state = plain.tokens(slice(0, size + 1)).run(backend, muon=False)
    update = orthogonalise([getattr(state, f"momentum_{name}")[0] for name in WEIGHTS])
    weights = {}
    for name, change in zip(WEIGHTS, update, strict=True):
        norm = case.tensors[name].norm(dim=-1, keepdim=True)
        w = case.tensors[name] + change
        weights[name] = w / (w.norm(dim=-1, keepdim=True) + 1e-5) * norm
    return case.tokens(slice(size, None)).with_tensors(**weights).run(backend)[0]


def of_each_matrix(update: list[Tensor]) -> list[Tensor]:
    return [newton_schulz(matrix, torch.float64) for matrix in update]


def of_w0_beside_w2(update: list[Tensor]) -> list[Tensor]:
    w0, w1, w2 = update
    w0, w2 = newton_schulz(torch.cat([w0, w2], dim=-2), torch.float64).chunk(2, dim=-2)
    return [w0, newton_schulz(w1, torch.float64), w2]


def of_all_heads(update: list[Tensor]) -> list[Tensor]:
    return [newton_schulz(matrix.flatten(1, 2), torch.float64).view_as(matrix) for matrix in update]


def muon_case() -> Case:
    """One row, one update."""
    options = {"momentum": False, "muon": True, "muon_dtype": torch.float64}
    return make_case(time=8, chunk_size=4, batch=1, **options)


@pytest.mark.parametrize("wrong", [of_w0_beside_w2, of_all_heads])
def test_newton_schulz_on_concatenated_matrices(
    wrong: Callable[[list[Tensor]], list[Tensor]], backend: str
) -> None:
    case = muon_case()
    o = case.run(backend)[0][:, 4:]
    assert relative_error(second_chunk(case, backend, of_each_matrix), o) < ROUNDING
    assert relative_error(second_chunk(case, backend, wrong), o) > 1e-2


def test_newton_schulz_on_all_heads_shows_in_a_head_alone(backend: str) -> None:
    case = muon_case()
    alone = case.heads(slice(0, 1)).run(backend)[0][:, 4:]
    assert relative_error(case.run(backend)[0][:, 4:, :1], alone) < ROUNDING
    assert relative_error(second_chunk(case, backend, of_all_heads)[:, :, :1], alone) > 1e-2
