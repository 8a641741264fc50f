"""Folders of saved weights, which appear when all of them is written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_new(target: Path, what: str) -> None:
    """Raise a FileExistsError if there is something where a folder is to appear."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(f"{target} is not empty: save {what} into a new folder")


@contextmanager
def new_folder(path: str | Path, what: str) -> Iterator[Path]:
    """A place to write to that becomes the folder at the end, unless an error comes first.

    Args:
        path: a new or empty folder.
        what: is saved, for the message.

    Raises:
        FileExistsError: there is something in the folder.
    """
    target = Path(path)
    check_new(target, what)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}_") as place:
        part = Path(place) / "part"
        part.mkdir()
        yield part
        os.replace(part, target)
