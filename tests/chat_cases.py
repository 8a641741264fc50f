"""A tiny tokenizer for conversations, chat templates, and their tokens written out by hand."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from datamodules import ChatDataModule
from datamodules.chat_conversations import Turn
from datamodules.chat_sources import ChatSource
from datamodules.tokenization import PretrainedTokenizer

START, END = "<|im_start|>", "<|im_end|>"
TEXTS = [
    "user\nassistant\nsystem\n",
    "How many legs has an ant?",
    "It has six legs.\n\n\n\n",
    "wow",
]

HEAD = "{% for m in messages %}<|im_start|>{{ m['role'] + '\n' }}"
TAIL = "{% endfor %}{% if add_generation_prompt %}<|im_start|>{{ 'assistant\n' }}{% endif %}"
PLAIN = f"{HEAD}{{{{ m['content'] }}}}<|im_end|>{{{{ '\n' }}}}{TAIL}"
BLOCKS = (
    f"{HEAD}{{% if m['role'] == 'assistant' %}}{{% generation %}}{{{{ m['content'] }}}}"
    f"{{% endgeneration %}}{{% else %}}{{{{ m['content'] }}}}{{% endif %}}<|im_end|>"
    f"{{{{ '\n' }}}}{TAIL}"
)
"""Marks the answers, but not the token that ends them."""
THINKING = PLAIN.replace(
    "{{ m['content'] }}",
    "{% if loop.last and m['role'] == 'assistant' %}{{ '<think>\n' }}{% endif %}{{ m['content'] }}",
)
"""The last answer is written in another way than the ones before, as Qwen3's template does."""


@cache
def make_tokenizer() -> PretrainedTokenizer:
    """A byte-level BPE with the tokens of ChatML."""
    tokenizer = PretrainedTokenizer.train(TEXTS * 3, 300).tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": [START, END]})
    return PretrainedTokenizer(tokenizer)


def save_tokenizer(folder: Path, template: str | None = PLAIN) -> str:
    tokenizer = copy.deepcopy(make_tokenizer().tokenizer)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


def turns(*contents: str, system: str | None = None) -> tuple[Turn, ...]:
    """Contents by the user and the assistant in turn."""
    head = () if system is None else (Turn("system", system),)
    roles = ("user", "assistant")
    return head + tuple(Turn(roles[i % 2], content) for i, content in enumerate(contents))


def by_hand(conversation: Sequence[Turn]) -> tuple[list[int], list[bool]]:
    """Tokens of ChatML and which of them are answers, up to the end of the last answer."""
    tokenizer = make_tokenizer().tokenizer
    tokens: list[int] = []
    answers: list[bool] = []

    def add(text: str, answer: bool) -> None:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens.extend(ids)
        answers.extend([answer] * len(ids))

    for role, content in conversation:
        add(f"{START}{role}\n", False)
        add(f"{content}{END}", role == "assistant")
        add("\n", False)
    return tokens[:-1], answers[:-1]


def conversation(number: int, rounds: int = 1, words: int = 3) -> tuple[Turn, ...]:
    """A conversation of so many rounds; the texts say where they stand."""
    contents = [f"{part}{number}.{i} " + "wow " * words for i in range(rounds) for part in "qa"]
    return turns(*contents, system=f"s{number}")


def as_messages(conversation: Sequence[Turn]) -> dict[str, Any]:
    return {"messages": [turn._asdict() for turn in conversation]}


def write_lines(path: Path, records: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def make_chat(path: Path, tokenizer: str | None = None, **options: Any) -> ChatDataModule:
    """A prepared DataModule over `path`, with tokenizer and cache beside it."""
    source = ChatSource(**{"path": str(path)} | options.pop("source", {}))
    if tokenizer is None:
        tokenizer = save_tokenizer(path.parent / "tokenizer")
    defaults = {"chunk_length": 64, "batch_size": 3, "cache": str(path.parent / "cache")}
    data = ChatDataModule(source, tokenizer, **defaults | options)
    data.prepare_data()
    data.setup("fit")
    return data


def stored(data: ChatDataModule) -> dict[str, tuple[list[int], list[bool]]]:
    """Tokens and answers of every conversation by its name."""
    store = data.store
    return {
        name: (store.document(i).tolist(), np.asarray(store.answers_of(i)).tolist())
        for i, name in enumerate(store.names)
    }
