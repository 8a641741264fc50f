"""What must hold for `ops.ttt_lora` whatever the numbers are, for every backend."""

import random
from dataclasses import replace

import pytest
import torch
from torch import nn
from ttt_cases import (
    assert_same,
    differentiate,
    outputs,
    random_flags,
    run_in_pieces,
)
from ttt_lora_cases import FORMS, PER_TOKEN, LoRACase, carried_state, case_of, with_everything

from lightning_modules.ops.ttt_lora import inner_loss

every_backend = pytest.mark.parametrize("backend", ("naive", "torch"))
every_form = pytest.mark.parametrize("form", FORMS)


def exact(backend: str) -> float:
    """The naive loop does the same arithmetic either way; a batched one may sum differently."""
    return 0.0 if backend == "naive" else 1e-11


def changed_outputs(case: LoRACase, backend: str, t: int, *names: str) -> torch.Tensor:
    """Tokens whose output changes when some tensors of token t do, bool `[B, T]`."""
    changed = {name: case.tensors[name].clone() for name in names}
    for value in changed.values():
        value[:, t] += 1
    o, _ = case.run(backend)
    return (case.with_tensors(**changed).run(backend)[0] != o).any(-1)


@pytest.mark.quick("*-torch", "A_plain-naive")
@every_backend
@every_form
def test_outputs_before_a_changed_token_are_bit_identical(form: str, backend: str) -> None:
    case = carried_state(case_of(form, 11), seed=1)
    masked = random_flags(case, 0, "mask", "document_ids")
    for t in range(11):
        assert not changed_outputs(case, backend, t, *PER_TOKEN)[:, :t].any()
        assert not changed_outputs(masked, backend, t, *PER_TOKEN)[:, :t].any()


@every_backend
@every_form
def test_a_write_is_read_at_once_in_mode_b_and_in_the_next_mini_batch_in_mode_a(
    form: str, backend: str
) -> None:
    case = case_of(form, 10, mini_batch_size=4)
    first = 4 if form.startswith("A") else 1
    for t, reads in ((1, first), (3, 4 if form.startswith("A") else 3)):
        changed = changed_outputs(case, backend, t, "k", "v", "eta")
        assert changed[:, reads:].all()
        assert not changed[:, :reads].any()


@every_backend
@every_form
def test_row_alone_is_row_in_batch(form: str, backend: str) -> None:
    case = with_everything(case_of(form, 13, batch=3), seed=3)
    together = outputs(*case.run(backend))
    for row in range(3):
        alone = outputs(*case.rows(slice(row, row + 1)).run(backend))
        here = {name: x[row : row + 1] for name, x in together.items()}
        assert_same(alone, here, exact(backend), backend)


@every_backend
@every_form
def test_one_pass_is_a_split_at_every_position(form: str, backend: str) -> None:
    case = with_everything(case_of(form, 9, batch=3, mini_batch_size=3), seed=2)
    expected = outputs(*case.run(backend))
    for cut in range(1, 9):
        pieces = outputs(*run_in_pieces(case, backend, [cut]))
        assert_same(pieces, expected, exact(backend), f"{backend} cut at {cut}")


@pytest.mark.quick("*-torch", "2-A_plain-naive")
@every_backend
@every_form
@pytest.mark.parametrize("seed", range(3))
def test_one_pass_is_any_split_also_in_gradients(seed: int, form: str, backend: str) -> None:
    case = case_of(form, 19, batch=3)
    case = with_everything(case, seed) if seed else case
    draw = random.Random(seed)
    cuts = sorted(draw.sample(range(1, 19), draw.randint(1, 6)))
    expected, expected_gradients = differentiate(case, backend)
    pieces, gradients = differentiate(case, lambda call: run_in_pieces(call, backend, cuts))
    assert_same(pieces, expected, exact(backend), f"{backend} cut at {cuts}")
    assert_same(gradients, expected_gradients, 1e-10, f"{backend} cut at {cuts}: gradient of")


