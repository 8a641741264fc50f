"""Sequences whose answers stand far back in their own context, and nowhere else."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from datamodules.text_chunks import NO_LABEL

PAD, BEGIN, END, COPY = range(4)
SPECIAL = 4


@dataclass(frozen=True)
class RecallProbe:
    """What has to be remembered, and for how long.

    Of the vocabulary, 0 to 3 are padding and markers; then come filler, keys and values, as many of
    each, and of `fused` a token for every key with every value.

    Args:
        kind: `mqar`, multi-query associative recall (Zoology, arXiv 2312.04927): pairs of a key
            and a value, filler, then keys among filler, each to be answered with its value.
            `fused`: the same with a pair in one token, so that no layer has to bind neighbours
            first: what is left is memory alone. `needle`: a marked span somewhere in filler, to
            be copied at the end.
        vocab_size: tokens in all.
        sequence_length: tokens per sequence.
        min_distance: tokens between what is to be recalled and the place where it is predicted,
            at least. To see memory and nothing else, take more than attention sees: with L layers
            of window W that is L * (W - 1).
        num_pairs: of `mqar` and `fused`, pairs of a key and a value.
        num_queries: of these, how many of the keys are asked, each once.
        span_length: of `needle`, tokens of the span.
    """

    kind: Literal["mqar", "fused", "needle"] = "mqar"
    vocab_size: int = 256
    sequence_length: int = 1024
    min_distance: int = 512
    num_pairs: int = 16
    num_queries: int = 16
    span_length: int = 16

    def __post_init__(self) -> None:
        if self.kind not in ("mqar", "fused", "needle"):
            raise ValueError(f"unknown kind {self.kind!r}; choose mqar, fused or needle")
        for name in ("min_distance", "num_pairs", "num_queries", "span_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.num_queries > self.num_pairs:
            raise ValueError(
                f"num_queries={self.num_queries} is more than num_pairs={self.num_pairs}: every "
                "key is asked at most once; choose fewer queries"
            )
        keys = 2 if self.kind == "needle" else self.num_pairs
        smallest = SPECIAL + 3 * keys + (keys**2 if self.kind == "fused" else 0)
        if self.vocab_size < smallest:
            raise ValueError(
                f"vocab_size={self.vocab_size} is too small for different keys: choose at least "
                f"{smallest}"
            )
        if self.sequence_length < self.shortest:
            raise ValueError(
                f"sequence_length={self.sequence_length} has no room for this {self.kind} with "
                f"min_distance={self.min_distance}: choose at least {self.shortest}"
            )

    @property
    def shortest(self) -> int:
        """Tokens that a sequence needs."""
        if self.kind != "needle":
            return self._first_query + self.num_queries
        return self.span_length + max(self.min_distance + 1, self.span_length + 2)

    @property
    def _first_query(self) -> int:
        """Place `min_distance` behind the last value."""
        width = 1 if self.kind == "fused" else 2
        return width * self.num_pairs - 1 + self.min_distance

    @property
    def share(self) -> int:
        """Number of fillers, of keys and of values; of `fused` its square is that of the pairs."""
        if self.kind == "fused":  # the largest n with n^2 + 3 n <= vocab_size - SPECIAL
            return (math.isqrt(9 + 4 * (self.vocab_size - SPECIAL)) - 3) // 2
        return (self.vocab_size - SPECIAL) // 3

    @property
    def first_value(self) -> int:
        """Values are this id and the `share - 1` behind it; keys stand before them."""
        return SPECIAL + 2 * self.share

    @property
    def chance(self) -> float:
        """Accuracy of a guess that has not seen the answer."""
        return 1 / self.share

    def sequence(self, rng: np.random.Generator) -> RecallSequence:
        """Draw one sequence: values are independent of keys and of each other."""
        tokens = rng.integers(SPECIAL, SPECIAL + self.share, self.sequence_length)
        labels = np.full(self.sequence_length, NO_LABEL, dtype=np.int64)
        if self.kind != "needle":
            self._add_pairs(rng, tokens, labels)
        else:
            self._add_needle(rng, tokens, labels)
        return RecallSequence(tokens, labels)

    def _add_pairs(self, rng: np.random.Generator, tokens: np.ndarray, labels: np.ndarray) -> None:
        keys = rng.choice(self.share, self.num_pairs, replace=False)
        values = rng.integers(self.share, size=self.num_pairs)
        if self.kind == "fused":
            first_pair = self.first_value + self.share
            tokens[: self.num_pairs] = first_pair + keys * self.share + values
        else:
            tokens[0 : 2 * self.num_pairs : 2] = SPECIAL + self.share + keys
            tokens[1 : 2 * self.num_pairs : 2] = self.first_value + values
        room = self.sequence_length - self._first_query
        places = self._first_query + rng.choice(room, self.num_queries, replace=False)
        asked = rng.choice(self.num_pairs, self.num_queries, replace=False)
        tokens[places] = SPECIAL + self.share + keys[asked]
        labels[places] = self.first_value + values[asked]

    def _add_needle(self, rng: np.random.Generator, tokens: np.ndarray, labels: np.ndarray) -> None:
        span = self.first_value + rng.integers(self.share, size=self.span_length)
        copy = self.sequence_length - self.span_length
        begin = int(rng.integers(self.sequence_length - self.shortest + 1))
        tokens[begin] = BEGIN
        tokens[begin + 1 : begin + 1 + self.span_length] = span
        tokens[begin + 1 + self.span_length] = END
        tokens[copy] = COPY
        tokens[copy + 1 :] = span[:-1]
        labels[copy:] = span


class RecallSequence(NamedTuple):
    """Tokens and already shifted labels, both `[sequence_length]` int64."""

    tokens: np.ndarray
    labels: np.ndarray
