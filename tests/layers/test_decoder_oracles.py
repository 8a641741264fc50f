"""AdaptiveDecoderLayer with and without a TTT adapter against oracles/adarms/layer_* (float64)."""

from typing import Any

import pytest
import torch
from gemma_cases import oracle_decoder_layer, oracle_name
from helpers import assert_close_to_oracle, load_oracle
from torch import Tensor

from lightning_modules.layers.decoder import AdaptiveDecoderLayer
from lightning_modules.streams import FastState

CASES = [
    "layer_gate_adarms",
    "layer_gate_product",
    "layer_gate_static",
    "layer_no_ttt",
    "layer_plain_no_ttt",
    "layer_plain_norm_static",
    "layer_retrofit_zero_gate",
]
# transformers' eager attention takes its softmax in float32 even for float64 inputs.
TOLERANCES = {"sdpa": 1e-8, "eager": 1e-5}


def _mask(tensors: dict[str, Tensor], implementation: str) -> Tensor:
    allowed = tensors["attention_mask"]
    if implementation == "sdpa":
        return allowed
    additive = torch.zeros(allowed.shape, dtype=torch.float64)
    return additive.masked_fill(~allowed, torch.finfo(torch.float64).min)


class _Run:
    """One forward call of an oracle's layer; what went in and out of its parts is kept."""

    def __init__(self, case: str, implementation: str = "sdpa") -> None:
        self.tensors, self.metadata = load_oracle(f"adarms/{case}")
        self.layer = oracle_decoder_layer(self.tensors, self.metadata, implementation)
        self.inputs = {
            name: self.tensors[name].requires_grad_()
            for name in ("hidden_states", "cond")
            if name in self.tensors
        }
        self.seen: dict[str, Any] = {}
        self._watch(self.layer)
        self.state = FastState.transient({"gate"})
        self.out = self.layer(
            self.inputs["hidden_states"],
            position_embeddings=(self.tensors["cos"], self.tensors["sin"]),
            attention_mask=_mask(self.tensors, implementation),
            adarms_cond=self.inputs.get("cond"),
            fast_state=self.state,
        )

    def _watch(self, layer: AdaptiveDecoderLayer) -> None:
        parts = {
            "norm1_out": layer.input_layernorm,
            "attn_out": getattr(layer.self_attn, "base_attention", layer.self_attn),
            "norm2_out": layer.post_attention_layernorm,
            "mlp_out": layer.mlp,
        }
        if self.metadata["ttt"]:
            parts["ttt_out"] = layer.self_attn.ttt
        for name, module in parts.items():
            module.register_forward_hook(self._keep(name))

    def _keep(self, name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            self.seen[name] = output[0] if isinstance(output, tuple) else output
            if name == "norm1_out" and output[1] is not None:
                self.seen["gate_attn"] = output[1]
            if name == "norm2_out":
                self.seen["after_attention"] = args[0]
                if output[1] is not None:
                    self.seen["gate_mlp"] = output[1]

        return hook


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("case", CASES)
def test_layer_matches_the_oracle_in_outputs_and_intermediate_results(
    case: str, implementation: str
) -> None:
    run = _Run(case, implementation)
    tolerance = TOLERANCES[implementation]
    assert_close_to_oracle(run.out, run.tensors["out"], tolerance, "out")
    parts = ("norm1_out", "attn_out", "ttt_out", "after_attention", "norm2_out", "mlp_out")
    for name in (*parts, "gate_attn", "gate_mlp"):
        assert (name in run.seen) == (name in run.tensors), name
        if name in run.seen:
            assert_close_to_oracle(run.seen[name], run.tensors[name], tolerance, name)


@pytest.mark.parametrize("case", CASES)
def test_layer_gradients_match_the_oracle(case: str) -> None:
    run = _Run(case)
    parameters = {oracle_name(name): p for name, p in run.layer.named_parameters()}
    leaves = parameters | run.inputs
    loss = (run.out * run.tensors["grad_out"]).sum()
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    compared = 0
    for name, gradient in zip(leaves, found, strict=True):
        reference = run.tensors[f"grad/{name}"]
        assert gradient is not None, name
        assert_close_to_oracle(gradient.view_as(reference), reference, 1e-8, name)
        compared += 1
    assert compared == len([key for key in run.tensors if key.startswith("grad/")])


@pytest.mark.parametrize("case", [case for case in CASES if "no_ttt" not in case])
def test_layer_writes_the_state_and_publishes_the_gate_of_the_oracle(case: str) -> None:
    run = _Run(case)
    ttt = run.layer.self_attn.ttt
    state = run.state.advance().read("layer", ttt.state_class)
    for name, weight, delta in zip(("W1", "b1"), ttt.fast_weights, state, strict=False):
        assert_close_to_oracle(weight + delta, run.tensors[f"updated_{name}"], 1e-8, name)
    published = run.state.published["gate"]["layer"]
    assert_close_to_oracle(published["gate_ttt"], run.tensors["gate_ttt"], 1e-8)


@pytest.mark.parametrize("case", ["layer_plain_no_ttt", "layer_retrofit_zero_gate"])
def test_layer_equals_the_gemma_layer_of_the_oracle(case: str) -> None:
    run = _Run(case)
    # The README: agreement of the reference's own two computations is 1e-12.
    assert_close_to_oracle(run.out, run.tensors["transformers_layer_out"], 1e-11)
