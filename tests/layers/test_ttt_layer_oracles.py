"""TTTLayer against ttt-lm-pytorch (ttt_linear_causal, ttt_mlp_causal) and float64 loops
(ttt_noncausal/bp_layer_*, adarms/ttt_batch_parallel*): outputs, states, gradients, decoding."""

from typing import Any

import pytest
import torch
from gemma_cases import TTT_NAMES
from helpers import assert_close_to_oracle, load_oracle
from torch import Tensor

from lightning_modules.layers.ttt import TTTConfig, TTTLayer
from lightning_modules.layers.ttt_statistics import inner_objective

CAUSAL = [
    f"ttt_{kind}_causal/layer_{case}"
    for kind in ("linear", "mlp")
    for case in ("K16_L37", "K1_L6", "K4_L11_gate", "K4_L12", "K8_L5_gate")
]
STREAMED = [case for case in CAUSAL if case.endswith("K4_L12")]
NON_CAUSAL = [f"ttt_noncausal/bp_layer_{case}" for case in ("L1", "L16", "L51")]


def _layer(tensors: dict[str, Tensor], metadata: dict[str, Any]) -> TTTLayer:
    config = TTTConfig(
        kind=metadata["layer"],
        num_heads=metadata["num_heads"],
        base_lr=metadata["ttt_base_lr"],
        causal="mini_batch_size" in metadata,
        mini_batch_size=metadata.get("mini_batch_size"),
        use_gate=metadata.get("use_gate", False),
        eps=metadata["eps_ttt_norm"],
    )
    layer = TTTLayer(metadata["hidden_size"], config).double()
    prefix = "param/"
    layer.load_state_dict(
        {key.removeprefix(prefix): value for key, value in tensors.items() if prefix == key[:6]}
    )
    return layer


def _check_weights(
    layer: TTTLayer, state: Any, tensors: dict[str, Tensor], prefix: str, tolerance: float
) -> None:
    """Compare learned initial weights + state with `<prefix>W1`, ..."""
    names = ("W1", "b1", "W2", "b2")[: len(layer.fast_weights)]
    for name, weight, delta in zip(names, layer.fast_weights, state, strict=False):
        assert_close_to_oracle(weight + delta, tensors[prefix + name], tolerance, prefix + name)


def _check_gradients(
    layer: TTTLayer,
    loss: Tensor,
    inputs: dict[str, Tensor],
    tensors: dict[str, Tensor],
    tolerance: float,
) -> None:
    leaves = {f"param/{name}": value for name, value in layer.named_parameters()} | inputs
    found = torch.autograd.grad(loss, list(leaves.values()))
    for name, gradient in zip(leaves, found, strict=True):
        assert_close_to_oracle(gradient, tensors[f"grad/{name}"], tolerance, f"grad/{name}")


@pytest.mark.parametrize("case", [*CAUSAL, *NON_CAUSAL])
def test_layer_matches_the_oracle_in_outputs_state_and_gradients(case: str) -> None:
    tensors, metadata = load_oracle(case)
    layer = _layer(tensors, metadata)
    x = tensors["x"].requires_grad_()
    out, state = layer(x, flush=True)
    assert_close_to_oracle(out, tensors["out"], metadata["tolerance"], "out")
    _check_weights(layer, state, tensors, "final/", metadata["tolerance"])
    loss = (out * tensors["grad_out"]).sum()
    _check_gradients(layer, loss, {"x": x}, tensors, metadata["tolerance_grad"])


@pytest.mark.parametrize("case", [CAUSAL[2], CAUSAL[7], NON_CAUSAL[1]])
def test_layer_in_float32_stays_within_the_oracle_float32_tolerance(case: str) -> None:
    tensors, metadata = load_oracle(case)
    layer = _layer(tensors, metadata).float()
    out, state = layer(tensors["x"].float(), flush=True)
    assert state[0].dtype == torch.float32
    assert_close_to_oracle(out, tensors["out"], metadata["tolerance_float32"], "out")


def test_carried_state_matches_the_oracle_over_three_calls() -> None:
    tensors, metadata = load_oracle("ttt_noncausal/bp_layer_carried_3calls")
    layer = _layer(tensors, metadata)
    state, loss, inputs = None, 0.0, {}
    for call in range(metadata["calls"]):
        inputs[f"x_{call}"] = x = tensors[f"x_{call}"].requires_grad_()
        out, state = layer(x, state=state)
        assert_close_to_oracle(out, tensors[f"out_{call}"], metadata["tolerance"], f"out_{call}")
        _check_weights(layer, state, tensors, f"state_out_{call}/", metadata["tolerance"])
        loss = loss + (out * tensors[f"grad_out_{call}"]).sum()
    _check_gradients(layer, loss, inputs, tensors, metadata["tolerance_grad"])


