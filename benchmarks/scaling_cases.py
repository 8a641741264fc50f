"""The variants of `scaling.py` and `end_to_end.py`: modules of a size, and random batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from lightning_modules import ActionExpertModule, LaCTModule, MemoryBankModule, TTTLoRAModule
from lightning_modules.adapters import TTTAdapterConfig
from lightning_modules.base import AdapterModule
from lightning_modules.layers.in_place_mlp import InPlaceConfig
from lightning_modules.layers.ttt_lora import TTTLoRAOptions
from lightning_modules.models.action_expert import ExpertConfig
from lightning_modules.models.in_place import InPlaceOptions
from lightning_modules.models.memory_options import MemoryOptions
from lightning_modules.models.pretrained import PretrainedOptions
from lightning_modules.models.ttt_lora import TTTLoRAPlacement
from lightning_modules.streams import StreamPlan

STATE, ACTION = 16, 16


@dataclass(frozen=True)
class Size:
    """Of all variants.

    Args:
        hidden: width of the model.
        layers: of the decoder.
        heads: of attention, of 64 entries, or less where the model is narrower.
        vocabulary: of the language models.
        rows: of every process.
        length: tokens of a chunk.
        horizon: actions of a chunk.
        chunk: tokens after which LaCT and In-Place TTT write.
    """

    hidden: int
    layers: int
    heads: int
    vocabulary: int
    rows: int
    length: int
    horizon: int
    chunk: int


FULL = Size(1024, 24, 16, 32000, rows=8, length=2048, horizon=50, chunk=512)
TINY = Size(32, 2, 2, 64, rows=2, length=32, horizon=4, chunk=8)


@dataclass(frozen=True)
class Case:
    """How a variant is made.

    Args:
        module: takes the size and the folder of a pretrained model.
        plain: the same without what the variant adds, all weights trained.
        features: of its data.
        tokens: of a row of a chunk.
    """

    module: Callable[[Size, Path], AdapterModule]
    plain: Callable[[Size, Path], AdapterModule]
    features: Callable[[Size], dict[str, Any]]
    tokens: Callable[[Size], int]


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4)


def save_base(size: Size, folder: Path, device: str = "cpu") -> Path:
    """A language model with random weights, drawn on a device, as a folder of the hub."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=3 * size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        head_dim=size.hidden // size.heads,
        tie_word_embeddings=True,
    )
    with torch.device(device):
        Qwen3ForCausalLM(config).save_pretrained(folder / "base")
    return folder / "base"


def action_expert(size: Size, base: Path, with_ttt: bool = True) -> ActionExpertModule:
    shape = {"num_heads": size.heads, "head_dim": size.hidden // size.heads}
    return ActionExpertModule(
        adamw,
        expert=ExpertConfig(
            hidden_size=size.hidden,
            num_layers=size.layers,
            intermediate_size=4 * size.hidden,
            **shape,
        ),
        ttt=TTTAdapterConfig() if with_ttt else None,
        ttt_state="carry_episode" if with_ttt else "reset",
        execution_horizon=1,
        normalization="none",
    )


def lact(size: Size, base: Path, branches: str = "both") -> LaCTModule:
    config = {
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "num_attn_heads": size.heads,
        "num_lact_heads": max(1, size.heads // 4),
        "window_size": size.chunk,
        "lact_chunk_size": size.chunk,
        "branches": branches,
    }
    return LaCTModule(adamw, config=config)


def memory_bank(size: Size, base: Path) -> MemoryBankModule:
    return MemoryBankModule(adamw, pretrained=PretrainedOptions(str(base)), memory=MemoryOptions())


def ttt_lora(method: Any, train: Any = "adapters") -> Callable[[Size, Path], TTTLoRAModule]:
    def make(size: Size, base: Path) -> TTTLoRAModule:
        return TTTLoRAModule(
            adamw,
            method=method,
            pretrained=PretrainedOptions(str(base), train=train),
            ttt_lora=TTTLoRAPlacement(learner=TTTLoRAOptions(mini_batch_size=min(16, size.chunk))),
            in_place=InPlaceOptions(layer=InPlaceConfig(chunk_size=size.chunk), every_n=2),
        )

    return make


def text_features(size: Size) -> dict[str, Any]:
    lengths = {"chunk_length": size.length, "tbptt": 1}
    return {"vocab_size": size.vocabulary, "mode": "stream", **lengths}


def action_features(size: Size) -> dict[str, Any]:
    return {
        "state_dim": STATE,
        "action_dim": ACTION,
        "horizon": size.horizon,
        "stride": 1,
        "image_keys": [],
        "tasks": [],
        "delta_actions": [],
    }


def text_tokens(size: Size) -> int:
    return size.length


def make_batch(variant: str, size: Size, step: int, rank: int) -> list[dict[str, Any]]:
    """One chunk of a file of every row, chunk number `step`."""
    generator = torch.Generator().manual_seed(1000 * rank + step)
    ids = tuple(rank * size.rows + row for row in range(size.rows))
    plan = StreamPlan(ids, (step,) * size.rows, (step == 0,) * size.rows)
    chunk: dict[str, Any] = {name: torch.tensor(plan[i]) for i, name in enumerate(plan._fields)}
    chunk["plan"] = plan
    if variant == "action_expert":
        shape = (size.rows, size.horizon)
        chunk["observation.state"] = torch.randn(size.rows, STATE, generator=generator)
        chunk["action"] = torch.randn(*shape, ACTION, generator=generator)
        chunk["action_is_pad"] = torch.zeros(shape, dtype=torch.bool)
    else:
        shape = (size.rows, size.length + 1)
        tokens = torch.randint(0, size.vocabulary, shape, generator=generator)
        chunk |= {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:]}
    return [chunk]


LANGUAGE_MODEL = ttt_lora("none", train="all")
VARIANTS = {
    "action_expert": Case(
        action_expert,
        partial(action_expert, with_ttt=False),
        action_features,
        lambda size: size.horizon,
    ),
    "lact": Case(lact, partial(lact, branches="attention"), text_features, text_tokens),
    "memory_bank": Case(memory_bank, LANGUAGE_MODEL, text_features, text_tokens),
    "ttt_lora": Case(ttt_lora("ttt_lora"), LANGUAGE_MODEL, text_features, text_tokens),
    "in_place": Case(ttt_lora("in_place"), LANGUAGE_MODEL, text_features, text_tokens),
}
