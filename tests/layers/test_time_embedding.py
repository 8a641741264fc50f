"""Time features and their modules against oracles/flow_matching (float64)."""

from typing import Any

import pytest
import torch
from helpers import assert_close_to_oracle, load_oracle
from torch import Tensor, nn

from lightning_modules.layers.time_embedding import (
    ActionTimeEmbedding,
    TimeMLP,
    sincos_embedding,
)

TOLERANCE = 1e-9
# Phases reach 2 pi / 4e-3 = 1571 rad, of which float32 keeps about 1e-4 (README: atol 2e-3).
FLOAT32_TOLERANCE = 2e-3


@pytest.mark.parametrize("case", ["sincos", "sincos_other_periods"])
def test_sincos_matches_the_oracle(case: str) -> None:
    tensors, metadata = load_oracle(f"flow_matching/{case}")
    t = tensors["t"].requires_grad_()
    out = sincos_embedding(t, metadata["width"], metadata["min_period"], metadata["max_period"])
    assert_close_to_oracle(out, tensors["out"], TOLERANCE)
    (gradient,) = torch.autograd.grad((out * tensors["grad_out"]).sum(), t)
    assert_close_to_oracle(gradient, tensors["grad/t"], TOLERANCE)


def test_sincos_in_float32_stays_near_the_oracle() -> None:
    tensors, metadata = load_oracle("flow_matching/sincos")
    out = sincos_embedding(tensors["t"].float(), metadata["width"])
    assert out.dtype == torch.float32
    assert (out - tensors["out"]).abs().max() < FLOAT32_TOLERANCE


def _check(module: nn.Module, inputs: dict[str, Tensor], tensors: dict[str, Tensor]) -> None:
    module.double()
    module.load_state_dict({name: tensors[name] for name, _ in module.named_parameters()})
    leaves: dict[str, Any] = {name: value.requires_grad_() for name, value in inputs.items()}
    out = module(**leaves)
    assert_close_to_oracle(out, tensors["out"], TOLERANCE, "out")
    leaves |= dict(module.named_parameters())
    found = torch.autograd.grad((out * tensors["grad_out"]).sum(), list(leaves.values()))
    for name, gradient in zip(leaves, found, strict=True):
        assert_close_to_oracle(gradient, tensors[f"grad/{name}"], TOLERANCE, name)


def test_time_mlp_matches_the_oracle_with_gradients() -> None:
    tensors, metadata = load_oracle("flow_matching/time_mlp")
    module = TimeMLP(metadata["width"], metadata["min_period"], metadata["max_period"])
    _check(module, {"t": tensors["t"]}, tensors)


def test_action_time_embedding_matches_the_oracle_with_gradients() -> None:
    tensors, metadata = load_oracle("flow_matching/action_time_embedding")
    module = ActionTimeEmbedding(
        metadata["state_dim"],
        metadata["action_dim"],
        metadata["width"],
        metadata["min_period"],
        metadata["max_period"],
    )
    _check(module, {name: tensors[name] for name in ("state", "noisy_actions", "t")}, tensors)


def test_odd_width_is_an_error() -> None:
    with pytest.raises(ValueError, match="must be even"):
        sincos_embedding(torch.zeros(2), 7)


@pytest.mark.parametrize("module", [TimeMLP(8), ActionTimeEmbedding(3, 2, 8)])
def test_bfloat16_weights_keep_float32_phases(module: nn.Module) -> None:
    inputs = [torch.zeros(2, 3), torch.zeros(2, 4, 2)] if not isinstance(module, TimeMLP) else []
    t = torch.tensor([0.1234567, 0.7654321])
    expected = module.float()(*inputs, t)
    actual = module.bfloat16()(*(value.bfloat16() for value in inputs), t)
    torch.testing.assert_close(actual.float(), expected, atol=0.02, rtol=0.02)
