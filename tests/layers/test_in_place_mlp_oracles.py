"""InPlaceMLP and its convolution against tests/oracles/in_place_ttt: outputs, every gradient."""

import pytest
import torch
from helpers import ORACLES, load_oracle
from in_place_mlp_cases import oracle_layer, read
from torch import Tensor

from lightning_modules.layers.chunk_conv import ChunkConv

FILES = sorted(path.stem for path in (ORACLES / "in_place_ttt").glob("layer_*.safetensors"))
DTYPES = {"float64": torch.float64, "float32": torch.float32}
FLAGS = ("target_states", "document_ids", "mask")
"""The mask of the file that has one is padding on the right, where it does not matter that masked
tokens take a place in their chunk there."""


def assert_near(actual: Tensor, expected: Tensor, name: str) -> None:
    """Within the tolerances that the files recommend for the dtype."""
    if actual.dtype == torch.float64:
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10, msg=name)
    else:
        error = (actual.double() - expected).abs().max()
        assert error <= 1e-4 * expected.abs().max() + 1e-5, name


def splits(length: int) -> list[list[int]]:
    return [[length], [1] * length, [4, 1, 5, 4], [6, 2, 6]]


@pytest.mark.quick("*-float64")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", splits(14), ids=str)
@pytest.mark.parametrize("name", FILES)
def test_any_split_matches_the_loop(name: str, sizes: list[int], dtype: str) -> None:
    data, about = load_oracle(f"in_place_ttt/{name}")
    layer = oracle_layer(data, about).to(DTYPES[dtype])
    flags = {key: data[key] for key in FLAGS if key in data}
    leaves = {"x": data["x"].to(DTYPES[dtype]).requires_grad_()}
    if "target_states" in flags:
        flags["target_states"] = flags["target_states"].to(DTYPES[dtype]).requires_grad_()
        leaves["target_states"] = flags["target_states"]
    out, state = read(layer, leaves["x"], sizes, **flags)
    assert_near(out, data["out"], "out")
    assert_near(state.dw, data["final_dW"], "final_dW")
    leaves |= {key.removeprefix("ttt."): value for key, value in layer.named_parameters()}
    assert len(leaves) == sum(key.startswith("grad/") for key in data)
    loss = (out * data["grad_out"].to(out.dtype)).sum()
    found = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    for key, gradient in zip(leaves, found, strict=True):
        gradient = gradient.T if key == "ttt_proj.weight" else gradient
        assert_near(gradient, data[f"grad/{key}"], f"grad/{key}")


@pytest.mark.parametrize("name", [name for name in FILES if "no_projection" not in name])
def test_projection_loaded_without_the_transpose_does_not_match(name: str) -> None:
    data, about = load_oracle(f"in_place_ttt/{name}")
    layer = oracle_layer(data, about)
    flags = {key: data[key] for key in FLAGS if key in data}
    with torch.no_grad():
        layer.ttt.ttt_proj.weight.copy_(data["ttt_proj.weight"])
        assert not torch.allclose(layer(data["x"], **flags), data["out"], atol=1e-3)


@pytest.mark.parametrize("name", FILES)
def test_the_other_kind_of_convolution_does_not_match(name: str) -> None:
    data, about = load_oracle(f"in_place_ttt/{name}")
    about["conv"] = "causal" if about["conv"] == "symmetric" else "symmetric"
    flags = {key: data[key] for key in FLAGS if key in data}
    out = oracle_layer(data, about)(data["x"], **flags)
    assert not torch.allclose(out, data["out"], atol=1e-3)


@pytest.mark.parametrize("kind", ["causal", "symmetric"])
def test_convolution_inside_chunks_matches_the_loop(kind: str) -> None:
    data, about = load_oracle("in_place_ttt/chunk_conv")
    conv = ChunkConv(5, about["kernel"], symmetric=kind == "symmetric").double()
    weight, x = conv.weight, data["x"].requires_grad_()
    conv.load_state_dict({"weight": data["ttt_conv.weight"]})
    out = conv(x, (torch.arange(14) // about["chunk"]).expand(2, -1))
    assert_near(out, data[f"out_{kind}"], "out")
    found = torch.autograd.grad((out * data[f"grad_out_{kind}"]).sum(), [x, weight])
    for name, gradient in zip(("x", "ttt_conv.weight"), found, strict=True):
        assert_near(gradient, data[f"grad_{kind}/{name}"], name)
    across = conv(x, torch.zeros(2, 14, dtype=torch.int64))
    assert not torch.allclose(across, data[f"out_{kind}"], atol=1e-3)


def test_every_file_of_the_layer_is_run() -> None:
    assert len(FILES) == 7
