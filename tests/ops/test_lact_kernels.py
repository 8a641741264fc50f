"""The triton backend of LaCT in the interpreter: as the loop, and what must always hold."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import triton_interpreter as triton_interpreter
from lact_cases import FLAGS, WEIGHTS, Case, carried_state, make_case, random_flags, run_in_pieces
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint
from ttt_cases import as_function, assert_same, differentiate, outputs

from lightning_modules.ops.lact import few, walk
from lightning_modules.ops.lact.fused import triton_obstacle
from lightning_modules.ops.lact.layout import Counts, Even
from lightning_modules.ops.lact.muon import newton_schulz
from lightning_modules.ops.lact.orthogonal import orthogonal, orthogonal_backward

MUON = {"muon": True, "muon_dtype": torch.float64}
SLOW = pytest.mark.slow
SMALL: dict[str, Any] = {"chunk_size": 3, "batch": 1, "heads": 1, "size": 3, "hidden": 5}


def check(case: Case, against: str = "naive", **options: Any) -> None:
    """float64 on both sides, so that only the order of sums differs."""
    expected, expected_gradients = differentiate(case, against, **options)
    actual, gradients = differentiate(case, "triton", **options)
    assert_same(actual, expected, 1e-10, "triton")
    assert_same(gradients, expected_gradients, 1e-8, "triton gradient of")


def continued(case: Case) -> Case:
    """From the state that the same tokens leave, equal in all rows."""
    return case.with_state(case.run("naive")[1])


def test_triton_is_naive_with_a_state_momentum_muon_and_prenorm() -> None:
    check(continued(make_case(time=7, prenorm=True, **MUON, **SMALL)))


def test_triton_is_naive_in_a_stack_of_two_with_masks_and_documents() -> None:
    sizes = {**SMALL, "batch": 2, "chunk_size": 2}
    case = make_case(time=5, blocks=2, residual=True, momentum=False, **sizes)
    ids = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 2, 2, 2]])
    mask = (torch.arange(5) != 1).expand(2, 5)
    check(case.with_options(mask=mask, document_ids=ids))


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {"momentum": False},
    "momentum_of_tall": {"size": 6, "hidden": 3},
    "muon_of_tall": {**MUON, "size": 6, "hidden": 3},
    "muon_of_square": {**MUON, "momentum": False, "hidden": 3},
    "prenorm": {"prenorm": True},
    "without_residual": {"blocks": 3},
    "residual_muon_prenorm": {"blocks": 3, "residual": True, "prenorm": True, **MUON},
    "greedy": {"blocks": 2, "residual": True, "greedy": True},
    "recompute": {"recompute": True, "momentum": False},
    "many_heads": {"heads": 3, "batch": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("given", [(), FLAGS], ids=["even", "uneven"])
@pytest.mark.parametrize("name", FEATURES)
def test_triton_is_naive_with_one_feature(name: str, given: tuple[str, ...]) -> None:
    case = make_case(time=7, seed=3, **{**SMALL, **FEATURES[name]})
    case = random_flags(case, 4, *given)
    check(carried_state(case, seed=5, time=5) if given and name == "prenorm" else case)


@pytest.mark.slow
@pytest.mark.parametrize("given", [("mask",), ("document_ids",), ("state",), (*FLAGS, "state")])
def test_triton_is_naive_with_rows_that_differ(given: tuple[str, ...]) -> None:
    case = make_case(time=8, prenorm="mask" in given, **{**SMALL, "batch": 3})
    case = random_flags(case, 2, *given)
    check(carried_state(case, seed=2, time=5) if "state" in given else case)


@pytest.mark.parametrize("time", [1, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_triton_is_naive_around_one_chunk(time: int) -> None:
    check(make_case(time=time, **SMALL))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(16, 40), (96, 96), (33, 17)])
def test_triton_is_torch_for_sizes_over_a_tile(sizes: tuple[int, int]) -> None:
    size, hidden = sizes
    case = make_case(time=45, chunk_size=20, batch=1, heads=2, size=size, hidden=hidden)
    check(case, against="torch")


@pytest.mark.slow
def test_triton_is_torch_for_chunks_over_a_tile() -> None:
    """More tokens and hidden channels than a program of `kernels/few.py` has."""
    check(make_case(time=300, chunk_size=140, batch=1, heads=1, size=18, hidden=70), "torch")


@pytest.mark.parametrize("name", ["plain", "greedy", pytest.param("muon_of_tall", marks=SLOW)])
def test_chunks_of_any_size_are_naive(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large ones take a launch for each product."""
    monkeypatch.setattr(few, "ROWS", 0)
    check(make_case(time=7, seed=3, **{**SMALL, **FEATURES[name]}))


