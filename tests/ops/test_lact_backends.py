"""The torch backend of LaCT against the naive loop: outputs, states, every gradient."""

import random
from typing import Any

import pytest
import torch
from lact_cases import (
    BACKENDS,
    FLAGS,
    WEIGHTS,
    Case,
    carried_state,
    make_case,
    random_flags,
)
from torch.autograd import gradgradcheck
from ttt_cases import as_function, assert_same, differentiate, outputs

MUON = {"muon": True, "muon_dtype": torch.float64}


def check_backends(case: Case, **options: Any) -> None:
    expected, expected_gradients = differentiate(case, "naive", **options)
    actual, gradients = differentiate(case, "torch", **options)
    # both are float64; sums are taken in another order, up to ten updates deep
    assert_same(actual, expected, 1e-10, "torch")
    assert_same(gradients, expected_gradients, 1e-8, "torch gradient of")


@pytest.mark.parametrize("blocks", [1, 2, 3])
@pytest.mark.parametrize("time", [1, 3, 4, 5, 8, 11, 12])
def test_torch_is_naive_on_odd_sizes(time: int, blocks: int) -> None:
    check_backends(
        make_case(time=time, chunk_size=4, blocks=blocks, residual=True, heads=1, size=3)
    )


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("time", [1, 3, 4, 5, 11, 12])
def test_torch_is_naive_with_everything(time: int, blocks: int) -> None:
    """Random masks, documents and states, one row without a token, in each chunk another mix."""
    case = make_case(
        time=time,
        chunk_size=4,
        batch=3,
        blocks=blocks,
        residual=True,
        prenorm=True,
        **MUON,
        seed=time,
    )
    check_backends(carried_state(random_flags(case, time, *FLAGS), seed=time, time=9))


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {"momentum": False},
    "momentum": {},
    "prenorm": {"prenorm": True},
    "muon": MUON,
    "muon_of_tall_and_wide": {**MUON, "size": 6, "hidden": 3},
    "per_channel": {"per_channel": True, "hidden": 4},
    "without_residual": {"blocks": 3},
    "stack_per_channel": {"per_channel": True, "hidden": 4, "blocks": 3, "residual": True},
    "greedy": {"blocks": 3, "residual": True, "greedy": True},
    "without_adapting": {"adapt": False},
    "recompute": {"recompute": True, **MUON, "prenorm": True},
}


@pytest.mark.quick("*-given4", "muon_of_tall_and_wide-*")
@pytest.mark.parametrize("given", [(), ("mask",), ("document_ids",), ("state",), FLAGS])
@pytest.mark.parametrize("name", FEATURES)
def test_torch_is_naive_with_one_feature(name: str, given: tuple[str, ...]) -> None:
    case = make_case(time=11, chunk_size=3, seed=3, **FEATURES[name])
    case = random_flags(case, 4, *given)
    check_backends(carried_state(case, seed=5, time=8) if "state" in given else case)


@pytest.mark.parametrize("chunk_size", [1, 2, 20])
def test_torch_is_naive_for_any_chunk_size(chunk_size: int) -> None:
    case = make_case(time=10, chunk_size=chunk_size, batch=3)
    check_backends(case)
    check_backends(carried_state(random_flags(case, 5, *FLAGS), seed=6))


def random_case(draw: random.Random, seed: int) -> Case:
    """Any options that fit together."""
    options: dict[str, Any] = {
        name: draw.random() < share
        for name, share in {
            "momentum": 0.5,
            "per_channel": 0.3,
            "prenorm": 0.4,
            "residual": 0.7,
            "greedy": 0.2,
            "adapt": 0.85,
            "recompute": 0.3,
        }.items()
    }
    if draw.random() < 0.3:
        options.update(MUON)
    sizes = {name: draw.choice([1, 2, 3]) for name in ("batch", "heads", "blocks")}
    hidden = 4 if options["per_channel"] else draw.choice([3, 4, 6])
    chunk_size, time = draw.choice([1, 2, 3, 4, 7]), draw.randint(1, 17)
    case = make_case(
        time=time, chunk_size=chunk_size, size=4, hidden=hidden, seed=seed, **sizes, **options
    )
    case = random_flags(case, seed, *(name for name in FLAGS if draw.random() < 0.4))
    return carried_state(case, seed, draw.randint(1, 9)) if draw.random() < 0.6 else case


