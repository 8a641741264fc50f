"""LaCTLayer against LaCTSWIGLULayer of github.com/a1600012888/LaCT: outputs, every gradient."""

from typing import Any

import pytest
import torch
from helpers import ORACLES, assert_close_to_oracle, load_oracle
from lact_model_cases import OPTIONS, lact_layer_config
from torch import Tensor

from lightning_modules.layers.lact import LaCTLayer

CASES = sorted(path.stem for path in (ORACLES / "lact_layer").glob("*.safetensors"))


def _layer(tensors: dict[str, Tensor], metadata: dict[str, Any], **changed: Any) -> LaCTLayer:
    given = {**metadata, **changed, "muon_dtype": "float64"}
    names = {name: given[name] for name in OPTIONS & given.keys()}
    layer = LaCTLayer(lact_layer_config(metadata["hidden_size"], **names)).double()
    parameters = {key[6:]: value for key, value in tensors.items() if key.startswith("param/")}
    layer.load_state_dict(parameters)
    return layer


def test_there_are_oracles() -> None:
    assert len(CASES) == 5


@pytest.mark.parametrize("case", CASES)
def test_layer_matches_the_oracle_in_output_and_gradients(case: str) -> None:
    tensors, metadata = load_oracle(f"lact_layer/{case}")
    layer, x = _layer(tensors, metadata), tensors["x"].requires_grad_()
    out, _ = layer(x)
    assert_close_to_oracle(out, tensors["out"], metadata["tolerance"], "out")
    leaves = {"x": x} | {f"param/{name}": value for name, value in layer.named_parameters()}
    loss = (out * tensors["grad_out"]).sum()
    found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    assert len(found) == sum(key.startswith("grad/") for key in tensors)
    for name, gradient in zip(leaves, found, strict=True):
        reference = tensors[f"grad/{name}"]
        assert_close_to_oracle(gradient, reference, metadata["tolerance_grad"], name)


@pytest.mark.parametrize("case", CASES)
def test_layer_in_float32_stays_within_the_float32_tolerances(case: str) -> None:
    tensors, metadata = load_oracle(f"lact_layer/{case}")
    layer, x = _layer(tensors, metadata).float(), tensors["x"].float().requires_grad_()
    out, state = layer(x)
    assert out.dtype == state.memory.w0.dtype == state.window.keys.dtype == torch.float32
    assert_close_to_oracle(out, tensors["out"], metadata["tolerance_float32"], "out")
    loss = (out * tensors["grad_out"].float()).sum()
    leaves = {"x": x} | {f"param/{name}": value for name, value in layer.named_parameters()}
    found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    for name, gradient in zip(leaves, found, strict=True):
        reference = tensors[f"grad/{name}"]
        assert_close_to_oracle(gradient, reference, metadata["tolerance_grad_float32"], name)


@pytest.mark.parametrize("case", CASES)
def test_token_by_token_matches_the_oracle_of_one_pass(case: str) -> None:
    tensors, metadata = load_oracle(f"lact_layer/{case}")
    layer, state, out = _layer(tensors, metadata), None, []
    for token in tensors["x"].split(1, dim=1):
        part, state = layer(token, state=state)
        out.append(part)
    assert_close_to_oracle(torch.cat(out, 1), tensors["out"], metadata["tolerance"], "out")


WRONG = {
    "low_rank_init": {"qkv_silu": False},
    "nope_prenorm_momentum_qkv_bias": {"ttt_nope": False},
    "qk_norm": {"window_size": 5},
    "short_sequence_no_update": {"rope_theta": 500_000.0},
    "ttt_scale_momentum": {"lact_chunk_size": 7},
}


@pytest.mark.parametrize("case", CASES)
def test_wrong_variant_of_an_option_does_not_match_the_oracle(case: str) -> None:
    tensors, metadata = load_oracle(f"lact_layer/{case}")
    out, _ = _layer(tensors, metadata, **WRONG[case])(tensors["x"])
    with pytest.raises(AssertionError, match="error"):
        assert_close_to_oracle(out, tensors["out"], 1e-4, "out")
