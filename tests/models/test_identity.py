"""Weights of a model are the same whatever wraps it, and other when one value is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from architecture_cases import ADAPTERS, adapted_model, build_model
from peft import LoraConfig, get_peft_model
from torch import nn

from lightning_modules.models.identity import Weights


class Module(pl.LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


class DistributedStandIn(nn.Module):
    """Names parameters as DistributedDataParallel does, without a process group."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def _compile_a_layer(model: nn.Module) -> nn.Module:
    model.model.layers[0] = torch.compile(model.model.layers[0])
    return model


def _llama() -> nn.Module:
    return adapted_model("llama", ADAPTERS["ttt"])


WRAPPED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "a LightningModule": Module,
    "DDP around it": lambda model: DistributedStandIn(Module(model)),
    "compiled": torch.compile,
    "a compiled layer": _compile_a_layer,
    "frozen": lambda model: model.requires_grad_(False).eval(),
    "trained": lambda model: model.requires_grad_(True).train(),
    "float64": lambda model: model.double(),
}


@pytest.mark.parametrize("wrapped", WRAPPED)
@pytest.mark.parametrize("tied", [False, True])
def test_what_wraps_a_model_does_not_change_its_weights(wrapped: str, tied: bool) -> None:
    model = adapted_model("qwen3", ADAPTERS["ttt"]) if tied else _llama()
    weights = Weights.of(model)
    other = WRAPPED[wrapped](model)
    assert weights.difference(other) is None
    assert Weights.of(other) == weights and Weights.of(other).fingerprint == weights.fingerprint


def test_a_peft_model_in_training_equals_what_is_inside_it_frozen() -> None:
    inner = get_peft_model(build_model("llama"), LoraConfig(target_modules=["q_proj"])).train()
    weights = Weights.of(Module(inner))
    assert weights.difference(inner.base_model.model.requires_grad_(False).eval()) is None
    assert weights.difference(inner) is None


def _changed(model: nn.Module, name: str) -> nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.get_parameter(name).view(-1)[0] += 1e-3
    return other


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.1.mlp.up_proj.weight", "1 of 51 weights of the base have other values"),
        ("model.layers.1.self_attn.ttt_gate.alpha", "1 of 51 weights of the adapter have"),
        ("model.layers.0.self_attn.base_attention.q_proj.weight", "weights of the base have"),
    ],
)
def test_one_changed_value_is_named_with_whose_weight_it_is(name: str, message: str) -> None:
    model = _llama()
    difference = Weights.of(Module(model)).difference(_changed(model, name))
    assert difference is not None and message in difference
    assert f"(e.g. {name.replace('.base_attention', '')})" in difference


def test_exchanged_weights_are_other_weights() -> None:
    model = _llama()
    weights, layers = Weights.of(model), model.model.layers
    layers[0], layers[1] = layers[1], layers[0]
    assert "have other values" in (weights.difference(model) or "")


def test_a_base_without_its_adapter_lacks_weights_and_the_other_way_round() -> None:
    base, model = Weights.of(build_model("llama")), _llama()
    own = Weights.of(model)
    missing: Any = own.difference(build_model("llama"))
    assert missing.startswith("30 weights are missing here (e.g. model.layers.0.self_attn.")
    assert (base.difference(model) or "").startswith("30 weights of the adapter were not there")
    assert own.fingerprint != base.fingerprint
