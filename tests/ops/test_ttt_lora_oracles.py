"""Both backends of `ops.ttt_lora` against an independent loop (tests/oracles/ttt_lora).

The files hold a whole layer; what is around the op is written out here.
"""

from itertools import pairwise
from typing import Any

import pytest
import torch
from helpers import ORACLES, load_oracle
from torch import Tensor
from torch.nn.functional import layer_norm, linear, normalize

from lightning_modules.ops import TTTLoRAState, ttt_lora

FILES = sorted(file.stem for file in (ORACLES / "ttt_lora").glob("*.safetensors"))
BACKENDS = ("naive", "torch")
DTYPES = {"float64": torch.float64, "float32": torch.float32}


def inputs(data: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The leaves of the layer, by their names in the file."""
    names = [key.removeprefix("grad/") for key in data if key.startswith("grad/")]
    return {name: data[name].to(dtype).requires_grad_() for name in names}


def initial_state(leaves: dict[str, Tensor], size: int) -> TTTLoRAState | None:
    """The state with which the file begins: changed weights, nothing pending."""
    if "initial_delta_W" not in leaves:
        return None
    dw, db = leaves["initial_delta_W"], leaves["initial_delta_b"]
    batch, d = db.shape
    none = torch.zeros(batch, dtype=torch.int64)
    blank = (db.new_zeros(batch, size, d), db.new_zeros(batch, size, d), db.new_zeros(batch, size))
    return TTTLoRAState(dw, db, *blank, none, none, none)


def layer(
    leaves: dict[str, Tensor],
    about: dict[str, Any],
    mask: Tensor | None,
    state: TTTLoRAState | None,
    backend: str,
    tokens: slice = slice(None),
) -> tuple[Tensor, Tensor, TTTLoRAState]:
    """y, o and the state of the layer for some of its tokens."""
    x = leaves["x"][:, tokens]
    q, k, v = (linear(x, leaves[f"theta_{name}.weight"]) for name in "qkv")
    if about["l2norm_qk"]:
        q, k = normalize(q, dim=-1), normalize(k, dim=-1)
    eta = leaves["lr_gate"].sigmoid().squeeze(0)
    mask = None if mask is None else mask[:, tokens]
    if mask is not None and about["mask_slots"].startswith("positional"):
        # A masked token that takes a slot and contributes nothing is a token with eta 0.
        eta, mask = eta * mask.to(x.dtype), None
    norm = (leaves["ln.weight"], leaves["ln.bias"]) if about["inner_loss"] == "ln" else (None, None)
    o, new = ttt_lora(
        q,
        k,
        v,
        eta,
        leaves["W_base"],
        leaves["b_base"],
        mini_batch_size=about["mini_batch"],
        mode=about["mode"][0],
        loss=about["inner_loss"],
        norm_weight=norm[0],
        norm_bias=norm[1],
        norm_eps=about["ln_eps"],
        mask=mask,
        state=state,
        backend=backend,
    )
    c = o
    if about["output_norm"]:
        c = layer_norm(o, o.shape[-1:], leaves["ln.weight"], leaves["ln.bias"], about["ln_eps"])
    c = c + q if about["q_residual"] else c
    y = linear(x, leaves["base.weight"], leaves.get("base.bias"))
    return y + about["scaling"] * linear(c, leaves["theta_out.weight"]), o, new


def assert_close(actual: Tensor, reference: Tensor, about: dict[str, Any], name: str) -> None:
    """The tolerances are the file's: of a float64 loop, and of one in float32."""
    relative, absolute = (about["rtol"], about["atol"])
    if actual.dtype == torch.float32:
        relative, absolute = 1e-4, 1e-5
    assert actual.shape == reference.shape, name
    error = (actual.double() - reference).abs().max().item() if reference.numel() else 0.0
    scale = reference.abs().max().item() if reference.numel() else 0.0
    assert error <= relative * scale + absolute, f"{name}: {error:.3g} of {scale:.3g}"


def check_state(state: TTTLoRAState, data: dict[str, Tensor], about: dict[str, Any]) -> None:
    assert_close(state.dw, data["final_delta_W"], about, "final_delta_W")
    assert_close(state.db, data["final_delta_b"], about, "final_delta_b")
    assert torch.equal(state.pending_count, data["pending_count"])
    if "pending_k" not in data:
        assert not state.pending_count.any()
        return
    here = data["pending_mask"].unsqueeze(-1)
    length = here.shape[1]
    for name in ("pending_k", "pending_v"):
        assert_close(getattr(state, name)[:, :length] * here, data[name] * here, about, name)


@pytest.mark.quick("*-float64-torch", "B_ln_initial_state_masked-*")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("file", FILES)
def test_layer_matches_independent_loop(file: str, dtype: str, backend: str) -> None:
    data, about = load_oracle(f"ttt_lora/{file}")
    leaves = inputs(data, DTYPES[dtype])
    state = initial_state(leaves, about["mini_batch"])
    y, o, new = layer(leaves, about, data.get("mask"), state, backend)
    assert_close(o, data["fast_out"], about, "fast_out")
    assert_close(y, data["y"], about, "y")
    check_state(new, data, about)

    losses = {
        "grad": (y * data["grad_out"].to(y.dtype)).sum(),
        "grad_state": (new.dw * data["grad_final_delta_W"].to(y.dtype)).sum(),
    }
    for prefix, loss in losses.items():
        gradients = [None] * len(leaves)
        if loss.requires_grad:
            gradients = torch.autograd.grad(
                loss, list(leaves.values()), allow_unused=True, retain_graph=True
            )
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
            got = torch.zeros_like(leaf) if gradient is None else gradient
            assert_close(got, data[f"{prefix}/{name}"], about, f"{prefix}/{name}")


@pytest.mark.quick("*-torch", "A_ln_m4-naive")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("file", FILES)
def test_split_stream_matches_independent_loop(file: str, backend: str) -> None:
    data, about = load_oracle(f"ttt_lora/{file}")
    leaves = inputs(data, torch.float64)
    state, parts = initial_state(leaves, about["mini_batch"]), []
    for start, stop in pairwise(data["stream_splits"].tolist()):
        y, _, state = layer(leaves, about, data.get("mask"), state, backend, slice(start, stop))
        parts.append(y)
    y = torch.cat(parts, dim=1)
    assert_close(y, data["y"], about, "y")
    check_state(state, data, about)
    gradients = torch.autograd.grad(
        (y * data["grad_out"]).sum(), list(leaves.values()), allow_unused=True
    )
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        got = torch.zeros_like(leaf) if gradient is None else gradient
        assert_close(got, data[f"grad/{name}"], about, f"grad/{name}")


@pytest.mark.parametrize("file", [file for file in FILES if "zero_theta_out" in file])
def test_zero_theta_out_is_the_base_layer_bit_for_bit(file: str) -> None:
    data, about = load_oracle(f"ttt_lora/{file}")
    leaves = inputs(data, torch.float64)
    y, _, _ = layer(leaves, about, None, None, "torch")
    assert torch.equal(y, linear(leaves["x"], leaves["base.weight"], leaves["base.bias"]))
    named = {n: g for n, g in data.items() if n.startswith("grad/")}
    learning = {name.removeprefix("grad/") for name, g in named.items() if g.any()}
    assert learning == {"x", "base.weight", "base.bias", "theta_out.weight"}


def test_every_file_of_the_folder_is_run() -> None:
    assert len(FILES) == 32
    assert sum("no_slot" in file for file in FILES) == 4
