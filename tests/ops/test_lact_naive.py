"""LaCT against torch.autograd (the inner gradient) and numerical derivatives (the whole op)."""

from pathlib import Path

import pytest
import torch
from lact_cases import BACKENDS, WEIGHTS, Case, carried_state, make_case
from torch import Tensor
from torch.autograd import gradcheck
from torch.nn.functional import silu
from ttt_cases import as_function, assert_same, outputs, relative_error

from lightning_modules.ops.states import LaCTState

STACKS = [(1, False), (1, True), (2, False), (2, True), (3, True), (4, False), (4, True)]


def inner_loss(weights: list[Tensor], k: Tensor, v: Tensor, residual: bool) -> Tensor:
    """`-<x_r(k), v>` of one row, summed over tokens and heads; k and v are `[T, H, D]`."""
    x, blocks = k, len(weights[0])
    for j in range(blocks):
        w0, w1, w2 = (w[j] for w in weights)
        gate = silu(torch.einsum("hfd,thd->thf", w0, x))
        y = torch.einsum("hdf,thf->thd", w1, gate * torch.einsum("hfd,thd->thf", w2, x))
        x = x + y if residual and j < blocks - 1 else y
    return -(x * v).sum()


def first_update(case: Case, backend: str) -> dict[str, Tensor]:
    """The sum that the first chunk adds to the weights: what its momentum buffers hold."""
    _, state = case.tokens(slice(0, case.options["chunk_size"] + 1)).run(backend)
    assert (state.updates == 1).all()
    return {name: getattr(state, f"momentum_{name}") for name in WEIGHTS}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("blocks", "residual"), STACKS)
def test_update_at_rate_one_is_autograd_of_the_summed_inner_loss(
    blocks: int, residual: bool, backend: str
) -> None:
    case = make_case(time=6, chunk_size=5, blocks=blocks, residual=residual, seed=blocks)
    case = case.with_tensors(lr=torch.ones_like(case.tensors["lr"]))
    weights = [case.tensors[name].requires_grad_() for name in WEIGHTS]
    k, v = (case.tensors[name][:, :5] for name in ("k", "v"))
    rows = [
        torch.autograd.grad(inner_loss(weights, k[row], v[row], residual), weights)
        for row in range(2)
    ]
    expected = {
        name: -torch.stack(x) for name, x in zip(WEIGHTS, zip(*rows, strict=True), strict=True)
    }
    # float64 rounding of sums of five tokens, through up to four blocks
    assert_same(first_update(case, backend), expected, 1e-12, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("blocks", "residual"), STACKS)
@pytest.mark.parametrize("per_channel", [False, True], ids=["per_head", "per_channel"])
def test_update_is_each_token_s_autograd_times_its_rates(
    per_channel: bool, blocks: int, residual: bool, backend: str
) -> None:
    """Per channel, rates scale the columns of the gradient: the inputs of what it multiplies."""
    sizes = {"size": 4, "hidden": 4, "blocks": blocks, "per_channel": per_channel, "batch": 1}
    case = make_case(time=6, chunk_size=5, residual=residual, seed=blocks, **sizes)
    weights = [case.tensors[name].requires_grad_() for name in WEIGHTS]
    k, v, lr = (case.tensors[name][0] for name in ("k", "v", "lr"))
    rates = lr.reshape(*lr.shape[:3], -1)
    expected = {name: torch.zeros_like(w) for name, w in zip(WEIGHTS, weights, strict=True)}
    for t in range(5):
        loss = inner_loss(weights, k[t : t + 1], v[t : t + 1], residual)
        for i, gradient in enumerate(torch.autograd.grad(loss, weights)):
            expected[WEIGHTS[i]] -= rates[t, :, i, None] * gradient
    expected = {name: x[None] for name, x in expected.items()}
    assert_same(first_update(case, backend), expected, 1e-12, backend)


CHECKED = {
    "plain": {"momentum": False},
    "momentum": {},
    "prenorm": {"prenorm": True},
    "muon": {"muon": True, "muon_dtype": torch.float64},
    "per_channel": {"per_channel": True, "hidden": 2},
    "stack": {"blocks": 2, "residual": True},
    "everything": {
        "blocks": 2,
        "residual": True,
        "prenorm": True,
        "muon": True,
        "muon_dtype": torch.float64,
    },
}


def tiny_case(**options) -> Case:
    """Two updates: momentum and pre-norm first matter at the second."""
    return make_case(
        time=5, chunk_size=2, **{"batch": 1, "heads": 1, "size": 2, "hidden": 3, **options}
    )


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CHECKED)
def test_gradients_are_numerical_derivatives(name: str, backend: str) -> None:
    function, leaves = as_function(tiny_case(**CHECKED[name]), backend)
    assert gradcheck(function, leaves, atol=1e-6)


