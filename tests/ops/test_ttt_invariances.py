"""What must hold for the TTT ops whatever the numbers are, for every backend."""

import random

import pytest
import torch
from torch import nn
from torch.nn.functional import gelu, layer_norm
from ttt_cases import (
    LAYERS,
    Case,
    assert_same,
    carried_state,
    differentiate,
    make_case,
    outputs,
    random_flags,
    run_in_pieces,
)

BACKENDS = ("naive", "torch")
FLAGS = ("mask", "write_mask", "document_ids")
FORMS = {"causal": (True, 4), "scan": (False, 4), "call": (False, None)}
every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_layer = pytest.mark.parametrize("layer", LAYERS)
every_form = pytest.mark.parametrize("form", FORMS)


def case_of(form: str, layer: str, time: int, **sizes) -> Case:
    causal, mini_batch_size = FORMS[form]
    return make_case(layer, time=time, causal=causal, mini_batch_size=mini_batch_size, **sizes)


def exact(backend: str) -> float:
    """The naive loop does the same arithmetic either way; a batched one may sum differently."""
    return 0.0 if backend == "naive" else 1e-11


def outputs_before_change(case: Case, backend: str, t: int) -> bool:
    """Whether outputs before t change when token t does."""
    changed = {name: case.tensors[name].clone() for name in ("q", "k", "v", "eta")}
    for value in changed.values():
        value[:, t] += 1
    o, _ = case.run(backend)
    other, _ = case.with_tensors(**changed).run(backend)
    assert not torch.equal(o[:, t], other[:, t])
    return not torch.equal(o[:, :t], other[:, :t])


@every_layer
@every_backend
def test_causal_outputs_before_a_changed_token_are_bit_identical(backend: str, layer: str) -> None:
    case = carried_state(case_of("causal", layer, 11), seed=1)
    assert not any(outputs_before_change(case, backend, t) for t in range(11))


@every_layer
@every_backend
@pytest.mark.parametrize("form", ["scan", "call"])
def test_non_causal_outputs_fail_the_causality_check(form: str, backend: str, layer: str) -> None:
    case = case_of(form, layer, 11)
    assert outputs_before_change(case, backend, 10)


@every_layer
@every_backend
@every_form
def test_row_alone_is_row_in_batch(form: str, backend: str, layer: str) -> None:
    case = random_flags(case_of(form, layer, 13, batch=3, per_row=True), 3, *FLAGS)
    case = carried_state(case, seed=4)
    together, gradients = differentiate(case, backend)
    for row in range(3):
        alone = outputs(*case.rows(slice(row, row + 1)).run(backend))
        here = {name: x[row : row + 1] for name, x in together.items()}
        assert_same(alone, here, exact(backend), backend)
    assert gradients["w" if layer == "linear" else "w1"].shape[0] == 3


@pytest.mark.quick("*-torch-*", "3-naive-linear")
@every_layer
@every_backend
@pytest.mark.parametrize("seed", range(4))
def test_one_pass_is_any_split(seed: int, backend: str, layer: str) -> None:
    case = case_of("causal", layer, 19, batch=3)
    case = carried_state(random_flags(case, seed, *FLAGS), seed) if seed else case
    draw = random.Random(seed)
    cuts = sorted(draw.sample(range(1, 19), draw.randint(1, 6)))
    expected, expected_gradients = differentiate(case, backend, flush=seed % 2 == 1)
    pieces, gradients = differentiate(
        case,
        lambda call, **options: run_in_pieces(call, backend, cuts, **options),
        flush=seed % 2 == 1,
    )
    assert_same(pieces, expected, exact(backend), f"{backend} cut at {cuts}")
    assert_same(gradients, expected_gradients, 1e-10, f"{backend} cut at {cuts}: gradient of")


@every_layer
@every_backend
def test_prefill_is_token_by_token_decoding(backend: str, layer: str) -> None:
    case = random_flags(case_of("causal", layer, 11, batch=3), 2, *FLAGS)
    one_by_one = outputs(*run_in_pieces(case, backend, list(range(1, 11))))
    assert_same(one_by_one, outputs(*case.run(backend)), exact(backend), backend)


@every_layer
@every_backend
def test_scan_is_one_call_for_each_mini_batch(backend: str, layer: str) -> None:
    case = case_of("scan", layer, 14)
    o, state = case.run(backend)
    pieces, piece_state = run_in_pieces(
        case.with_options(mini_batch_size=None), backend, [4, 8, 12]
    )
    names = LAYERS[layer].deltas
    assert_same({"o": pieces}, {"o": o}, 1e-11, backend)
    assert_same(
        {n: getattr(piece_state, n) for n in names},
        {n: getattr(state, n) for n in names},
        1e-11,
        backend,
    )
    assert state.pending_count.tolist() == [0, 0]


