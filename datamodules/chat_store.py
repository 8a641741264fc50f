"""Encoded conversations on disk: tokens, and which of them are answers."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.progress import track

from datamodules.atomic_folder import AtomicFolder
from datamodules.chat_conversations import BadConversation, canonical
from datamodules.chat_sources import ChatSource, Conversation, Conversations
from datamodules.chat_template import ChatTemplate, Encoded
from datamodules.documents import Skipped, describe_skips
from datamodules.splits import unit_hash
from datamodules.token_store import (
    META,
    NAMES,
    OFFSETS,
    PLACES,
    TOKENIZER,
    TOKENS,
    TokenStore,
    slug,
    write_json,
)

FORMAT = 1
"""Part of every folder's name; raise it when what is stored changes."""

ANSWERS = "answers.bin"


class ChatStore(TokenStore):
    """Conversations as tokens, read from a folder that `encode_conversations` wrote.

    Args:
        path: the folder.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: its files do not fit together.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.answers = np.memmap(path / ANSWERS, dtype=np.bool_, mode="r")
        """Tokens that the assistant says, end of turn included, beside `tokens`."""
        if len(self.answers) != len(self.tokens):
            raise ValueError(f"{path} is damaged: {ANSWERS} has the wrong size; remove the folder")

    def answers_of(self, number: int) -> np.ndarray:
        """Which tokens of a conversation are answers."""
        return self.answers[self.offsets[number] : self.offsets[number + 1]]


def chat_store_path(
    cache: str | Path, name: str, conversations: Conversations, template: ChatTemplate, places: int
) -> Path:
    """Folder of conversations: its name changes with them, the template and their length."""
    parts = [FORMAT, conversations.key, template.tokenizer.key, template.text, places]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]
    return Path(cache) / f"chat-{slug(name) or 'conversations'}-{digest}"


def encode_conversations(
    path: Path,
    conversations: Conversations,
    template: ChatTemplate,
    source: ChatSource,
    chunk_length: int,
) -> None:
    """Write the tokens of conversations into `path` unless they are there; others wait.

    Raises:
        ValueError: no conversation can be used; with `source.strict`, one of them cannot.
    """
    if path.exists():
        return
    started = time.perf_counter()
    try:
        target = AtomicFolder(path)
    except FileExistsError:  # another process wrote it while we waited for its lock
        return
    with target:
        meta = _write(target.folder, conversations, template, source, chunk_length)
        template.tokenizer.save(target.folder / TOKENIZER)
        write_json(target.folder / META, meta)
    seconds = time.perf_counter() - started
    print(f"encoded {meta['conversations']} conversations in {seconds:.1f} s: {path}")


class _Item(NamedTuple):
    name: str
    content: bytes
    encoded: Encoded


def _encoded(
    conversations: Conversations, template: ChatTemplate, strict: bool, chunk_length: int
) -> Iterator[_Item | Skipped]:
    progress = {"description": "encoding", "disable": not sys.stdout.isatty()}
    for item in track(conversations, total=len(conversations), transient=True, **progress):
        yield item if isinstance(item, Skipped) else _encode(item, template, strict, chunk_length)


def _encode(
    item: Conversation, template: ChatTemplate, strict: bool, chunk_length: int
) -> _Item | Skipped:
    try:
        encoded = template.fit(item.turns, chunk_length + 1)
    except BadConversation as error:
        if strict:
            raise ValueError(
                f"{item.name}: {error}; repair or remove it, or set strict: false to skip it"
            ) from error
        return Skipped(item.name, str(error))
    return _Item(item.name, canonical(item.turns), encoded)


def _write(
    folder: Path,
    conversations: Conversations,
    template: ChatTemplate,
    source: ChatSource,
    chunk_length: int,
) -> dict[str, Any]:
    dtype = np.min_scalar_type(template.tokenizer.vocab_size - 1)
    names: list[str] = []
    places: list[float] = []
    lengths: list[int] = []
    skipped: list[Skipped] = []
    digest, counts = hashlib.sha256(), Counter[str]()
    with (folder / TOKENS).open("wb") as tokens, (folder / ANSWERS).open("wb") as answers:
        for item in _encoded(conversations, template, source.strict, chunk_length):
            if isinstance(item, Skipped):
                skipped.append(item)
                continue
            names.append(item.name)
            places.append(unit_hash(item.content))
            lengths.append(len(item.encoded.tokens))
            digest.update(b"%d:" % len(item.content) + item.content)
            tokens.write(item.encoded.tokens.astype(dtype).tobytes())
            answers.write(item.encoded.answers.tobytes())
            counts["labels"] += int(item.encoded.answers[1:].sum())
            counts["shortened"] += item.encoded.dropped > 0
            counts["cut"] += item.encoded.cut
    report = describe_skips(skipped, len(conversations), "conversations")
    if not names:
        raise ValueError(f"there is nothing to learn from in {source.path}: {report}")
    np.save(folder / OFFSETS, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
    np.save(folder / PLACES, np.asarray(places))
    write_json(folder / NAMES, names)
    return {
        "conversations": len(names),
        "tokens": sum(lengths),
        **{name: counts[name] for name in ("labels", "shortened", "cut")},
        "skipped": len(skipped),
        "skip_report": report if skipped else None,
        "dtype": dtype.name,
        "content_hash": digest.hexdigest(),
    }
