"""Tiny LaCT layers and models, shared by several tests."""

from dataclasses import fields
from typing import Any

import torch
from gemma_cases import randomise
from torch import Tensor

from lightning_modules.layers.lact import LaCTLayer, LaCTLayerState
from lightning_modules.layers.lact_options import (
    LaCTAttentionConfig,
    LaCTFeatureConfig,
    LaCTLayerConfig,
    LaCTMemoryConfig,
    LaCTUpdateConfig,
)
from lightning_modules.models.lact import LaCTForCausalLM
from lightning_modules.models.lact_config import LaCTConfig

HIDDEN, CHUNK, WINDOW = 16, 4, 5
SMALL: dict[str, Any] = {
    "num_attn_heads": 4,
    "num_lact_heads": 2,
    "lact_chunk_size": CHUNK,
    "window_size": WINDOW,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "bare": {"use_momentum": False, "learnable_ttt_scale": False, "qkv_silu": False},
    "low_rank": {"w0_w2_low_rank": 3, "ttt_prenorm": True, "attn_qk_norm": True, "qkv_bias": True},
    "muon": {"use_muon": True, "muon_dtype": "float64", "window_size": None, "inter_multi": 2},
    "stack2": {"r": 2, "residual_ttt": True, "w0_w2_low_rank": 2},
    "stack3": {"r": 3, "residual_ttt": True, "ttt_prenorm": True, "inter_multi": 0.5},
    "per_channel": {"lr_dim": HIDDEN // 2, "ttt_nope": True, "no_v_silu": True},
}
UNUSUAL = "ignore:use_muon with lact_chunk_size:UserWarning"
"""For models of the variant `muon`, whose chunks are as short as those of the others."""


PARTS: dict[str, Any] = {
    "attention": LaCTAttentionConfig,
    "memory": LaCTMemoryConfig,
    "features": LaCTFeatureConfig,
    "update": LaCTUpdateConfig,
}
OPTIONS = {field.name for config in PARTS.values() for field in fields(config)}


def lact_layer_config(hidden_size: int = HIDDEN, **options: Any) -> LaCTLayerConfig:
    """Sizes from flat options."""
    given = {**SMALL, **options}
    chosen: dict[str, Any] = {}
    for part, config in PARTS.items():
        names = {field.name for field in fields(config)} & given.keys()
        chosen[part] = config(**{name: given.pop(name) for name in names})
    assert not given, f"unknown options {list(given)}"
    return LaCTLayerConfig(hidden_size, **chosen)


def lact_layer(variant: str = "default", seed: int = 0, **options: Any) -> LaCTLayer:
    """A randomised layer in float64 that learns fast enough to be seen."""
    torch.manual_seed(seed)
    layer = randomise(LaCTLayer(lact_layer_config(**{**VARIANTS[variant], **options})), seed)
    return hurry(layer).double()


def lact_config(variant: str = "default", **options: Any) -> LaCTConfig:
    """Configuration of a tiny language model of two blocks."""
    sizes = {"vocab_size": 40, "hidden_size": HIDDEN, "num_hidden_layers": 2}
    more = {"intermediate_size": 24, "initializer_range": 0.3, "eos_token_id": None}
    return LaCTConfig(**{**sizes, **more, **SMALL, **VARIANTS[variant], **options})


def lact_model(variant: str = "default", seed: int = 0, **options: Any) -> LaCTForCausalLM:
    """A tiny randomised language model in float64, in evaluation mode."""
    torch.manual_seed(seed)
    model = LaCTForCausalLM(lact_config(variant, **options))
    return hurry(randomise(model, seed)).double().eval()


def hurry(module: Any) -> Any:
    """Raise the inner learning rates from about 0.001 to about 0.3."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("lr_proj.bias"):
                parameter.add_(6.0)
    return module


def hidden(rows: int = 2, length: int = 15, seed: int = 1) -> Tensor:
    """Input of a layer, `[rows, length, HIDDEN]` in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, length, HIDDEN, generator=generator, dtype=torch.float64)


def token_ids(rows: int = 2, length: int = 15, seed: int = 1) -> Tensor:
    """Random ids 3 to 39."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 40, (rows, length), generator=generator)


def read_pieces(
    layer: LaCTLayer, x: Tensor, sizes: list[int], **call: Tensor
) -> tuple[Tensor, LaCTLayerState]:
    """The output for x in pieces, each with the state that the one before returned."""
    out, state, start = [], None, 0
    for size in sizes:
        part = slice(start, start + size)
        start += size
        own = {name: value[:, part] for name, value in call.items()}
        o, state = layer(x[:, part], state=state, **own)
        out.append(o)
    assert state is not None
    return torch.cat(out, dim=1), state
