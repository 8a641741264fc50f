"""Known mistakes of public versions of TTT, and that comparing with the naive loop shows them."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import layer_norm
from ttt_cases import Case, make_case, relative_error, run_in_pieces


def inner_gradient(case: Case) -> Tensor:
    """`G = dl/dz` of all tokens at the initial weights, by autograd, `[B, H, T, D]`."""
    k, v = (case.tensors[name].transpose(1, 2) for name in ("k", "v"))
    z = (k @ case.tensors["w"] + case.tensors["b"]).requires_grad_()
    loss = 0.5 * (normalise(case, z) - (v - k)).square().sum()
    return torch.autograd.grad(loss, z)[0]


def normalise(case: Case, z: Tensor) -> Tensor:
    gamma, beta = (case.tensors[name].unsqueeze(1) for name in ("norm_weight", "norm_bias"))
    return layer_norm(z, z.shape[-1:], eps=1e-6) * gamma + beta


def dual_outputs(case: Case, weight_sum: Tensor, bias_sum: Tensor) -> Tensor:
    """The dual form of one mini-batch: which tokens enter the weight and the bias of each query.

    Args:
        weight_sum: factor of `q_i . k_j`, `[T, T]`.
        bias_sum: the same for the bias, `[T, T]`.
    """
    q, k, eta = (case.tensors[name].transpose(1, 2) for name in ("q", "k", "eta"))
    gradient = eta.unsqueeze(-1) * inner_gradient(case)
    z = q @ case.tensors["w"] - (weight_sum * (q @ k.transpose(-2, -1))) @ gradient
    z = z + case.tensors["b"] - bias_sum @ gradient
    return (q + normalise(case, z)).transpose(1, 2)


def one_causal_mini_batch() -> tuple[Case, Tensor, Tensor]:
    """A case, its causal factors `tau_i [j <= i]` and the factors `tau_i` of a full sum."""
    case = make_case("linear", time=8, mini_batch_size=8, causal=True)
    tau = case.tensors["token_eta"].unsqueeze(1)
    full = tau.expand(8, 8)
    return case, full.tril(), full


def test_dual_form_is_naive_loop() -> None:
    case, tril, _ = one_causal_mini_batch()
    assert relative_error(dual_outputs(case, tril, tril), case.run("naive")[0]) < 1e-12


def test_full_sum_for_the_bias_differs_from_naive_loop() -> None:
    case, tril, full = one_causal_mini_batch()
    expected = case.run("naive")[0]
    wrong = dual_outputs(case, tril, full)
    assert relative_error(wrong, expected) > 1e-2
    assert relative_error(wrong[:, -1], expected[:, -1]) < 1e-12  # the last token sees all


def test_no_tril_differs_from_causal_naive_loop() -> None:
    case, _, full = one_causal_mini_batch()
    assert relative_error(dual_outputs(case, full, full), case.run("naive")[0]) > 1e-2


@pytest.mark.parametrize("constant", [True, False])
def test_eta_on_the_rows_of_w_differs_from_naive_loop(constant: bool) -> None:
    """Scaling rows of `k^T G`, not tokens, runs where T equals D; right if eta is constant."""
    case = make_case("linear", time=4, size=4, mini_batch_size=None, causal=False)
    if constant:
        case = case.with_tensors(eta=torch.full_like(case.tensors["eta"], 0.2))
    k, eta = (case.tensors[name].transpose(1, 2) for name in ("k", "eta"))
    gradient = k.transpose(-2, -1) @ inner_gradient(case)
    error = relative_error(-eta.unsqueeze(-1) * gradient, case.run("naive")[1].dw)
    assert error < 1e-12 if constant else error > 1e-2


def test_one_state_for_the_whole_batch_differs_from_naive_loop() -> None:
    case = make_case("linear", time=6, mini_batch_size=None, causal=False)
    joined = {n: case.tensors[n].flatten(0, 1).unsqueeze(0) for n in ("q", "k", "v", "eta")}
    shared, _ = case.with_tensors(**joined).run("naive")
    o, state = case.run("naive")
    assert relative_error(shared.view_as(o), o) > 1e-2
    assert relative_error(state.dw[:1], state.dw[1:]) > 1e-2


@pytest.mark.parametrize("backend", ["naive", "torch"])
def test_state_is_returned_and_not_kept(backend: str) -> None:
    case = make_case("linear", time=8, mini_batch_size=4, causal=True)
    first, _ = case.run(backend)
    again, _ = case.run(backend)
    carried, _ = run_in_pieces(case.tokens([*range(8), *range(8)]), backend, [8])
    assert torch.equal(first, again)
    assert torch.equal(first, carried[:, :8])
    assert relative_error(carried[:, 8:], first) > 1e-2
