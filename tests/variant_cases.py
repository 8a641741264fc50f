"""Every variant, tiny, with its data and a trainer: what the tests of exactness run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lact_module_cases import CONFIG, LLAMA, adamw, write_texts
from lerobot_reference import write_reference
from memory_cases import memory_options

from callbacks import FileBoundaryReset, StreamStateCheckpoint
from datamodules import ActionChunkDataModule, TextStreamDataModule
from datamodules.documents import TextSource
from lightning_modules import ActionExpertModule, LaCTModule, MemoryBankModule, TTTLoRAModule
from lightning_modules.adapters import TTTAdapterConfig
from lightning_modules.base import AdapterModule
from lightning_modules.layers.in_place_mlp import InPlaceConfig
from lightning_modules.layers.ttt import TTTConfig
from lightning_modules.layers.ttt_lora import TTTLoRAOptions
from lightning_modules.models.action_expert import ExpertConfig
from lightning_modules.models.in_place import InPlaceOptions
from lightning_modules.models.ttt_lora import TTTLoRAPlacement

Losses = dict[int, float]

CHUNK = 16
STEPS = 9
"""An epoch of any variant has between 3 and 9 steps: one end of an epoch at least."""


@dataclass(frozen=True)
class Variant:
    """How a tiny module and its DataModule are made.

    Args:
        module: takes options of the module.
        data: takes the folder for files and options of the DataModule.
    """

    module: Callable[..., AdapterModule]
    data: Callable[..., pl.LightningDataModule]


def texts(folder: Path, **options: Any) -> TextStreamDataModule:
    """Bytes of files of 10 to 120 letters, in chunks of 16."""
    defaults = {"chunk_length": CHUNK, "batch_size": 3, "val_fraction": 0.3}
    root = folder / "texts"
    if not root.exists():
        write_texts(folder)
    source = TextSource("files", str(root))
    return TextStreamDataModule(source, cache=str(folder / "cache"), **{**defaults, **options})


def episodes(folder: Path, **options: Any) -> ActionChunkDataModule:
    """Four episodes of 4 to 8 frames."""
    root = folder / "episodes"
    if not root.exists():
        write_reference(root)
    defaults = {"horizon": 4, "stride": 1, "batch_size": 2, "val_fraction": 0.3}
    return ActionChunkDataModule(str(root), **{**defaults, **options})


def action_expert(**options: Any) -> ActionExpertModule:
    sizes = {"hidden_size": 16, "num_layers": 2, "num_heads": 2, "head_dim": 8}
    return ActionExpertModule(
        adamw,
        expert=ExpertConfig(**sizes, intermediate_size=32),
        ttt=TTTAdapterConfig(layer=TTTConfig(num_heads=2)),
        execution_horizon=1,
        denoise_steps=2,
        **{"ttt_state": "carry_episode", **options},
    )


def lact(**options: Any) -> LaCTModule:
    return LaCTModule(adamw, config=CONFIG, **options)


def memory_bank(**options: Any) -> MemoryBankModule:
    router = {"balance_coefficient": 0.1, "z_coefficient": 0.1}
    memory = memory_options("block", router=router)
    return MemoryBankModule(adamw, config=LLAMA, memory=memory, **options)


def ttt_lora(method: str, **options: Any) -> TTTLoRAModule:
    return TTTLoRAModule(
        adamw,
        method=method,
        config=LLAMA,
        ttt_lora=TTTLoRAPlacement(inner_dim=4, learner=TTTLoRAOptions(mini_batch_size=5)),
        in_place=InPlaceOptions(every_n=1, layer=InPlaceConfig(chunk_size=7, clip=None)),
        **options,
    )


VARIANTS = {
    "action_expert": Variant(action_expert, episodes),
    "lact": Variant(lact, texts),
    "memory_bank": Variant(memory_bank, texts),
    "ttt_lora": Variant(partial(ttt_lora, "ttt_lora"), texts),
    "in_place": Variant(partial(ttt_lora, "in_place"), texts),
}

every_variant = pytest.mark.parametrize("name", VARIANTS)


class Trace(pl.Callback):
    """Loss of every training batch, by the number of batches before it."""

    def __init__(self) -> None:
        self.losses: Losses = {}

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        batches = trainer.fit_loop.epoch_loop.total_batch_idx
        self.losses[batches] = args[1]["loss"].item()


class Interrupted(Exception):
    """The process is lost."""


class SaveAndStop(pl.callbacks.Checkpoint):
    """Save a checkpoint behind a batch, as ModelCheckpoint does, and lose the process."""

    def __init__(self, batch: int, path: Path) -> None:
        self.batch, self.path = batch, path

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx + 1 == self.batch:
            trainer.save_checkpoint(self.path)
            raise Interrupted


def make_trainer(folder: Path, max_steps: int, *callbacks: Any, **options: Any) -> pl.Trainer:
    defaults = {
        "accelerator": "cpu",
        "logger": False,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": any(isinstance(c, pl.callbacks.Checkpoint) for c in callbacks),
    }
    return pl.Trainer(
        default_root_dir=folder,
        max_steps=max_steps,
        max_epochs=-1,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[FileBoundaryReset(), StreamStateCheckpoint(), *callbacks],
        **{**defaults, **options},
    )


def train(
    name: str,
    folder: Path,
    *,
    stops: Sequence[int] = (),
    steps: int = STEPS,
    data: dict[str, Any] | None = None,
    module: dict[str, Any] | None = None,
    callbacks: Callable[[], Sequence[pl.Callback]] = tuple,
    **options: Any,
) -> tuple[AdapterModule, Losses]:
    """Train, stopping behind these batches and resuming in a new module, data and trainer.

    Args:
        name: of the variant.
        folder: for files and checkpoints.
        stops: batches behind which the run is interrupted, ascending.
        steps: of the optimizer, at the end.
        data: options of the DataModule.
        module: options of the module.
        callbacks: makes further callbacks, anew for every part.
        **options: of the trainer.
    """
    variant, trace, checkpoint = VARIANTS[name], Trace(), None
    for part, stop in enumerate((*stops, None)):
        torch.manual_seed(part * 1000)  # what a resumed run draws must come from the checkpoint
        own = variant.module(**(module or {}))
        path = folder / f"stop_{part}.ckpt"
        stopping = [] if stop is None else [SaveAndStop(stop, path)]
        trainer = make_trainer(folder, steps, trace, *callbacks(), *stopping, **options)
        with nullcontext() if stop is None else pytest.raises(Interrupted):
            trainer.fit(own, variant.data(folder, **(data or {})), ckpt_path=checkpoint)
        checkpoint = path
    assert trainer.global_step == steps
    return own, trace.losses


def assert_same(
    actual: tuple[AdapterModule, Losses], expected: tuple[AdapterModule, Losses]
) -> None:
    """Losses, weights and streams, bit for bit."""
    (module, losses), (whole, all_losses) = actual, expected
    assert losses == all_losses
    other = whole.state_dict()
    assert module.state_dict().keys() == other.keys()
    for name, value in module.state_dict().items():
        assert torch.equal(value, other[name]), name
    one, two = module.streams.state_dict(), whole.streams.state_dict()
    slots = one.pop("slots"), two.pop("slots")
    assert one == two and slots[0].keys() == slots[1].keys() and slots[0]
    for slot, fields in slots[0].items():
        for field, value in fields.items():
            assert torch.equal(value, slots[1][slot][field]), f"{slot} {field}"
