"""AdaRMSNorm: against openpi's norm (oracles/adarms/norm_*), its retrofit, its errors."""

from typing import Any

import pytest
import torch
from helpers import assert_close_to_oracle, load_oracle
from torch import Tensor
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from lightning_modules.layers.adarms import AdaRMSNorm, Modulation, gated_residual

# norm_* were made in float64 (README: rtol 1e-9), *_f32 with the reference's own float32 roundings.
CASES = {
    "norm_plain": 1e-9,
    "norm_adaptive": 1e-9,
    "norm_adaptive_small_input": 1e-9,
    "norm_adaptive_token_cond": 1e-9,
    "norm_plain_f32": 1e-4,
    "norm_adaptive_f32": 1e-4,
}


def _oracle_norm(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> AdaRMSNorm:
    norm = AdaRMSNorm(metadata["dim"], metadata["cond_dim"] or None, metadata["eps"])
    norm.to(tensors["x"].dtype)
    norm.load_state_dict({name: tensors[name] for name, _ in norm.named_parameters()})
    return norm


def _gradients(norm: AdaRMSNorm, inputs: dict[str, Tensor], loss: Tensor) -> dict[str, Tensor]:
    leaves = {**inputs, **dict(norm.named_parameters())}
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_norm_matches_the_openpi_oracle_with_gate_and_gradients(case: str) -> None:
    tensors, metadata = load_oracle(f"adarms/{case}")
    norm = _oracle_norm(tensors, metadata)
    inputs = {name: tensors[name].requires_grad_() for name in ("x", "cond") if name in tensors}
    out, gate = norm(**inputs)
    assert_close_to_oracle(out, tensors["out"], CASES[case], "out")
    if "gate" in tensors:
        assert_close_to_oracle(gate, tensors["gate"], CASES[case], "gate")
    else:
        assert gate is None
    gradients = _gradients(norm, inputs, (out * tensors["grad_out"]).sum())
    for name, gradient in gradients.items():
        assert_close_to_oracle(gradient, tensors[f"grad/{name}"], CASES[case], f"grad/{name}")


@pytest.mark.parametrize("case", [case for case in CASES if "token_cond" not in case])
def test_gated_residual_matches_the_openpi_oracle(case: str) -> None:
    tensors, metadata = load_oracle(f"adarms/{case}")
    norm = _oracle_norm(tensors, metadata)
    inputs = {
        name: tensors[name].requires_grad_() for name in ("x", "cond", "branch") if name in tensors
    }
    _, gate = norm(inputs["x"], inputs.get("cond"))
    out = gated_residual(inputs["x"], inputs["branch"], gate)
    assert_close_to_oracle(out, tensors["residual_out"], CASES[case], "residual_out")
    gradients = _gradients(norm, inputs, (out * tensors["grad_residual_out"]).sum())
    for name, gradient in gradients.items():
        key = f"grad_residual/{name}"
        if key in tensors:
            assert_close_to_oracle(gradient, tensors[key], CASES[case], key)


def test_segments_equal_the_condition_spread_over_tokens() -> None:
    norm = AdaRMSNorm(8, 4).double()
    torch.nn.init.normal_(norm.dense.weight)
    torch.nn.init.normal_(norm.dense.bias)
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    cond = torch.randn(2, 3, 4, dtype=torch.float64)
    segments = torch.tensor([0, 2, 2, 1, 0])
    for ours, spread in zip(norm(x, cond, segments), norm(x, cond[:, segments]), strict=True):
        torch.testing.assert_close(ours, spread)


def test_zero_condition_row_uses_the_bias_alone() -> None:
    norm = AdaRMSNorm(4, 3)
    torch.nn.init.normal_(norm.dense.weight)
    torch.nn.init.normal_(norm.dense.bias)
    cond = torch.stack([torch.zeros(2, 3), torch.randn(2, 3)], dim=1)
    _, gate = norm(torch.randn(2, 2, 4), cond, torch.tensor([0, 1]))
    assert torch.equal(gate[:, 0], norm.dense.bias[8:].expand(2, -1))


def test_fresh_adaptive_norm_only_normalises_and_closes_its_gate() -> None:
    norm, plain = AdaRMSNorm(8, 4), AdaRMSNorm(8)
    x = torch.randn(2, 3, 8)
    out, gate = norm(x, torch.randn(2, 4))
    assert torch.equal(out, plain(x)[0])
    assert torch.equal(gate, torch.zeros(2, 1, 8))


@pytest.mark.parametrize("cond_size", [None, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_retrofit_equals_gemma_norm_bit_for_bit(cond_size: int | None, dtype: torch.dtype) -> None:
    gemma = GemmaRMSNorm(16).to(dtype)
    torch.nn.init.normal_(gemma.weight)
    norm = AdaRMSNorm.retrofit(gemma.weight, cond_size, gemma.eps)
    x = torch.randn(2, 5, 16).to(dtype)
    out, gate = norm(x, None if cond_size is None else torch.randn(2, 4).to(dtype))
    assert out.dtype == dtype
    assert torch.equal(out, gemma(x))
    assert gate is None or torch.equal(gate, torch.ones(2, 1, 16, dtype=dtype))


def test_autocast_changes_nothing() -> None:
    norm = AdaRMSNorm.retrofit(torch.randn(16), 4)
    torch.nn.init.normal_(norm.dense.weight)
    x, cond = torch.randn(2, 5, 16), torch.randn(2, 4)
    expected = norm(x, cond)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = norm(x, cond)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_condition_is_never_accepted_and_ignored() -> None:
    x, cond = torch.randn(2, 3, 8), torch.randn(2, 4)
    with pytest.raises(ValueError, match="would ignore cond"):
        AdaRMSNorm(8)(x, cond)
    with pytest.raises(ValueError, match="pass cond"):
        AdaRMSNorm(8, 4)(x)


@pytest.mark.parametrize(
    ("cond", "segments", "message"),
    [
        (torch.zeros(2, 5), None, "cond_size"),
        (torch.zeros(2, 2, 4), None, "pass segments"),
        (torch.zeros(2, 4), torch.zeros(3, dtype=torch.long), "expected segments"),
        (torch.zeros(2, 2, 4), torch.zeros(4, dtype=torch.long), "expected segments"),
    ],
)
def test_shapes_that_do_not_fit_are_named(
    cond: Tensor, segments: Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Modulation(4, 6)(cond, 3, segments)
