"""Files of audio codes, as a neural codec such as Mimi writes them, and their tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from datamodules.documents import Document, find_files, update_hash
from datamodules.splits import unit_hash

SUFFIXES = (".npy", ".safetensors")
CODES = "codes"
"""Name of the tensor in a safetensors file that holds several."""


@dataclass(frozen=True)
class CodeVocabulary:
    """Frames of codes as tokens, one codebook after the other: `k codebook_size + code[k, t]`.

    A file is `[bos] frame frame ...`, a frame as many tokens as there are codebooks, in their
    order: the semantic one first. A `Tokenizer`, of files' codes as int64 bytes `[T, codebooks]`.

    Args:
        codebooks: per frame.
        codebook_size: codes of each.
    """

    codebooks: int
    codebook_size: int
    eos_id: int | None = None

    @property
    def bos_id(self) -> int:
        """The token behind all codes."""
        return self.codebooks * self.codebook_size

    @property
    def pad_id(self) -> int:
        """It is masked wherever it stands."""
        return self.bos_id

    @property
    def vocab_size(self) -> int:
        """All codes, and bos."""
        return self.bos_id + 1

    def encode(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """Tokens `[1 + T codebooks]` int32 of every file."""
        shifts = np.arange(self.codebooks) * self.codebook_size
        encoded = []
        for document in documents:
            codes = np.frombuffer(document, dtype=np.int64).reshape(-1, self.codebooks)
            tokens = (codes + shifts).ravel()
            encoded.append(np.concatenate([[self.bos_id], tokens]).astype(np.int32))
        return encoded

    def frames(self, ids: Iterable[int]) -> np.ndarray:
        """Codes int64 `[codebooks, T]` of the whole frames among tokens, for the codec.

        Raises:
            ValueError: a token stands where one of another codebook belongs.
        """
        tokens = np.asarray([i for i in map(int, ids) if i != self.bos_id], dtype=np.int64)
        whole = len(tokens) // self.codebooks
        frames = tokens[: whole * self.codebooks].reshape(whole, self.codebooks)
        codes = frames - np.arange(self.codebooks) * self.codebook_size
        wrong = (codes < 0) | (codes >= self.codebook_size)
        if wrong.any():
            frame, codebook = np.argwhere(wrong)[0]
            raise ValueError(
                f"token {frames[frame, codebook]} in frame {frame} is no code of codebook "
                f"{codebook}"
            )
        return codes.T

    def decode(self, ids: Iterable[int]) -> str:
        """The codes in words, one frame after the other."""
        return " ".join(",".join(map(str, frame)) for frame in self.frames(ids).T)

    def save(self, folder: Path) -> None:
        """Nothing to keep."""


class CodeCorpus:
    """Files of codes as documents; whatever is wrong with one is an error that names it.

    Args:
        path: a folder (all .npy and .safetensors files below it), a glob, or a file.
        vocabulary: the codes that files may hold.
        min_frames: a file with fewer is an error.

    Raises:
        FileNotFoundError: there is no such file.
    """

    def __init__(self, path: str, vocabulary: CodeVocabulary, min_frames: int) -> None:
        found = find_files(path)
        self.files = {n: p for n, p in found.items() if p.suffix in SUFFIXES}
        if not self.files:
            raise FileNotFoundError(
                f"{path} has {len(found)} files, but none ends in {' or '.join(SUFFIXES)}: write "
                "the codes of each recording into a file of its own"
            )
        self.vocabulary = vocabulary
        self.min_frames = min_frames

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[Document]:
        """Read the files one by one.

        Raises:
            ValueError: a file does not hold codes as they are wanted.
        """
        for name, path in self.files.items():
            codes = checked(read_codes(path), path, self.vocabulary, self.min_frames)
            content = np.ascontiguousarray(codes.T.astype(np.int64)).tobytes()
            yield Document(name, content, unit_hash(name))

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of names and codes in order."""
        digest = hashlib.sha256()
        for document in self:
            update_hash(digest, document)
        return digest.hexdigest()

    @property
    def key(self) -> str:
        """Changes when names or codes do."""
        return self.content_hash


def read_codes(path: Path) -> np.ndarray:
    """The array of a file, as it is there.

    Raises:
        ValueError: it cannot be read, or it is not clear which of several is meant.
    """
    try:
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False)
        from safetensors.numpy import load_file

        tensors: dict[str, Any] = load_file(path)
    except Exception as error:  # of many kinds: truncated, pickled, another format
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} cannot be read as codes ({reason}): write it again") from error
    if len(tensors) != 1 and CODES not in tensors:
        raise ValueError(
            f"{path} holds {', '.join(sorted(tensors)) or 'nothing'}: it needs one tensor, or one "
            f"named {CODES}"
        )
    return tensors[CODES] if CODES in tensors else next(iter(tensors.values()))


def checked(
    codes: np.ndarray, path: Path, vocabulary: CodeVocabulary, min_frames: int
) -> np.ndarray:
    """The first codebooks of codes `[K, T]` (or `[1, K, T]`), as `[codebooks, T]`.

    Raises:
        ValueError: they are not as wanted; the message names the file.
    """
    count, size = vocabulary.codebooks, vocabulary.codebook_size
    if not np.issubdtype(codes.dtype, np.integer):
        raise ValueError(
            f"{path} holds {codes.dtype}: codes are whole numbers, as the codec's encode gives "
            "them (not its embeddings, and not the sound)"
        )
    shape = list(codes.shape)
    if codes.ndim == 3 and len(codes) == 1:
        codes = codes[0]
    if codes.ndim != 2 or len(codes) < count:
        raise ValueError(
            f"{path} has shape {shape}, but must be [K, frames] with K at least codebooks={count}"
        )
    codes = codes[:count]
    if codes.shape[1] < min_frames:
        raise ValueError(
            f"{path} has {codes.shape[1]} frames, fewer than min_frames={min_frames}: remove it, "
            "or lower min_frames (which is at least 1)"
        )
    wrong = (codes < 0) | (codes >= size)
    if wrong.any():
        codebook, frame = np.argwhere(wrong)[0]
        raise ValueError(
            f"{path} has the code {codes[codebook, frame]} in codebook {codebook}, frame {frame}, "
            f"but codebook_size={size} allows 0 to {size - 1}"
        )
    return codes
