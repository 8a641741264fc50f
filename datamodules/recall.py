"""DataModule of recall probes: what a model can only know if it remembers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from datamodules.base import Stage, StreamDataModule
from datamodules.recall_probes import PAD, RecallProbe
from datamodules.sampler import ChunkRequest
from datamodules.text_chunks import padded


class RecallDataset:
    """Sequences drawn on request, each a file of one or several chunks.

    A sample has `input_ids [T]`, `labels [T]` (already shifted, -100 everywhere but where
    something is to be recalled) and `mask [T]`.

    Args:
        probe: what a sequence is.
        sequences: their number.
        chunk_length: tokens per chunk (T).
        seed: with the number of a sequence it fixes what stands in it.
    """

    def __init__(
        self, probe: RecallProbe, sequences: int, chunk_length: int, seed: tuple[int, ...]
    ) -> None:
        self.probe = probe
        self.chunk_length = chunk_length
        self.seed = seed
        self.lengths: Sequence[int] = [-(-probe.sequence_length // chunk_length)] * sequences

    def __getitem__(self, request: ChunkRequest) -> dict[str, Tensor]:
        """The chunk that the sampler asks for."""
        start = request.index * self.chunk_length
        stop = start if request.idle else start + self.chunk_length
        rng = np.random.default_rng([*self.seed, max(0, request.file)])
        tokens, labels = self.probe.sequence(rng)
        return padded(tokens[start:stop], labels[start:stop], self.chunk_length, PAD)


class RecallDataModule(StreamDataModule):
    """Synthetic sequences with questions about their own distant past, drawn as they are read.

    A sequence is a function of the seed, the split and its number. A chunk without a question has
    no label at all: average a loss over labels, not over chunks.

    Args:
        probe: what has to be remembered, and for how long.
        chunk_length: tokens per chunk; less than the sequence's length makes streams, in which
            only carried state can answer. None: a sequence is one chunk.
        train_sequences: sequences per epoch, the same ones in each.
        val_sequences: sequences of validation, test and predict.
        streams: options of every DataModule: batch_size, tbptt, num_workers, seed.
    """

    def __init__(
        self,
        probe: RecallProbe | None = None,
        *,
        chunk_length: int | None = None,
        train_sequences: int = 10_000,
        val_sequences: int = 500,
        **streams: Any,
    ) -> None:
        super().__init__(**streams)
        self.probe = probe or RecallProbe()
        self.chunk_length = chunk_length or self.probe.sequence_length
        self.train_sequences = train_sequences
        self.val_sequences = val_sequences
        if not 1 <= self.chunk_length <= self.probe.sequence_length:
            raise ValueError(
                f"chunk_length={chunk_length} must be between 1 and "
                f"sequence_length={self.probe.sequence_length}"
            )
        if self.tbptt > 1 and self.chunk_length == self.probe.sequence_length:
            raise ValueError(
                f"tbptt={self.tbptt} needs sequences of several chunks; choose a chunk_length "
                f"below sequence_length={self.probe.sequence_length}, or tbptt: 1"
            )
        if min(train_sequences, val_sequences) < 1:
            raise ValueError(
                f"train_sequences={train_sequences} and val_sequences={val_sequences} must be at "
                "least 1"
            )

    @property
    def features(self) -> dict[str, Any]:
        """What a model must know of the data, with the keys of `TextStreamDataModule.features`."""
        return {
            "vocab_size": self.probe.vocab_size,
            "bos_id": None,
            "eos_id": None,
            "pad_id": PAD,
            "chunk_length": self.chunk_length,
            "tbptt": self.tbptt,
            "mode": "stream",
            "packing_alignment": 1,
            "tokenizer": self.probe.kind,
        }

    def build_dataset(self, stage: Stage) -> RecallDataset:
        """Training sequences for `train`, validation sequences for every other stage."""
        training = stage == "train"
        sequences = self.train_sequences if training else self.val_sequences
        seed = (self.seed, 0 if training else 1)
        return RecallDataset(self.probe, sequences, self.chunk_length, seed)
