"""Tokenised documents on disk: one memory-mapped array, written once, all or nothing."""

from __future__ import annotations

import hashlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from datamodules.atomic_folder import AtomicFolder
from datamodules.documents import EMPTY, Corpus, Document, Skipped, describe_skips, update_hash
from datamodules.splits import split_by_hash
from datamodules.tokenization import (
    ByteTokenizer,
    PretrainedTokenizer,
    Tokenizer,
    TokenizerConfig,
)

FORMAT = 1
"""Part of every folder's name; raise it when what is stored changes."""

TOKENS, OFFSETS, PLACES = "tokens.bin", "offsets.npy", "places.npy"
NAMES, META, TOKENIZER = "names.json", "meta.json", "tokenizer"
BATCH_BYTES = 4 * 2**20
"""Text that is tokenised at once: enough to keep all threads of a fast tokenizer busy."""


class TokenStore:
    """Documents as tokens, read from a folder that `tokenise` wrote.

    Copies that go to worker processes open the files again, so nothing is sent but the path.

    Args:
        path: the folder.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: its files do not fit together.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_dir():
            raise FileNotFoundError(
                f"{path} is not there: the documents are tokenised by prepare_data(), which has "
                "not run, or they changed since; the trainer calls it, scripts call it themselves"
            )
        self.meta: dict[str, Any] = json.loads((path / META).read_text(encoding="utf-8"))
        self.offsets: np.ndarray = np.load(path / OFFSETS)
        self.places: np.ndarray = np.load(path / PLACES)
        """Hash in [0, 1) by which each document belongs to a split."""
        dtype = np.dtype(self.meta["dtype"])
        if (path / TOKENS).stat().st_size != int(self.offsets[-1]) * dtype.itemsize:
            raise ValueError(f"{path} is damaged: {TOKENS} has the wrong size; remove the folder")
        self.tokens = np.memmap(path / TOKENS, dtype=dtype, mode="r")

    def __reduce__(self) -> tuple[type[TokenStore], tuple[Path]]:
        return type(self), (self.path,)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of every document, int64."""
        return np.diff(self.offsets)

    @cached_property
    def names(self) -> list[str]:
        """Name of every document."""
        return json.loads((self.path / NAMES).read_text(encoding="utf-8"))

    def document(self, number: int) -> np.ndarray:
        """All tokens of a document."""
        return self.tokens[self.offsets[number] : self.offsets[number + 1]]

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the documents were encoded with."""
        if (self.path / TOKENIZER).is_dir():
            return PretrainedTokenizer.load(str(self.path / TOKENIZER))
        return ByteTokenizer()


def store_path(
    cache: str | Path, name: str, corpus: Corpus, config: TokenizerConfig, val_fraction: float
) -> Path:
    """Folder of a corpus and a tokenizer: its name changes with the content and the settings."""
    tokenizer: list[Any] = [config.kind]
    if config.kind == "bpe":  # trained without the validation documents
        tokenizer += [config.vocab_size, val_fraction]
    elif config.name is not None:
        tokenizer += [PretrainedTokenizer.load(config.name).key]
    text = json.dumps([FORMAT, corpus.key, tokenizer])
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    return Path(cache) / f"text-{slug(name) or 'documents'}-{config.kind}-{digest}"


def slug(name: str) -> str:
    """A name as part of a folder's."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name).strip("-.")


def tokenise(path: Path, corpus: Corpus, config: TokenizerConfig, val_fraction: float) -> None:
    """Write the tokens of a corpus into `path` unless they are there; others wait.

    Raises:
        ValueError: no document can be used.
        RuntimeError: files changed meanwhile.
    """
    write_store(path, corpus, lambda: _make_tokenizer(config, corpus, val_fraction))


