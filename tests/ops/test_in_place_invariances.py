"""What must hold for In-Place TTT whatever the numbers are, for every backend."""

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from in_place_cases import (
    BACKENDS,
    FLAGS,
    FORMS,
    TOKENS,
    Case,
    carried_state,
    make_case,
    random_flags,
    run_in_pieces,
)
from torch import nn
from torch.nn.functional import linear
from ttt_cases import assert_same, differentiate, outputs

from lightning_modules.ops import InPlaceState

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_form = pytest.mark.parametrize("form", FORMS)
C = 3


def case_of(form: str, time: int, **sizes: Any) -> Case:
    return make_case(**{"time": time, "chunk_size": C, **FORMS[form], **sizes})


def exact(backend: str) -> float:
    """Products sum differently for other sizes; the loop has one alone, with W_down."""
    return 1e-14 if backend == "naive" else 1e-11


def moved(case: Case, t: int, *names: str) -> Case:
    changed = {name: case.tensors[name].clone() for name in names}
    for value in changed.values():
        value[:, t] += 1
    return case.with_tensors(**changed)


@every_form
@every_backend
@pytest.mark.parametrize("given", [(), FLAGS, ("state",)], ids=["fresh", "flags", "state"])
def test_outputs_before_a_changed_token_are_bit_identical(
    given: tuple[str, ...], backend: str, form: str
) -> None:
    case = random_flags(case_of(form, 11), 1, *given)
    case = carried_state(case, seed=1) if "state" in given else case
    o, _ = case.run(backend)
    for t in range(11):
        other, _ = moved(case, t, *TOKENS).run(backend)
        assert torch.equal(o[:, :t], other[:, :t])


