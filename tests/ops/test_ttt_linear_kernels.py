"""The Triton kernels of TTT-Linear in the interpreter: as the loop, and what must always hold."""

import logging
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton_interpreter as triton_interpreter
from torch.utils.checkpoint import checkpoint
from ttt_cases import (
    Case,
    as_function,
    assert_same,
    carried_state,
    differentiate,
    make_case,
    outputs,
    random_flags,
    run_in_pieces,
)

from lightning_modules.ops import triton_backend, ttt_linear

FORMS = {"causal": (True, 4), "causal_16": (True, 16), "scan": (False, 4), "call": (False, None)}
FLAGS = ("mask", "write_mask", "document_ids")
SLOW_FORMS = ("causal_16", "scan")
every_form = pytest.mark.parametrize("form", FORMS)


def case_of(form: str, time: int, **sizes: Any) -> Case:
    causal, size = FORMS[form]
    sizes = {"batch": 1, "heads": 1, "size": 8} | sizes
    return make_case("linear", time=time, causal=causal, mini_batch_size=size, **sizes)


def check(case: Case, against: str = "naive", **options: Any) -> None:
    """float64 on both sides, so that only the order of sums differs."""
    expected, expected_gradients = differentiate(case, against, **options)
    actual, gradients = differentiate(case, "triton", **options)
    assert_same(actual, expected, 1e-10, "triton")
    assert_same(gradients, expected_gradients, 1e-9, "triton gradient of")


@pytest.mark.quick("1-*", "21-scan")
@every_form
@pytest.mark.parametrize("time", [1, 21])
def test_triton_is_naive_on_odd_sizes(time: int, form: str) -> None:
    check(case_of(form, time))


@pytest.mark.quick("call")
@pytest.mark.parametrize(
    "form", ["causal", "call", *(pytest.param(f, marks=pytest.mark.slow) for f in SLOW_FORMS)]
)
def test_triton_is_naive_with_everything(form: str) -> None:
    case = random_flags(case_of(form, 7, batch=3, per_row=True), 5, *FLAGS)
    check(carried_state(case, seed=5), flush=True)


@pytest.mark.slow
@every_form
@pytest.mark.parametrize("feature", [*FLAGS, "per_row", "state", "flush", "eps"])
def test_triton_is_naive_with_one_feature(feature: str, form: str) -> None:
    case = case_of(form, 11, batch=2, per_row=feature == "per_row")
    if feature in FLAGS:
        case = random_flags(case, 3, feature)
    elif feature == "state":
        case = carried_state(case, 4)
    elif feature == "eps":
        case = case.with_options(eps=0.1)
    check(case, flush=feature == "flush")


