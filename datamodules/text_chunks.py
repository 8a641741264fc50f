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

    With an `alignment` every document begins at a multiple of it in its row, so that no block of
    so many places holds two of them; the places between are padding, with the id of the document
    before.

    Args:
        store: the tokens.
        documents: numbers of the documents to use, of at least two tokens each.
        chunk_length: places per row (T), a multiple of the alignment.
        pad_id: token that fills up the last row, and what is between aligned documents.
        alignment: documents begin at multiples of it.
    """

    def __init__(
        self,
        store: TokenStore,
        documents: np.ndarray,
        chunk_length: int,
        pad_id: int,
        alignment: int = 1,
    ) -> None:
        self.store = store
        self.chunk_length = chunk_length
        self.pad_id = pad_id
        places = store.lengths[documents] - 1
        aligned = -(-places // alignment) * alignment
        starts = np.cumsum(aligned) - aligned
        self.num_labels = int(places.sum())
        self.lengths: Sequence[int] = [1] * -(-int(starts[-1] + places[-1]) // chunk_length)
        rows = np.arange(len(self.lengths)) * chunk_length
        # Where a document or a row begins, another id does; padding begins none.
        self._begins = np.union1d(starts, rows)
        self._starts = starts
        self._ends = starts + places
        self._shifts = store.offsets[documents] - starts

    def __getitem__(self, request: ChunkRequest) -> dict[str, Tensor]:
        """The row that the sampler asks for."""
        first = max(0, request.file) * self.chunk_length
        places = np.arange(first, first + self.chunk_length)
        document = np.searchsorted(self._starts, places, side="right") - 1
        real = np.flatnonzero(places < (first if request.idle else self._ends[document]))
        positions = places[real] + self._shifts[document[real]]
        tokens = self.store.tokens
        sample = padded(
            tokens[positions], tokens[positions + 1], self.chunk_length, self.pad_id, real
        )
        ids = np.searchsorted(self._begins, places, side="right") - 1
        sample["document_ids"] = torch.from_numpy(ids)
        return sample


def padded(
    inputs: np.ndarray,
    labels: np.ndarray,
    length: int,
    pad_id: int,
    places: np.ndarray | None = None,
) -> dict[str, Tensor]:
    """Inputs and labels `[n]` filled up to `length`, as int64, with their mask.

    They stand at `places [n]` (int64), or at the beginning.
    """
    input_ids = np.full(length, pad_id, dtype=np.int64)
    targets = np.full(length, NO_LABEL, dtype=np.int64)
    mask = np.zeros(length, dtype=np.bool_)
    where = slice(len(inputs)) if places is None else places
    input_ids[where], targets[where], mask[where] = inputs, labels, True
    return {
        "input_ids": torch.from_numpy(input_ids),
        "labels": torch.from_numpy(targets),
        "mask": torch.from_numpy(mask),
    }
