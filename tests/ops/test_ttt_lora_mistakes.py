"""Known mistakes of public versions of TTT-as-LoRA, and that the tests of the op show them."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm
from ttt_cases import relative_error
from ttt_lora_cases import LoRACase, make_case

every_backend = pytest.mark.parametrize("backend", ("naive", "torch"))


class Variant(NamedTuple):
    """One loop over complete mini-batches, and what the public versions get wrong in it."""

    transposed: bool = False
    reads_updated: bool = False
    over_rows: bool = False
    detached: bool = False
    summed_weight: bool = False
    no_norm_backward: bool = False


def error(case: LoRACase, z: Tensor, target: Tensor, variant: Variant) -> Tensor:
    """`e = dl/dz` at z."""
    if case.options["loss"] == "plain":
        return z - target
    gamma, beta = case.tensors["norm_weight"], case.tensors["norm_bias"]
    if variant.no_norm_backward:
        return layer_norm(z, z.shape[-1:], gamma, beta) - target
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        loss = 0.5 * (layer_norm(leaf, z.shape[-1:], gamma, beta) - target).square().sum()
        return torch.autograd.grad(loss, leaf)[0]


def loop(case: LoRACase, variant: Variant) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs of mode A, and the changes of weight and bias, of a loop with these mistakes."""
    q, k, v, eta = (case.tensors[name] for name in ("q", "k", "v", "eta"))
    size, batch = case.options["mini_batch_size"], len(q)
    w, b = (
        case.tensors[name].expand(batch, *case.tensors[name].shape) for name in ("w_base", "b_base")
    )
    if variant.detached:
        w, b = w.detach(), b.detach()
    w0, b0, outputs = w, b, []
    for start in range(0, q.shape[1], size):
        here = slice(start, start + size)
        keys, rate = k[:, here], eta[:, here].unsqueeze(-1)
        e = error(case, keys @ w + b.unsqueeze(1), v[:, here] - keys, variant)
        dw, db = (rate * keys).mT @ e / size, (rate * e).mean(1)
        if variant.transposed:
            dw = dw.mT
        if variant.over_rows:
            dw, db = (x.mean(0, keepdim=True).expand_as(x) for x in (dw, db))
        if variant.summed_weight:
            dw = dw * size
        before = q[:, here] @ w + b.unsqueeze(1)
        w, b = w - dw, b - db
        outputs.append(q[:, here] @ w + b.unsqueeze(1) if variant.reads_updated else before)
    return torch.cat(outputs, dim=1), w - w0, b - b0


def errors(case: LoRACase, variant: Variant, backend: str) -> tuple[float, float, float]:
    """How far the loop is from the op: outputs, weight, bias."""
    o, state = case.run(backend)
    pairs = zip(loop(case, variant), (o, state.dw, state.db), strict=True)
    first, second, third = (relative_error(wrong, right) for wrong, right in pairs)
    return first, second, third


@every_backend
@pytest.mark.parametrize("loss", ["plain", "ln"])
def test_loop_without_mistakes_is_the_op(loss: str, backend: str) -> None:
    case = make_case(time=12, loss=loss)
    assert max(errors(case, Variant(), backend)) < 1e-12


@every_backend
@pytest.mark.parametrize("loss", ["plain", "ln"])
@pytest.mark.parametrize("mistake", ["transposed", "over_rows", "summed_weight"])
def test_wrong_gradient_differs_from_the_op(mistake: str, loss: str, backend: str) -> None:
    case = make_case(time=12, loss=loss)
    outputs, weight, _ = errors(case, Variant(**{mistake: True}), backend)
    assert outputs > 1e-2
    assert weight > 1e-2


@every_backend
def test_gradient_without_the_norms_backward_differs_from_the_op(backend: str) -> None:
    case = make_case(time=12, loss="ln")
    assert min(errors(case, Variant(no_norm_backward=True), backend)) > 1e-2