@pytest.mark.quick("32-16", "128-20", "80-40")
@pytest.mark.parametrize(("size", "mini_batch_size"), [(32, 16), (96, 4), (128, 20), (80, 40)])
def test_triton_is_torch_for_head_sizes_of_models(size: int, mini_batch_size: int) -> None:
    check(
        make_case(
            "linear", time=90, causal=True, mini_batch_size=mini_batch_size, batch=1, heads=1,
            size=size,
        ),
        against="torch",
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mini_batch_size", [1, 3, 4, 13, 16, 33, 64])
def test_triton_is_torch_over_several_groups(mini_batch_size: int, causal: bool) -> None:
    sizes = {"time": 150, "batch": 2, "heads": 1, "size": 8}
    case = make_case("linear", causal=causal, mini_batch_size=mini_batch_size, **sizes)
    check(carried_state(random_flags(case, 3, "mask", "write_mask"), 3), against="torch")


@pytest.mark.slow
@every_form
@pytest.mark.parametrize("time", [50, 51, 64])
def test_triton_is_torch_with_everything_on_long_rows(time: int, form: str) -> None:
    case = random_flags(case_of(form, time, batch=3, per_row=True), time, *FLAGS)
    check(carried_state(case, seed=time, time=19), against="torch", flush=time % 2 == 0)


@pytest.mark.quick("causal", "call")
@every_form
def test_float32_is_close_to_naive_float64(form: str) -> None:
    case = carried_state(random_flags(case_of(form, 21), 1, "mask", "write_mask"), seed=2)
    expected, expected_gradients = differentiate(case, "naive")
    actual, gradients = differentiate(single(case), "triton")
    assert all(x.dtype == torch.float32 for x in actual.values() if x.is_floating_point())
    as_double = {n: x.double() if x.is_floating_point() else x for n, x in actual.items()}
    # float32 has 6e-8; the bounds are those of the other backends
    assert_same(as_double, expected, 2e-5, "triton")
    assert_same({n: x.double() for n, x in gradients.items()}, expected_gradients, 5e-5, "triton")


def single(case: Case) -> Case:
    state = case.state
    if state is not None:
        state = type(state)(*(x.float() if x.is_floating_point() else x for x in state))
    return replace(case, tensors={n: x.float() for n, x in case.tensors.items()}, state=state)


def test_rounding_does_not_grow_with_the_length_of_a_row() -> None:
    """Two hundred mini-batches: a mean of z that nobody takes off would have grown to 1e-4."""
    case = make_case("linear", time=400, causal=True, mini_batch_size=2, batch=1, heads=1, size=8)
    x = dict(case.tensors)
    x |= {name: torch.nn.functional.normalize(x[name], dim=-1) for name in ("q", "k")}
    case = case.with_tensors(**x | {"eta": torch.ones_like(x["eta"])})
    for actual, exact in zip(
        differentiate(single(case), "triton"), differentiate(case, "torch"), strict=True
    ):
        for name, reference in exact.items():
            if reference.is_floating_point() and reference.abs().max() > 0:
                error = (actual[name].double() - reference).norm() / reference.norm()
                assert error < 5e-6, (name, float(error))


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_one_pass_is_any_split(seed: int) -> None:
    case = carried_state(random_flags(case_of("causal", 11, batch=2), seed, "mask"), seed)
    draw = random.Random(seed)
    cuts = sorted(draw.sample(range(1, 11), 2))
    expected, expected_gradients = differentiate(case, "triton")
    pieces, gradients = differentiate(
        case, lambda call, **options: run_in_pieces(call, "triton", cuts, **options)
    )
    assert_same(pieces, expected, 1e-11, f"cut at {cuts}")
    assert_same(gradients, expected_gradients, 1e-10, f"cut at {cuts}: gradient of")


@pytest.mark.quick("call")
@pytest.mark.parametrize("form", ["causal", "call"])
def test_masked_tokens_are_never_looked_at(form: str) -> None:
    case = case_of(form, 11).with_options(mask=torch.arange(11)[None] % 3 != 1)
    poisoned = {name: case.tensors[name].clone() for name in ("q", "k", "v", "eta")}
    for value in poisoned.values():
        value[~case.options["mask"]] = float("nan")
    expected = differentiate(case, "triton")
    for got, clean in zip(
        differentiate(case.with_tensors(**poisoned), "triton"), expected, strict=True
    ):
        assert_same(got, clean, 0, "poisoned")


def test_eta_zero_leaves_a_carried_state_as_it_is() -> None:
    case = carried_state(case_of("call", 11), seed=2)
    silent = case.with_tensors(eta=torch.zeros_like(case.tensors["eta"]))
    state = silent.run("triton")[1]
    assert torch.equal(state.dw, case.state.dw)
    assert torch.equal(state.db, case.state.db)


def test_causal_outputs_before_a_changed_token_are_bit_identical() -> None:
    case = carried_state(case_of("causal", 11), seed=1)
    o, _ = case.run("triton")
    for t in (2, 7, 10):
        changed = {name: case.tensors[name].clone() for name in ("q", "k", "v", "eta")}
        for value in changed.values():
            value[:, t] += 1
        other, _ = case.with_tensors(**changed).run("triton")
        assert torch.equal(other[:, :t], o[:, :t])
        assert not torch.equal(other[:, t], o[:, t])


def test_a_mean_added_to_the_initial_weights_changes_nothing() -> None:
    """The kernels leave the mean over the outputs out; a LayerNorm must not notice."""
    case = case_of("causal", 11)
    moved = case.with_tensors(
        w=case.tensors["w"] + torch.randn(1, 8, 1, dtype=torch.float64), b=case.tensors["b"] + 3
    )
    assert_same(outputs(*moved.run("triton")), outputs(*case.run("naive")), 1e-10, "moved")


def test_another_run_checkpointing_and_no_grad_change_no_bit() -> None:
    case = case_of("causal", 11)
    expected, expected_gradients = differentiate(case, "triton")

    def checkpointed(call: Case) -> tuple[torch.Tensor, Any]:
        return checkpoint(call.run, "triton", use_reentrant=False)

    actual, gradients = differentiate(case, checkpointed)
    assert_same(actual, expected, 0, "checkpointed")
    assert_same(gradients, expected_gradients, 0, "checkpointed gradient of")
    with torch.no_grad():
        assert_same(outputs(*case.run("triton")), expected, 0, "no_grad")


def test_gradient_of_the_state_alone_and_of_the_output_alone() -> None:
    case = case_of("causal", 9)
    for pick in (
        lambda o, s: o.sum(),
        lambda o, s: s.dw.square().sum(),
        lambda o, s: s.db.square().sum(),
    ):
        assert_same(some_gradients(case, "triton", pick), some_gradients(case, "naive", pick),
                    1e-9, "gradient of")  # fmt: skip


def some_gradients(case: Case, backend: str, pick: Callable[..., Any]) -> dict[str, torch.Tensor]:
    leaves = {n: x.clone().requires_grad_() for n, x in case.tensors.items()}
    loss = pick(*case.with_tensors(**leaves).run(backend))
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(x) if g is None else g
        for (name, x), g in zip(leaves.items(), found, strict=True)
    }