@pytest.mark.parametrize("heads", [4, 8])
def test_a_call_is_small_by_the_tokens_of_all_heads_in_a_chunk(
    heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(few, "ROWS", 6 * 3)
    launched: list[str] = []
    monkeypatch.setattr(few, "launcher", lambda _, name: lambda *_: launched.append(name))
    make_case(time=7, **{**SMALL, "heads": heads}).run("triton")
    assert launched == (["operands_kernel", "changes_kernel"] * 2 if heads == 4 else [])


@pytest.mark.slow
def test_chunks_read_in_several_parts_are_those_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walk, "ROWS", 6)
    check(make_case(time=11, **SMALL), against="torch")
    check(make_case(time=11, adapt=False, **SMALL), against="torch")


def test_reading_without_adapting_is_naive() -> None:
    check(continued(make_case(time=7, **SMALL)), adapt=False)


@pytest.mark.slow
def test_another_rule_is_noticed() -> None:
    case = make_case(time=7, blocks=2, residual=True, **SMALL)
    expected, _ = differentiate(case, "naive", greedy=True)
    with pytest.raises(AssertionError):
        assert_same(differentiate(case, "triton")[0], expected, 1e-10, "greedy")


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), FLAGS], ids=["even", "uneven"])
def test_float32_is_close_to_naive_float64(flags: tuple[str, ...]) -> None:
    case = make_case(time=10, blocks=2, residual=True, **{**SMALL, "batch": 2})
    case = carried_state(random_flags(case, 1, *flags), seed=2, time=5)
    assert case.state is not None
    state = type(case.state)(*(x.float() if x.is_floating_point() else x for x in case.state))
    single = replace(case, tensors={n: x.float() for n, x in case.tensors.items()}, state=state)
    expected, expected_gradients = differentiate(case, "naive")
    actual, gradients = differentiate(single, "triton")
    assert all(x.dtype == torch.float32 for x in actual.values() if x.is_floating_point())
    as_double = {n: x.double() if x.is_floating_point() else x for n, x in actual.items()}
    # float32 has 6e-8; the bounds are those of the torch backend
    assert_same(as_double, expected, 2e-5, "triton")
    assert_same({n: x.double() for n, x in gradients.items()}, expected_gradients, 8e-5, "triton")


@pytest.mark.slow
def test_one_pass_is_any_split() -> None:
    case = random_flags(make_case(time=10, **{**SMALL, "batch": 2}), 1, "mask")
    expected, expected_gradients = differentiate(case, "triton")
    pieces, gradients = differentiate(
        case, lambda call, **options: run_in_pieces(call, "triton", [2, 6], **options)
    )
    assert_same(pieces, expected, 1e-11, "pieces")
    assert_same(gradients, expected_gradients, 1e-9, "pieces: gradient of")


def test_masked_tokens_are_never_looked_at() -> None:
    mask = torch.arange(5)[None] % 3 != 1
    case = make_case(time=5, mask=mask, **{**SMALL, "chunk_size": 2})
    poisoned = {n: x.clone() for n, x in case.tensors.items() if n not in WEIGHTS}
    for value in poisoned.values():
        value[~mask] = float("nan")
    clean = outputs(*case.run("triton"))
    assert_same(outputs(*case.with_tensors(**poisoned).run("triton")), clean, 0, "poisoned")


def test_outputs_before_a_changed_chunk_are_bit_identical() -> None:
    case = make_case(time=7, **SMALL)
    o, _ = case.run("triton")
    changed = {name: case.tensors[name].clone() for name in ("k", "v", "lr")}
    for value in changed.values():
        value[:, 2] += 1
    other, _ = case.with_tensors(**changed).run("triton")
    assert torch.equal(other[:, :3], o[:, :3])
    assert not torch.equal(other[:, 3:], o[:, 3:])


@pytest.mark.slow
def test_another_run_checkpointing_and_no_grad_change_no_bit() -> None:
    case = make_case(time=7, prenorm=True, **MUON, **SMALL)
    expected, expected_gradients = differentiate(case, "triton")

    def checkpointed(call: Case) -> tuple[Tensor, Any]:
        return checkpoint(call.run, "triton", use_reentrant=False)

    actual, gradients = differentiate(case, checkpointed)
    assert_same(actual, expected, 0, "checkpointed")
    assert_same(gradients, expected_gradients, 0, "checkpointed gradient of")
    with torch.no_grad():
        assert_same(outputs(*case.run("triton")), expected, 0, "no_grad")


