"""DataModule of conversations: what the assistant says is learned, the rest is read."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.base import Stage
from datamodules.chat_sources import ChatSource, Conversations, open_conversations
from datamodules.chat_store import ChatStore, chat_store_path, encode_conversations
from datamodules.chat_template import ChatTemplate
from datamodules.sampler import ChunkRequest
from datamodules.splits import split_by_hash
from datamodules.text_chunks import NO_LABEL, padded
from datamodules.token_data import TokenDataModule
from datamodules.tokenization import PretrainedTokenizer


class ChatConversations:
    """Every conversation is a file of one chunk of T places.

    A sample has `input_ids [T]`, `labels [T]` (already shifted: the token after `input_ids[t]` if
    the assistant says it, -100 otherwise), `mask [T]` (bool, true at real tokens) and
    `prompt_mask [T]` (bool, true at real tokens that the assistant does not say). The last token
    of a prompt thus has a label, the first one of the answer.

    Args:
        store: the encoded conversations, of at most T + 1 tokens each.
        conversations: numbers of those to use.
        chunk_length: places per chunk (T).
        pad_id: token that fills up.
    """

    def __init__(
        self, store: ChatStore, conversations: np.ndarray, chunk_length: int, pad_id: int
    ) -> None:
        self.store = store
        self.conversations = conversations
        self.chunk_length = chunk_length
        self.pad_id = pad_id
        self.lengths: Sequence[int] = [1] * len(conversations)

    def __getitem__(self, request: ChunkRequest) -> dict[str, Tensor]:
        """The conversation that the sampler asks for."""
        number = int(self.conversations[max(0, request.file)])
        stop = 0 if request.idle else None
        tokens = self.store.document(number)[:stop].astype(np.int64)
        answers = self.store.answers_of(number)[:stop]
        labels = np.where(answers[1:], tokens[1:], NO_LABEL)
        sample = padded(tokens[:-1], labels, self.chunk_length, self.pad_id)
        prompt_mask = np.zeros(self.chunk_length, dtype=np.bool_)
        prompt_mask[: len(labels)] = ~answers[:-1]
        sample["prompt_mask"] = torch.from_numpy(prompt_mask)
        return sample


class ChatDataModule(TokenDataModule):
    """Conversations for supervised fine-tuning: labels are what the assistant says.

    Conversations are `messages` [{role, content}], `conversations` [{from, value}] or `prompt`
    with `response` or `completion`, written out by the tokenizer's chat template. Labels are
    already shifted, so a model must not shift them again; they are -100 at everything but the
    answers, whose end-of-turn token is one. `prompt_mask` is true at what is no answer.

    Of a conversation longer than a chunk the oldest turns behind the system's are left out; if
    the last answer still does not fit, its end is cut off.

    Validation conversations are chosen by a hash of their text, whatever the seed, and stay so
    when others are added. `test` and `predict` read them, too.

    Args:
        source: which conversations.
        tokenizer: a Hugging Face tokenizer: its name on the hub, or a folder.
        chat_template: a Jinja template, a file with one, or `chatml` (for tokenizers with its
            tokens); None takes the tokenizer's own. Answers are what stands in
            `{% generation %}`, or are found by rendering what comes before them.
        chunk_length: tokens per conversation.
        val_fraction: share of the conversations used for validation.
        cache: folder for encoded conversations, relative to the working directory; reused while
            they, the tokenizer, the template and the length are the same.
        streams: options of every DataModule: batch_size, num_workers, seed.
    """

    def __init__(
        self,
        source: ChatSource,
        tokenizer: str,
        chat_template: str | None = None,
        *,
        chunk_length: int = 1024,
        val_fraction: float = 0.1,
        cache: str = "data",
        **streams: Any,
    ) -> None:
        super().__init__(**streams)
        self.source = source
        self.tokenizer_name = tokenizer
        self.chat_template = chat_template
        self.chunk_length = chunk_length
        self.val_fraction = val_fraction
        self.cache = cache
        if chunk_length < 1:
            raise ValueError(f"chunk_length={chunk_length} must be at least 1")
        if self.tbptt != 1:
            raise ValueError(
                f"tbptt={self.tbptt} needs files of several chunks, but a conversation is one "
                "chunk; set tbptt to 1"
            )

    @cached_property
    def _conversations(self) -> Conversations:
        return open_conversations(self.source)

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template with its tokenizer."""
        return ChatTemplate(PretrainedTokenizer.load(self.tokenizer_name), self.chat_template)

    @property
    def tokenizer(self) -> PretrainedTokenizer:
        """The tokenizer: `encode`, `decode`, `vocab_size`, `bos_id`, `eos_id`, `pad_id`."""
        return self.template.tokenizer

    @cached_property
    def _path(self) -> Path:
        return chat_store_path(
            self.cache, self.source.name, self._conversations, self.template, self.chunk_length
        )

    def write_store(self) -> None:
        """Encode the conversations."""
        encode_conversations(
            self._path, self._conversations, self.template, self.source, self.chunk_length
        )

    @cached_property
    def store(self) -> ChatStore:
        """The encoded conversations, training and validation together.

        Raises:
            FileNotFoundError: `prepare_data` has not run.
        """
        return ChatStore(self._path)

    @cached_property
    def _split(self) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the training and of the validation conversations."""
        return split_by_hash(self.store.places, self.val_fraction, "conversations")

    @property
    def features(self) -> dict[str, Any]:
        """What a model must know of the data; see `describe`."""
        return self.describe("chat", 1, self.tokenizer_name)

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the numbers of a benchmark come from: print it beside them.

        `source`, `content_hash`, `conversations`, `tokens`, `labels`, `shortened` (conversations
        without their oldest turns), `cut` (without the end of their answer), `skipped`,
        `train_conversations` and `val_conversations`.
        """
        training, validation = self._split
        names = ("content_hash", "conversations", "tokens", "labels", "shortened", "cut", "skipped")
        return {
            "source": self.source.name,
            **{name: self.store.meta[name] for name in names},
            "train_conversations": len(training),
            "val_conversations": len(validation),
        }

    def build_dataset(self, stage: Stage) -> ChatConversations:
        """Training conversations for `train`, validation conversations for every other stage."""
        training, validation = self._split
        chosen = training if stage == "train" else validation
        return ChatConversations(self.store, chosen, self.chunk_length, self.tokenizer.pad_id)
