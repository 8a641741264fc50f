"""Flow matching against oracles/flow_matching: interpolant, loss, sampler, time distribution."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import assert_close_to_oracle, load_oracle
from torch import Tensor

from lightning_modules.models.flow_matching import (
    euler_sample,
    flow_matching_loss,
    interpolate,
    sample_time,
    time_quantile,
)

TOLERANCE = 1e-9
EXACT = 1e-12


def test_interpolant_matches_the_oracle_with_gradients() -> None:
    tensors, _ = load_oracle("flow_matching/interpolant")
    inputs = {name: tensors[name].requires_grad_() for name in ("actions", "noise", "t")}
    x_t, target = interpolate(**inputs)
    assert_close_to_oracle(x_t, tensors["x_t"], EXACT, "x_t")
    assert_close_to_oracle(target, tensors["target"], EXACT, "target")
    found = torch.autograd.grad((x_t * tensors["grad_out"]).sum(), list(inputs.values()))
    for name, gradient in zip(inputs, found, strict=True):
        assert_close_to_oracle(gradient, tensors[f"grad/{name}"], EXACT, name)
    loss = (target * tensors["grad_out_target"]).sum()
    for name in ("actions", "noise"):
        (gradient,) = torch.autograd.grad(loss, inputs[name], retain_graph=True)
        assert_close_to_oracle(gradient, tensors[f"grad_target/{name}"], EXACT, name)


LOSSES = ["loss_plain", "loss_padding", "loss_real_dims", "loss_padding_real_dims"]


@pytest.mark.parametrize("case", LOSSES)
def test_masked_loss_matches_the_oracle_with_gradients(case: str) -> None:
    tensors, metadata = load_oracle(f"flow_matching/{case}")
    velocity = tensors["predicted_velocity"].requires_grad_()
    target = tensors["noise"] - tensors["actions"]
    loss, per_sample = flow_matching_loss(
        velocity, target, tensors["action_is_pad"], metadata["real_dims"]
    )
    assert_close_to_oracle(loss, tensors["loss"], TOLERANCE, "loss")
    assert_close_to_oracle(per_sample, tensors["per_sample_loss"], TOLERANCE, "per_sample")
    (gradient,) = torch.autograd.grad(loss, velocity, retain_graph=True)
    assert_close_to_oracle(gradient, tensors["grad/predicted_velocity"], TOLERANCE)
    assert torch.equal(gradient == 0, tensors["grad/predicted_velocity"] == 0)
    weighted = (per_sample * tensors["grad_out_per_sample"]).sum()
    (gradient,) = torch.autograd.grad(weighted, velocity)
    assert_close_to_oracle(gradient, tensors["grad_per_sample/predicted_velocity"], TOLERANCE)


def test_loss_without_masks_equals_the_plain_mean() -> None:
    tensors, _ = load_oracle("flow_matching/loss_padding")
    loss, _ = flow_matching_loss(tensors["predicted_velocity"], tensors["target"])
    assert_close_to_oracle(loss, tensors["unmasked_loss"], TOLERANCE)
    assert not torch.isclose(loss, tensors["loss"]), "the oracle cannot tell the two apart"


def test_loss_is_zero_and_finite_where_nothing_is_valid() -> None:
    velocity = torch.full((2, 3, 4), torch.nan, requires_grad=True)
    loss, per_sample = flow_matching_loss(
        velocity, torch.zeros(2, 3, 4), torch.ones(2, 3, dtype=torch.bool)
    )
    loss.backward()
    assert loss == 0 and torch.equal(per_sample, torch.zeros(2))
    assert torch.equal(velocity.grad, torch.zeros(2, 3, 4))


def _field(tensors: dict[str, Tensor], name: str) -> Callable[[Tensor, Tensor], Tensor]:
    a, b, c = tensors["A"], tensors["b"], tensors["c"]

    def affine(x: Tensor, t: Tensor) -> Tensor:
        return x @ a + c + b * t

    def tanh(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x @ a + c) * torch.cos(2 * torch.pi * t) + b * t**2

    return {"affine": affine, "tanh": tanh}[name]


@pytest.mark.parametrize("num_steps", [1, 5, 10])
@pytest.mark.parametrize("case", ["euler_affine", "euler_tanh"])
def test_euler_sampler_matches_the_oracle_with_gradients(case: str, num_steps: int) -> None:
    tensors, metadata = load_oracle(f"flow_matching/{case}")
    leaves = {name: tensors[name].requires_grad_() for name in ("noise", "A", "b", "c")}
    field = _field(leaves, metadata["field"])
    visited: list[Any] = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        visited.append((x, t))
        return field(x, t.view(-1, 1, 1))

    last = euler_sample(velocity, leaves["noise"], num_steps)
    trajectory = torch.stack([*(x for x, _ in visited), last])
    assert_close_to_oracle(trajectory, tensors[f"trajectory_{num_steps}"], TOLERANCE)
    times = torch.stack([t for _, t in visited])
    assert times.shape == (num_steps, leaves["noise"].shape[0])
    assert_close_to_oracle(times[:, 0], tensors[f"times_{num_steps}"], TOLERANCE)
    found = torch.autograd.grad(
        (last * tensors[f"grad_out_{num_steps}"]).sum(), list(leaves.values())
    )
    for name, gradient in zip(leaves, found, strict=True):
        assert_close_to_oracle(gradient, tensors[f"grad_{num_steps}/{name}"], TOLERANCE, name)


def test_sampler_needs_a_step() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        euler_sample(lambda x, t: x, torch.zeros(1, 1, 1), 0)


def test_time_quantiles_match_the_oracle() -> None:
    tensors, _ = load_oracle("flow_matching/time_distribution")
    assert_close_to_oracle(time_quantile(tensors["quantile_p"]), tensors["quantile_t"], EXACT)


def test_sampled_times_follow_the_distribution_of_the_oracle() -> None:
    tensors, _ = load_oracle("flow_matching/time_distribution")
    n = 100_000
    t = sample_time((n,), torch.Generator().manual_seed(0)).double()
    # Kolmogorov-Smirnov: 1.95 / sqrt(n) is passed by 1 draw in 1,000.
    bound = 1.95 / n**0.5
    for threshold, cdf in zip(tensors["t"], tensors["cdf"], strict=True):
        assert ((t <= threshold).double().mean() - cdf).abs() < bound
    # Five standard errors of the mean.
    assert (t.mean() - tensors["mean_t"]).abs() < 5 * (tensors["var_t"] / n).sqrt()
    assert ((t > 0.5).double().mean() - tensors["prob_t_above_half"]).abs() < bound
    assert t.min() >= 0.001 and t.max() <= 1.0


def test_sampled_times_come_from_the_generator() -> None:
    draws = [sample_time((2, 3), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    assert draws[0].shape == (2, 3)
