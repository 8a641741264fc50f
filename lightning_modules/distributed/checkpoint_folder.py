"""Checkpoints that are folders: written beside their place, marked when complete, then moved."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

MARKER = "complete"
"""Last file of a checkpoint: without it, the folder was not written to its end."""


def part_of(folder: Path) -> Path:
    """Where a checkpoint lies while it is written, beside its place and on the same disk."""
    return folder.with_name(f".{folder.name}.part")


def begin(folder: Path) -> Path:
    """Make room for a new checkpoint: an empty folder, to be filled before `publish`."""
    part = part_of(folder)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    return part


def publish(folder: Path) -> None:
    """Mark what was written as complete, and put it in its place, instead of what is there."""
    part = part_of(folder)
    with (part / MARKER).open("w") as marker:
        marker.flush()
        os.fsync(marker.fileno())
    if folder.is_dir():
        shutil.rmtree(folder)
    elif folder.exists():
        folder.unlink()
    part.rename(folder)


def recover(folder: Path) -> None:
    """Finish a `publish` that was interrupted between its mark and its move."""
    part = part_of(folder)
    if (part / MARKER).exists() and not (folder / MARKER).exists():
        publish(folder)


def check_complete(folder: Path) -> None:
    """Refuse a checkpoint that is not there to its last file.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: it was not written to its end.
    """
    if not folder.exists():
        raise FileNotFoundError(f"there is no checkpoint {folder}")
    if folder.is_dir() and not (folder / MARKER).exists():
        raise ValueError(
            f"the checkpoint {folder} has no file {MARKER!r}: the run was interrupted while it was "
            "written, or another program wrote it; resume from another checkpoint and delete this"
        )
