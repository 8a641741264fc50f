"""The variants of `monitors.py`: modules of a size, and streams of data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from datamodules import ActionChunkDataModule, TextStreamDataModule
from datamodules.lerobot_writer import LeRobotWriter
from lightning_modules import ActionExpertModule, LaCTModule, MemoryBankModule, TTTLoRAModule
from lightning_modules.adapters import TTTAdapterConfig, as_config
from lightning_modules.base import AdapterModule
from lightning_modules.layers.ttt import TTTConfig
from lightning_modules.layers.ttt_lora import TTTLoRAOptions
from lightning_modules.models.action_expert import ExpertConfig
from lightning_modules.models.memory_options import MemoryOptions
from lightning_modules.models.ttt_lora import TTTLoRAPlacement

ADAMW = partial(torch.optim.AdamW, lr=1e-4)


@dataclass(frozen=True)
class Sizes:
    """How large the models and batches are.

    Args:
        expert: of the action expert, with `heads` heads of TTT.
        heads: of TTT.
        lact: configuration of LaCT.
        llama: of the model with a memory bank in two of its layers, and `memory` its options.
        memory: layers and bank.
        qwen: of the model with TTT-LoRA.
        rows: of a batch of chunks of actions.
        tokens: rows and tokens of a batch of text.
        episodes: number and frames of the random episodes, as many for every row.
    """

    expert: ExpertConfig
    heads: int
    lact: dict[str, Any]
    llama: dict[str, Any]
    memory: dict[str, Any]
    qwen: dict[str, Any]
    rows: int
    tokens: tuple[int, int]
    episodes: tuple[int, int]


def _decoder(kind: str, hidden: int, layers: int, heads: int, kv: int) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers}
    heads_ = {"num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": hidden // heads}
    return {"model_type": kind, "max_position_embeddings": 2048, **sizes, **heads_}


def _memory(layers: list[int], rows: int, heads: int, router: dict[str, Any]) -> dict[str, Any]:
    bank = {"bank": {"num_rows": rows}, "attention": {"num_heads": heads}, "router": router}
    return {"placement": "custom", "layers": layers, "memory": bank}


FULL = Sizes(
    ExpertConfig(1024, 18, 8, 1, 256, 4096),
    heads=8,
    lact={
        "hidden_size": 1024,
        "num_hidden_layers": 12,
        "num_attn_heads": 16,
        "num_lact_heads": 4,
        "window_size": 512,
        "lact_chunk_size": 512,
    },
    llama=_decoder("llama", 768, 16, 12, 4),
    memory=_memory(
        [2, 6, 10, 14], 4160, 12, {"strategy": "block", "num_chapters": 65, "top_k": 8, "shared": 1}
    ),
    qwen=_decoder("qwen3", 1024, 4, 16, 8),
    rows=64,
    tokens=(8, 1024),
    episodes=(320, 400),
)

TINY = Sizes(
    ExpertConfig(32, 2, 4, 1, 8, 64),
    heads=4,
    lact={
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attn_heads": 4,
        "num_lact_heads": 2,
        "window_size": 16,
        "lact_chunk_size": 16,
    },
    llama=_decoder("llama", 32, 2, 4, 2),
    memory=_memory([1], 32, 2, {"strategy": "block", "num_chapters": 4, "top_k": 2}),
    qwen=_decoder("qwen3", 32, 2, 4, 2),
    rows=4,
    tokens=(2, 64),
    episodes=(8, 150),
)


def action_expert(size: Sizes) -> AdapterModule:
    """The expert of 300M parameters with TTT in all layers, whose state is carried."""
    layer = TTTConfig(kind="linear", num_heads=size.heads)
    return ActionExpertModule(
        ADAMW,
        expert=size.expert,
        ttt=TTTAdapterConfig(layer=layer),
        ttt_state="carry_episode",
        execution_horizon=50,
    )


def lact(size: Sizes) -> AdapterModule:
    """Stacked LaCT, r = 2."""
    return LaCTModule(ADAMW, config={**size.lact, "r": 2})


def memory_bank(size: Sizes) -> AdapterModule:
    """A bank in some layers, routed block by block."""
    memory = as_config(MemoryOptions, size.memory, "memory")
    return MemoryBankModule(ADAMW, config=size.llama, memory=memory)


def ttt_lora(size: Sizes) -> AdapterModule:
    """TTT-LoRA on all linear layers, of the parameters of a LoRA of rank 16."""
    learner = TTTLoRAOptions(mini_batch_size=16)
    return TTTLoRAModule(ADAMW, config=size.qwen, ttt_lora=TTTLoRAPlacement(learner=learner))


VARIANTS: dict[str, Callable[[Sizes], AdapterModule]] = {
    "action expert": action_expert,
    "LaCT": lact,
    "memory bank": memory_bank,
    "TTT-LoRA": ttt_lora,
}


def make_data(name: str, size: Sizes, folder: Path) -> pl.LightningDataModule:
    """Streams of the variant's kind."""
    if name != "action expert":
        rows, tokens = size.tokens
        return TextStreamDataModule(
            cache=str(folder / "tokens"),
            batch_size=rows,
            chunk_length=tokens,
            min_tokens=4 * tokens,
        )
    episodes, frames = size.episodes
    root = folder / "episodes"
    if not root.exists():
        write_episodes(root, episodes, frames)
    return ActionChunkDataModule(str(root), horizon=50, stride=50, batch_size=size.rows)


def write_episodes(root: Path, episodes: int, frames: int) -> None:
    """Random episodes with 32 numbers of state and of action."""
    rng = np.random.default_rng(0)
    names = ("observation.state", "action")
    features = {name: {"dtype": "float32", "shape": [32], "names": None} for name in names}
    with LeRobotWriter(root, fps=50, features=features) as writer:
        for _ in range(episodes):
            draw = {name: rng.normal(size=(frames, 32)).astype(np.float32) for name in names}
            writer.add_episode(draw, "move")
