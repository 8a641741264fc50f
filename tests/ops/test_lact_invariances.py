"""What must hold for LaCT whatever the numbers are, for every backend."""

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lact_cases import (
    BACKENDS,
    FLAGS,
    TOKENS,
    WEIGHTS,
    Case,
    carried_state,
    make_case,
    random_flags,
    run_in_pieces,
)
from torch import Tensor, nn
from ttt_cases import assert_same, differentiate, outputs

from lightning_modules.ops.states import LaCTState

MUON = {"muon": True, "muon_dtype": torch.float64}
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "prenorm_muon": {"prenorm": True, **MUON},
    "stack": {"blocks": 2, "residual": True, "per_channel": True, "hidden": 4},
}
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_form = pytest.mark.parametrize("form", FORMS)


def case_of(form: str, time: int, **sizes: Any) -> Case:
    return make_case(**{"time": time, "chunk_size": 4, **FORMS[form], **sizes})


def exact(backend: str) -> float:
    """The naive loop does the same arithmetic either way; a batched one may sum differently."""
    return 0.0 if backend == "naive" else 1e-11


def moved(case: Case, names: tuple[str, ...], t: int) -> Case:
    changed = {name: case.tensors[name].clone() for name in names}
    for value in changed.values():
        value[:, t] += 1
    return case.with_tensors(**changed)


@pytest.mark.quick("flags-*")
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
        other, _ = moved(case, TOKENS, t).run(backend)
        assert torch.equal(o[:, :t], other[:, :t])