@every_layer
@every_backend
def test_flush_changes_the_state_but_no_output(backend: str, layer: str) -> None:
    case = case_of("causal", layer, 10)
    kept, flushed = case.run(backend), case.run(backend, flush=True)
    assert torch.equal(kept[0], flushed[0])
    assert kept[1].pending_count.tolist() == [2, 2]
    assert flushed[1].pending_count.tolist() == [0, 0]
    assert not flushed[1].pending_k.any()
    assert not torch.equal(kept[1][0], flushed[1][0])
    assert torch.equal(kept[1].tokens_seen, flushed[1].tokens_seen)


@every_layer
@every_backend
@every_form
def test_zeroed_row_is_fresh_row(form: str, backend: str, layer: str) -> None:
    case = case_of(form, layer, 9)
    carried = carried_state(case, seed=7)
    kept = torch.tensor([0, 1])
    partly = type(carried.state)(
        *(x * kept.to(x.dtype).view(-1, *[1] * (x.dim() - 1)) for x in carried.state)
    )
    fresh, kept_on = outputs(*case.run(backend)), outputs(*carried.run(backend))
    mixed = outputs(*carried.with_state(partly).run(backend))
    for row, expected in ((0, fresh), (1, kept_on)):
        here, there = ({n: x[row] for n, x in found.items()} for found in (mixed, expected))
        assert_same(here, there, exact(backend), backend)
    assert not torch.equal(kept_on["o"][0], fresh["o"][0])


@pytest.mark.quick("*-torch-*", "0-*-naive-linear")
@every_layer
@every_backend
@every_form
@pytest.mark.parametrize("document", [0, -3, 12])
def test_other_document_is_fresh_and_same_document_continues(
    document: int, form: str, backend: str, layer: str
) -> None:
    case = case_of(form, layer, 9)
    state = carried_state(case, seed=7).state._replace(document_id=torch.full((2,), document))
    ids = torch.full((2, 9), document)
    named = case.with_options(document_ids=ids)
    other = named.with_options(document_ids=ids + 1)
    continued, plain = named.with_state(state).run(backend), case.with_state(state).run(backend)
    restarted, fresh = other.with_state(state).run(backend), other.run(backend)
    assert_same(outputs(*continued), outputs(*plain), exact(backend), backend)
    assert_same(outputs(*restarted), outputs(*fresh), exact(backend), backend)
    assert not torch.allclose(continued[0], restarted[0])


@every_layer
@every_backend
@every_form
def test_packed_documents_are_separate_runs(form: str, backend: str, layer: str) -> None:
    lengths = {9: 5, 2: 7, -4: 3}
    ids = torch.tensor([d for d, n in lengths.items() for _ in range(n)]).expand(2, -1)
    packed = case_of(form, layer, ids.shape[1]).with_options(document_ids=ids)
    start, separate = 0, []
    for length in lengths.values():
        separate.append(packed.tokens(slice(start, start + length)).run(backend))
        start += length
    expected = outputs(torch.cat([o for o, _ in separate], dim=1), separate[-1][1])
    assert_same(outputs(*packed.run(backend)), expected, exact(backend), backend)


@every_layer
@every_backend
@every_form
def test_padding_anywhere_is_unpadded_run(form: str, backend: str, layer: str) -> None:
    short, generator = case_of(form, layer, 9), torch.Generator().manual_seed(0)
    padded = case_of(form, layer, 15, seed=1)
    at = torch.stack([torch.randperm(15, generator=generator)[:9].sort()[0] for _ in range(2)])
    mask = torch.zeros(2, 15, dtype=torch.bool).scatter(1, at, True)
    mixed = {name: padded.tensors[name].clone() for name in ("q", "k", "v", "eta")}
    for name, value in mixed.items():
        value[mask] = short.tensors[name].flatten(0, 1)
    o, state = short.with_tensors(**mixed).with_options(mask=mask).run(backend)
    expected, expected_state = short.run(backend)
    assert_same({"o": o[mask].view_as(expected)}, {"o": expected}, exact(backend), backend)
    assert_same(state._asdict(), expected_state._asdict(), exact(backend), backend)
    assert not o[~mask].any()


