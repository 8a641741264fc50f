"""Where documents come from: Python's standard library, files, or a Hugging Face dataset."""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from datamodules.splits import unit_hash

EMPTY = "empty"
# Tests of the standard library, and what others installed below it.
NOT_STDLIB = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages"})
# Written when Python was built: paths and flags of that machine.
BUILD_SETTINGS = ("_sysconfigdata", "config-")
MAGIC = frozenset("*?[")


@dataclass(frozen=True)
class TextSource:
    """Which documents are read.

    Args:
        kind: `stdlib` is Python's own standard library without its tests, `files` a folder or a
            glob, `datasets` a Hugging Face dataset (needs `pip install datasets`).
        path: what is read: of `files`, a folder (all files below it), a glob such as
            `corpus/**/*.md`, or a file; of `datasets`, a folder of `save_to_disk`, a .json, .jsonl,
            .csv or .parquet file or glob, or the name of a dataset on the hub.
        subset: configuration of a dataset on the hub.
        split: which part of a dataset is read; validation documents are split off from it.
        column: the column of a dataset that has the text.
        strict: True stops at a document that cannot be read or is not UTF-8; False reports how
            many were skipped.
    """

    kind: Literal["stdlib", "files", "datasets"] = "stdlib"
    path: str | None = None
    subset: str | None = None
    split: str = "train"
    column: str = "text"
    strict: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("stdlib", "files", "datasets"):
            raise ValueError(f"unknown source {self.kind!r}; choose stdlib, files or datasets")
        if self.kind == "stdlib" and self.path is not None:
            raise ValueError(
                f"path={self.path!r} is not read by kind: stdlib; set kind: files (or datasets)"
            )
        if self.kind != "stdlib" and not self.path:
            raise ValueError(f"kind: {self.kind} needs a path")

    @property
    def name(self) -> str:
        """Short name for messages and folders."""
        if self.path is None:
            return self.kind
        return _split_glob(Path(self.path).expanduser())[0].resolve().name or self.kind


class Document(NamedTuple):
    """One document: `place` in [0, 1) decides to which split it belongs."""

    name: str
    content: bytes
    place: float


class Skipped(NamedTuple):
    """A document that is not used, and why; `EMPTY` is no mistake."""

    name: str
    reason: str


class Corpus(Protocol):
    """Documents in an order that does not change, each with its content in UTF-8."""

    @property
    def key(self) -> str:
        """Changes when the documents do."""
        ...

    @property
    def content_hash(self) -> str | None:
        """SHA-256 of names and contents; None where finding out would take long."""
        ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Document | Skipped]: ...


class FileCorpus:
    """Files as documents, in the given order; an empty one is skipped.

    Args:
        files: name (relative to the folder, with slashes) -> file.
        strict: raise at a file that cannot be used.
    """

    def __init__(self, files: dict[str, Path], strict: bool = False) -> None:
        self.files = files
        self.strict = strict

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[Document | Skipped]:
        """Read the files one by one.

        Raises:
            ValueError: with `strict`, at a file that cannot be read or is not UTF-8.
        """
        for name, path in self.files.items():
            try:
                content = path.read_bytes()
                content.decode()
            except (OSError, UnicodeDecodeError) as error:
                yield self._skip(name, path, error)
                continue
            yield Document(name, content, unit_hash(name)) if content else Skipped(name, EMPTY)

    def _skip(self, name: str, path: Path, error: OSError | UnicodeDecodeError) -> Skipped:
        if isinstance(error, UnicodeDecodeError):
            reason = f"not UTF-8 at byte {error.start}"
        else:
            reason = f"unreadable: {error.strerror}"
        if self.strict:
            raise ValueError(
                f"{path} is {reason}; convert or remove it, or set strict: false to skip it"
            )
        return Skipped(name, reason)

    @property
    def content_hash(self) -> str:
        """SHA-256 of names and contents in order, the same on every machine."""
        return self._hashes[0]

    @property
    def key(self) -> str:
        """Hash of the content and of what is skipped: reading is fast beside tokenising."""
        return self._hashes[1]

    @cached_property
    def _hashes(self) -> tuple[str, str]:
        digest, skipped = hashlib.sha256(), []
        for item in self:
            if isinstance(item, Document):
                update_hash(digest, item)
            else:
                skipped.append(item)
        content = digest.hexdigest()
        return content, hashlib.sha256(repr([content, skipped]).encode()).hexdigest()


