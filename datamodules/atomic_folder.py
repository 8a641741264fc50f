"""Folders that appear under their name only when they are complete."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Self

from filelock import FileLock, Timeout


class AtomicFolder:
    """A hidden folder beside `path` that is renamed to it when all is written.

    What is interrupted therefore never looks complete; what it left behind is removed by the next
    writer of the same path. A second process waits for the first one's lock.

        with AtomicFolder(path) as target:
            (target.folder / "data.bin").write_bytes(content)

    Args:
        path: the folder to be; it must not exist.

    Raises:
        FileExistsError: `path` exists, perhaps because the process we waited for wrote it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.path.with_name(f".{self.path.name}.lock"))
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            print(f"waiting for another process that is writing {self.path}", flush=True)
            self._lock.acquire()
        if self.path.exists():
            self._lock.release()
            raise FileExistsError(f"{self.path} exists; remove it or write to another folder")
        prefix = f".{self.path.name}.partial-"
        for leftover in self.path.parent.glob(f"{prefix}*"):
            shutil.rmtree(leftover)
        self.folder = Path(tempfile.mkdtemp(prefix=prefix, dir=self.path.parent))
        self.folder.chmod(0o755)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self.commit()
        finally:
            self.discard()

    def commit(self) -> None:
        """Flush the files and give the folder its name.

        Raises:
            FileExistsError: `path` has appeared meanwhile; it is left as it is.
        """
        _flush_to_disk(self.folder)
        if self.path.exists():
            raise FileExistsError(f"{self.path} was written by somebody else meanwhile")
        self.folder.rename(self.path)

    def discard(self) -> None:
        """Remove what is not committed and let other writers in."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()


def _flush_to_disk(folder: Path) -> None:
    """Make sure that a power failure cannot leave the final name with unwritten files."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
