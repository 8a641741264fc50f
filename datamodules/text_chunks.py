"""Chunks of tokenised documents: one document after the other, or packed into rows.

Labels are **already shifted**: `labels[t]` is the token that follows `input_ids[t]` in its
document, so `loss = cross_entropy(logits[t], labels[t])` without a shift. (Models of `transformers`
shift labels themselves: do not hand these to them.) A document of L tokens has L - 1 places with an
input and a label; every token but the first is a label exactly once, also where a chunk ends.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from datamodules.sampler import ChunkRequest
from datamodules.token_store import TokenStore

NO_LABEL = -100


class DocumentStreams:
    """Every document is a file, cut into chunks of T places in order.

    A sample has `input_ids [T]`, `labels [T]` and `mask [T]` (bool, true at real tokens). Behind
    the end of the document, and everywhere in idle rows, ids are the padding's, labels -100 and
    the mask is false.

    Args:
        store: the tokens.
        documents: numbers of the documents to use, of at least two tokens each.
        chunk_length: places per chunk (T).
        pad_id: token that fills up.
    """

    def __init__(
        self, store: TokenStore, documents: np.ndarray, chunk_length: int, pad_id: int
    ) -> None:
        self.store = store
        self.documents = documents
        self.chunk_length = chunk_length
        self.pad_id = pad_id
        places = store.lengths[documents] - 1
        self.num_labels = int(places.sum())
        self.lengths: Sequence[int] = (-(-places // chunk_length)).tolist()

    def __getitem__(self, request: ChunkRequest) -> dict[str, Tensor]:
        """The chunk that the sampler asks for."""
        if request.idle:
            tokens = self.store.tokens[:0]
        else:
            start = request.index * self.chunk_length
            document = self.store.document(int(self.documents[request.file]))
            tokens = document[start : start + self.chunk_length + 1]
        return padded(tokens[:-1], tokens[1:], self.chunk_length, self.pad_id)


class PackedDocuments:
    """Documents one behind the other, cut into rows of T places; every row is a file of one chunk.

    A document that does not fit goes on in the next row as another document: no token is lost and
    none is repeated, but what continues is read without its beginning. A sample has `input_ids`,
    `labels`, `mask` (as `DocumentStreams`) and `document_ids [T]` int64, which no two rows share;
    documents of a row see nothing of each other if the model respects them.

    Args:
        store: the tokens.
        documents: numbers of the documents to use, of at least two tokens each.
        chunk_length: places per row (T).
        pad_id: token that fills up the last row.
    """

    def __init__(
        self, store: TokenStore, documents: np.ndarray, chunk_length: int, pad_id: int
    ) -> None:
        self.store = store
        self.chunk_length = chunk_length
        self.pad_id = pad_id
        places = store.lengths[documents] - 1
        ends = np.cumsum(places)
        starts = ends - places
        self.num_labels = int(ends[-1])
        self.lengths: Sequence[int] = [1] * -(-self.num_labels // chunk_length)
        rows = np.arange(len(self.lengths)) * chunk_length
        # Where a document or a row begins, another id does.
        self._begins = np.union1d(starts, rows)
        self._starts = starts
        self._shifts = store.offsets[documents] - starts

    def __getitem__(self, request: ChunkRequest) -> dict[str, Tensor]:
        """The row that the sampler asks for."""
        first = max(0, request.file) * self.chunk_length
        end = first if request.idle else min(first + self.chunk_length, self.num_labels)
        places = np.arange(first, first + self.chunk_length)
        real = places[: end - first]
        positions = real + self._shifts[np.searchsorted(self._starts, real, side="right") - 1]
        tokens = self.store.tokens
        sample = padded(tokens[positions], tokens[positions + 1], self.chunk_length, self.pad_id)
        # Padding stands behind the last document and has its id, so that it begins none.
        ids = np.searchsorted(self._begins, places, side="right") - 1
        sample["document_ids"] = torch.from_numpy(ids)
        return sample


def padded(inputs: np.ndarray, labels: np.ndarray, length: int, pad_id: int) -> dict[str, Tensor]:
    """Inputs and labels `[n]`, filled up to `length`, as int64, with their mask."""
    input_ids = np.full(length, pad_id, dtype=np.int64)
    targets = np.full(length, NO_LABEL, dtype=np.int64)
    input_ids[: len(inputs)] = inputs
    targets[: len(labels)] = labels
    return {
        "input_ids": torch.from_numpy(input_ids),
        "labels": torch.from_numpy(targets),
        "mask": torch.arange(length) < len(inputs),
    }