def write_store(path: Path, corpus: Corpus, make_tokenizer: Callable[[], Tokenizer]) -> None:
    """`tokenise` with a tokenizer that is made when nobody else has written the folder."""
    if path.exists():
        return
    started = time.perf_counter()
    try:
        target = AtomicFolder(path)
    except FileExistsError:  # another process wrote it while we waited for its lock
        return
    with target:
        tokenizer = make_tokenizer()
        meta = _write_documents(target.folder, corpus, tokenizer)
        if corpus.content_hash not in (None, meta["content_hash"]):
            raise RuntimeError("documents changed while they were read; run again")
        tokenizer.save(target.folder / TOKENIZER)
        write_json(target.folder / META, {**meta, "vocab_size": tokenizer.vocab_size})
    print(
        f"tokenised {meta['documents']} documents in {time.perf_counter() - started:.1f} s: {path}"
    )


def _make_tokenizer(config: TokenizerConfig, corpus: Corpus, val_fraction: float) -> Tokenizer:
    if config.kind == "bytes":
        return ByteTokenizer()
    if config.name is not None:
        return PretrainedTokenizer.load(config.name)
    places = [document.place for document in _documents(corpus)]
    training = set(split_by_hash(places, val_fraction, "documents")[0].tolist())
    texts = (
        document.content.decode()
        for number, document in enumerate(_documents(corpus))
        if number in training
    )
    return PretrainedTokenizer.train(texts, config.vocab_size or 4096)


def _documents(corpus: Corpus) -> Iterator[Document]:
    return (item for item in corpus if isinstance(item, Document))


class _Writer:
    """Collects documents and appends their tokens to a file, a few megabytes at a time."""

    def __init__(self, folder: Path, encode: Callable[[list[bytes]], list[np.ndarray]]) -> None:
        self.file = (folder / TOKENS).open("wb")
        self.encode = encode
        self.dtype = ""
        self.lengths: list[int] = []
        self._batch: list[bytes] = []
        self._bytes = 0

    def add(self, content: bytes) -> None:
        self._batch.append(content)
        self._bytes += len(content)
        if self._bytes >= BATCH_BYTES:
            self.flush()

    def flush(self) -> None:
        for tokens in self.encode(self._batch) if self._batch else ():
            self.file.write(tokens.tobytes())
            self.lengths.append(len(tokens))
            self.dtype = tokens.dtype.name
        self._batch, self._bytes = [], 0


def _write_documents(folder: Path, corpus: Corpus, tokenizer: Tokenizer) -> dict[str, Any]:
    names: list[str] = []
    places: list[float] = []
    skipped: list[Skipped] = []
    digest, size = hashlib.sha256(), 0
    writer = _Writer(folder, tokenizer.encode)
    with writer.file:
        progress = {"description": "tokenising", "disable": not sys.stdout.isatty()}
        for item in track(corpus, total=len(corpus), transient=True, **progress):
            if isinstance(item, Skipped):
                skipped.append(item)
                continue
            names.append(item.name)
            places.append(item.place)
            size += len(item.content)
            update_hash(digest, item)
            writer.add(item.content)
        writer.flush()
    mistakes = [skip for skip in skipped if skip.reason != EMPTY]
    if not names:
        raise ValueError(
            f"there is nothing to read: {describe_skips(skipped, len(corpus))}; name a source "
            "with documents in UTF-8"
        )
    np.save(folder / OFFSETS, np.concatenate([[0], np.cumsum(writer.lengths)]).astype(np.int64))
    np.save(folder / PLACES, np.asarray(places))
    write_json(folder / NAMES, names)
    return {
        "documents": len(names),
        "bytes": size,
        "tokens": sum(writer.lengths),
        "skipped": len(mistakes),
        "skip_report": describe_skips(mistakes, len(corpus)) if mistakes else None,
        "empty": len(skipped) - len(mistakes),
        "dtype": writer.dtype,
        "content_hash": digest.hexdigest(),
    }


def write_json(path: Path, content: Any) -> None:
    """Write plain values as JSON."""
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
