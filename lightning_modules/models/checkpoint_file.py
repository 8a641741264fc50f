"""The file of a checkpoint, read without running anything that it holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def read_checkpoint(path: str | Path) -> Any:
    """Content of a checkpoint file, on the CPU.

    Raises:
        FileNotFoundError: there is no such file, or it is the folder of a sharded run.
        ValueError: it is another kind of file.
    """
    path = Path(path)
    if path.is_dir():
        raise FileNotFoundError(
            f"the checkpoint {path} is a folder: name the file, e.g. "
            "runs/quickstart/version_0/checkpoints/last.ckpt; the folder that a run with "
            "strategy: fsdp2 saved becomes one by python -m "
            "lightning_modules.distributed.consolidate FOLDER FILE"
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"the checkpoint {path} does not exist: name the file, e.g. "
            "runs/quickstart/version_0/checkpoints/last.ckpt"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen types for files that are none of its
        raise ValueError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}): name a file that "
            "ModelCheckpoint or trainer.save_checkpoint wrote"
        ) from error
