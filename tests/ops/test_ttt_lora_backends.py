"""The torch backend of `ops.ttt_lora` against the naive loop: outputs, states, every gradient."""

from dataclasses import replace

import pytest
import torch
from ttt_cases import as_function, assert_same, differentiate, outputs, random_flags
from ttt_lora_cases import (
    FORMS,
    LoRACase,
    carried_state,
    case_of,
    make_case,
    with_everything,
)

BACKENDS = ("naive", "torch")
every_form = pytest.mark.parametrize("form", FORMS)
every_backend = pytest.mark.parametrize("backend", BACKENDS)


def check_backends(case: LoRACase) -> None:
    expected, expected_gradients = differentiate(case, "naive")
    actual, gradients = differentiate(case, "torch")
    # both are float64; sums are taken in another order, up to 50 steps deep
    assert_same(actual, expected, 1e-10, "torch")
    assert_same(gradients, expected_gradients, 1e-9, "torch gradient of")


@every_form
@pytest.mark.parametrize("time", [1, 7, 8, 9, 33])
def test_torch_is_naive_on_odd_sizes(time: int, form: str) -> None:
    check_backends(case_of(form, time, mini_batch_size=8, batch=1, size=5))


@every_form
@pytest.mark.parametrize("time", [1, 8, 23])
def test_torch_is_naive_with_everything(time: int, form: str) -> None:
    case = case_of(form, time, batch=4, group=2, seed=time)
    check_backends(with_everything(case, seed=time))


@pytest.mark.quick("?-A_plain", "?-B_ln")
@every_form
@pytest.mark.parametrize("seed", range(12))
def test_torch_is_naive_with_dense_masks_and_documents(seed: int, form: str) -> None:
    case = carried_state(case_of(form, 15, batch=3, mini_batch_size=3, size=2, seed=seed), seed)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(3, 15, generator=generator) < 0.5
    ids = (torch.rand(3, 15, generator=generator) < 0.4).cumsum(1)
    check_backends(case.with_options(mask=mask, document_ids=ids))


@pytest.mark.quick("None-*", "2-B_ln")
@every_form
@pytest.mark.parametrize("pending", [None, *range(4)])
def test_torch_is_naive_for_every_mask_of_seven_tokens(pending: int | None, form: str) -> None:
    case = case_of(form, 7, batch=128, size=2)
    bits = torch.arange(128).unsqueeze(1) >> torch.arange(7)
    case = case.with_options(mask=(bits & 1).bool())
    if pending is not None:
        earlier = case_of(form, 4 + pending, batch=128, size=2, seed=1)
        case = case.with_state(earlier.run("torch")[1])
    assert_same(outputs(*case.run("torch")), outputs(*case.run("naive")), 1e-11, "torch")


@pytest.mark.quick("*-A_plain", "*-B_ln")
@every_form
@pytest.mark.parametrize("feature", ["mask", "document_ids", "state", "group", "eps", "no_adapt"])
def test_torch_is_naive_with_one_feature(feature: str, form: str) -> None:
    case = case_of(form, 21, batch=3, group=3 if feature == "group" else None)
    if feature in ("mask", "document_ids"):
        case = random_flags(case, 3, feature)
    elif feature == "state":
        case = carried_state(case, 4)
    elif feature in ("eps", "no_adapt"):
        option = {"eps": {"norm_eps": 0.1}, "no_adapt": {"adapt": False}}[feature]
        case = carried_state(case, 4).with_options(**option)
    check_backends(case)


@every_form
@pytest.mark.parametrize("mini_batch_size", [1, 3, 40])
def test_torch_is_naive_for_any_mini_batch_size(mini_batch_size: int, form: str) -> None:
    case = case_of(form, 10, batch=3, mini_batch_size=mini_batch_size)
    check_backends(with_everything(case, seed=6))


@every_form
@pytest.mark.parametrize("eta", ["all", "adapter", "token"])
def test_torch_is_naive_for_any_shape_of_eta(eta: str, form: str) -> None:
    check_backends(carried_state(case_of(form, 10, group=3, eta=eta), seed=1))


@every_backend
@every_form
def test_group_is_its_members_alone(form: str, backend: str) -> None:
    case = with_everything(case_of(form, 14, batch=3, group=3), seed=2)
    together, state = case.run(backend)
    for index in range(3):
        o, alone = case.member(index).run(backend)
        assert_same({"o": together[:, :, index]}, {"o": o}, 1e-12, backend)
        weights, pending = state[:2], state[2:5]
        own = type(state)(
            *(x[:, index] for x in weights), *(x[:, :, index] for x in pending), *state[5:]
        )
        assert_same(own._asdict(), alone._asdict(), 1e-12, backend)


@pytest.mark.quick("flags0-*-torch", "flags1-A_plain-naive", "flags2-B_ln-torch")
@every_backend
@every_form
@pytest.mark.parametrize("flags", [(), ("mask",), ("document_ids",)])
def test_gradients_are_numerical_derivatives(
    flags: tuple[str, ...], form: str, backend: str
) -> None:
    case = case_of(form, 5, mini_batch_size=2, size=3, batch=2, group=1)
    case = carried_state(random_flags(case, 9, *flags), seed=8, time=3)
    function, leaves = as_function(case, backend)
    # fast mode: one random direction per pair of input and output
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True, atol=1e-6)


@pytest.mark.quick("A_plain")
@every_form
def test_second_derivatives_are_numerical_or_an_error(form: str) -> None:
    case = case_of(form, 3, mini_batch_size=2, size=2, batch=1)
    function, leaves = as_function(case, "naive")
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True, atol=1e-6)
    function, leaves = as_function(case, "torch")
    with pytest.raises(RuntimeError, match=r"ttt_lora has no second derivatives.*'naive'"):
        torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


@every_backend
@every_form
def test_float32_is_close_to_naive_float64(form: str, backend: str) -> None:
    case = with_everything(case_of(form, 35, batch=3), seed=1)
    single = replace(
        case,
        tensors={name: x.float() for name, x in case.tensors.items()},
        state=type(case.state)(*(x.float() if x.is_floating_point() else x for x in case.state)),
    )
    expected, expected_gradients = differentiate(case, "naive")
    actual, gradients = differentiate(single, backend)
    assert all(x.dtype == torch.float32 for x in actual.values() if x.is_floating_point())
    as_double = {n: x.double() if x.is_floating_point() else x for n, x in actual.items()}
    # float32 has 6e-8; the bounds are those of the other TTT ops
    assert_same(as_double, expected, 2e-5, backend)
    assert_same({n: x.double() for n, x in gradients.items()}, expected_gradients, 5e-5, backend)


@every_backend
@every_form
@pytest.mark.parametrize("flags", [(), ("mask", "document_ids")])
def test_bfloat16_under_autocast_computes_in_float32(
    flags: tuple[str, ...], form: str, backend: str
) -> None:
    case = random_flags(case_of(form, 20, batch=3, dtype=torch.bfloat16), 1, *flags)
    expected, expected_state = case.with_tensors(
        **{name: x.float() for name, x in case.tensors.items()}
    ).run(backend)
    with torch.autocast("cpu", torch.bfloat16):
        o, state = case.run(backend)
    assert o.dtype == torch.bfloat16
    assert torch.equal(o, expected.bfloat16())
    assert_same(state._asdict(), expected_state._asdict(), 0, backend)


@every_backend
def test_auto_is_the_torch_backend(backend: str) -> None:
    case = make_case(time=9)
    same = outputs(*case.run(backend)), outputs(*case.run("auto"))
    assert_same(*same, 0 if backend == "torch" else 1e-12, backend)