def _open_gradients(layer: TTTLayer, state: Any) -> list[Tensor]:
    """`sum_j eta_j dl_j/dW` over the open mini-batch, at the weights with which it began."""
    deltas = [delta.detach().requires_grad_() for delta in state[: len(layer.fast_weights)]]
    loss = inner_objective(layer, state.pending_k, state.pending_v, tuple(deltas))
    return list(torch.autograd.grad((loss * state.pending_eta).sum(), deltas))


@pytest.mark.parametrize("case", STREAMED)
def test_token_by_token_matches_the_decoding_oracle(case: str) -> None:
    tensors, metadata = load_oracle(case)
    layer = _layer(tensors, metadata)
    tolerance = metadata["tolerance"]
    compared, state = [], None
    for t in range(metadata["seq_len"]):
        out, state = layer(tensors["x"][:, t : t + 1], state=state)
        expected = tensors["out_token_by_token"][:, t : t + 1]
        assert_close_to_oracle(out, expected, tolerance, f"token {t}")
        seen = t + 1
        prefix = "state_end/" if seen == metadata["seq_len"] else f"state_{seen}/"
        if seen not in (*metadata["splits"], metadata["seq_len"]):
            continue
        names = ("W1", "b1", "W2", "b2")[: len(layer.fast_weights)]
        for index, (name, gradient) in enumerate(
            zip(names, _open_gradients(layer, state), strict=True)
        ):
            weight = layer.fast_weights[index] + state[index]
            assert_close_to_oracle(weight, tensors[f"{prefix}{name}_states"], tolerance, name)
            assert_close_to_oracle(gradient, tensors[f"{prefix}{name}_grad"], tolerance, name)
        compared.append(seen)
    assert compared == [*metadata["splits"], metadata["seq_len"]]


@pytest.mark.parametrize("case", STREAMED)
@pytest.mark.parametrize("pieces", [(5, 7), (3, 1, 6, 2), (4, 4, 4)])
def test_streaming_in_pieces_equals_the_oracle_of_one_pass(case: str, pieces: Any) -> None:
    tensors, metadata = load_oracle(case)
    layer = _layer(tensors, metadata)
    outs, state = [], None
    for piece in tensors["x"].split(pieces, dim=1):
        out, state = layer(piece, state=state)
        outs.append(out)
    assert_close_to_oracle(torch.cat(outs, 1), tensors["out"], metadata["tolerance"])
    _check_weights(layer, state, tensors, "final/", metadata["tolerance"])


@pytest.mark.parametrize("case", ["ttt_batch_parallel", "ttt_batch_parallel_scaled_l2"])
def test_batch_parallel_layer_matches_the_adarms_oracle(case: str) -> None:
    tensors, metadata = load_oracle(f"adarms/{case}")
    config = TTTConfig(
        num_heads=metadata["ttt_heads"],
        base_lr=metadata["ttt_base_lr"],
        qk_l2norm=metadata["ttt_l2norm_qk"],
        eta_over_length=metadata["ttt_eta_divided_by_length"],
    )
    layer = TTTLayer(metadata["hidden"], config).double()
    names = {ours: theirs for theirs, ours in TTT_NAMES.items()}
    keys = {name: f"ttt.{names.get(name, name)}" for name, _ in layer.named_parameters()}
    layer.load_state_dict(
        {name: tensors[key].view_as(layer.get_parameter(name)) for name, key in keys.items()}
    )
    x = tensors["hidden_states"].requires_grad_()
    out, state = layer(x)
    tolerance = metadata["rtol"]
    assert_close_to_oracle(out, tensors["out"], tolerance, "out")
    _check_weights(layer, state, tensors, "updated_", tolerance)
    leaves = dict(layer.named_parameters())
    found = torch.autograd.grad((out * tensors["grad_out"]).sum(), [x, *leaves.values()])
    assert_close_to_oracle(found[0], tensors["grad/hidden_states"], tolerance, "grad")
    for name, gradient in zip(leaves, found[1:], strict=True):
        reference = tensors[f"grad/{keys[name]}"].view_as(gradient)
        assert_close_to_oracle(gradient, reference, tolerance, name)