@every_backend
@every_form
def test_prefill_is_token_by_token_decoding(form: str, backend: str) -> None:
    case = with_everything(case_of(form, 11, batch=3), seed=2)
    one_by_one = outputs(*run_in_pieces(case, backend, list(range(1, 11))))
    assert_same(one_by_one, outputs(*case.run(backend)), exact(backend), backend)


@every_backend
@every_form
def test_packed_documents_are_separate_runs(form: str, backend: str) -> None:
    lengths, case = (5, 1, 8, 3), case_of(form, 17)
    ids = torch.tensor([7, -2, 9, 0]).repeat_interleave(torch.tensor(lengths)).expand(2, -1)
    packed, start, separate = case.with_options(document_ids=ids), 0, []
    for length in lengths:
        separate.append(case.tokens(slice(start, start + length)).run(backend))
        start += length
    o, state = packed.run(backend)
    expected = outputs(torch.cat([o for o, _ in separate], dim=1), separate[-1][1])
    assert_same(outputs(o, state), expected, exact(backend), backend)
    assert not torch.allclose(case.run(backend)[0], o)


@every_backend
@every_form
def test_padding_anywhere_is_unpadded_run(form: str, backend: str) -> None:
    short, generator = case_of(form, 9), torch.Generator().manual_seed(0)
    padded = case_of(form, 15, seed=1)
    at = torch.stack([torch.randperm(15, generator=generator)[:9].sort()[0] for _ in range(2)])
    mask = torch.zeros(2, 15, dtype=torch.bool).scatter(1, at, True)
    mixed = {name: padded.tensors[name].clone() for name in PER_TOKEN}
    for name, value in mixed.items():
        value[mask] = short.tensors[name].flatten(0, 1)
    o, state = short.with_tensors(**mixed).with_options(mask=mask).run(backend)
    expected, expected_state = short.run(backend)
    assert_same({"o": o[mask].view_as(expected)}, {"o": expected}, exact(backend), backend)
    assert_same(state._asdict(), expected_state._asdict(), exact(backend), backend)


@every_backend
@every_form
def test_masked_tokens_read_what_a_token_that_is_appended_would(form: str, backend: str) -> None:
    case = with_everything(case_of(form, 12, batch=3), seed=5)
    o, _ = case.run(backend)
    mask = case.options["mask"]
    for t in range(12):
        # The token before t leave a state; one more call reads q_t with eta 0.
        state = case.state if t == 0 else case.tokens(slice(0, t)).run(backend)[1]
        asking = replace(case.tokens(slice(t, t + 1)), state=state)
        asking = asking.with_options(mask=None, document_ids=None, adapt=False)
        read, _ = asking.run(backend)
        rows = ~mask[:, t]
        assert_same({"o": read[rows, 0]}, {"o": o[rows, t]}, 1e-11, f"{backend} at {t}")


@every_backend
@every_form
def test_what_masked_tokens_would_write_is_never_looked_at(form: str, backend: str) -> None:
    case = with_everything(case_of(form, 12, batch=3), seed=5)
    mask, ids = case.options["mask"], case.options["document_ids"]
    poisoned = {name: case.tensors[name].clone() for name in ("k", "v", "eta")}
    for value in poisoned.values():
        value[~mask] = float("nan")
    expected, expected_gradients = differentiate(case, backend)
    other_ids = torch.where(mask, ids, 12345)
    actual, gradients = differentiate(
        case.with_tensors(**poisoned).with_options(document_ids=other_ids), backend
    )
    assert_same(actual, expected, 0, backend)
    assert_same(gradients, expected_gradients, 0, f"{backend} gradient of")
    assert not any(gradients[name][~mask].any() for name in poisoned)


@every_backend
@every_form
def test_row_of_padding_keeps_its_state_bit_for_bit(form: str, backend: str) -> None:
    case = carried_state(case_of(form, 12, batch=3), seed=1)
    mask = torch.tensor([[True], [False], [False]]).expand(3, 12)
    _, state = case.with_options(mask=mask).run(backend)
    for name, value in case.state._asdict().items():
        assert torch.equal(getattr(state, name)[1:], value[1:]), name
    assert not torch.equal(state.dw[0], case.state.dw[0])


