"""Small folders of documents, and what must come out of every loader over them."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from datamodules import TextStreamDataModule
from datamodules.documents import TextSource
from datamodules.text_chunks import NO_LABEL
from datamodules.token_store import TokenStore

WORDS = ("lambda", "über", "return", "x_1", "日本", "✓", "\n", "\t", " ", "0")


def write_documents(folder: Path, count: int = 14, seed: int = 0) -> Path:
    """Text files of 1 to about 90 characters, some in a subfolder."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        path = folder / ("sub" if number % 3 == 0 else "") / f"{number:03}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(rng.choice(WORDS, size=1 + 2 * number)) or "x"
        path.write_text(text, encoding="utf-8")
    return folder


def make_data(folder: Path, **options: Any) -> TextStreamDataModule:
    """A prepared DataModule over `folder`, with its cache beside it."""
    source = {"kind": "files", "path": str(folder)} | options.pop("source", {})
    defaults = {"chunk_length": 16, "batch_size": 3, "cache": str(folder.parent / "cache")}
    data = TextStreamDataModule(TextSource(**source), **defaults | options)
    data.prepare_data()
    data.setup("fit")
    return data


def places_of_streams(loader: Any) -> dict[int, list[tuple[int, int]]]:
    """(input, label) of every real place, by stream and in the order of reading."""
    places: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for batch in loader:
        for chunk in batch:
            labelled = chunk["labels"] != NO_LABEL
            assert labelled.equal(chunk["mask"])
            for row, stream in enumerate(chunk["stream_id"].tolist()):
                mask = chunk["mask"][row]
                assert bool(mask.any()) == (stream >= 0)
                inputs = chunk["input_ids"][row][mask].tolist()
                labels = chunk["labels"][row][mask].tolist()
                places[stream] += zip(inputs, labels, strict=True)
    places.pop(-1, None)
    return places


def pairs(tokens: np.ndarray) -> list[tuple[int, int]]:
    """(token, next token) of a document."""
    return list(zip(tokens[:-1].tolist(), tokens[1:].tolist(), strict=True))


def documents_of(store: TokenStore) -> dict[str, list[int]]:
    """Tokens of every document by its name."""
    return {name: store.document(i).tolist() for i, name in enumerate(store.names)}
