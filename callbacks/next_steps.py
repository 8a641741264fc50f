"""What a finished or interrupted fit has left, and the command that comes next."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger


class InterruptedFit(Callback):
    """Say what a fit has left that Ctrl-C ended, and how it goes on; Lightning exits silently."""

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        if not isinstance(exception, KeyboardInterrupt) or not trainer.is_global_zero:
            return
        print(f"\ninterrupted at step {trainer.global_step}")
        for line in next_steps(trainer, finished=False):
            print(line)


def next_steps(trainer: pl.Trainer, finished: bool = True) -> list[str]:
    """Lines for the terminal: the run's folder, curves, losses, checkpoints, the next command.

    Args:
        trainer: behind its fit.
        finished: the next command tests the model; otherwise it goes on from the last checkpoint.
    """
    lines = []
    folder = None if trainer.logger is None else trainer.log_dir
    if folder is not None:
        lines.append(f"run: {_shown(folder)} (config.yaml is what it was started with)")
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            lines.append(f"curves: tensorboard --logdir {_shown(logger.save_dir)}")
    saved = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    if (loss := trainer.callback_metrics.get("val/loss")) is not None:
        lines.append(f"val/loss: {float(loss):.4g}")
    best = next((c for c in saved if c.best_model_path and c.monitor), None)
    if best is not None:
        score = _score(best)
        lines.append(f"best checkpoint: {_shown(best.best_model_path)}{score}")
    last = next((c.last_model_path for c in saved if c.last_model_path), None)
    if last is not None:
        lines.append(f"last checkpoint: {_shown(last)}")
    path = last or (best.best_model_path if best else None)
    if folder is not None and path is not None:
        command = f"next: {_program()} test" if finished else f"go on: {_program()} fit"
        config = _shown(Path(folder) / "config.yaml")
        lines.append(f"{command} --config {config} --ckpt_path {_shown(path)}")
    elif not finished:
        lines.append("no checkpoint was saved yet: the next fit begins anew")
    return lines


def _score(saved: ModelCheckpoint) -> str:
    score = saved.best_model_score
    return "" if score is None else f" ({saved.monitor} {float(score):.4g})"


def _program() -> str:
    """How this process was started: a script in the place of `cli.py`, or an installed command."""
    path = Path(sys.argv[0])
    return f"python {_shown(path)}" if path.suffix == ".py" else path.name


def _shown(path: str | Path) -> str:
    """Relative to the working directory where it lies below it."""
    path = Path(path)
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
