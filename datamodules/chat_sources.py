"""Where conversations come from: files of JSON lines, or a Hugging Face dataset."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from datamodules.chat_conversations import COLUMNS, SHAPES, BadConversation, Turn, read_turns
from datamodules.documents import Skipped, TextSource, find_files

SUFFIX = ".jsonl"


@dataclass(frozen=True)
class ChatSource:
    """Which conversations are read.

    A conversation has `messages` [{role, content}], `conversations` [{from, value}] (ShareGPT's),
    or `prompt` with `response` or `completion`.

    Args:
        path: of `files`, a .jsonl file, a folder (all .jsonl files below it) or a glob; of
            `datasets`, a folder of `save_to_disk`, a .json, .jsonl or .parquet file or glob, or
            the name of a dataset on the hub.
        kind: `files` reads one conversation per line, `datasets` the rows of a Hugging Face
            dataset (needs `pip install datasets`).
        subset: configuration of a dataset on the hub.
        split: which part of a dataset is read; validation conversations are split off from it.
        strict: True stops at a conversation that cannot be used; False reports how many were
            skipped.
    """

    path: str
    kind: Literal["files", "datasets"] = "files"
    subset: str | None = None
    split: str = "train"
    strict: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("files", "datasets"):
            raise ValueError(f"unknown source {self.kind!r}; choose files or datasets")
        if not self.path:
            raise ValueError(f"kind: {self.kind} needs a path")

    @property
    def name(self) -> str:
        """Short name for messages and folders."""
        return TextSource("files", self.path).name


class Conversation(NamedTuple):
    """One conversation, with a name that says where it stands."""

    name: str
    turns: tuple[Turn, ...]


class Conversations(Protocol):
    """Conversations in an order that does not change."""

    @property
    def key(self) -> str:
        """Changes when the conversations do."""
        ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Conversation | Skipped]: ...


def open_conversations(source: ChatSource) -> Conversations:
    """The conversations of a source.

    Raises:
        FileNotFoundError: the path does not exist, or has no .jsonl file.
        ImportError: `datasets` is not installed.
        ValueError: a dataset has no such split, or no column with conversations.
    """
    return (JsonLines if source.kind == "files" else DatasetRows)(source)


class JsonLines:
    """Lines of .jsonl files, in the order of their names; blank ones are none.

    Args:
        source: path and strictness.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a file cannot be read.
    """

    def __init__(self, source: ChatSource) -> None:
        self.source = source
        found = find_files(source.path)
        self.files = {n: p for n, p in found.items() if len(found) == 1 or n.endswith(SUFFIX)}
        if not self.files:
            raise FileNotFoundError(
                f"{source.path} has no {SUFFIX} files; for other formats set kind: datasets"
            )
        digest, self._lines = hashlib.sha256(), 0
        for name, _, line in self._raw_lines():
            digest.update(b"%d:%d:" % (len(name), len(line)) + name.encode() + line)
            self._lines += 1
        self.key = f"{digest.hexdigest()}:{source.strict}"

    def __len__(self) -> int:
        return self._lines

    def __iter__(self) -> Iterator[Conversation | Skipped]:
        """Conversations one by one.

        Raises:
            ValueError: with `strict`, at a line that is no conversation.
        """
        for name, number, line in self._raw_lines():
            yield _read(f"{name}:{number}", line, self.source.strict)

    def _raw_lines(self) -> Iterator[tuple[str, int, bytes]]:
        for name, path in self.files.items():
            try:
                with path.open("rb") as file:
                    for number, line in enumerate(file, start=1):
                        if line.strip():
                            yield name, number, line
            except OSError as error:
                raise ValueError(
                    f"{path} cannot be read: {error.strerror}; repair or remove it"
                ) from error


class DatasetRows:
    """Rows of a dataset, in its order.

    Args:
        source: path, subset, split and strictness.

    Raises:
        ImportError: `datasets` is not installed.
        FileNotFoundError: there is no such dataset.
        ValueError: it has no such split, or no column with conversations.
    """

    def __init__(self, source: ChatSource) -> None:
        from datamodules.dataset_documents import load_rows

        self.source = source
        rows = load_rows(source.path, source.subset, source.split)
        columns = [name for name in rows.column_names if name in COLUMNS]
        if not columns:
            raise ValueError(
                f"{source.path} has the columns {', '.join(rows.column_names)}, but conversations "
                f"are {SHAPES}: rename its columns"
            )
        self.rows = rows.select_columns(columns)
        self.key = f"datasets:{self.rows._fingerprint}:{source.strict}"

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Conversation | Skipped]:
        """Conversations one by one.

        Raises:
            ValueError: with `strict`, at a row that is no conversation.
        """
        for number, row in enumerate(self.rows):
            yield _read(f"row {number}", row, self.source.strict)


def _read(name: str, record: Any, strict: bool) -> Conversation | Skipped:
    """The conversation of a record, which may still be a line of JSON."""
    try:
        if isinstance(record, bytes):
            record = _parse(record)
        return Conversation(name, read_turns(record))
    except BadConversation as error:
        if strict:
            raise ValueError(
                f"{name}: {error}; repair or remove it, or set strict: false to skip it"
            ) from error
        return Skipped(name, str(error))


def _parse(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise BadConversation(f"not UTF-8 at byte {error.start}") from error
    except ValueError as error:
        raise BadConversation(f"no line of JSON ({error})") from error
