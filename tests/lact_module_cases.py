"""A tiny LaCTModule, a folder of texts for it, and trainers that drive them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from callbacks import FileBoundaryReset, StreamStateCheckpoint
from datamodules import TextStreamDataModule
from datamodules.documents import TextSource
from lightning_modules.lact import LaCTModule

CHUNK = 16
CONFIG = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attn_heads": 4,
    "num_lact_heads": 2,
    "window_size": 8,
    "lact_chunk_size": 8,
    "initializer_range": 0.2,
    "r": 2,
    "residual_ttt": True,
}

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
"""Entries of the configuration of a tiny model from scratch; the vocabulary is the data's."""


def adamw(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def make_module(config: dict[str, Any] | None = None, **options: Any) -> LaCTModule:
    torch.manual_seed(0)
    return LaCTModule(adamw, config={**CONFIG, **(config or {})}, **options)


def write_texts(folder: Path, count: int = 12) -> Path:
    """Files of 10 to 120 bytes, each with letters of its own."""
    texts = folder / "texts"
    texts.mkdir(exist_ok=True)
    for index in range(count):
        letters = [chr(97 + (index + 3 * place * place) % 26) for place in range(10 + 10 * index)]
        (texts / f"{index:02d}.txt").write_text("".join(letters))
    return texts


def make_data(folder: Path, **options: Any) -> TextStreamDataModule:
    defaults = {"chunk_length": CHUNK, "batch_size": 2, "val_fraction": 0.3}
    return TextStreamDataModule(
        TextSource("files", str(write_texts(folder))),
        cache=str(folder / "cache"),
        **{**defaults, **options},
    )


def make_trainer(folder: Path, max_steps: int, *callbacks: Any, **options: Any) -> pl.Trainer:
    defaults = {"logger": False, "limit_val_batches": 0, "num_sanity_val_steps": 0}
    return pl.Trainer(
        default_root_dir=folder,
        max_steps=max_steps,
        max_epochs=-1,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[FileBoundaryReset(), StreamStateCheckpoint(), *callbacks],
        **{**defaults, **options},
    )


class Trace(pl.Callback):
    """Loss of every training step, by its number; saves a checkpoint after one of them."""

    def __init__(self, save_after: int | None = None, path: Path | None = None) -> None:
        self.losses: dict[int, float] = {}
        self.save_after, self.path = save_after, path

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        self.losses[trainer.global_step] = args[1]["loss"].item()
        if trainer.global_step == self.save_after:
            trainer.save_checkpoint(self.path)


def save_pretrained(folder: Path) -> str:
    """A tiny Qwen3 that knows the bytes, as a folder of the hub."""
    torch.manual_seed(1)
    config = Qwen3Config(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=256,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder / "qwen3")
    return str(folder / "qwen3")
