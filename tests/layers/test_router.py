"""Router functions against token loops, against transformers' Mixtral, and at their extremes."""

import math

import pytest
import torch
from torch import Tensor, nn
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from lightning_modules.layers.router import (
    balance_loss,
    entropy,
    init_router,
    masked_mean,
    router_logits,
    top_k,
    top_k_weights,
    z_loss,
)

B, T, N = 3, 7, 5


def _logits(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(B, T, N, generator=generator, dtype=torch.float64)


def _mask() -> Tensor:
    return torch.rand(B, T, generator=torch.Generator().manual_seed(3)) < 0.6


@pytest.mark.parametrize("k", range(1, N + 1))
def test_top_k_equals_a_loop_that_takes_the_largest_k_times(k: int) -> None:
    probabilities = _logits().softmax(-1)
    weights, selected = top_k_weights(probabilities, k)
    for b in range(B):
        for t in range(T):
            left, expected = probabilities[b, t].tolist(), [0.0] * N
            for _ in range(k):
                best = left.index(max(left))  # the first of equals
                expected[best], left[best] = left[best], -1.0
            assert weights[b, t].tolist() == expected
            assert selected[b, t].tolist() == [w > 0 for w in expected]
    assert k < N or torch.equal(weights, probabilities)


@pytest.mark.parametrize("n", [3, 40])
def test_ties_go_to_the_lowest_index(n: int) -> None:
    probabilities = torch.full((2, n), 1 / n)
    probabilities[1, -1] *= 2
    weights, selected = top_k_weights(probabilities, 2)
    assert selected[0].nonzero().flatten().tolist() == [0, 1]
    assert selected[1].nonzero().flatten().tolist() == [0, n - 1]
    assert weights[1, -1] == 2 / n


def test_gradients_flow_through_the_kept_weights_only() -> None:
    probabilities = _logits().softmax(-1).requires_grad_()
    weights, selected = top_k_weights(probabilities, 2)
    weights.sum().backward()
    assert torch.equal(probabilities.grad, selected.double())


@pytest.mark.parametrize("k", [1, 2, N])
@pytest.mark.parametrize("masked", [False, True])
def test_balance_loss_equals_mixtrals_divided_by_k(k: int, masked: bool) -> None:
    logits = _logits().requires_grad_()
    mask = _mask() if masked else None
    probabilities = logits.softmax(-1)
    loss = balance_loss(probabilities, top_k_weights(probabilities, k)[1], mask)
    attention_mask = mask.long() if masked else None
    flat = logits.flatten(0, 1)
    expected = load_balancing_loss_func((flat,), N, k, attention_mask) / k
    torch.testing.assert_close(loss, expected.to(loss.dtype), rtol=1e-6, atol=0)  # float32 inside
    gradients = [
        torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (loss, expected)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("masked", [False, True])
def test_losses_equal_their_formulas_token_by_token(masked: bool) -> None:
    logits, mask = _logits(), _mask() if masked else torch.ones(B, T, dtype=torch.bool)
    chosen = top_k_weights(logits.softmax(-1), 2)[1]
    count, squares, load, mean = 0, 0.0, [0.0] * N, [0.0] * N
    for b in range(B):
        for t in range(T):
            if not mask[b, t]:
                continue
            exponentials = [math.exp(value) for value in logits[b, t].tolist()]
            count, squares = count + 1, squares + math.log(sum(exponentials)) ** 2
            for i in range(N):
                mean[i] += exponentials[i] / sum(exponentials)
                load[i] += float(chosen[b, t, i]) / 2
    given = mask if masked else None
    probabilities = logits.softmax(-1)
    expected = N * sum(f / count * p / count for f, p in zip(load, mean, strict=True))
    assert balance_loss(probabilities, chosen, given).item() == pytest.approx(expected, rel=1e-12)
    assert z_loss(logits, given).item() == pytest.approx(squares / count, rel=1e-12)
    dense = N * sum((p / count) ** 2 for p in mean)
    assert balance_loss(probabilities, None, given).item() == pytest.approx(dense, rel=1e-12)


def test_balance_is_one_when_even_and_n_when_one_choice_takes_all() -> None:
    even = torch.full((1, N, N), 1 / N)
    assert balance_loss(even).item() == pytest.approx(1.0)
    turns = torch.eye(N, dtype=torch.bool).unsqueeze(0)
    assert balance_loss(even, turns).item() == pytest.approx(1.0)
    single = torch.zeros(1, T, N)
    single[..., 2] = 1.0
    assert balance_loss(single, single > 0).item() == pytest.approx(N)
    assert balance_loss(single).item() == pytest.approx(N)


def test_the_load_has_no_gradient_also_where_it_is_the_mean_probability() -> None:
    probabilities = _logits().softmax(-1).requires_grad_()
    balance_loss(probabilities).backward()
    expected = N * probabilities.detach().mean((0, 1)) / (B * T)
    torch.testing.assert_close(probabilities.grad, expected.expand(B, T, N))


@pytest.mark.parametrize("k", [None, 1])
def test_descending_the_balance_loss_spreads_the_load(k: int | None) -> None:
    logits = torch.tensor([1.0, 0.0, 0.0]).repeat(1, 4, 1).requires_grad_()
    for _ in range(100):
        probabilities = logits.softmax(-1)
        selected = None if k is None else top_k_weights(probabilities, k)[1]
        (gradient,) = torch.autograd.grad(balance_loss(probabilities, selected), logits)
        logits = (logits - 2.0 * gradient).detach().requires_grad_()
    assert logits.softmax(-1)[..., 0].max() < 0.36


def test_masked_tokens_count_nowhere_even_if_they_are_not_finite() -> None:
    logits, mask = _logits(), _mask()
    dirty = logits.masked_fill(~mask.unsqueeze(-1), float("nan")).requires_grad_()
    loss = z_loss(dirty, mask) + balance_loss(dirty.softmax(-1), None, mask)
    torch.testing.assert_close(
        loss, z_loss(logits, mask) + balance_loss(logits.softmax(-1), None, mask)
    )
    nothing = torch.zeros(B, T, dtype=torch.bool)
    assert z_loss(logits, nothing) == 0 and balance_loss(logits.softmax(-1), None, nothing) == 0


def test_entropy_is_zero_when_sure_and_log_n_when_uniform() -> None:
    assert entropy(torch.eye(N)).tolist() == [0.0] * N
    assert entropy(torch.full((N,), 1 / N)).item() == pytest.approx(math.log(N))


def test_means_over_one_dimension_equal_means_of_its_rows() -> None:
    values, mask = _logits(), _mask()
    mask[1] = False
    by_row = masked_mean(values, mask, dim=1)
    for row in (0, 2):
        torch.testing.assert_close(by_row[row], values[row][mask[row]].mean(0))
    assert torch.equal(by_row[1], torch.zeros(N, dtype=torch.float64))
    torch.testing.assert_close(masked_mean(values), values.mean((0, 1)))


def test_logits_are_float32_under_autocast_and_in_bfloat16() -> None:
    router, x = nn.Linear(16, N), torch.randn(B, T, 16)
    with torch.autocast("cpu", torch.bfloat16):
        logits = router_logits(x, router)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, router(x))
    assert router_logits(x.bfloat16(), router.bfloat16()).dtype == torch.float32
    assert router_logits(x.double(), router.double()).dtype == torch.float64
    assert router_logits(x.double().to("meta"), router.to("meta")).shape == (B, T, N)


def test_initial_probabilities_are_nearly_uniform_and_no_choice_is_left_out() -> None:
    torch.manual_seed(0)
    router, x = nn.Linear(64, N), torch.randn(1000, 64)
    init_router(router)
    assert torch.equal(router.bias, torch.zeros(N))
    probabilities = router_logits(x, router).softmax(-1)
    assert (probabilities - 1 / N).abs().max() < 0.2
    load = top_k_weights(probabilities, 1)[1].float().mean(0)
    assert load.min() > 0.05
    nn.init.zeros_(router.weight)  # the wrong start: every token ties, and the first choice wins
    ties = top_k_weights(router_logits(x, router).softmax(-1), 1)[1].float().mean(0)
    assert ties.tolist() == [1.0, 0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("k", [1, 3, 12])
def test_top_k_equals_a_stable_sort_where_many_are_equal(k: int) -> None:
    scores = torch.randint(0, 4, (50, 12), generator=torch.Generator().manual_seed(0)).float()
    expected = scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(top_k(scores, k), expected)