@pytest.mark.quick("torch")
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_by_a_carried_state_are_numerical_derivatives(backend: str) -> None:
    case = carried_state(tiny_case(prenorm=True), seed=1, time=4).tokens(slice(0, 3))
    function, leaves = as_function(case, backend)
    assert gradcheck(function, leaves, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_low_rank_factors_are_numerical_derivatives(backend: str) -> None:
    """`w0 = A B + 0.5 I`, and w2 likewise."""
    case = tiny_case(**CHECKED["everything"])
    generator = torch.Generator().manual_seed(3)
    sizes = [(2, 1, 3, 1), (2, 1, 1, 2)] * 2
    factors = [torch.randn(x, generator=generator, dtype=torch.float64) for x in sizes]
    identity = 0.5 * torch.eye(3, 2, dtype=torch.float64)
    tokens = {name: x for name, x in case.tensors.items() if name not in ("w0", "w2")}

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        a0, b0, a2, b2, *others = values
        w0, w2 = a0 @ b0 + identity, a2 @ b2 + identity
        call = case.with_tensors(w0=w0, w2=w2, **dict(zip(tokens, others, strict=True)))
        o, state = call.run(backend)
        return o, state.w0, state.w1, state.w2

    leaves = [x.clone().requires_grad_() for x in (*factors, *tokens.values())]
    assert gradcheck(function, leaves, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("residual", [False, True])
def test_greedy_is_exact_for_one_block(residual: bool, backend: str) -> None:
    case = make_case(time=12, chunk_size=4, residual=residual)
    exact, greedy = (outputs(*case.run(backend, greedy=x)) for x in (False, True))
    assert_same(greedy, exact, 1e-13, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("blocks", [2, 3])
def test_greedy_is_another_rule_for_a_stack(blocks: int, residual: bool, backend: str) -> None:
    case = make_case(time=12, chunk_size=4, blocks=blocks, residual=residual)
    exact, greedy = (case.run(backend, greedy=x)[0] for x in (False, True))
    assert torch.equal(greedy[:, :4], exact[:, :4])  # nothing is written yet
    assert relative_error(greedy[:, 4:], exact[:, 4:]) > 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_greedy_trains_every_block_as_if_it_stood_alone(backend: str) -> None:
    case = make_case(time=6, chunk_size=5, blocks=3, residual=True, greedy=True)
    together = first_update(case, backend)
    for j in range(3):
        block = {name: case.tensors[name][j : j + 1] for name in WEIGHTS}
        alone = first_update(case.with_tensors(**block).with_options(greedy=False), backend)
        one = {name: x[:, j : j + 1] for name, x in together.items()}
        assert_same(one, alone, 1e-12, f"{backend}, block {j}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("prenorm", [False, True])
def test_detached_state_gives_learned_weights_the_gradient_of_the_carried(
    prenorm: bool, backend: str
) -> None:
    """`W + (w - w.detach())`: the value of W, and its gradient for w; with a graph, W alone."""
    case = make_case(time=16, chunk_size=4, prenorm=prenorm)
    _, state = case.tokens(slice(0, 6)).run(backend)
    fields = [*WEIGHTS, *([f"main_{name}" for name in WEIGHTS] if prenorm else [])]
    carried = {name: getattr(state, name).clone().requires_grad_() for name in fields}
    learned = {name: case.tensors[name].clone().requires_grad_() for name in WEIGHTS}
    rest = case.with_tensors(**learned).tokens(slice(6, None))

    detached, _ = rest.with_state(state).run(backend)
    of_learned = torch.autograd.grad(detached.square().sum(), list(learned.values()))
    attached, _ = rest.with_state(state._replace(**carried)).run(backend)
    leaves = [*carried.values(), *learned.values()]
    gradients = torch.autograd.grad(attached.square().sum(), leaves, allow_unused=True)

    assert torch.equal(detached, attached)
    assert gradients[len(fields) :] == (None, None, None)
    for i, gradient in enumerate(of_learned):
        expected = sum(x.sum(0) for x in gradients[i : len(fields) : 3])
        assert relative_error(gradient, expected) < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_adapting_chunks_end_and_the_weights_stay(backend: str) -> None:
    case = make_case(time=11, chunk_size=4, blocks=2, residual=True)
    before, state = case.run(backend)
    read, after = case.with_state(state).run(backend, adapt=False)
    assert torch.equal(after.w0, state.w0)
    assert torch.equal(after.momentum_w0, state.momentum_w0)
    assert torch.equal(after.updates, state.updates)
    assert torch.equal(after.tokens_seen, torch.full((2,), 22))
    assert torch.equal(after.pending_count, torch.full((2,), 2))
    for row in range(2):
        weights = {name: getattr(state, name)[row] for name in WEIGHTS}
        alone = case.rows(slice(row, row + 1)).with_tensors(**weights)
        assert relative_error(read[row : row + 1], alone.run(backend, chunk_size=16)[0]) < 1e-12
    assert relative_error(read, before) > 1e-2


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_that_has_seen_nothing_is_zero_and_reads_as_a_fresh_one(backend: str) -> None:
    case = make_case(time=11, chunk_size=4, prenorm=True)
    mask = torch.tensor([[True], [False]]).expand(2, 11)
    _, state = case.run(backend, mask=mask)
    assert not any(x[1].any() for x in state)
    # whatever else it holds, too
    held = LaCTState(*(torch.full_like(x, 2) for x in state))
    held = held._replace(tokens_seen=torch.zeros(2, dtype=torch.int64))
    fresh = outputs(*case.run(backend))
    assert_same(outputs(*case.with_state(held).run(backend)), fresh, 1e-12, backend)
    second = {name: x[1:] for name, x in outputs(*case.with_state(state).run(backend)).items()}
    assert_same(second, {name: x[1:] for name, x in fresh.items()}, 1e-12, backend)


def test_naive_refuses_a_group(tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    try:
        with pytest.raises(ValueError, match="backend='torch'"):
            make_case(time=4, chunk_size=4).run("naive", group=torch.distributed.group.WORLD)
    finally:
        torch.distributed.destroy_process_group()