def test_second_derivatives_are_an_error() -> None:
    function, leaves = as_function(case_of("causal", 3, heads=1), "triton")
    with pytest.raises(RuntimeError, match=r"triton.*second derivatives.*'naive'"):
        torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


# --- which backend ---


def test_without_gpu_and_interpreter_triton_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match=r"CUDA device.*'cpu'.*TRITON_INTERPRET"):
        case_of("causal", 5).run("triton")


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (make_case("linear", time=2, mini_batch_size=2, causal=True, size=132), "head size 132"),
        (make_case("linear", time=2, mini_batch_size=65, causal=True), "mini_batch_size = 65"),
        (make_case("linear", time=70, mini_batch_size=None, causal=False), "T without .* = 70"),
        (
            make_case("linear", time=2, mini_batch_size=2, causal=True, dtype=torch.bfloat16),
            "bfloat16: convert",
        ),
    ],
)
def test_call_that_the_kernels_cannot_run_names_cause_and_fix(case: Case, message: str) -> None:
    with pytest.raises(ValueError, match=rf"{message}.*backend='torch'"):
        case.run("triton")


def test_auto_on_a_cpu_is_torch_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    triton_backend._announce.cache_clear()
    case = case_of("causal", 5)
    with caplog.at_level(logging.INFO, logger=triton_backend.__name__):
        for _ in range(2):
            assert_same(outputs(*case.run("auto")), outputs(*case.run("torch")), 0, "auto")
    assert [record.getMessage() for record in caplog.records] == [
        "ttt_linear: backend 'torch', as q is on the device 'cpu'"
    ]


def test_auto_takes_triton_where_it_can() -> None:
    backends = {"torch": ttt_linear, "triton": differentiate}
    fake = torch.empty(1, 4, 2, 8, device="meta")
    for obstacle, device, expected in (
        (None, "cuda", "triton"),
        ("T = 70 is over 64", "cuda", "torch"),
        (None, "cpu", "torch"),
    ):
        stand_in = _Named(device, fake.dtype)
        chosen = triton_backend.dispatch(
            "op", "auto", backends, stand_in, lambda found=obstacle: found
        )
        assert chosen is backends[expected]


def test_compiled_calls_take_torch_in_one_graph_for_any_length() -> None:
    graphs = []

    def count(module: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(module)
        return module

    def call(q: torch.Tensor) -> torch.Tensor:
        return case.with_tensors(q=q, k=q, v=q, eta=q[..., 0]).run("auto")[0]

    case = case_of("call", 11)
    compiled = torch.compile(call, backend=count, fullgraph=True, dynamic=True)
    for time in (11, 60, 70):  # with more than 64 tokens the kernels end
        q = torch.randn(1, time, 1, 8, dtype=torch.float64)
        assert torch.equal(compiled(q), call(q))
    assert len(graphs) == 1


class _Named:
    """What `dispatch` asks of a tensor, without a GPU."""

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = torch.device(device), dtype