@pytest.mark.slow
def test_gradient_of_the_state_alone_and_of_the_output_alone() -> None:
    case = make_case(time=7, **SMALL)
    leaves = {name: case.tensors[name].clone().requires_grad_() for name in case.tensors}
    for pick in (lambda o, s: o.sum(), lambda o, s: s.w1.sum(), lambda o, s: s.momentum_w0.sum()):
        found = {}
        for backend in ("naive", "triton"):
            loss = pick(*case.with_tensors(**leaves).run(backend))
            gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
            found[backend] = {
                name: torch.zeros_like(x) if g is None else g
                for (name, x), g in zip(leaves.items(), gradients, strict=True)
            }
        assert_same(found["triton"], found["naive"], 1e-9, "gradient of")


def test_second_derivatives_are_an_error() -> None:
    case = make_case(time=1, **{**SMALL, "size": 2, "hidden": 2}, momentum=False)
    function, leaves = as_function(case, "triton")
    with pytest.raises(RuntimeError, match=r"triton.*second derivatives.*'naive'"):
        torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


# --- Muon ---


@pytest.mark.parametrize(("hidden", "size"), [(3, 5), (4, 4), (5, 3)])
def test_muon_of_packed_weights_is_that_of_each_matrix(hidden: int, size: int) -> None:
    """Values and gradients against autograd through `newton_schulz`; a row of zeros, too."""
    shapes = [(hidden, size), (hidden, size), (size, hidden)]
    packed = torch.randn(2, 3, 3 * hidden * size, dtype=torch.float64)
    packed[1, 2] = 0
    upper, leaf = torch.randn_like(packed), packed.clone().requires_grad_()
    parts = leaf.split([a * b for a, b in shapes], dim=-1)
    each = [
        newton_schulz(x.unflatten(-1, s), torch.float64) for x, s in zip(parts, shapes, strict=True)
    ]
    expected = torch.cat([x.flatten(-2) for x in each], dim=-1)
    (gradient,) = torch.autograd.grad(expected, leaf, upper)
    actual = orthogonal(packed, hidden, size, torch.float64)
    # float64 through five steps that each multiply errors by up to 4
    torch.testing.assert_close(actual, expected.detach(), rtol=1e-11, atol=1e-11)
    found = orthogonal_backward(packed, upper, hidden, size, torch.float64)
    live = packed.abs().sum(-1) > 0
    torch.testing.assert_close(found[live], gradient[live], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found[~live], gradient[~live], rtol=1e-9, atol=1e-9)


# --- how a call is cut ---


def even(time: int, size: int, ahead: int = 0, adapt: bool = True) -> walk.Walk:
    zero = torch.zeros(1, dtype=torch.int64)
    layout = Even(time, size, ahead, adapt, ahead > 0, Counts(zero, zero, zero, zero))
    return walk.walk(layout, batch=1, heads=1)


def test_full_chunks_are_read_at_once_and_others_as_wide_as_they_are() -> None:
    found = even(time=1 + 4 * 5 + 2, size=4, ahead=3)
    cuts = [(x.version, x.number, x.width, x.start) for x in found.reads]
    assert cuts == [(0, 1, 1, 0), (1, 5, 4, 1), (6, 1, 2, 21)]
    assert len(found.changes) == found.writes.number == 6
    assert found.writes.start == -3


def test_one_token_is_read_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding must not pay for the slots of a chunk."""
    (block,) = even(time=1, size=2048, ahead=7).reads
    assert (block.number, block.width) == (1, 1)
    monkeypatch.setattr(walk, "ROWS", 10)
    assert [x.width for x in even(time=25, size=4, adapt=False).reads] == [10, 10, 5]


# --- which backend ---


def test_without_gpu_and_interpreter_triton_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match=r"CUDA device.*'cpu'.*TRITON_INTERPRET"):
        make_case(time=2, **SMALL).run("triton")


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (make_case(time=2, chunk_size=2, per_channel=True, hidden=4), "per channel"),
        (make_case(time=2, chunk_size=2, dtype=torch.bfloat16), "bfloat16: convert"),
    ],
)
def test_call_that_the_kernels_cannot_run_names_cause_and_fix(case: Case, message: str) -> None:
    with pytest.raises(ValueError, match=rf"{message}.*backend='torch'"):
        case.run("triton")


def test_group_is_an_obstacle_with_the_fix() -> None:
    found = triton_obstacle(torch.empty(1, 2, 1, 3), ProcessGroup(0, 2))
    assert found is not None
    assert "group" in found and "backend='torch'" in found


def test_auto_on_a_cpu_is_torch() -> None:
    case = make_case(time=5, **SMALL)
    assert_same(outputs(*case.run("auto")), outputs(*case.run("torch")), 0, "auto")