@every_form
@every_backend
def test_token_is_written_for_later_chunks_alone(backend: str, form: str) -> None:
    """The causality check above has something to see, from the next chunk on."""
    case = case_of(form, 11)
    o, _ = case.run(backend)
    for t in range(9):
        other, _ = moved(case, t, "v").run(backend)
        following = (t // C + 1) * C
        assert torch.equal(o[:, :following], other[:, :following])
        assert (o[:, following:] - other[:, following:]).abs().amin(-1).gt(1e-6).all()


@every_form
@every_backend
def test_first_chunk_is_the_linear_layer_bit_for_bit(backend: str, form: str) -> None:
    case = case_of(form, 11)
    expected = linear(case.tensors["z"], case.tensors["w_down"])
    assert torch.equal(case.run(backend)[0][:, :C], expected[:, :C])
    for still in (
        case.with_options(adapt=False),
        case.with_tensors(v=torch.zeros_like(case.tensors["v"])),
        case.with_tensors(eta=torch.zeros_like(case.tensors["eta"])),
    ):
        o, state = still.run(backend)
        assert torch.equal(o, expected)
        assert not state.dw.any() and not state.pending_dw.any()
        assert (state.tokens_seen == 11).all() and (state.pending_count == 2).all()


@every_form
@every_backend
def test_row_alone_is_row_in_batch(backend: str, form: str) -> None:
    case = carried_state(random_flags(case_of(form, 13, batch=3), 3, *FLAGS), seed=4)
    together = outputs(*case.run(backend))
    for row in range(3):
        alone = outputs(*case.rows(slice(row, row + 1)).run(backend))
        here = {name: x[row : row + 1] for name, x in together.items()}
        assert_same(alone, here, exact(backend), backend)


@every_form
@every_backend
@pytest.mark.parametrize("seed", range(6))
def test_one_pass_is_any_split(seed: int, backend: str, form: str) -> None:
    """With the graph kept, gradients too."""
    case = case_of(form, 19, batch=3 - seed % 2)
    if seed % 2 == 0:
        case = carried_state(random_flags(case, seed, *FLAGS), seed)
    draw = random.Random(seed)
    cuts = sorted(draw.sample(range(1, 19), draw.randint(1, 6)))
    expected, expected_gradients = differentiate(case, backend)
    pieces, gradients = differentiate(case, lambda call: run_in_pieces(call, backend, cuts))
    what = f"{backend} cut at {cuts}"
    assert_same(pieces, expected, exact(backend), what)
    assert_same(gradients, expected_gradients, 1e-9, f"{what}: gradient of")


@every_form
@every_backend
@pytest.mark.parametrize("time", [11, 12, 13])
@pytest.mark.parametrize("given", [(), FLAGS], ids=["plain", "flags"])
def test_prefill_is_token_by_token_decoding(
    given: tuple[str, ...], time: int, backend: str, form: str
) -> None:
    """T % C in {C - 1, 0, 1}."""
    case = random_flags(case_of(form, time, batch=3), 2, *given)
    one_by_one = outputs(*run_in_pieces(case, backend, list(range(1, time))))
    assert_same(one_by_one, outputs(*case.run(backend)), exact(backend), backend)


@every_form
@every_backend
def test_without_adapting_any_split_is_one_pass(backend: str, form: str) -> None:
    case = carried_state(random_flags(case_of(form, 14, batch=3), 1, *FLAGS), 2)
    still = case.with_options(adapt=False)
    pieces = outputs(*run_in_pieces(still, backend, [1, 5, 6, 12]))
    assert_same(pieces, outputs(*still.run(backend)), exact(backend), backend)


@every_form
@every_backend
def test_zeroed_row_is_fresh_row(backend: str, form: str) -> None:
    case = case_of(form, 9)
    carried = carried_state(case, seed=7)
    assert carried.state is not None
    kept = torch.tensor([0, 1])
    partly = InPlaceState(
        *(x * kept.to(x.dtype).view(-1, *[1] * (x.dim() - 1)) for x in carried.state)
    )
    fresh, kept_on = outputs(*case.run(backend)), outputs(*carried.run(backend))
    mixed = outputs(*carried.with_state(partly).run(backend))
    for row, expected in ((0, fresh), (1, kept_on)):
        here, there = ({n: x[row] for n, x in found.items()} for found in (mixed, expected))
        assert_same(here, there, exact(backend), backend)
    assert not torch.equal(kept_on["o"][0], fresh["o"][0])


@every_form
@every_backend
@pytest.mark.parametrize("document", [0, -3, 12])
def test_other_document_is_fresh_and_same_document_continues(
    document: int, backend: str, form: str
) -> None:
    case = case_of(form, 9)
    state = carried_state(case, seed=7).state
    assert state is not None
    state = state._replace(document_id=torch.full((2,), document))
    ids = torch.full((2, 9), document)
    named = case.with_options(document_ids=ids)
    other = named.with_options(document_ids=ids + 1)
    continued, plain = named.with_state(state).run(backend), case.with_state(state).run(backend)
    restarted, fresh = other.with_state(state).run(backend), other.run(backend)
    assert_same(outputs(*continued), outputs(*plain), exact(backend), backend)
    assert_same(outputs(*restarted), outputs(*fresh), exact(backend), backend)
    assert not torch.allclose(continued[0], restarted[0])


def split(case: Case, lengths: list[int]) -> Iterator[Case]:
    start = 0
    for length in lengths:
        yield case.tokens(slice(start, start + length))
        start += length


@every_form
@every_backend
def test_packed_documents_that_differ_by_row_are_separate_runs(backend: str, form: str) -> None:
    lengths = [[6, 7], [13], [1, 4, 8]]
    case = case_of(form, 13, batch=3)
    ids = torch.stack(
        [torch.repeat_interleave(torch.arange(len(n)), torch.tensor(n)) for n in lengths]
    )
    packed = outputs(*case.run(backend, document_ids=ids))
    for row, own in enumerate(lengths):
        separate = [part.run(backend) for part in split(case.rows(slice(row, row + 1)), own)]
        expected = outputs(torch.cat([o for o, _ in separate], dim=1), separate[-1][1])
        expected["document_id"] = ids[row, -1:]
        here = {name: x[row : row + 1] for name, x in packed.items()}
        assert_same(here, expected, exact(backend), backend)


@every_form
@every_backend
@pytest.mark.parametrize("cuts", [[], [7], [5, 9]], ids=str)
def test_broken_document_does_not_reach_a_later_call(
    cuts: list[int], backend: str, form: str
) -> None:
    """A NaN, whether written or in the open chunk, is gone from the state with its document.

    In the same call, tokens of a later document may be products of it with zero.
    """
    case = case_of(form, 12).with_options(
        document_ids=torch.tensor([1] * 7 + [2] * 5).expand(2, -1)
    )
    later = case_of(form, 8, seed=5).with_options(document_ids=torch.full((2, 8), 2))
    broken = {name: case.tensors[name].clone() for name in ("z", "v")}
    for value in broken.values():
        value[:, [1, 6]] = float("nan")
    wrong = case.with_tensors(**broken)
    assert wrong.tokens(slice(0, 7)).run(backend)[1].pending_dw.isnan().any()
    _, expected = run_in_pieces(case, backend, cuts)
    o, state = run_in_pieces(wrong, backend, cuts)
    assert o[:, 3:7].isnan().all()
    assert_same(state._asdict(), expected._asdict(), exact(backend), backend)
    actual, wanted = (later.with_state(x).run(backend) for x in (state, expected))
    assert_same(outputs(*actual), outputs(*wanted), exact(backend), backend)


@every_form
@every_backend
@pytest.mark.parametrize("where", ["right", "left", "anywhere"])
def test_padding_is_unpadded_run(where: str, backend: str, form: str) -> None:
    short, generator = case_of(form, 9), torch.Generator().manual_seed(0)
    padded = case_of(form, 15, seed=1)
    at = torch.arange(9).expand(2, -1) + (6 if where == "left" else 0)
    if where == "anywhere":
        at = torch.stack([torch.randperm(15, generator=generator)[:9].sort()[0] for _ in range(2)])
    mask = torch.zeros(2, 15, dtype=torch.bool).scatter(1, at, True)
    mixed = {name: padded.tensors[name].clone() for name in TOKENS}
    for name, value in mixed.items():
        value[mask] = short.tensors[name].flatten(0, 1)
    o, state = short.with_tensors(**mixed).with_options(mask=mask).run(backend)
    expected, expected_state = short.run(backend)
    assert_same({"o": o[mask].view_as(expected)}, {"o": expected}, exact(backend), backend)
    assert_same(state._asdict(), expected_state._asdict(), exact(backend), backend)


@every_form
@every_backend
def test_masked_token_reads_what_a_token_there_would_read(backend: str, form: str) -> None:
    case = carried_state(random_flags(case_of(form, 13, batch=3), 5, *FLAGS), 3)
    mask = case.options["mask"]
    o, _ = case.run(backend)
    real, state = case, case.state
    for t in range(13):
        here = real.tokens(slice(t, t + 1)).with_state(state)
        # as the only token of a call, with the document that the state is in
        asked = here.with_options(mask=None, document_ids=None)
        read, _ = asked.run("naive")
        hidden = ~mask[:, t]
        assert_same({"o": o[hidden, t]}, {"o": read[hidden, 0]}, 1e-11, backend)
        _, state = here.run("naive")


@every_form
@every_backend
def test_what_masked_tokens_hold_changes_nothing_else(backend: str, form: str) -> None:
    case = carried_state(random_flags(case_of(form, 12, batch=3), 5, *FLAGS), 3)
    mask = case.options["mask"]
    other = {name: case.tensors[name].clone() for name in TOKENS}
    for value in other.values():
        value[~mask] = float("nan")
    expected, expected_state = case.run(backend)
    o, state = case.with_tensors(**other).run(backend)
    assert torch.equal(o[mask], expected[mask])
    assert_same(state._asdict(), expected_state._asdict(), 0, backend)


@every_backend
def test_row_without_a_token_keeps_its_state_bit_for_bit(backend: str) -> None:
    case = carried_state(random_flags(case_of("clipped_history", 12, batch=3), 5, *FLAGS), 3)
    assert case.state is not None and not case.options["mask"][-1].any()
    _, state = case.run(backend)
    kept, given = ({n: x[-1] for n, x in s._asdict().items()} for s in (state, case.state))
    assert_same(kept, given, 0, backend)


@every_form
@every_backend
@pytest.mark.parametrize("given", [(), FLAGS], ids=["plain", "flags"])
def test_inputs_parameters_and_states_are_never_written(
    given: tuple[str, ...], backend: str, form: str
) -> None:
    case = carried_state(random_flags(case_of(form, 11), 5, *given), 1)
    assert case.state is not None
    case = case.with_tensors(w_down=nn.Parameter(case.tensors["w_down"]))
    everything = [*case.tensors.values(), *case.state, *(case.options[name] for name in given)]
    before = [(x.detach().clone(), x._version) for x in everything]
    o, state = case.run(backend)
    (o.sum() + sum(x.sum() for x in state)).backward()
    for x, (value, version) in zip(everything, before, strict=True):
        assert torch.equal(x, value)
        assert x._version == version
    assert torch.equal(case.run(backend)[0], o)


@every_form
def test_state_keeps_no_other_memory_alive(form: str) -> None:
    with torch.no_grad():
        _, state = case_of(form, 30).run("torch")
    for x in (state.dw, state.pending_dw):
        assert x.untyped_storage().nbytes() == x.numel() * x.element_size()
