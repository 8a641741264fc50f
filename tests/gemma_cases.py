"""Tiny Gemma pieces and the decoder layers of the adarms oracles, shared by several tests."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GemmaConfig
from transformers.models.gemma.modeling_gemma import (
    GemmaAttention,
    GemmaMLP,
    GemmaRotaryEmbedding,
)

from lightning_modules.adapters import TTTAdapterConfig, create_attention_adapter
from lightning_modules.layers.adarms import AdaRMSNorm
from lightning_modules.layers.decoder import AdaptiveDecoderLayer
from lightning_modules.layers.ttt import TTTConfig

TTT_NAMES = {
    "lr.weight": "learnable_ttt_lr_weight",
    "lr.bias": "learnable_ttt_lr_bias",
    "ln.weight": "ttt_norm_weight",
    "ln.bias": "ttt_norm_bias",
}
"""Names in the adarms oracles -> names in `TTTLayer`; the others are the same."""

GATES = {"none": "none", "static": "tanh", "adarms": "adarms", "product": "adarms_tanh"}


def gemma_config(
    hidden_size: int = 32, head_dim: int = 16, intermediate_size: int = 48, **options: Any
) -> GemmaConfig:
    """A small Gemma with two heads."""
    return GemmaConfig(
        **{
            "vocab_size": 17,
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": head_dim,
            "attn_implementation": "sdpa",
            **options,
        }
    )


def rotary(config: GemmaConfig, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Rotary cosines and sines `[B, T, head_dim]`, float32."""
    positions = torch.arange(length).expand(batch, -1)
    return GemmaRotaryEmbedding(config)(torch.zeros(1), positions)


def randomise(module: nn.Module, seed: int = 0, scale: float = 0.2) -> nn.Module:
    """Add noise to every parameter, so that nothing is at a special value."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(scale * noise)
    return module


def decoder_layer(
    cond_size: int | None = 4, config: GemmaConfig | None = None, seed: int = 0
) -> AdaptiveDecoderLayer:
    """A randomised decoder layer without adapter."""
    torch.manual_seed(seed)
    config = config or gemma_config()
    layer = AdaptiveDecoderLayer(
        GemmaAttention(config, layer_idx=0),
        GemmaMLP(config),
        AdaRMSNorm(config.hidden_size, cond_size),
        AdaRMSNorm(config.hidden_size, cond_size),
    )
    return randomise(layer, seed)


def oracle_decoder_layer(
    tensors: dict[str, Tensor], metadata: dict[str, Any], implementation: str
) -> AdaptiveDecoderLayer:
    """The layer of an `adarms/layer_*` oracle with its weights, float64."""
    config = gemma_config(
        metadata["hidden"],
        metadata["head_dim"],
        metadata["intermediate"],
        attn_implementation=implementation,
    )
    cond_size = metadata["cond_dim"] if str(metadata["norms"]).startswith("adarms") else None
    layer = decoder_layer(cond_size, config)
    if metadata["ttt"]:
        ttt = TTTConfig(
            num_heads=metadata["ttt_heads"],
            base_lr=metadata["ttt_base_lr"],
            qk_l2norm=metadata["ttt_l2norm_qk"],
            eta_over_length=metadata["ttt_eta_divided_by_length"],
        )
        options = TTTAdapterConfig(
            ttt_gate=GATES[metadata["ttt_gate"]],
            ttt_input_norm="none",
            cond_size=metadata["cond_dim"],
            layer=ttt,
        )
        layer.self_attn = create_attention_adapter(layer.self_attn, "ttt", options)
        layer.self_attn.slot = "layer"
    layer.double()
    names = {oracle_name(name): name for name, _ in layer.named_parameters()}
    layer.load_state_dict(
        {
            names[oracle]: tensors[oracle].view_as(layer.get_parameter(names[oracle]))
            for oracle in names
        }
    )
    return layer


def oracle_name(name: str) -> str:
    """Name of a decoder-layer parameter in the adarms oracles."""
    name = name.replace("self_attn.base_attention.", "self_attn.")
    name = name.removeprefix("self_attn.") if ".ttt" in name else name
    for theirs, ours in TTT_NAMES.items():
        name = name.replace(f"ttt.{ours}", f"ttt.{theirs}")
    return name
