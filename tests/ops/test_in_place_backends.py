"""The torch backend of In-Place TTT against the naive loop: outputs, states, every gradient."""

import random
from typing import Any

import pytest
import torch
from in_place_cases import (
    BACKENDS,
    FLAGS,
    FORMS,
    Case,
    carried_state,
    make_case,
    random_flags,
    run_in_pieces,
)
from torch._dynamo.testing import CompileCounter
from torch.autograd import gradcheck
from torch.utils.flop_counter import FlopCounterMode
from ttt_cases import as_function, assert_same, differentiate, outputs

from lightning_modules.ops import in_place
from lightning_modules.ops.in_place import eager


def check_backends(case: Case) -> None:
    expected, expected_gradients = differentiate(case, "naive")
    actual, gradients = differentiate(case, "torch")
    # both are float64; sums are taken in another order
    assert_same(actual, expected, 1e-11, "torch")
    assert_same(gradients, expected_gradients, 1e-10, "torch gradient of")


@pytest.mark.quick(
    "*-1-('mask',)", "*-3-('document_ids',)", "*-5-('mask', 'document_ids')", "*-30-()"
)
@pytest.mark.parametrize("given", [(), ("mask",), ("document_ids",), FLAGS], ids=str)
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 5, 30])
@pytest.mark.parametrize("form", FORMS)
def test_torch_is_naive(form: str, chunk_size: int, given: tuple[str, ...]) -> None:
    for time in (1, 2, 3, 4, 7, 12, 13):
        case = make_case(time=time, chunk_size=chunk_size, batch=3, seed=time, **FORMS[form])
        case = random_flags(case, time, *given)
        check_backends(case)
        check_backends(carried_state(case, seed=time))


@pytest.mark.parametrize("form", FORMS)
def test_forms_are_what_they_say(form: str) -> None:
    tensors = make_case(time=5, chunk_size=3, **FORMS[form]).tensors
    takes = [eager._makes_matrices(tensors["z"], tensors["v"], size) for size in (2, 3, 6)]
    assert takes == ([True, True, False] if form.endswith("chunks") else [False] * 3)