@every_backend
@every_form
def test_zeros_are_a_fresh_state(form: str, backend: str) -> None:
    case = random_flags(case_of(form, 11, batch=3), 4, "mask", "document_ids")
    _, state = carried_state(case, 1).run(backend)
    reset = type(state)(*(x * torch.zeros_like(x) for x in state))
    fresh = outputs(*case.run(backend))
    assert_same(outputs(*case.with_state(reset).run(backend)), fresh, exact(backend), backend)
    document_zero = case.with_options(document_ids=torch.zeros(3, 11, dtype=torch.int64))
    assert_same(
        outputs(*document_zero.with_state(reset).run(backend)),
        outputs(*document_zero.run(backend)),
        exact(backend),
        backend,
    )


@every_backend
@every_form
def test_another_first_document_restarts_and_the_same_continues(form: str, backend: str) -> None:
    case = carried_state(case_of(form, 9, batch=3), seed=1)
    same = case.with_options(document_ids=torch.full((3, 9), 5))
    state = case.state._replace(document_id=torch.full((3,), 5))
    continued = outputs(*same.with_state(state).run(backend))
    assert_same({"o": continued["o"]}, {"o": case.run(backend)[0]}, exact(backend), backend)
    other = outputs(
        *same.with_state(state._replace(document_id=state.document_id + 1)).run(backend)
    )
    assert_same(other, outputs(*same.with_state(None).run(backend)), exact(backend), backend)


@every_backend
@every_form
def test_no_adapt_is_eta_zero(form: str, backend: str) -> None:
    case = with_everything(case_of(form, 11, batch=3), seed=5)
    silent = case.with_tensors(eta=torch.zeros_like(case.tensors["eta"]))
    still = case.with_options(adapt=False)
    assert_same(outputs(*still.run(backend)), outputs(*silent.run(backend)), 0, backend)
    _, gradients = differentiate(still, backend)
    assert not gradients["eta"].any()
    state = still.with_state(None).run(backend)[1]
    assert not state.dw.any()
    assert torch.equal(state.pending_count, case.with_state(None).run(backend)[1].pending_count)


@every_backend
@every_form
def test_inputs_parameters_and_states_are_never_written(form: str, backend: str) -> None:
    case = with_everything(case_of(form, 11, batch=3), seed=1)
    parameters = {n: nn.Parameter(x) for n, x in case.tensors.items() if n not in PER_TOKEN}
    case = case.with_tensors(**parameters)
    flags = [case.options[name] for name in ("mask", "document_ids")]
    everything = [*case.tensors.values(), *case.state, *flags]
    before = [(x.detach().clone(), x._version) for x in everything]
    o, state = case.run(backend)
    (o.sum() + sum(x.sum() for x in state)).backward()
    for x, (value, version) in zip(everything, before, strict=True):
        assert torch.equal(x, value)
        assert x._version == version
    assert torch.equal(case.run(backend)[0], o)


@every_backend
@every_form
def test_one_small_step_goes_down_the_gradient_of_the_inner_loss(form: str, backend: str) -> None:
    case = case_of(form, 8, mini_batch_size=8, group=2)
    w, b = (case.tensors[name].clone().requires_grad_() for name in ("w_base", "b_base"))
    eta = torch.full_like(case.tensors["eta"], 1e-3)
    _, state = case.with_tensors(w_base=w, b_base=b, eta=eta).run(backend)
    options = {n: x for n, x in case.tensors.items() if n.startswith("norm")}
    options["loss"] = case.options["loss"]

    def loss(w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return inner_loss(case.tensors["k"], case.tensors["v"], w, b, **options)

    rows = w.expand(2, *w.shape), b.expand(2, *b.shape)
    before = loss(*rows)
    slopes = torch.autograd.grad(before.sum(), rows)
    assert before.shape == (2, 8, 2)
    # eta / m = 1e-3 / 8 times the sum over the mini-batch, exactly
    assert_same(
        {"w": state.dw.detach(), "b": state.db.detach()},
        {"w": -1.25e-4 * slopes[0], "b": -1.25e-4 * slopes[1]},
        1e-12,
        backend,
    )
    assert (loss(w + state.dw, b + state.db).sum(1) < before.sum(1)).all()
