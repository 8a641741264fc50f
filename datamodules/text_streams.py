"""DataModule of texts: documents as streams of tokens, or packed into rows."""

from __future__ import annotations

import platform
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from datamodules.base import Stage
from datamodules.corpora import open_corpus
from datamodules.documents import Corpus, TextSource
from datamodules.splits import split_by_hash
from datamodules.text_chunks import DocumentStreams, PackedDocuments
from datamodules.token_data import TokenDataModule
from datamodules.token_store import TokenStore, store_path, tokenise
from datamodules.tokenization import Tokenizer, TokenizerConfig


class TextStreamDataModule(TokenDataModule):
    """Documents as tokens; the default needs no download: Python's own standard library.

    Documents are `[bos] text [eos]`. Labels are already shifted: `labels[t]` is the token after
    `input_ids[t]`, so a model must not shift them again. They are -100, and `mask` is false, only
    in padding.

    Validation documents are chosen by a hash of their path (of a dataset's rows: of their text),
    whatever the seed, and stay so when others are added. `test` and `predict` read them, too.

    Args:
        source: which documents; the standard library by default. It differs by Python version
            and distribution: print `provenance` beside every number.
        tokenizer: how text becomes tokens; bytes by default.
        chunk_length: tokens per chunk.
        mode: `stream` reads every document chunk after chunk, so that a model can learn to
            remember; `packed` fills rows with whole documents one behind the other, told apart by
            `document_ids`, and a document that does not fit goes on in the next row as another.
        packing_alignment: in `packed`, documents begin at multiples of it in their row, with
            padding between them: the block size of a router or of block-sparse attention, so that
            no block holds two documents. It is in every chunk as `document_alignment`. None takes
            what the model asks for (`align_documents`), or 1.
        min_tokens: documents with fewer tokens are left out.
        val_fraction: share of the documents used for validation.
        cache: folder for tokenised documents, relative to the working directory; reused while
            documents and tokenizer are the same.
        streams: options of every DataModule: batch_size, tbptt, num_workers, seed.
    """

    def __init__(
        self,
        source: TextSource | None = None,
        tokenizer: TokenizerConfig | None = None,
        *,
        chunk_length: int = 1024,
        mode: Literal["stream", "packed"] = "stream",
        packing_alignment: int | None = None,
        min_tokens: int = 2,
        val_fraction: float = 0.1,
        cache: str = "data",
        **streams: Any,
    ) -> None:
        super().__init__(**streams)
        self.source = source or TextSource()
        self.tokenizer_config = tokenizer or TokenizerConfig()
        self.chunk_length = chunk_length
        self.mode = mode
        self.packing_alignment = packing_alignment
        self._asked_alignment = 1
        self.min_tokens = min_tokens
        self.val_fraction = val_fraction
        self.cache = cache
        if mode not in ("stream", "packed"):
            raise ValueError(f"unknown mode {mode!r}; choose stream or packed")
        if chunk_length < 1:
            raise ValueError(f"chunk_length={chunk_length} must be at least 1")
        if min_tokens < 2:
            raise ValueError(
                f"min_tokens={min_tokens} must be at least 2: one token has none to predict"
            )
        if mode == "packed" and self.tbptt != 1:
            raise ValueError(
                f"tbptt={self.tbptt} needs files of several chunks; use mode: stream, or tbptt: 1"
            )
        self._check_alignment()

    @property
    def alignment(self) -> int:
        """Documents begin at multiples of it in their row."""
        return self._asked_alignment if self.packing_alignment is None else self.packing_alignment

    def align_documents(self, block_size: int) -> None:
        """Let packed documents begin with a block, unless the options say otherwise.

        Rows that blocks of this size do not fill stay as they are.
        """
        if self.mode == "packed" and self.chunk_length % block_size == 0:
            self._asked_alignment = block_size

    def _check_alignment(self) -> None:
        alignment = self.alignment
        if alignment < 1:
            raise ValueError(f"packing_alignment={alignment} must be at least 1, which is none")
        if alignment > 1 and self.mode != "packed":
            raise ValueError(
                f"packing_alignment={alignment} is of mode: packed, but mode is {self.mode}; leave "
                "one of them out"
            )
        if self.chunk_length % alignment:
            raise ValueError(
                f"chunk_length={self.chunk_length} must be a multiple of packing_alignment="
                f"{alignment}: choose {-(-self.chunk_length // alignment) * alignment}"
            )

    @cached_property
    def _corpus(self) -> Corpus:
        return open_corpus(self.source)

    def write_store(self) -> None:
        """Tokenise the documents."""
        tokenise(self._path, self._corpus, self.tokenizer_config, self.val_fraction)

    @cached_property
    def _path(self) -> Path:
        return store_path(
            self.cache, self.source.name, self._corpus, self.tokenizer_config, self.val_fraction
        )

    @cached_property
    def store(self) -> TokenStore:
        """The tokenised documents, training and validation together.

        Raises:
            FileNotFoundError: `prepare_data` has not run.
        """
        return TokenStore(self._path)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer: `encode`, `decode`, `vocab_size`, `bos_id`, `eos_id`, `pad_id`."""
        return self.store.tokenizer()

    @cached_property
    def _split(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the training and of the validation documents that are long enough."""
        store, lengths = self.store, self.store.lengths
        training, validation = split_by_hash(store.places, self.val_fraction, "documents")
        training, validation = (s[lengths[s] >= self.min_tokens] for s in (training, validation))
        wanted = [("training", training)]
        wanted += [("validation", validation)] if self.val_fraction > 0 else []
        for name, documents in wanted:
            if len(documents) == 0:
                raise ValueError(
                    f"no {name} document of {self.source.name} has min_tokens={self.min_tokens}; "
                    f"{self._longest()}: choose a smaller min_tokens or another val_fraction"
                )
        used = np.concatenate([training, validation])
        if self.mode == "stream" and self.chunk_length > lengths[used].max() - 1:
            raise ValueError(
                f"chunk_length={self.chunk_length} is longer than every document of "
                f"{self.source.name}, so no state would be carried; {self._longest()}: choose a "
                "smaller chunk_length, or mode: packed"
            )
        return training, validation

    def _longest(self) -> str:
        number = int(self.store.lengths.argmax())
        return f"the longest, {self.store.names[number]}, has {self.store.lengths[number]} tokens"

    @property
    def features(self) -> dict[str, Any]:
        """What a model must know of the data; see `describe`."""
        tokenizer = self.tokenizer_config.name or self.tokenizer_config.kind
        return self.describe(self.mode, self.alignment, tokenizer)

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the numbers of a benchmark come from: print it beside them.

        `source`, `python_version`, `content_hash` (of names and contents), `documents`, `bytes`,
        `tokens`, `skipped` (unreadable or not UTF-8), `empty`, `too_short` (left out by
        `min_tokens`), `train_documents` and `val_documents`.
        """
        training, validation = self._split
        kept = len(training) + len(validation)
        names = ("content_hash", "documents", "bytes", "tokens", "skipped", "empty")
        return {
            "source": self.source.name,
            "python_version": platform.python_version(),
            **{name: self.store.meta[name] for name in names},
            "too_short": self.store.meta["documents"] - kept,
            "train_documents": len(training),
            "val_documents": len(validation),
        }

    @property
    def constants(self) -> dict[str, Any]:
        """`document_alignment` of packed rows: documents begin at multiples of it."""
        packed = self.mode == "packed"
        return {"document_alignment": self.alignment} if packed else {}

    def build_dataset(self, stage: Stage) -> DocumentStreams | PackedDocuments:
        """Training documents for `train`, validation documents for every other stage."""
        training, validation = self._split
        documents = training if stage == "train" else validation
        common = (self.store, documents, self.chunk_length, self.tokenizer.pad_id)
        if self.mode == "stream":
            return DocumentStreams(*common)
        return PackedDocuments(*common, self.alignment)
