"""The torch backend of the TTT ops against the naive loop: outputs, states, every gradient."""

import pytest
import torch
from ttt_cases import (
    LAYERS,
    Case,
    as_function,
    assert_same,
    carried_state,
    differentiate,
    make_case,
    outputs,
    random_flags,
)

FORMS = {"causal": (True, 16), "scan": (False, 16), "call": (False, None)}
TINY = {"causal": (True, 2), "scan": (False, 2), "call": (False, None)}
FLAGS = ("mask", "write_mask", "document_ids")


def case_of(form: tuple[bool, int | None], layer: str, time: int, **sizes) -> Case:
    causal, mini_batch_size = form
    return make_case(layer, time=time, causal=causal, mini_batch_size=mini_batch_size, **sizes)


def check_backends(case: Case, flush: bool) -> None:
    expected, expected_gradients = differentiate(case, "naive", flush=flush)
    actual, gradients = differentiate(case, "torch", flush=flush)
    # both are float64; sums are taken in another order, up to 100 steps deep
    assert_same(actual, expected, 1e-10, "torch")
    assert_same(gradients, expected_gradients, 1e-9, "torch gradient of")


@pytest.mark.quick("1-*", "51-*")
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("time", [1, 8, 16, 50, 51, 64, 100])
def test_torch_is_naive_on_odd_sizes(time: int, form: str, layer: str) -> None:
    check_backends(case_of(FORMS[form], layer, time, batch=1), flush=False)


@pytest.mark.quick("1-*", "51-*")
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("time", [1, 8, 16, 50, 51, 64, 100])
def test_torch_is_naive_with_everything(time: int, form: str, layer: str) -> None:
    case = case_of(FORMS[form], layer, time, batch=3, per_row=True, seed=time)
    case = carried_state(random_flags(case, time, *FLAGS), seed=time, time=19)
    check_backends(case, flush=time % 2 == 0)


@pytest.mark.quick("*-causal-linear", "*-call-mlp")
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("feature", [*FLAGS, "per_row", "state", "flush", "eps"])
def test_torch_is_naive_with_one_feature(feature: str, form: str, layer: str) -> None:
    case = case_of(FORMS[form], layer, 21, batch=2, per_row=feature == "per_row")
    if feature in FLAGS:
        case = random_flags(case, 3, feature)
    elif feature == "state":
        case = carried_state(case, 4)
    elif feature == "eps":
        case = case.with_options(eps=0.1)
    check_backends(case, flush=feature == "flush")


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mini_batch_size", [1, 3, 40])
def test_torch_is_naive_for_any_mini_batch_size(
    mini_batch_size: int, causal: bool, layer: str
) -> None:
    case = case_of((causal, mini_batch_size), layer, 10, batch=3)
    check_backends(carried_state(random_flags(case, 5, *FLAGS), seed=6), flush=False)


@pytest.mark.quick("*-linear", "torch-call-mlp")
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("form", TINY)
@pytest.mark.parametrize("backend", ["naive", "torch"])
def test_gradients_are_numerical_derivatives(backend: str, form: str, layer: str) -> None:
    case = case_of(TINY[form], layer, 3, batch=2, heads=1, size=3)
    case = case.with_options(mask=torch.tensor([[True, True, True], [True, False, True]]))
    case = carried_state(case, seed=8, time=3)
    function, leaves = as_function(case, backend)
    # fast mode: one random direction per pair of input and output
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True, atol=1e-6)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("backend", ["naive", "torch"])
def test_default_token_eta_is_one_over_position(backend: str, layer: str) -> None:
    case = case_of((True, 4), layer, 10)
    steps = 1 / torch.arange(1, 5, dtype=torch.float64)
    given = case.with_tensors(token_eta=steps)
    default = Case(layer, {n: x for n, x in case.tensors.items() if n != "token_eta"}, case.options)
    assert_same(outputs(*default.run(backend)), outputs(*given.run(backend)), 1e-14, backend)


@pytest.mark.quick("torch-*-linear", "torch-call-mlp", "naive-scan-linear")
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["naive", "torch"])
def test_float32_is_close_to_naive_float64(backend: str, form: str, layer: str) -> None:
    case = carried_state(random_flags(case_of(FORMS[form], layer, 35), 1, *FLAGS), seed=2)
    single = Case(
        layer,
        {name: x.float() for name, x in case.tensors.items()},
        case.options,
        type(case.state)(*(x.float() if x.is_floating_point() else x for x in case.state)),
    )
    expected, expected_gradients = differentiate(case, "naive")
    actual, gradients = differentiate(single, backend)
    assert all(x.dtype == torch.float32 for x in actual.values() if x.is_floating_point())
    as_double = {n: x.double() if x.is_floating_point() else x for n, x in actual.items()}
    # float32 has 6e-8; the bounds are those of the published oracles
    assert_same(as_double, expected, 2e-5, backend)
    assert_same({n: x.double() for n, x in gradients.items()}, expected_gradients, 5e-5, backend)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["naive", "torch"])
def test_bfloat16_under_autocast_computes_in_float32(backend: str, form: str, layer: str) -> None:
    case = case_of(FORMS[form], layer, 20, dtype=torch.bfloat16)
    expected, expected_state = case.with_tensors(
        **{name: x.float() for name, x in case.tensors.items()}
    ).run(backend)
    with torch.autocast("cpu", torch.bfloat16):
        o, state = case.run(backend)
    assert o.dtype == torch.bfloat16
    assert torch.equal(o, expected.bfloat16())
    assert_same(state._asdict(), expected_state._asdict(), 0, backend)


@pytest.mark.quick("causal-linear", "call-linear")
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("form", TINY)
def test_second_derivatives_are_numerical_or_an_error(form: str, layer: str) -> None:
    case = case_of(TINY[form], layer, 3, batch=1, heads=1, size=3)
    function, leaves = as_function(case, "naive")
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True, atol=1e-6)

    function, leaves = as_function(case, "torch")
    with pytest.raises(RuntimeError, match="second derivatives.*'naive'"):
        torch.autograd.gradgradcheck(function, leaves, fast_mode=True)
