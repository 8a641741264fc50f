"""What a finished fit has left, and the command that comes next."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger


def next_steps(trainer: pl.Trainer) -> list[str]:
    """Lines for the terminal: the run's folder, its curves, its checkpoints, how to test it."""
    lines = []
    folder = None if trainer.logger is None else trainer.log_dir
    if folder is not None:
        lines.append(f"run: {_shown(folder)} (config.yaml is what it was started with)")
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            lines.append(f"curves: tensorboard --logdir {_shown(logger.save_dir)}")
    saved = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    best = next((c.best_model_path for c in saved if c.best_model_path and c.monitor), None)
    if best is not None:
        lines.append(f"best checkpoint: {_shown(best)}")
    last = next((c.last_model_path for c in saved if c.last_model_path), None)
    if last is not None:
        lines.append(f"last checkpoint: {_shown(last)}")
    if folder is not None and (path := last or best):
        config = _shown(Path(folder) / "config.yaml")
        lines.append(f"next: python cli.py test --config {config} --ckpt_path {_shown(path)}")
    return lines


def _shown(path: str | Path) -> str:
    """Relative to the working directory where it lies below it."""
    path = Path(path)
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
