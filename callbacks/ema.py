"""Exponential moving average of the trained weights, for evaluation and for checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn


def shards_parameters(trainer: pl.Trainer) -> bool:
    """Whether every process holds only a part of the parameters."""
    return isinstance(trainer.strategy, (ModelParallelStrategy, FSDPStrategy, DeepSpeedStrategy))


class _Averages:
    """Averages of a module's trained parameters, and the weights they stand in for.

    The averages are kept in float32 at least: in bfloat16 a step of (1 - decay) would be lost.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.count = 0
        self.parameters = {
            name: parameter
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        self.values = {
            name: parameter.detach().to(_wide(parameter), copy=True)
            for name, parameter in self.parameters.items()
        }
        self.trained: dict[str, Tensor] | None = None
        """The weights that training goes on with, while the averages are in the module."""

    @torch.no_grad()
    def update_parameters(self, module: nn.Module) -> None:
        """`average <- decay * average + (1 - decay) * weight`; the first time, the weight."""
        current = [p.detach().to(_wide(p)) for p in self.parameters.values()]
        weight = 1 - self.decay if self.count else 1.0
        torch._foreach_lerp_(list(self.values.values()), current, weight)
        self.count += 1

    @torch.no_grad()
    def enter(self) -> None:
        """Put the averages into the module."""
        self.trained = {name: p.detach().clone() for name, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            parameter.copy_(self.values[name])

    @torch.no_grad()
    def leave(self) -> None:
        """Put the trained weights back."""
        assert self.trained is not None
        for name, parameter in self.parameters.items():
            parameter.copy_(self.trained[name])
        self.trained = None

    def load(self, values: dict[str, Tensor], count: int) -> None:
        """Take over what a checkpoint stored, where the names agree."""
        for name, value in self.values.items():
            if name in values:
                value.copy_(values[name])
        self.count = count


class EMA(EMAWeightAveraging):
    """Average the trained parameters; evaluation and checkpoints use the average.

    `average <- decay * average + (1 - decay) * weight` after every optimizer step. The averages
    replace the weights in validation, in closed-loop evaluation, after training, and in the
    `state_dict` of every checkpoint; the weights that training goes on with lie beside it under
    `current_model_state`, so that resuming is exact. Checkpoints hold what the module keeps in its
    `state_dict` (the adapter alone, say), no more. Frozen parameters and buffers are never copied.

    Args:
        decay: share of the average that is kept at every update.
        update_every_n_steps: optimizer steps between two updates.
        update_starting_at_step: first optimizer step that counts; None starts at once.

    Raises:
        ValueError: decay outside [0, 1), or a strategy that shards parameters.
    """

    def __init__(
        self,
        decay: float = 0.998,
        update_every_n_steps: int = 1,
        update_starting_at_step: int | None = None,
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay} must be at least 0 and below 1")
        super().__init__(
            use_buffers=False,
            decay=decay,
            update_every_n_steps=update_every_n_steps,
            update_starting_at_step=update_starting_at_step,
        )
        self._kwargs = {}  # Lightning's averaging function: not used here, and it cannot be pickled
        self.decay = decay
        self._averages: _Averages | None = None
        self._restored: dict[str, Any] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if shards_parameters(trainer):
            raise ValueError(
                f"EMA cannot average parameters that {type(trainer.strategy).__name__} shards; "
                "remove EMA from trainer.callbacks or use strategy: ddp"
            )
        if stage == "fit":
            self._latest_update_step = 0  # an earlier fit of this object does not count

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Only now is the module complete, frozen where it shall be, and on its device.
        self._averages = _Averages(pl_module, self.decay)
        self._average_model = self._averages  # type: ignore[assignment]
        if self._restored is not None:
            self._averages.load(self._restored["values"], self._restored["count"])
            self._restored = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._enter()

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._enter()

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.state.fn == "fit" and self._averages is not None:
            self._averages.leave()

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The module has the averaged weights in this context; nests, and is harmless after fit."""
        if self._averages is None or self._averages.trained is not None:
            yield
            return
        self._averages.enter()
        try:
            yield
        finally:
            self._averages.leave()

    def _enter(self) -> None:
        if self._averages is not None and self._averages.trained is None:
            self._averages.enter()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        averages = self._averages
        if averages is None:
            return
        current = averages.trained or {n: p.detach() for n, p in averages.parameters.items()}
        checkpoint["current_model_state"] = current
        checkpoint["averaging_state"] = {"count": averages.count, "values": averages.values}
        if averages.trained is None:
            state = checkpoint["state_dict"]
            for name, owner in _owners(pl_module).items():
                if name in state and owner in averages.values:
                    state[name] = averages.values[owner].to(state[name].dtype)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn != "fit" or "averaging_state" not in checkpoint:
            return
        self._restored = checkpoint["averaging_state"]
        parameters = dict(pl_module.named_parameters())
        with torch.no_grad():
            for name, value in checkpoint["current_model_state"].items():
                parameters[name].copy_(value)


def _wide(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def _owners(module: nn.Module) -> dict[str, str]:
    """Every name of every parameter -> its first name (tied parameters have several)."""
    first = {id(parameter): name for name, parameter in module.named_parameters()}
    return {
        name: first[id(parameter)]
        for name, parameter in module.named_parameters(remove_duplicate=False)
    }
