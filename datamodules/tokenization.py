"""Text to tokens and back: bytes, a byte-level BPE trained on the data, or a pretrained one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

BYTES = 256
BYTE_BOS, BYTE_EOS, BYTE_PAD = range(BYTES, BYTES + 3)
SPECIAL_TOKENS = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}


@dataclass(frozen=True)
class TokenizerConfig:
    """How text becomes tokens.

    Args:
        kind: `bytes` has ids 0 to 255 for the bytes of UTF-8, then bos 256, eos 257 and pad 258;
            `bpe` is a byte-level BPE trained on the training documents, in seconds; `pretrained`
            is any Hugging Face tokenizer.
        vocab_size: of `bpe`, with its 256 bytes and 3 special tokens; None is 4096. A small corpus
            can yield fewer.
        name: of `pretrained`, a name on the hub or a folder.
    """

    kind: Literal["bytes", "bpe", "pretrained"] = "bytes"
    vocab_size: int | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("bytes", "bpe", "pretrained"):
            raise ValueError(f"unknown tokenizer {self.kind!r}; choose bytes, bpe or pretrained")
        if (self.kind == "pretrained") != (self.name is not None):
            raise ValueError(
                f"kind: {self.kind} with name={self.name!r}: a pretrained tokenizer needs a name "
                "(on the hub, or a folder), the others have none"
            )
        if self.vocab_size is not None and self.kind != "bpe":
            raise ValueError(
                f"vocab_size={self.vocab_size} is of kind: bpe, but kind is {self.kind}; leave one "
                "of them out"
            )
        smallest = BYTES + len(SPECIAL_TOKENS)
        if self.vocab_size is not None and self.vocab_size < smallest:
            raise ValueError(
                f"vocab_size={self.vocab_size} must be at least {smallest}: every byte and "
                f"{', '.join(SPECIAL_TOKENS.values())} are tokens"
            )


class Tokenizer(Protocol):
    """Documents to tokens: `[bos] text [eos]`, as far as the tokenizer has these two."""

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int

    def encode(self, documents: Sequence[bytes]) -> list[np.ndarray]: ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def save(self, folder: Path) -> None: ...


class ByteTokenizer:
    """One token per byte of UTF-8; nothing is lost, nothing is learned."""

    vocab_size = BYTES + 3
    bos_id: int | None = BYTE_BOS
    eos_id: int | None = BYTE_EOS
    pad_id = BYTE_PAD

    def encode(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """Tokens `[L + 2]` uint16 of every document of L bytes."""
        encoded = []
        for document in documents:
            tokens = np.empty(len(document) + 2, dtype=np.uint16)
            tokens[0], tokens[-1] = BYTE_BOS, BYTE_EOS
            tokens[1:-1] = np.frombuffer(document, dtype=np.uint8)
            encoded.append(tokens)
        return encoded

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the bytes among the ids; broken UTF-8 becomes U+FFFD."""
        return bytes(i for i in map(int, ids) if i < BYTES).decode(errors="replace")

    def save(self, folder: Path) -> None:
        """Nothing to keep."""


class PretrainedTokenizer:
    """A Hugging Face tokenizer, with its own beginning and end of a document.

    Text that spells a special token is read as text.

    Args:
        tokenizer: the `transformers` tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int | None = tokenizer.eos_token_id
        known = (tokenizer.pad_token_id, self.eos_id, 0)
        self.pad_id: int = next(i for i in known if i is not None)
        self.vocab_size = 1 + max(tokenizer.get_vocab().values())

    @classmethod
    def load(cls, name: str) -> PretrainedTokenizer:
        """From the hub or a folder.

        Raises:
            ValueError: there is none.
        """
        from transformers import AutoTokenizer

        try:
            return cls(AutoTokenizer.from_pretrained(name))
        except (OSError, ValueError) as error:
            raise ValueError(
                f"no tokenizer could be loaded from {name!r}: give a name on the hub, or a folder "
                f"with tokenizer.json ({type(error).__name__})"
            ) from error

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> PretrainedTokenizer:
        """A byte-level BPE as GPT-2's, learned from `texts`; every text can be encoded."""
        from transformers import GPT2Tokenizer

        # Every byte is in the alphabet, so there is no unknown token.
        options: dict[str, Any] = {"unk_token": None, **SPECIAL_TOKENS}
        untrained = GPT2Tokenizer(vocab={}, merges=[], **options)
        return cls(untrained.train_new_from_iterator(texts, vocab_size, show_progress=False))

    @property
    def key(self) -> str:
        """Hash of all that decides how text is encoded."""
        fast = getattr(self.tokenizer, "backend_tokenizer", None)
        rules = fast.to_str() if fast is not None else self._slow_rules()
        return hashlib.sha256(json.dumps([rules, self.bos_id, self.eos_id]).encode()).hexdigest()

    def _slow_rules(self) -> str:
        settings = {"class": type(self.tokenizer).__name__, **self.tokenizer.init_kwargs}
        return json.dumps([settings, self.tokenizer.get_vocab()], sort_keys=True, default=str)

    def encode(self, documents: Sequence[bytes]) -> list[np.ndarray]:
        """Tokens of every document, with bos and eos where the tokenizer has them."""
        encoded = self.tokenizer(
            [document.decode() for document in documents],
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]
        bos = [] if self.bos_id is None else [self.bos_id]
        eos = [] if self.eos_id is None else [self.eos_id]
        dtype = np.min_scalar_type(self.vocab_size - 1)
        return [np.array([*bos, *tokens, *eos], dtype=dtype) for tokens in encoded]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids, without special tokens."""
        return self.tokenizer.decode(
            list(map(int, ids)), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def save(self, folder: Path) -> None:
        """Write the tokenizer so that `load` finds it."""
        self.tokenizer.save_pretrained(folder)