def test_transposed_gradient_raises_the_loss_that_the_right_one_lowers() -> None:
    case = make_case(time=400, batch=4, mini_batch_size=8, eta="all", size=8)
    # A map that can be learned: values are a fixed linear function of the keys.
    k = case.tensors["k"]
    truth = torch.randn(8, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    case = case.with_tensors(v=k + k @ truth, q=k, eta=torch.tensor(0.5, dtype=torch.float64))

    def late_loss(outputs: Tensor) -> float:
        return (outputs - k @ truth)[:, -40:].square().mean().item()

    start = (k @ case.tensors["w_base"] + case.tensors["b_base"] - k @ truth).square().mean().item()
    assert late_loss(case.run("torch")[0]) < 0.05 * start
    assert late_loss(loop(case_with_rates(case), Variant())[0]) < 0.05 * start
    assert late_loss(loop(case_with_rates(case), Variant(transposed=True))[0]) > start


def case_with_rates(case: LoRACase) -> LoRACase:
    """The same call with one eta for each token."""
    return case.with_tensors(eta=case.tensors["eta"].expand(case.tensors["q"].shape[:2]))


def looks_ahead(run: Callable[[LoRACase], Tensor], case: LoRACase) -> bool:
    """Whether outputs before the last token change when that token does."""
    changed = {name: case.tensors[name].clone() for name in ("k", "v")}
    for value in changed.values():
        value[:, -1] += 1
    return not torch.equal(run(case)[:, :-1], run(case.with_tensors(**changed))[:, :-1])


@every_backend
@pytest.mark.parametrize("mode", ["A", "B"])
def test_reading_updated_weights_is_a_leak_that_causality_shows(mode: str, backend: str) -> None:
    case = make_case(time=12, mode=mode)
    assert looks_ahead(lambda x: loop(x, Variant(reads_updated=True))[0], case)
    assert not looks_ahead(lambda x: loop(x, Variant())[0], case)
    assert not looks_ahead(lambda x: x.run(backend)[0], case)


@every_backend
def test_learned_weights_get_their_gradient_from_outputs_states_and_carried_streams(
    backend: str,
) -> None:
    case = make_case(time=12)
    learned = {n: case.tensors[n].clone().requires_grad_() for n in ("w_base", "b_base")}
    case = case.with_tensors(**learned)
    o, state = case.run(backend)
    for value in (o, state.dw, state.db):
        assert all(
            g.any()
            for g in torch.autograd.grad(value.sum(), list(learned.values()), retain_graph=True)
        )
    carried = case.with_state(type(state)(*(x.detach() for x in state))).run(backend)[0]
    assert all(g.any() for g in torch.autograd.grad(carried.sum(), list(learned.values())))
    assert not loop(case, Variant(detached=True))[0].requires_grad


@every_backend
@pytest.mark.parametrize("mode", ["A", "B"])
def test_rows_do_not_share_a_state(mode: str, backend: str) -> None:
    case = make_case(time=12, mode=mode)
    joined = {n: case.tensors[n].flatten(0, 1).unsqueeze(0) for n in ("q", "k", "v", "eta")}
    o, state = case.run(backend)
    shared, _ = case.with_tensors(**joined).run(backend)
    assert relative_error(shared.view_as(o), o) > 1e-2
    assert relative_error(state.dw[:1], state.dw[1:]) > 1e-2


@every_backend
@pytest.mark.parametrize("size", [1, 4, 32, 128])
def test_mean_over_the_mini_batch_is_stable_for_every_size_where_a_sum_is_not(
    size: int, backend: str
) -> None:
    case = make_case(time=768, mini_batch_size=size, batch=1, eta="all")
    unit = {n: torch.nn.functional.normalize(case.tensors[n], dim=-1) for n in ("q", "k")}
    eta = torch.tensor(-2.0, dtype=torch.float64).sigmoid()  # 0.119, that of an untrained gate
    case = case.with_tensors(**unit, eta=eta)
    assert case.run(backend)[0].abs().max() < 10
    if size == 128:
        summed = case.with_tensors(eta=eta * size)
        assert summed.run(backend)[0].abs().max() > 1e3


@every_backend
def test_a_partial_mini_batch_is_kept_and_not_written(backend: str) -> None:
    case = make_case(time=6)
    o, state = case.run(backend)
    _, early = case.tokens(slice(0, 4)).run(backend)
    assert torch.equal(state.dw, early.dw)
    assert state.pending_count.tolist() == [2, 2]
    dropped = case.tokens(slice(4, 6)).with_state(early).run(backend)[1]
    assert torch.equal(dropped.pending_k, state.pending_k)
    assert o.shape == (2, 6, 4)
