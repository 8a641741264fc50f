"""transformers' `init_weights` must not undo what our modules start with."""

from typing import Any

import pytest
import torch
from gemma_cases import gemma_config, randomise
from torch import Tensor, nn
from transformers import (
    GemmaModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedConfig,
    PreTrainedModel,
)

from lightning_modules.adapters import inject_adapters
from lightning_modules.layers.adarms import AdaRMSNorm, Modulation
from lightning_modules.layers.decoder import AdaptiveDecoderLayer
from lightning_modules.layers.ttt import TTTConfig, TTTLayer

COND = 4
ADAPTER = {
    "ttt_gate": "adarms_tanh",
    "ttt_input_norm": "rms",
    "alpha_init": 0.3,
    "cond_size": COND,
    "layer": {"num_heads": 2, "causal": True, "mini_batch_size": 4},
}


def _build(name: str, cond_size: int | None) -> PreTrainedModel:
    """A model with a retrofitted Gemma layer (Gemma) and TTT adapters."""
    torch.manual_seed(0)
    if name == "llama":
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
        model: Any = LlamaModel(LlamaConfig(vocab_size=17, num_hidden_layers=2, **sizes))
    else:
        model = GemmaModel(gemma_config())
        with torch.no_grad():
            for layer in model.layers:
                layer.input_layernorm.weight.normal_()
        for index, layer in enumerate(model.layers):
            model.layers[index] = AdaptiveDecoderLayer.from_gemma(layer, cond_size)
        model.norm = AdaRMSNorm.retrofit(torch.randn(32), cond_size)
    inject_adapters(
        model, [("*", "ttt", {**ADAPTER, "ttt_input_norm": "adarms"} if cond_size else ADAPTER)]
    )
    return model


def _ours(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that belong to our modules and that no `nn.Linear` holds (those are N(0, .02))."""
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, (AdaRMSNorm, Modulation, TTTLayer)) or path.endswith("ttt_gate"):
            for name, parameter in module.named_parameters():
                if not name.endswith("_proj.weight"):
                    found[f"{path}.{name}"] = parameter
    return found


@pytest.mark.parametrize("name", ["gemma", "llama"])
@pytest.mark.parametrize("cond_size", [COND, None])
def test_init_weights_leaves_inserted_modules_alone(name: str, cond_size: int | None) -> None:
    model = _build(name, cond_size)
    before = {key: value.clone() for key, value in _ours(model).items()}
    assert len(before) > 20
    model.init_weights()
    for key, value in _ours(model).items():
        assert torch.equal(value, before[key]), key


class _RMSNormNamed(AdaRMSNorm):
    """The same norm under a name that transformers recognises."""


class _LinearModulated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(COND, 3)
        nn.init.zeros_(self.dense.weight)


def test_the_hazard_is_real() -> None:
    model = GemmaModel(gemma_config())
    model.extra = _LinearModulated()
    model.init_weights()
    assert model.extra.dense.weight.abs().max() > 0
    model = LlamaModel(
        LlamaConfig(
            vocab_size=17,
            hidden_size=32,
            intermediate_size=48,
            num_attention_heads=2,
            num_hidden_layers=1,
        )
    )
    model.extra = _RMSNormNamed(32)
    model.init_weights()
    assert model.extra.weight.min() == 1  # the weight is an offset from 1: this doubles the norm


class _ModelConfig(PreTrainedConfig):
    model_type = "hf_init_test"


class _Model(PreTrainedModel):
    """A model that builds our modules itself, and initialises them as the package says."""

    config_class = _ModelConfig

    def __init__(self, config: _ModelConfig) -> None:
        super().__init__(config)
        self.head = nn.Linear(8, 8)
        self.norm = AdaRMSNorm(8, COND)
        self.ttt = TTTLayer(8, TTTConfig(num_heads=2, causal=True, mini_batch_size=2))
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (AdaRMSNorm, Modulation, TTTLayer)):
            module.reset_parameters()


def test_reset_parameters_initialises_what_a_checkpoint_lacks(tmp_path: Any) -> None:
    model = _Model(_ModelConfig())
    kept = ("head.weight", "head.bias", "ttt.W1", "ttt.q_proj.weight")
    saved = {name: value for name, value in model.state_dict().items() if name in kept}
    model.save_pretrained(tmp_path, state_dict=saved)
    loaded = _Model.from_pretrained(tmp_path)
    for name in kept:
        assert torch.equal(loaded.get_parameter(name), model.get_parameter(name)), name
    assert not any(parameter.any() for parameter in loaded.norm.parameters())
    assert loaded.ttt.b1.abs().max() == 0 and (loaded.ttt.ttt_norm_weight == 1).all()
    assert 0 < loaded.ttt.learnable_ttt_lr_weight.std() < 0.05
    assert 0 < loaded.ttt.k_proj.weight.std() < 0.05


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_reset_parameters_of_the_ttt_layer_are_those_of_the_spec(kind: str) -> None:
    config = TTTConfig(kind=kind, num_heads=2, causal=True, mini_batch_size=4, use_gate=True)
    layer = randomise(TTTLayer(64, config))
    layer.reset_parameters()
    for name, value in layer.named_parameters():
        if name in ("ttt_norm_weight", "post_norm.weight"):
            assert (value == 1).all(), name
        elif name in ("b1", "b2", "learnable_token_idx") or "bias" in name:
            assert (value == 0).all(), name
        else:
            assert 0.015 < value.std() < 0.025, name
