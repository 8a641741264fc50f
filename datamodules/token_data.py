"""What DataModules of tokens share, whose documents are tokenised once and kept on disk."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from pathlib import Path
from typing import Any

from datamodules.base import StreamDataModule
from datamodules.loader import StreamLoader
from datamodules.token_store import TOKENIZER, TokenStore
from datamodules.tokenization import Tokenizer


class TokenDataModule(StreamDataModule):
    """Tokenises in `prepare_data`, says from what, and describes its tokens to the model.

    A subclass says what is written and where numbers come from, and makes the chunks.

    Attributes:
        chunk_length: tokens per chunk.
        val_fraction: share of the documents used for validation.
        store: the tokens; known after `prepare_data`.
        tokenizer: `encode`, `decode`, `vocab_size`, `bos_id`, `eos_id`, `pad_id`.
    """

    chunk_length: int
    val_fraction: float
    store: TokenStore
    tokenizer: Tokenizer

    @abstractmethod
    def write_store(self) -> None:
        """Tokenise unless that was done; other processes wait."""

    @property
    @abstractmethod
    def provenance(self) -> dict[str, Any]:
        """Where the numbers of a benchmark come from: print it beside them."""

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer lies beside the tokens; empty for bytes and codes."""
        return (self.store.path / TOKENIZER).resolve()

    def prepare_data(self) -> None:
        """Tokenise unless that was done, and print the `provenance`; other processes wait."""
        self.write_store()
        if self.store.meta["skip_report"]:
            warnings.warn(self.store.meta["skip_report"], stacklevel=2)
        print(", ".join(f"{name} {value}" for name, value in self.provenance.items()))

    def describe(self, mode: str, alignment: int, tokenizer: str) -> dict[str, Any]:
        """What a model must know of the data: plain values, stored in its checkpoints.

        `vocab_size` (special tokens included), `bos_id`, `eos_id` (None where the tokenizer has
        none), `pad_id` (a token that exists; masked wherever it stands), `chunk_length`, `tbptt`,
        `mode`, `packing_alignment` and `tokenizer` (its kind, or the name of a pretrained one).
        """
        return {
            "vocab_size": self.tokenizer.vocab_size,
            "bos_id": self.tokenizer.bos_id,
            "eos_id": self.tokenizer.eos_id,
            "pad_id": self.tokenizer.pad_id,
            "chunk_length": self.chunk_length,
            "tbptt": self.tbptt,
            "mode": mode,
            "packing_alignment": alignment,
            "tokenizer": tokenizer,
        }

    def setup(self, stage: str) -> None:
        """Open the tokens, so that what is wrong with them shows before the first step."""
        self.build_dataset("train")

    def val_dataloader(self) -> StreamLoader | list[Any]:  # type: ignore[override]
        """Validation documents in order; an empty list (nothing to do) with `val_fraction: 0`."""
        return super().val_dataloader() if self.val_fraction > 0 else []