def update_hash(digest: Any, document: Document) -> None:
    """Add a document to a hash of `hashlib`; lengths keep neighbours apart."""
    name = document.name.encode("utf-8", "surrogateescape")
    digest.update(b"%d:%d:" % (len(name), len(document.content)) + name)
    digest.update(document.content)


def stdlib_files() -> dict[str, Path]:
    """Python files of the interpreter's standard library, without tests and build settings."""
    root = Path(sysconfig.get_path("stdlib"))
    files = {
        name: path
        for name, path in _below(root, NOT_STDLIB).items()
        if name.endswith(".py") and not name.startswith(BUILD_SETTINGS)
    }
    if not files:
        raise FileNotFoundError(
            f"{sys.executable} has no standard library as files below {root}; "
            "name a folder: kind: files, path: FOLDER"
        )
    return files


def find_files(path: str) -> dict[str, Path]:
    """Files of a folder or a glob, by name relative to the folder (a glob's: its fixed part).

    Hidden files and folders and `__pycache__` are left out, links to folders are not followed, and
    a file that is also reached by a link is read once, under its own name.

    Raises:
        FileNotFoundError: nothing is there.
    """
    root = Path(path).expanduser()
    if root.is_dir():
        files = _below(root)
    elif root.is_file():
        files = {root.name: root}
    else:
        fixed, pattern = _split_glob(root)
        if not pattern:
            raise FileNotFoundError(f"{path} does not exist; name a folder, a file or a glob")
        found = fixed.glob(pattern) if fixed.is_dir() else ()
        files = _without_aliases(
            {name: p for p in found if _is_file(p) and not _hidden(name := _name(p, fixed))}
        )
    if not files:
        raise FileNotFoundError(
            f"{path} has no files; for a glob over all levels write FOLDER/**/*.txt"
        )
    return files


def _split_glob(path: Path) -> tuple[Path, str]:
    parts = path.parts
    first = next((i for i, part in enumerate(parts) if MAGIC & set(part)), len(parts))
    return Path(*parts[:first]), "/".join(parts[first:])


def _below(root: Path, left_out: frozenset[str] = frozenset()) -> dict[str, Path]:
    """All files below a folder; a folder that cannot be listed stands for its files."""
    files: dict[str, Path] = {}

    def unreadable(error: OSError) -> None:
        files[_name(Path(error.filename), root)] = Path(error.filename)

    for folder, folders, names in os.walk(root, onerror=unreadable):
        folders[:] = [name for name in folders if not _hidden(name) and name not in left_out]
        for name in names:
            path = Path(folder, name)
            if _is_file(path) and not _hidden(name):
                files[_name(path, root)] = path
    return _without_aliases(files)


def _name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _is_file(path: Path) -> bool:
    """Also for a link that leads nowhere, which is to be reported; not for pipes and devices."""
    return path.is_file() or (path.is_symlink() and not path.exists())


def _hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in Path(name).parts)


def _without_aliases(files: dict[str, Path]) -> dict[str, Path]:
    """Keep one name per file: its own rather than a link's, then the first."""
    kept: dict[str, str] = {}
    for name in sorted(files, key=lambda name: (files[name].is_symlink(), name)):
        kept.setdefault(os.path.realpath(files[name]), name)
    return {name: files[name] for name in sorted(kept.values())}


def describe_skips(skipped: Sequence[Skipped], total: int, items: str = "documents") -> str:
    """One sentence with the number of skipped documents (or other items) and the first few.

    Every reason is said once, behind the first three that it holds for.
    """
    if not total:
        return f"it has no {items}"
    by_reason: dict[str, list[str]] = {}
    for skip in skipped:
        by_reason.setdefault(skip.reason, []).append(skip.name)
    first = [f"{_first(names)} ({reason})" for reason, names in by_reason.items()]
    return f"{len(skipped)} of {total} {items} were skipped: {_first(first)}"


def _first(names: Sequence[str]) -> str:
    return ", ".join([*names[:3], *(["..."] if len(names) > 3 else [])])
