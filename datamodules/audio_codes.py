"""DataModule of audio: files of a neural codec's codes as streams of tokens."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.audio_files import CodeCorpus, CodeVocabulary
from datamodules.base import Stage
from datamodules.splits import split_by_hash
from datamodules.text_chunks import DocumentStreams
from datamodules.token_data import TokenDataModule
from datamodules.token_store import TokenStore, slug, write_store

FORMAT = 1
"""Part of every folder's name; raise it when what is stored changes."""


class AudioCodeDataModule(TokenDataModule):
    """Files of audio codes, chunk after chunk, each file a stream that a model can remember.

    A file is .npy or .safetensors with integer codes `[codebooks, frames]` of a neural codec, e.g.
    of Mimi (`MimiModel.encode(audio).audio_codes`, 12.5 frames a second); it is one recording, and
    ends where the file ends. Nothing here decodes or encodes sound.

    What a model sees are **tokens, one codebook after the other**: frame t is the tokens
    `k codebook_size + code[k, t]` for k = 0, 1, ..., behind a bos. Any causal language model over
    them (`model_type: moshi` is Moshi's temporal decoder) learns the whole distribution of the
    codes, every code given all codes before it. With `codebooks: 1` it is the semantic codebook of
    Mimi alone, one token a frame.

    What is **not** modelled of Moshi: its temporal decoder reads one sum of embeddings a frame (of
    a text token and the codes of two speakers, the acoustic ones delayed) and leaves the codes of a
    frame to a depth decoder. There is no text, no second speaker, no delay and no depth decoder
    here, so that a frame costs as many steps as it has codebooks, and Moshi's published weights,
    which know other embeddings, do not fit.

    Batches are those of `TextStreamDataModule` in mode `stream`: `input_ids`, `labels` (already
    shifted), `mask`, `stream_id`, `chunk_index`, `is_first`. Validation files are chosen by a hash
    of their names; `test` and `predict` read them, too.

    Args:
        path: a folder (all files below it), a glob such as `codes/**/*.npy`, or a file.
        codebooks: how many of each file's codebooks are used, from the first on.
        codebook_size: codes of each, 2048 in Mimi.
        chunk_frames: frames per chunk, 125 are 10 seconds of Mimi.
        min_frames: a file with fewer is an error.
        val_fraction: share of the files used for validation.
        cache: folder for the tokens, relative to the working directory; reused while files and
            options are the same.
        streams: options of every DataModule: batch_size, tbptt, num_workers, seed.
    """

    def __init__(
        self,
        path: str,
        *,
        codebooks: int = 8,
        codebook_size: int = 2048,
        chunk_frames: int = 125,
        min_frames: int = 2,
        val_fraction: float = 0.1,
        cache: str = "data",
        **streams: Any,
    ) -> None:
        super().__init__(**streams)
        sizes = {"codebooks": codebooks, "codebook_size": codebook_size,
                 "chunk_frames": chunk_frames, "min_frames": min_frames}  # fmt: skip
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self.path = path
        self.vocabulary = CodeVocabulary(codebooks, codebook_size)
        self.chunk_length = chunk_frames * codebooks
        self.chunk_frames = chunk_frames
        self.min_frames = min_frames
        self.val_fraction = val_fraction
        self.cache = cache

    @property
    def tokenizer(self) -> CodeVocabulary:  # type: ignore[override]
        """The vocabulary: `bos_id`, `vocab_size`, and `frames`, from tokens back to codes."""
        return self.vocabulary

    @cached_property
    def _corpus(self) -> CodeCorpus:
        return CodeCorpus(self.path, self.vocabulary, self.min_frames)

    @cached_property
    def _path(self) -> Path:
        size = [self.vocabulary.codebooks, self.vocabulary.codebook_size]
        parts = json.dumps([FORMAT, self._corpus.key, size])
        digest = hashlib.sha256(parts.encode()).hexdigest()[:12]
        name = slug(Path(self.path).expanduser().resolve().name) or "files"
        return Path(self.cache) / f"codes-{name}-{digest}"

    def write_store(self) -> None:
        """Check all files, and write their tokens."""
        write_store(self._path, self._corpus, lambda: self.vocabulary)

    @cached_property
    def store(self) -> TokenStore:  # type: ignore[override]
        """The tokens of all files.

        Raises:
            FileNotFoundError: `prepare_data` has not run.
        """
        return TokenStore(self._path)

    @cached_property
    def _split(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the training and of the validation files."""
        longest = int(self.store.lengths.argmax())
        frames = int(self.store.lengths[longest] - 1) // self.vocabulary.codebooks
        if self.chunk_frames > frames:
            raise ValueError(
                f"chunk_frames={self.chunk_frames} is longer than every file, so no state would be "
                f"carried; the longest, {self.store.names[longest]}, has {frames} frames: choose a "
                "smaller chunk_frames"
            )
        return split_by_hash(self.store.places, self.val_fraction, "files")

    @property
    def features(self) -> dict[str, Any]:
        """What a model must know of the data; see `describe`."""
        return self.describe("stream", 1, "audio_codes")

    @property
    def provenance(self) -> dict[str, Any]:
        """`path`, `content_hash` (of names and codes), `files`, `frames`, and files by split."""
        training, validation = self._split
        files = len(self.store.lengths)
        return {
            "path": self.path,
            "content_hash": self.store.meta["content_hash"],
            "files": files,
            "frames": (self.store.meta["tokens"] - files) // self.vocabulary.codebooks,
            "train_files": len(training),
            "val_files": len(validation),
        }

    def build_dataset(self, stage: Stage) -> DocumentStreams:
        """Training files for `train`, validation files for every other stage."""
        training, validation = self._split
        files = training if stage == "train" else validation
        return DocumentStreams(self.store, files, self.chunk_length, self.vocabulary.pad_id)
