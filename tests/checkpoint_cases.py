"""Checkpoints of an action expert, as they are and changed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lightning_modules.action_expert import ActionExpertModule

Change = Callable[[dict[str, Any]], Any]


def save(module: ActionExpertModule, path: Path, change: Change | None = None) -> Path:
    """What Lightning's checkpoint holds of a module, changed if so wished."""
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    if change is not None:
        change(checkpoint)
    torch.save(checkpoint, path)
    return path
