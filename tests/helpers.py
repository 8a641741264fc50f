"""Shared by the tests: reading oracle files, comparing with them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

ORACLES = Path(__file__).parent / "oracles"


def _decode(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def load_oracle(path: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read `tests/oracles/<path>` (".safetensors" may be left out) as tensors and metadata."""
    file = ORACLES / path
    if file.suffix != ".safetensors":
        file = file.with_name(file.name + ".safetensors")
    with safe_open(file, "pt") as data:
        metadata = {key: _decode(value) for key, value in (data.metadata() or {}).items()}
        tensors = {key: data.get_tensor(key) for key in data.keys()}  # noqa: SIM118 (not a dict)
    return tensors, metadata


def assert_close_to_oracle(
    actual: Tensor, reference: Tensor, tolerance: float, name: str = ""
) -> None:
    """Assert max|actual - reference| / max|reference| <= tolerance (1e-12 absolute for zeros)."""
    assert actual.shape == reference.shape, (
        f"{name}: shape {tuple(actual.shape)} instead of {tuple(reference.shape)}"
    )
    scale = reference.abs().max().item()
    error = (actual.double() - reference.double()).abs().max().item()
    if scale == 0:
        assert error <= 1e-12, f"{name}: {error:.3g} where the reference is exactly zero"
    else:
        assert torch.isfinite(actual).all(), f"{name}: not finite"
        assert error / scale <= tolerance, f"{name}: error {error / scale:.3g} > {tolerance:.3g}"