@pytest.mark.quick("?")
@pytest.mark.parametrize("seed", range(40))
def test_torch_is_naive_for_random_options(seed: int) -> None:
    check_backends(random_case(random.Random(seed), seed))


@pytest.mark.parametrize("flags", [(), FLAGS], ids=["even", "uneven"])
@pytest.mark.parametrize("prenorm", [False, True])
def test_torch_is_naive_from_a_state_without_a_graph(prenorm: bool, flags: tuple[str, ...]) -> None:
    """The learned weights get the gradient of the carried ones."""
    case = make_case(time=11, chunk_size=4, prenorm=prenorm)
    _, state = case.run("naive")
    case = random_flags(case, 1, *flags).with_state(state)
    leaves = {name: case.tensors[name].clone().requires_grad_() for name in WEIGHTS}
    gradients = {}
    for backend in BACKENDS:
        o, new = case.with_tensors(**leaves).run(backend)
        loss = o.square().sum() + new.w0.sum() + new.main_w1.sum()
        found = torch.autograd.grad(loss, list(leaves.values()))
        gradients[backend] = dict(zip(WEIGHTS, found, strict=True))
    assert_same(gradients["torch"], gradients["naive"], 1e-10, "torch gradient of")


@pytest.mark.quick("1")
@pytest.mark.parametrize("blocks", [1, 2])
def test_second_derivatives_are_numerical(blocks: int) -> None:
    case = make_case(
        time=3, chunk_size=2, batch=1, heads=1, size=2, hidden=2, blocks=blocks, residual=True
    )
    function, leaves = as_function(case, "torch")
    # fast mode: one random direction per pair of input and output
    assert gradgradcheck(function, leaves, fast_mode=True, atol=1e-6)


@pytest.mark.quick("momentum-*", "stack_per_channel-torch")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["momentum", "prenorm", "per_channel", "stack_per_channel"])
def test_float32_is_close_to_naive_float64(name: str, backend: str) -> None:
    case = make_case(time=21, chunk_size=4, **FEATURES[name])
    case = carried_state(random_flags(case, 1, *FLAGS), seed=2)
    assert case.state is not None
    single = Case(
        {n: x.float() for n, x in case.tensors.items()},
        case.options,
        type(case.state)(*(x.float() if x.is_floating_point() else x for x in case.state)),
    )
    expected, expected_gradients = differentiate(case, "naive")
    actual, gradients = differentiate(single, backend)
    assert all(x.dtype == torch.float32 for x in actual.values() if x.is_floating_point())
    as_double = {n: x.double() if x.is_floating_point() else x for n, x in actual.items()}
    # float32 has 6e-8; the bounds are those of the published oracles, whose stacks need more
    assert_same(as_double, expected, 2e-5, backend)
    assert_same({n: x.double() for n, x in gradients.items()}, expected_gradients, 8e-5, backend)


@pytest.mark.parametrize("given", [(), FLAGS], ids=["even", "uneven"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_under_autocast_computes_in_float32(backend: str, given: tuple[str, ...]) -> None:
    case = make_case(time=13, chunk_size=4, blocks=2, residual=True, dtype=torch.bfloat16)
    case = random_flags(case, 1, *given)
    expected, expected_state = case.with_tensors(
        **{name: x.float() for name, x in case.tensors.items()}
    ).run(backend)
    with torch.autocast("cpu", torch.bfloat16):
        o, state = case.run(backend)
    assert o.dtype == torch.bfloat16
    assert torch.equal(o, expected.bfloat16())
    assert_same(outputs(o, state), outputs(o, expected_state), 0, backend)