@pytest.mark.parametrize("form", [form for form in FORMS if FORMS[form].get("clip")])
def test_clips_of_the_forms_take_effect_in_some_chunks_only(form: str) -> None:
    case = make_case(time=30, chunk_size=3, batch=4, **{**FORMS[form], "clip": None})
    chunks = [case.tokens(slice(start, start + 3)) for start in range(0, 30, 3)]
    norms = torch.cat([x.run("naive")[1].dw.flatten(1).norm(dim=1) for x in chunks])
    assert 0.2 < (norms > FORMS[form]["clip"]).double().mean() < 0.8


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", [form for form in FORMS if FORMS[form].get("clip")])
def test_clip_can_be_a_tensor(form: str, backend: str) -> None:
    case = make_case(time=8, chunk_size=3, **FORMS[form])
    (o, state), (expected, after) = (
        case.run(backend, clip=clip)
        for clip in (torch.tensor(FORMS[form]["clip"], dtype=torch.float64), FORMS[form]["clip"])
    )
    torch.testing.assert_close(o, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state.dw, after.dw, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", range(30))
def test_torch_is_naive_for_random_options(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a call is read in several pieces."""
    draw = random.Random(seed)
    monkeypatch.setattr(eager, "SHORTEST", draw.choice([2, 3, 64]))
    case = make_case(
        time=draw.randint(1, 23),
        chunk_size=draw.choice([1, 2, 3, 4, 7]),
        batch=draw.choice([1, 2, 3]),
        hidden=draw.choice([3, 7, 40]),
        size=draw.choice([1, 5, 20]),
        per_token=draw.random() < 0.5,
        clip=draw.choice([None, 3.0, 8.0]),
        adapt=draw.random() < 0.9,
        seed=seed,
    )
    case = random_flags(case, seed, *(name for name in FLAGS if draw.random() < 0.4))
    check_backends(carried_state(case, seed, draw.randint(1, 9)) if seed % 2 else case)


@pytest.mark.parametrize("given", [(), (*FLAGS, "state")], ids=["plain", "everything"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_gradients_are_numerical(clip: float | None, given: tuple[str, ...]) -> None:
    case = random_flags(make_case(time=5, chunk_size=2, hidden=3, size=2, clip=clip), 1, *given)
    case = carried_state(case, 2) if "state" in given else case
    for backend in BACKENDS:
        # fast mode: one random direction per pair of input and output
        assert gradcheck(*as_function(case, backend), fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("clip", [None, 1.0])
def test_gradients_of_a_clip_are_finite_where_nothing_is_written(
    clip: float | None, backend: str
) -> None:
    case = make_case(time=7, chunk_size=2, clip=clip)
    case = case.with_tensors(v=torch.zeros_like(case.tensors["v"]))
    for given in ((), ("mask",)):
        _, gradients = differentiate(random_flags(case, 1, *given), backend)
        assert all(x.isfinite().all() for x in gradients.values())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_is_close_to_naive_float64(backend: str, form: str) -> None:
    for given in ((), FLAGS):
        case = random_flags(make_case(time=21, chunk_size=3, **FORMS[form]), 1, *given)
        case = carried_state(case, seed=2)
        assert case.state is not None
        single = Case(
            {n: x.float() for n, x in case.tensors.items()},
            case.options,
            type(case.state)(*(x.float() if x.is_floating_point() else x for x in case.state)),
        )
        expected, expected_gradients = differentiate(case, "naive")
        actual, gradients = differentiate(single, backend)
        assert all(x.dtype == torch.float32 for x in actual.values() if x.is_floating_point())
        doubles = {n: x.double() if x.is_floating_point() else x for n, x in actual.items()}
        # float32 has 6e-8; sums of about a hundred products
        assert_same(doubles, expected, 1e-5, backend)
        wide = {n: x.double() for n, x in gradients.items()}
        assert_same(wide, expected_gradients, 1e-4, f"{backend}: gradient of")


@pytest.mark.parametrize("given", [(), FLAGS], ids=["plain", "flags"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_keeps_its_state_in_float32(backend: str, given: tuple[str, ...]) -> None:
    case = random_flags(make_case(time=13, chunk_size=4, dtype=torch.bfloat16), 1, *given)
    wide = case.with_tensors(**{name: x.float() for name, x in case.tensors.items()})
    expected, expected_state = wide.run("naive")
    o, state = case.run(backend)
    assert o.dtype == torch.bfloat16
    assert_same(state._asdict(), expected_state._asdict(), 1e-5, backend)
    # 2**-8 is what bfloat16 rounds to, once for the linear layer and once for the sum
    torch.testing.assert_close(o.float(), expected, rtol=2**-7, atol=2**-7 * expected.abs().max())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("given", [(), FLAGS], ids=["plain", "flags"])
def test_bfloat16_in_calls_that_are_long_enough_for_its_products(
    given: tuple[str, ...], form: str
) -> None:
    """Errors of bfloat16 (2**-9 for a rounding), against the same numbers in float64."""
    case = make_case(time=67, chunk_size=5, dtype=torch.bfloat16, **FORMS[form])
    case = carried_state(random_flags(case, 1, *given), seed=2)
    assert case.state is not None
    state = type(case.state)(*(x.double() if x.is_floating_point() else x for x in case.state))
    tensors = {name: x.double() for name, x in case.tensors.items()}
    wide = Case(tensors, case.options, state)
    expected, expected_gradients = differentiate(wide, "naive")
    actual, gradients = differentiate(case, "torch")
    assert actual["dw"].dtype == actual["pending_dw"].dtype == torch.float32
    for ours, theirs in ((actual, expected), (gradients, expected_gradients)):
        for name, value in theirs.items():
            error = (ours[name].double() - value).norm() / value.double().norm().clamp(min=1e-9)
            assert error < 0.01, f"{name}: {error}"


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_applies_to_the_linear_layer_alone(backend: str) -> None:
    case = make_case(time=13, chunk_size=4, dtype=torch.float32)
    narrow = case.with_tensors(z=case.tensors["z"].bfloat16(), v=case.tensors["v"].bfloat16())
    _, expected = narrow.with_tensors(w_down=case.tensors["w_down"].bfloat16()).run(backend)
    with torch.autocast("cpu", torch.bfloat16):
        o, state = narrow.run(backend)
        base = torch.nn.functional.linear(narrow.tensors["z"], narrow.tensors["w_down"])
    assert o.dtype == torch.bfloat16
    assert torch.equal(o[:, :4], base[:, :4])
    assert_same(outputs(o, state), outputs(o, expected), 0, backend)


def flops(case: Case) -> int:
    with FlopCounterMode(display=False) as counter:
        case.run("torch")
    return counter.get_total_flops()


def test_operations_of_whole_chunks_are_those_of_the_equations() -> None:
    """A product with W, one with S, one that writes: 2 D F each for a token."""
    case = make_case(time=12, chunk_size=4)
    assert flops(case) == 3 * 2 * (2 * 12) * 7 * 5


@pytest.mark.parametrize("chunk_size", [4, 1024])
def test_operations_of_one_token_depend_on_neither_the_past_nor_the_chunk(chunk_size: int) -> None:
    case = carried_state(make_case(time=1, chunk_size=chunk_size, hidden=40, size=30), 1)
    # W, S and the open chunk are read, both are written; a token is its own only pair
    assert flops(case) == 5 * 2 * 2 * 40 * 30 + 2 * 2 * (40 + 30)


def test_short_chunks_of_a_large_weight_never_make_a_matrix_each() -> None:
    case = make_case(time=128, chunk_size=1, hidden=64, size=64, dtype=torch.float32)
    kept: list[int] = []
    leaves = {name: x.clone().requires_grad_() for name, x in case.tensors.items()}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel()) or x, lambda x: x
    ):
        case.with_tensors(**leaves).run("torch")
    assert max(kept) <= 2 * 128 * 128  # of 128 matrices: 2 * 128 * 64 * 64


def test_compiled_op_is_one_graph() -> None:
    """Without a break: nothing in it waits for a value. One graph each for a start and a state."""
    torch._dynamo.reset()
    counter = CompileCounter()

    def read(case: Case) -> Any:
        options = {**case.options, "state": case.state}
        return in_place(*(case.tensors[n] for n in ("z", "v", "w_down", "eta")), **options)

    compiled = torch.compile(read, backend=counter, fullgraph=True)
    case = random_flags(make_case(time=9, chunk_size=4), 1, *FLAGS)
    for call in (case, carried_state(case, 1), make_case(time=9, chunk_size=4)):
        o, state = compiled(call)
        expected, expected_state = call.run("torch")
        assert_same(outputs(o, state), outputs(expected, expected_state), 0, "compiled")
    assert counter.frame_count == 3
    torch._dynamo.reset()


def test_meta_tensors_have_shapes() -> None:
    case = random_flags(make_case(time=9, chunk_size=4), 1, *FLAGS)
    meta = Case(
        {name: x.to("meta") for name, x in case.tensors.items()},
        {k: x.to("meta") if isinstance(x, torch.Tensor) else x for k, x in case.options.items()},
    )
    o, state = run_in_pieces(meta, "torch", [4])
    assert o.shape == (2, 9, 5) and state.dw.shape == (2, 5, 7)
