"""Every backend of chapter attention against the loop in tests/oracles/memory_attention."""

from typing import Any

import pytest
import torch
from chapter_cases import BACKENDS, Case
from helpers import ORACLES, load_oracle
from torch import Tensor

FILES = sorted(file.stem for file in (ORACLES / "memory_attention").glob("op_*.safetensors"))
DTYPES = {"float64": torch.float64, "float32": torch.float32}
GRADIENTS = {"q": "q", "mem_k": "k", "mem_v": "v", "weights": "weights"}


def oracle_case(
    data: dict[str, Tensor], about: dict[str, Any], dtype: torch.dtype
) -> tuple[Case, dict[str, Tensor]]:
    """The call of a file, and its leaves: weights, not their logarithms, are differentiated."""
    rows = about["rows_per_chapter"]
    leaves = {"q": data["q"].to(dtype).requires_grad_()}
    for name in ("k", "v"):
        leaves[f"mem_{name}"] = data[name].unflatten(0, (-1, rows)).to(dtype).requires_grad_()
    tensors, options = dict(leaves), {"scale": about["scale"]}
    if "weights" in data:
        leaves["weights"] = data["weights"].to(dtype).requires_grad_()
        tensors["log_weights"] = (about["routed_scaling"] * leaves["weights"]).log()
        size = 1 if about["granularity"] == "token" else about["granularity"]
        options |= {"shared": about["num_shared"], "mixing": about["semantics"], "block_size": size}
        if "per shared chapter" in str(about.get("shared_combination")):
            options["shared_mode"] = "per_chapter"
    return Case(tensors, data.get("selected"), options), leaves


def assert_close(name: str, actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """With the tolerances of the files' README."""
    if dtype == torch.float64:
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)
    else:
        error = (actual.double() - expected).abs().max().item()
        assert error <= 1e-4 * expected.abs().max().item() + 1e-5, f"{name}: {error:.3g}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("file", FILES)
def test_outputs_lse_and_gradients_are_those_of_the_loop(
    file: str, dtype: str, backend: str
) -> None:
    data, about = load_oracle(f"memory_attention/{file}")
    case, leaves = oracle_case(data, about, DTYPES[dtype])
    outputs = case.outputs(backend)
    assert ("lse" in outputs) == ("lse" in data)
    assert_close("out", outputs["o"], data["out"], DTYPES[dtype])
    if "lse" in data:
        assert_close("lse", outputs["lse"], data["lse"], DTYPES[dtype])
    loss = (outputs["o"] * data["grad_out"].to(DTYPES[dtype])).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    assert len(leaves) == sum(key.startswith("grad/") for key in data)
    for name, gradient in zip(leaves, gradients, strict=True):
        expected = data[f"grad/{GRADIENTS[name]}"]
        assert_close(name, gradient.reshape(expected.shape), expected, DTYPES[dtype])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("file", [file for file in FILES if "unrouted" in file])
def test_the_whole_bank_without_lse_is_that_of_the_loop(file: str, backend: str) -> None:
    """The torch backend has a path of its own for it."""
    data, about = load_oracle(f"memory_attention/{file}")
    case, leaves = oracle_case(data, about, torch.float64)
    o = case.run(backend)
    assert_close("out", o, data["out"], torch.float64)
    gradients = torch.autograd.grad((o * data["grad_out"]).sum(), list(leaves.values()))
    for name, gradient in zip(leaves, gradients, strict=True):
        expected = data[f"grad/{GRADIENTS[name]}"]
        assert_close(name, gradient.reshape(expected.shape), expected, torch.float64)


def test_all_files_are_there() -> None:
    assert len(FILES) == 16
