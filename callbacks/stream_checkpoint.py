"""Fast state and random state in every checkpoint: resuming equals never having stopped."""

from __future__ import annotations

import random
import warnings
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback


class StreamStateCheckpoint(Callback):
    """Save and restore, per rank, the training streams and the random number generators.

    The position of the loader travels beside it (Lightning saves the `state_dict` of
    `StreamLoader`), so a run that is resumed in the middle of a file continues bit for bit.
    A checkpoint of another world size has no state for the new rows: they start afresh, and a
    warning says so.
    """

    def __init__(self) -> None:
        self._restored: list[dict[str, Any]] | None = None

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        here = {"streams": pl_module.streams.state_dict("train"), "rng": collect_rng_states()}
        checkpoint["streams"] = _gather(here)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        self._restored = checkpoint.get("streams")

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        restored, self._restored = self._restored, None
        if restored is None:
            return
        if len(restored) != trainer.world_size:
            warnings.warn(
                f"the checkpoint holds the streams of {len(restored)} processes and this run has "
                f"{trainer.world_size}: every stream starts afresh",
                stacklevel=2,
            )
            pl_module.streams.restart("train")
            return
        mine = restored[trainer.global_rank]
        pl_module.streams.load_state_dict(mine["streams"], "train", device=pl_module.device)
        set_rng_states(mine["rng"])


def _gather(value: dict[str, Any]) -> list[dict[str, Any]]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, value)
    return everyone


def collect_rng_states() -> dict[str, Any]:
    """States of Python's, numpy's and torch's generators, as what `torch.load` reads safely."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, torch.tensor(np.asarray(keys).tolist()), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_states(states: dict[str, Any]) -> None:
    """Put every generator where `collect_rng_states` found it."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if len(states["cuda"]) == torch.cuda.device_count() > 0:
        torch.cuda.set_rng_state_all(states["cuda"])
