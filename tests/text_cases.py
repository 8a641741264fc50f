"""Small folders of documents, and what must come out of every loader over them."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn import functional as F

from datamodules import TextStreamDataModule
from datamodules.documents import TextSource
from datamodules.text_chunks import NO_LABEL
from datamodules.token_store import TokenStore
from lightning_modules.base import AdapterModule, Chunk, Schedule
from lightning_modules.streams import FastState

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


class SeenState(NamedTuple):
    seen: Tensor


class BagModule(AdapterModule):
    """Predicts the next token from the current one and the bag of all tokens of the stream."""

    def __init__(self, optimizer: OptimizerCallable = torch.optim.SGD) -> None:
        super().__init__(optimizer, Schedule(decay="constant"), persistent=True)
        self.model: nn.ModuleDict | None = None

    def configure_model(self) -> None:
        if self.model is None:
            size = self.trainer.datamodule.features["vocab_size"]
            layers = {"embed": nn.Embedding(size, 8), "head": nn.Linear(8, size)}
            self.model = nn.ModuleDict(layers)

    def chunk_loss(
        self, chunk: Chunk, fast_state: FastState, generator: torch.Generator | None
    ) -> Tensor:
        assert self.model is not None
        x = self.model["embed"](chunk["input_ids"]) * chunk["mask"][..., None]
        state = fast_state.read("bag", SeenState)
        seen = x.new_zeros(len(x), 8) if state is None else state.seen
        fast_state.write("bag", SeenState(seen + x.sum(1)))
        logits = self.model["head"](x + torch.tanh(seen)[:, None])
        labels = chunk["labels"].flatten()
        loss = F.cross_entropy(logits.flatten(0, 1), labels, reduction="sum")
        return loss / (labels != NO_LABEL).sum().clamp(min=1)
