"""Small classes that the command line's tests configure, and a config file of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from toy import ToyData

from lightning_modules.base import AdapterModule, ParameterGroup


@dataclass(frozen=True)
class CaseMemory:
    size: int = 4
    kind: Literal["linear", "mlp"] = "linear"
    rates: tuple[float, ...] = (1.0,)
    limit: int | None = 8


@dataclass(frozen=True)
class CaseExpert:
    hidden_size: int = 8
    memory: CaseMemory | None = None
    inner: CaseMemory = field(default_factory=CaseMemory)


class CaseModule(AdapterModule):
    """A linear layer with options of every kind."""

    def __init__(
        self,
        optimizer: OptimizerCallable,
        expert: CaseExpert | None = None,
        horizon: int = 4,
        fail: bool = False,
        groups: dict[str, ParameterGroup] | None = None,
    ) -> None:
        super().__init__(optimizer, groups=groups, persistent=True)
        if fail:
            torch.zeros(2).view(3)
        self.layer = nn.Linear(4, 4)

    def chunk_loss(self, chunk: dict[str, Any], fast_state: Any, generator: Any) -> Tensor:
        return (self.layer(chunk["x"]) - chunk["y"]).square().mean()


class CaseData(ToyData):
    """`ToyData` under a name of its own."""


class CaseMonitor(Callback):
    """Prints which callbacks run."""

    def __init__(self, every_n_steps: int = 50) -> None:
        self.every_n_steps = every_n_steps

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        print("callbacks:", *(type(callback).__name__ for callback in trainer.callbacks))


class CaseInterrupt(Callback):
    """What Ctrl-C does, behind a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise KeyboardInterrupt


CONFIG = """
trainer:
  max_steps: 2
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  limit_val_batches: 0
  callbacks:
    - class_path: CaseMonitor
      init_args: {every_n_steps: 3}
    - class_path: RichModelSummary
model:
  class_path: CaseModule
  init_args:
    horizon: 4
    expert: {hidden_size: 8, memory: {size: 2}}
    optimizer:
      class_path: AdamW
      init_args: {lr: 1.0e-3}
    groups: {gate: {lr_scale: 2.0}}
data:
  class_path: CaseData
  init_args: {batch_size: 2}
"""
