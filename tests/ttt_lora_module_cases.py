"""Tiny TTTLoRAModules of every method; texts, DataModules and trainers are those of LaCT's."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from lact_module_cases import LLAMA, Trace, adamw, make_data, make_trainer
from torch import nn

from lightning_modules.layers.in_place_mlp import InPlaceConfig
from lightning_modules.layers.ttt_lora import TTTLoRAOptions
from lightning_modules.models.in_place import InPlaceOptions
from lightning_modules.models.pretrained import PretrainedOptions
from lightning_modules.models.projection_lora import ProjectionLoRA
from lightning_modules.models.ttt_lora import TTTLoRAPlacement
from lightning_modules.ttt_lora import TTTLoRAModule

METHODS = {
    "lora": {"lora"},
    "ttt_lora": {"theta", "fast", "gate"},
    "in_place": {"in_place"},
    "ttt_lora+lora": {"theta", "fast", "gate", "lora"},
}
"""Method -> the parameter groups that it trains."""

MINI_BATCH, IN_PLACE_CHUNK = 5, 7
"""Neither divides the chunks of 16 tokens: a chunk ends inside of a mini-batch."""

TARGETS = ["q_proj", "k_proj", "v_proj", "down_proj"]
"""A group of siblings, and a layer by itself; tests of configs have all."""


def make_module(method: str = "ttt_lora", seed: int = 0, **options: Any) -> TTTLoRAModule:
    """A module over a tiny model from scratch, or over `pretrained` (a folder or options)."""
    torch.manual_seed(seed)
    learner = TTTLoRAOptions(mini_batch_size=options.pop("mini_batch_size", MINI_BATCH))
    layer = InPlaceConfig(chunk_size=options.pop("chunk_size", IN_PLACE_CHUNK), clip=None)
    base = options.pop("pretrained", None)
    base = PretrainedOptions(base) if isinstance(base, str) else base
    options = options if base else {"config": LLAMA, **options}
    return TTTLoRAModule(
        adamw,
        method=method,
        pretrained=base,
        ttt_lora=TTTLoRAPlacement(inner_dim=4, targets=TARGETS, learner=learner),
        in_place=InPlaceOptions(every_n=1, layer=layer),
        lora=ProjectionLoRA(rank=2),
        **options,
    )


def hash_of_base(module: TTTLoRAModule) -> str:
    """Of every byte of the weights that were there before the adapters, by their names of then."""
    digest = hashlib.sha256()
    for name, parameter in sorted(base_weights(module.model).items()):
        digest.update(name.encode() + parameter.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def base_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    marks = ("ttt_lora_cells", "lora_", ".ttt.")
    return {
        name.replace(".base_layer", ""): parameter
        for name, parameter in model.named_parameters()
        if not any(mark in name for mark in marks)
    }


def train(
    folder: Path, module: TTTLoRAModule, steps: int, data: dict[str, Any] | None = None,
    checkpoint: Path | None = None, trace: Trace | None = None, **trainer: Any,
) -> Trace:  # fmt: skip
    """Fit a module on the texts in a folder."""
    trace = trace or Trace()
    fit = make_trainer(folder, steps, trace, **trainer)
    fit.fit(module, make_data(folder, **(data or {})), ckpt_path=checkpoint)
    return trace


def assert_same_weights(first: nn.Module, second: nn.Module) -> None:
    """Bit for bit."""
    other = second.state_dict()
    for name, value in first.state_dict().items():
        assert torch.equal(value, other[name]), name
