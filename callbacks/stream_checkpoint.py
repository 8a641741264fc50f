"""What exact resuming needs beside weights: fast state, random state, open gradients."""

from __future__ import annotations

import random
import warnings
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class StreamStateCheckpoint(Callback):
    """Save and restore, per rank, the training streams and the random number generators.

    Between two batches whose gradients are accumulated for one step, the gradients so far as well.
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
        if trainer.training and trainer.fit_loop.epoch_loop._should_accumulate():
            here["gradients"] = collect_gradients(pl_module)
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
        set_gradients(pl_module, mine.get("gradients", {}))


def _gather(value: dict[str, Any]) -> list[dict[str, Any]]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, value)
    return everyone


def collect_gradients(module: nn.Module) -> dict[str, Tensor]:
    """Gradients of this process, name -> a copy on the CPU; of a sharded one its own part."""
    parameters = module.named_parameters()
    return {name: local(p.grad).cpu().clone() for name, p in parameters if p.grad is not None}


def set_gradients(module: nn.Module, gradients: Mapping[str, Tensor]) -> None:
    """Give the named parameters these gradients; the others keep what they have."""
    parameters = dict(module.named_parameters())
    for name, gradient in gradients.items():
        parameter = parameters[name]
        parameter.grad = torch.zeros_like(parameter)
        local(parameter.grad).copy_(gradient)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, without its graph: all of it, unless it is sharded."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


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