@every_form
@every_backend
def test_token_is_read_by_itself_and_written_for_later_chunks(backend: str, form: str) -> None:
    """The causality check above has something to see, from the next chunk on."""
    case = case_of(form, 11)
    o, _ = case.run(backend)
    for t in range(8):
        other, _ = moved(case, ("k", "v", "lr"), t).run(backend)
        next_chunk = (t // 4 + 1) * 4
        assert torch.equal(o[:, :next_chunk], other[:, :next_chunk])
        assert not torch.equal(o[:, next_chunk:], other[:, next_chunk:])
        asked, _ = moved(case, ("q",), t).run(backend)
        assert [not torch.equal(o[:, i], asked[:, i]) for i in range(11)] == [
            i == t for i in range(11)
        ]


@every_form
@every_backend
def test_row_alone_is_row_in_batch(backend: str, form: str) -> None:
    case = carried_state(random_flags(case_of(form, 13, batch=3), 3, *FLAGS), seed=4)
    together = outputs(*case.run(backend))
    for row in range(3):
        alone = outputs(*case.rows(slice(row, row + 1)).run(backend))
        here = {name: x[row : row + 1] for name, x in together.items()}
        assert_same(alone, here, exact(backend), backend)


@pytest.mark.quick("1-*", "4-torch-stack")
@every_form
@every_backend
@pytest.mark.parametrize("seed", range(6))
def test_one_pass_is_any_split(seed: int, backend: str, form: str) -> None:
    """With the graph kept, gradients too. Odd seeds: rows alike, which another code path cuts."""
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


@pytest.mark.quick("uneven-12-*")
@every_form
@every_backend
@pytest.mark.parametrize("time", [11, 12, 13])
@pytest.mark.parametrize("given", [(), FLAGS], ids=["even", "uneven"])
def test_prefill_is_token_by_token_decoding(
    given: tuple[str, ...], time: int, backend: str, form: str
) -> None:
    """T % C in {C - 1, 0, 1}."""
    case = random_flags(case_of(form, time, batch=3), 2, *given)
    one_by_one = outputs(*run_in_pieces(case, backend, list(range(1, time))))
    assert_same(one_by_one, outputs(*case.run(backend)), exact(backend), backend)


@every_form
@every_backend
@pytest.mark.parametrize("prompt", [3, 4, 5, 8])
def test_decoding_after_a_prompt_is_one_pass(prompt: int, backend: str, form: str) -> None:
    case = case_of(form, 14)
    pieces = outputs(*run_in_pieces(case, backend, list(range(prompt, 14))))
    assert_same(pieces, outputs(*case.run(backend)), exact(backend), backend)


@every_form
@every_backend
def test_zeroed_row_is_fresh_row(backend: str, form: str) -> None:
    case = case_of(form, 9)
    carried = carried_state(case, seed=7)
    assert carried.state is not None
    kept = torch.tensor([0, 1])
    partly = LaCTState(
        *(x * kept.to(x.dtype).view(-1, *[1] * (x.dim() - 1)) for x in carried.state)
    )
    fresh, kept_on = outputs(*case.run(backend)), outputs(*carried.run(backend))
    mixed = outputs(*carried.with_state(partly).run(backend))
    for row, expected in ((0, fresh), (1, kept_on)):
        here, there = ({n: x[row] for n, x in found.items()} for found in (mixed, expected))
        assert_same(here, there, exact(backend), backend)
    assert not torch.equal(kept_on["o"][0], fresh["o"][0])


@every_backend
@pytest.mark.parametrize("given", [(), ("mask",), FLAGS])
def test_row_that_has_seen_nothing_is_fresh_whatever_else_it_holds(
    given: tuple[str, ...], backend: str
) -> None:
    case = carried_state(random_flags(case_of("prenorm_muon", 9), 3, *given), seed=7)
    assert case.state is not None
    seen = case.state.tokens_seen * torch.tensor([0, 1])
    case = case.with_state(case.state._replace(tokens_seen=seen))
    fresh = outputs(*case.rows(slice(0, 1)).with_state(None).run(backend))
    first = {name: x[:1] for name, x in outputs(*case.run(backend)).items()}
    assert_same(first, fresh, exact(backend), backend)


@every_backend
def test_state_of_zeros_is_no_state(backend: str) -> None:
    case = case_of("prenorm_muon", 9)
    _, state = case.run(backend)
    zeros = case.with_state(LaCTState(*(torch.zeros_like(x) for x in state)))
    assert_same(outputs(*zeros.run(backend)), outputs(*case.run(backend)), 0, backend)


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
def test_packed_documents_are_separate_runs(backend: str, form: str) -> None:
    lengths = {9: 5, 2: 8, -4: 3, 7: 9}
    ids = torch.tensor([d for d, n in lengths.items() for _ in range(n)]).expand(2, -1)
    packed = case_of(form, ids.shape[1]).with_options(document_ids=ids)
    separate = [part.run(backend) for part in split(packed, list(lengths.values()))]
    expected = outputs(torch.cat([o for o, _ in separate], dim=1), separate[-1][1])
    assert_same(outputs(*packed.run(backend)), expected, exact(backend), backend)


@every_form
@every_backend
def test_documents_that_differ_by_row_are_separate_runs(backend: str, form: str) -> None:
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
@pytest.mark.parametrize("where", ["left", "anywhere"])
def test_padding_is_unpadded_run(where: str, backend: str, form: str) -> None:
    short, generator = case_of(form, 9), torch.Generator().manual_seed(0)
    padded = case_of(form, 15, seed=1)
    at = torch.arange(6, 15).expand(2, -1)
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
    assert not o[~mask].any()


@every_backend
@pytest.mark.parametrize("given", [("mask",), FLAGS])
def test_masked_tokens_are_never_looked_at(given: tuple[str, ...], backend: str) -> None:
    case = carried_state(random_flags(case_of("stack", 12, batch=3), 5, *given), 3)
    poisoned = {name: case.tensors[name].clone() for name in TOKENS}
    for value in poisoned.values():
        value[~case.options["mask"]] = float("nan")
    expected, expected_gradients = differentiate(case, backend)
    actual, gradients = differentiate(case.with_tensors(**poisoned), backend)
    assert_same(actual, expected, 0, backend)
    assert_same(gradients, expected_gradients, 0, f"{backend} gradient of")
    assert not actual["o"][~case.options["mask"]].any()


@every_backend
def test_broken_document_does_not_reach_the_next(backend: str) -> None:
    """A NaN in a document's chunk, whether written or left open, ends with the document."""
    case = case_of("plain", 15).with_options(
        document_ids=torch.tensor([1] * 6 + [2] * 9).expand(2, -1)
    )
    broken = {name: case.tensors[name].clone() for name in TOKENS}
    for value in broken.values():
        value[:, [1, 5]] = float("nan")
    expected = case.run(backend)
    cut = case.with_tensors(**broken)
    for pieces in ([], [6]):
        o, state = run_in_pieces(cut, backend, pieces)
        assert o[:, 4:6].isnan().all()
        assert_same({"o": o[:, 6:]}, {"o": expected[0][:, 6:]}, exact(backend), backend)
        assert_same(state._asdict(), expected[1]._asdict(), exact(backend), backend)


@every_form
@every_backend
def test_learning_rate_zero_reads_the_initial_weights(backend: str, form: str) -> None:
    case = case_of(form, 11, muon=False)
    still = case.with_tensors(lr=torch.zeros_like(case.tensors["lr"]))
    o, state = still.run(backend)
    expected, _ = case.run(backend, chunk_size=20)
    # every update rescales rows by 1 / (1 + 1e-5 / norm)
    assert_same({"o": o}, {"o": expected}, 1e-3, backend)
    assert (state.updates == 2).all()
    assert not torch.allclose(case.run(backend)[0], expected, rtol=1e-2)


@every_form
@every_backend
def test_without_adapting_any_split_reads_the_same_weights(backend: str, form: str) -> None:
    case = carried_state(random_flags(case_of(form, 14, batch=3), 1, *FLAGS), 2)
    still = case.with_options(adapt=False)
    pieces = outputs(*run_in_pieces(still, backend, [1, 5, 6, 12]))
    assert_same(pieces, outputs(*still.run(backend)), exact(backend), backend)


@every_form
@pytest.mark.parametrize("given", [(), (*FLAGS, "state")], ids=["even", "uneven"])
def test_recomputing_is_bit_identical_to_keeping(given: tuple[str, ...], form: str) -> None:
    case = random_flags(case_of(form, 14), 1, *given)
    case = carried_state(case, 2) if given else case
    kept, gradients = differentiate(case, "torch")
    again, recomputed = differentiate(case, "torch", recompute=True)
    assert_same(again, kept, 0, "recompute")
    assert_same(recomputed, gradients, 0, "recompute: gradient of")


@every_form
@every_backend
@pytest.mark.parametrize("given", [(), FLAGS], ids=["even", "uneven"])
def test_inputs_parameters_and_states_are_never_written(
    given: tuple[str, ...], backend: str, form: str
) -> None:
    case = carried_state(random_flags(case_of(form, 11), 5, *given), 1)
    assert case.state is not None
    parameters = {name: nn.Parameter(case.tensors[name]) for name in WEIGHTS}
    case = case.with_tensors(**parameters)
    everything = [*case.tensors.values(), *case.state, *(case.options[name] for name in given)]
    before = [(x.detach().clone(), x._version) for x in everything]
    o, state = case.run(backend)
    (o.sum() + sum(x.sum() for x in state)).backward()
    for x, (value, version) in zip(everything, before, strict=True):
        assert torch.equal(x, value)
        assert x._version == version
    assert torch.equal(case.run(backend)[0], o)


def memory_of(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


@every_form
@every_backend
@pytest.mark.parametrize("time", [3, 4, 9])
@pytest.mark.parametrize("given", [(), ("mask",)], ids=["even", "uneven"])
def test_state_of_a_fresh_start_shares_no_memory_with_inputs_and_parameters(
    given: tuple[str, ...], time: int, backend: str, form: str
) -> None:
    """An optimizer's step must not change a carried state, and a state must not keep all of k."""
    case = random_flags(case_of(form, time, batch=1), 1, *given)
    with torch.no_grad():
        for adapt in (True, False):
            _, state = case.run(backend, adapt=adapt)
            theirs = {memory_of(x) for x in case.tensors.values()}
            assert not any(memory_of(x) in theirs for x in state if x.numel())


@every_form
def test_strides_in_which_a_state_comes_back_do_not_matter_bit_for_bit(form: str) -> None:
    """Files keep values; a state that was just left has the strides of the work on it."""
    case = case_of(form, 7, size=16, hidden=16, batch=3, dtype=torch.float32)
    _, left = case.run("torch")
    stored = LaCTState(*(x.clone(memory_format=torch.contiguous_format) for x in left))
    assert any(x.stride() != y.stride() for x, y in zip(left, stored, strict=True))
    (o, after), (same, after_stored) = (case.with_state(s).run("torch") for s in (left, stored))
    assert torch.equal(o, same)
    assert all(torch.equal(x, y) for x, y in zip(after, after_stored, strict=True))