@every_layer
@every_backend
@every_form
def test_masked_tokens_are_never_looked_at(form: str, backend: str, layer: str) -> None:
    case = random_flags(case_of(form, layer, 12, batch=3), 5, "mask")
    poisoned = {name: case.tensors[name].clone() for name in ("q", "k", "v", "eta")}
    for value in poisoned.values():
        value[~case.options["mask"]] = float("nan")
    expected, expected_gradients = differentiate(case, backend)
    actual, gradients = differentiate(case.with_tensors(**poisoned), backend)
    assert_same(actual, expected, 0, backend)
    assert_same(gradients, expected_gradients, 0, f"{backend} gradient of")
    assert not actual["o"][~case.options["mask"]].any()


@every_layer
@every_backend
@every_form
def test_write_mask_is_eta_zero(form: str, backend: str, layer: str) -> None:
    case = random_flags(carried_state(case_of(form, layer, 11), 1), 5, "write_mask")
    write_mask = case.options["write_mask"]
    eta = case.tensors["eta"] * write_mask.unsqueeze(-1)
    silent = case.with_options(write_mask=None).with_tensors(eta=eta)
    assert_same(outputs(*case.run(backend)), outputs(*silent.run(backend)), 0, backend)
    _, gradients = differentiate(case, backend)
    assert not gradients["eta"][~write_mask].any()
    assert gradients["eta"][write_mask].all()


@every_layer
@every_backend
@every_form
def test_eta_zero_reads_the_initial_weights(form: str, backend: str, layer: str) -> None:
    case = case_of(form, layer, 11)
    o, state = case.with_tensors(eta=torch.zeros_like(case.tensors["eta"])).run(backend)
    assert not any(getattr(state, name).any() for name in LAYERS[layer].deltas)
    weights = [case.tensors[name] for name in LAYERS[layer].weights]
    q = case.tensors["q"].transpose(1, 2)
    z = q @ weights[0] + weights[1]
    if layer == "mlp":
        z = gelu(z, approximate="tanh") @ weights[2] + weights[3]
    gamma, beta = (case.tensors[name].unsqueeze(1) for name in ("norm_weight", "norm_bias"))
    expected = q + layer_norm(z, z.shape[-1:], eps=1e-6) * gamma + beta
    assert_same({"o": o}, {"o": expected.transpose(1, 2)}, 1e-12, backend)


@every_layer
@every_backend
def test_permuted_tokens_of_one_mini_batch_permute_the_outputs(backend: str, layer: str) -> None:
    case = carried_state(case_of("call", layer, 13), seed=2)
    order = torch.randperm(13, generator=torch.Generator().manual_seed(0))
    o, state = case.run(backend)
    permuted, same_state = case.tokens(order).run(backend)
    assert_same({"o": permuted}, {"o": o[:, order]}, 1e-12, backend)
    assert_same(same_state._asdict(), state._asdict(), 1e-12, backend)
    causal = case_of("causal", layer, 13)
    assert not torch.allclose(
        causal.tokens(order).run(backend)[0], causal.run(backend)[0][:, order]
    )


@every_layer
@every_backend
@every_form
def test_inputs_parameters_and_states_are_never_written(
    form: str, backend: str, layer: str
) -> None:
    case = random_flags(carried_state(case_of(form, layer, 11), 1), 5, *FLAGS)
    parameters = {name: nn.Parameter(case.tensors[name]) for name in LAYERS[layer].weights}
    case = case.with_tensors(**parameters)
    flags = [case.options[name] for name in FLAGS]
    everything = [*case.tensors.values(), *case.state, *flags]
    before = [(x.detach().clone(), x._version) for x in everything]
    o, state = case.run(backend, flush=True)
    (o.sum() + sum(x.sum() for x in state)).backward()
    for x, (value, version) in zip(everything, before, strict=True):
        assert torch.equal(x, value)
        assert x._version == version
    assert torch.equal(case.run(backend, flush=True)[0], o)


@every_layer
@every_backend
def test_one_small_step_lowers_the_inner_loss(backend: str, layer: str) -> None:
    case = case_of("call", layer, 8)
    case = case.with_tensors(eta=torch.full_like(case.tensors["eta"], 1e-3))

    def inner_loss(state) -> torch.Tensor:
        asking = case.with_tensors(q=case.tensors["k"]).with_state(state)
        o, _ = asking.run(backend, write_mask=torch.zeros(2, 8, dtype=torch.bool))
        prediction, target = o - case.tensors["k"], case.tensors["v"] - case.tensors["k"]
        return (prediction - target).square().sum((1, 3))

    assert (inner_loss(case.run(backend)[1]) < inner_loss(None)).all()
