"""MemoryAttention against github.com/Tasmay-Tibrewal/Memory: outputs, every gradient."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bank_cases import Chosen, oracle_attention, our_name, standard_bank
from helpers import ORACLES, load_oracle
from torch import Tensor

from lightning_modules.layers.memory_attention import MemoryAttention
from lightning_modules.layers.memory_options import RouterConfig

CASES = sorted(path.stem for path in (ORACLES / "memory_attention").glob("ref_*.safetensors"))
ROUTED = [case for case in CASES if "routed" in case]
Read = Callable[[MemoryAttention, dict[str, Tensor], dict[str, Any]], Tensor]


def _router(metadata: dict[str, Any], **changed: Any) -> RouterConfig:
    options = {
        "num_chapters": metadata["num_chapters"],
        "top_k": metadata["top_k"],
        "strategy": "token",
        "shared": metadata["num_shared"],
        "mixing": "mixture" if metadata["semantics"] == "mixture" else "joint",
    }
    return RouterConfig(**{**options, **changed})


def _routing(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> Chosen:
    if "weights" not in tensors:
        return Chosen(tensors["selected"], torch.zeros_like(tensors["selected"], dtype=torch.float))
    scaled = tensors["weights"] * metadata["routed_scaling"]
    return Chosen(tensors["selected"], scaled.log())


def _read(
    layer: MemoryAttention, tensors: dict[str, Tensor], metadata: dict[str, Any], **changed: Any
) -> Tensor:
    """Output; a bank of its own for every row where the oracle has one."""
    x, memory = tensors["hidden_states"], tensors["memory"]
    if metadata["kind"] == "routed_layer":
        routing, router = _routing(tensors, metadata), _router(metadata, **changed)
        projected = _projected(layer, memory, router.num_chapters)
        return layer(x, standard_bank(memory), routing, router, projected=projected)
    if not metadata["batched_memory"]:
        return layer(x, standard_bank(memory), projected=_projected(layer, memory, 1))
    rows = [
        layer(x[b : b + 1], standard_bank(rows), projected=_projected(layer, rows, 1))
        for b, rows in enumerate(memory)
    ]
    return torch.cat(rows)


def _projected(layer: MemoryAttention, memory: Tensor, chapters: int) -> tuple[Tensor, Tensor]:
    """Of rows that are a leaf of the test, as a bank's parameter would be a copy."""
    return layer.project(memory.unflatten(0, (chapters, -1)))


def _values(case: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Output and gradients, actual and of the oracle, under published names."""
    tensors, metadata = load_oracle(f"memory_attention/{case}")
    expected = {name[5:]: value for name, value in tensors.items() if name.startswith("grad/")}
    expected["out"] = tensors["out"]
    layer = oracle_attention(tensors, metadata).to(dtype)
    tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
    weights = dict(layer.named_parameters())
    leaves = {
        name: weights[our_name(name)]
        if name.endswith(".weight")
        else tensors[name].requires_grad_()
        for name in expected.keys() - {"out"}
    }
    assert set(leaves) >= {"hidden_states", "memory"} and len(leaves) >= len(weights) + 2
    out = _read(layer, tensors, metadata)
    loss = (out * tensors["grad_out"]).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return {"out": out, **dict(zip(leaves, gradients, strict=True))}, expected


def test_there_are_oracles() -> None:
    assert len(CASES) == 13 and len(ROUTED) == 4


@pytest.mark.parametrize("case", CASES)
def test_output_and_every_gradient_match_the_oracle_in_float64(case: str) -> None:
    actual, expected = _values(case, torch.float64)
    for name, reference in expected.items():
        torch.testing.assert_close(actual[name], reference, rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_output_and_every_gradient_stay_within_the_oracles_float32_tolerance(case: str) -> None:
    actual, expected = _values(case, torch.float32)
    for name, reference in expected.items():
        assert actual[name].dtype == torch.float32
        error = (actual[name].double() - reference).abs().max()
        assert error <= 1e-4 * reference.abs().max() + 1e-5, name


@pytest.mark.parametrize("case", CASES)
def test_a_bank_as_a_module_reads_what_its_projected_rows_do(case: str) -> None:
    tensors, metadata = load_oracle(f"memory_attention/{case}")
    layer, x = oracle_attention(tensors, metadata), tensors["hidden_states"]
    if metadata["kind"] == "routed_layer":
        bank = standard_bank(tensors["memory"])
        out = layer(x, bank, _routing(tensors, metadata), _router(metadata))
    elif metadata["batched_memory"]:
        banks = [standard_bank(rows) for rows in tensors["memory"]]
        out = torch.cat([layer(row[None], bank) for row, bank in zip(x, banks, strict=True)])
    else:
        out = layer(x, standard_bank(tensors["memory"]))
    torch.testing.assert_close(out, tensors["out"], rtol=1e-9, atol=1e-10)


def _keys_as_values(layer: MemoryAttention) -> None:
    with torch.no_grad():
        for key, value in zip(layer.key.parameters(), layer.value.parameters(), strict=True):
            value.copy_(key)


@pytest.mark.parametrize("case", CASES)
def test_wrong_variant_that_reads_keys_as_values_does_not_match(case: str) -> None:
    tensors, metadata = load_oracle(f"memory_attention/{case}")
    layer = oracle_attention(tensors, metadata)
    _keys_as_values(layer)
    assert not torch.allclose(_read(layer, tensors, metadata), tensors["out"], rtol=1e-3)


@pytest.mark.parametrize("case", ROUTED)
def test_wrong_variant_of_the_mixing_does_not_match(case: str) -> None:
    tensors, metadata = load_oracle(f"memory_attention/{case}")
    other = "joint" if metadata["semantics"] == "mixture" else "mixture"
    wrong = _read(oracle_attention(tensors, metadata), tensors, metadata, mixing=other)
    assert not torch.allclose(wrong, tensors["out"], rtol=1e-3)


def test_wrong_variant_without_the_scaling_of_routed_chapters_does_not_match() -> None:
    tensors, metadata = load_oracle("memory_attention/ref_routed_mixture_shared")
    assert metadata["routed_scaling"] != 1
    metadata["routed_scaling"] = 1
    wrong = _read(oracle_attention(tensors, metadata), tensors, metadata)
    assert not torch.allclose(wrong, tensors["out"], rtol=1e-3)
