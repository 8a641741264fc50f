"""Every backend of In-Place TTT against an independent loop (tests/oracles/in_place_ttt)."""

from typing import Any

import pytest
import torch
from helpers import ORACLES, load_oracle
from in_place_cases import BACKENDS, Case
from torch import Tensor

from lightning_modules.ops import InPlaceState

FILES = sorted(file.stem for file in (ORACLES / "in_place_ttt").glob("op*.safetensors"))
POSITIONAL = ["op_documents_masked", "op_masked"]
"""Masked tokens take a place in their chunks there, which they do not here."""
MET = [name for name in FILES if name not in POSITIONAL]
DTYPES = {"float64": torch.float64, "float32": torch.float32}
NAMES = {"Z": "z", "V": "v", "W_down": "w_down"}


def assert_near(actual: Tensor, expected: Tensor, name: str) -> None:
    """Within the tolerances that the files recommend for the dtype."""
    if actual.dtype == torch.float64:
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10, msg=name)
    else:
        error = (actual.double() - expected).abs().max()
        assert error <= 1e-4 * expected.abs().max() + 1e-5, name


def oracle_case(data: dict[str, Tensor], about: dict[str, Any], dtype: torch.dtype) -> Case:
    """The call that a file describes, with leaves that ask for gradients."""
    tensors = {ours: data[name].to(dtype).requires_grad_() for name, ours in NAMES.items()}
    tensors["eta"] = torch.tensor(about["eta"], dtype=dtype)
    options = {name: data[name] for name in ("document_ids", "mask") if name in data}
    options |= {"chunk_size": about["chunk"], "clip": about["clip_tau"] or None}
    case = Case(tensors, options)
    if "initial_dW" in data:
        dw = data["initial_dW"].to(dtype).requires_grad_()
        zero = torch.zeros(len(dw), dtype=torch.int64)
        case = case.with_state(InPlaceState(dw, torch.zeros_like(dw), zero, zero, zero))
    return case


def with_partial(state: InPlaceState, clip: float | None) -> Tensor:
    """S once the open chunk is added, too."""
    norm = state.pending_dw.flatten(1).norm(dim=1).view(-1, 1, 1)
    factor = torch.ones_like(norm) if clip is None else clip / norm.clamp(min=clip)
    return state.dw + factor * state.pending_dw


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MET)
def test_output_state_and_gradients_match_the_loop(name: str, dtype: str, backend: str) -> None:
    data, about = load_oracle(f"in_place_ttt/{name}")
    case = oracle_case(data, about, DTYPES[dtype])
    o, state = case.run(backend)
    assert_near(o, data["out"], "out")
    assert_near(state.dw, data["final_dW"], "final_dW")
    after = with_partial(state, case.options["clip"])
    assert_near(after, data["final_dW_with_partial"], "final_dW_with_partial")
    leaves = {key: case.tensors[ours] for key, ours in NAMES.items()}
    if case.state is not None:
        leaves["initial_dW"] = case.state.dw
    assert len(leaves) == sum(key.startswith("grad/") for key in data)
    losses = {
        "grad": (o * data["grad_out"].to(o.dtype)).sum(),
        # of an S that is zero, still, the loop has no graph
        "grad_state": (state.dw * data["grad_final_dW"].to(o.dtype)).sum() + 0 * o.sum(),
    }
    for prefix, loss in losses.items():
        found = torch.autograd.grad(
            loss, list(leaves.values()), retain_graph=True, materialize_grads=True
        )
        for key, gradient in zip(leaves, found, strict=True):
            if f"{prefix}/{key}" in data:
                assert_near(gradient, data[f"{prefix}/{key}"], f"{prefix}/{key}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", POSITIONAL)
def test_masked_files_match_with_eta_zero_in_place_of_the_mask(name: str, backend: str) -> None:
    """A token that takes its place but does not write: both conventions have it."""
    data, about = load_oracle(f"in_place_ttt/{name}")
    case = oracle_case(data, about, torch.float64)
    mask = case.options.pop("mask")
    case = case.with_tensors(eta=about["eta"] * mask.double())
    o, state = case.run(backend)
    assert_near(o, data["out"], "out")
    assert_near(state.dw, data["final_dW"], "final_dW")
    leaves = [case.tensors[name] for name in NAMES.values()]
    found = torch.autograd.grad((o * data["grad_out"]).sum(), leaves)
    for key, gradient in zip(NAMES, found, strict=True):
        assert_near(gradient, data[f"grad/{key}"], f"grad/{key}")


@pytest.mark.parametrize("name", POSITIONAL)
def test_masked_tokens_that_took_a_place_would_match_so_ours_do_not(name: str) -> None:
    data, about = load_oracle(f"in_place_ttt/{name}")
    o, _ = oracle_case(data, about, torch.float64).run("naive")
    assert not torch.allclose(o, data["out"], atol=1e-3)


def test_the_clip_of_the_oracle_takes_effect_in_some_chunks_only() -> None:
    data, about = load_oracle("in_place_ttt/op_clipped")
    larger = data["chunk_update_norms"] > about["clip_tau"]
    assert larger.any() and not larger.all()


def test_every_file_of_the_op_is_run() -> None:
    assert len(FILES) == 9
    assert set(POSITIONAL) < set(FILES)
