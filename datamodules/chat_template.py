"""Conversations to tokens by a tokenizer's chat template, and which of them are answers."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from datamodules.chat_conversations import ASSISTANT, USER, BadConversation, Turn
from datamodules.tokenization import PretrainedTokenizer

CHATML = r"""
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}
{%- else %}
{{- message['content'] + '<|im_end|>' }}
{%- endif %}
{{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
FIX = (
    "set chat_template to chatml, to a Jinja template, or to a file with one; {% generation %} "
    "around what the assistant says marks the answers"
)
PROBE = (Turn(USER, "is it?"), Turn(ASSISTANT, "yes"))


class Encoded(NamedTuple):
    """A conversation as tokens, up to the end of its last answer.

    Args:
        tokens: int64 `[L]`.
        answers: tokens that the assistant says, end of turn included, bool `[L]`.
        dropped: turns that were left out to make it fit.
        cut: whether the end of the last answer is missing.
    """

    tokens: np.ndarray
    answers: np.ndarray
    dropped: int = 0
    cut: bool = False


def load_template(template: str | None, tokenizer: PretrainedTokenizer) -> str:
    """The Jinja template that an option asks for; None takes the tokenizer's own.

    Raises:
        ValueError: the tokenizer has none, or lacks the tokens of `chatml`.
        FileNotFoundError: there is no such file.
    """
    if template is None:
        own = tokenizer.tokenizer.chat_template
        own = own.get("default") if isinstance(own, dict) else own
        if own is None:
            raise ValueError(f"the tokenizer has no chat template: {FIX}")
        return own
    if template == "chatml":
        if not {"<|im_start|>", "<|im_end|>"} <= tokenizer.tokenizer.get_vocab().keys():
            raise ValueError(
                "chat_template=chatml needs the tokens <|im_start|> and <|im_end|>, which the "
                "tokenizer does not have: choose a template of tokens that it has"
            )
        return CHATML
    if "{%" in template or "{{" in template:
        return template
    if not Path(template).expanduser().is_file():
        raise FileNotFoundError(f"chat_template={template!r} is no file and no template: {FIX}")
    return Path(template).expanduser().read_text(encoding="utf-8")


class ChatTemplate:
    """Encodes conversations and knows the answers in them, end-of-turn token included.

    Where the template marks the answers (`{% generation %}`), they are what it marks. Elsewhere an
    answer begins behind the conversation before it, rendered as the prompt for an answer, whose
    tokens must be the first ones of the whole; it ends with the first end-of-turn token. What ends
    a turn is found in a short conversation; texts that spell it, or any special token, are
    refused.

    Args:
        tokenizer: the tokenizer.
        template: see `load_template`; it becomes the tokenizer's.

    Raises:
        ValueError: there is no template, it refuses a simple conversation, or its answers do not
            end with a token of their own.
        FileNotFoundError: the template's file does not exist.
    """

    def __init__(self, tokenizer: PretrainedTokenizer, template: str | None = None) -> None:
        self.text = load_template(template, tokenizer)
        self.tokenizer = tokenizer
        self._tokenizer = tokenizer.tokenizer
        self._tokenizer.chat_template = self.text
        self._marks_answers = GENERATION_BLOCK.search(self.text) is not None
        added = self._tokenizer.added_tokens_decoder
        self.end_of_turn = self._find_end_of_turn(set(added))
        special = [token.content for token in added.values() if token.special]
        special.append(added[self.end_of_turn].content)
        self._special = re.compile("|".join(map(re.escape, sorted(special, key=len)[::-1])))

    def fit(self, turns: Sequence[Turn], max_tokens: int) -> Encoded:
        """Encode a conversation in at most `max_tokens` tokens.

        The oldest turns behind the system's are left out, as few as possible, up to the last
        question; if its answer is still too long, the end of it is cut off.

        Raises:
            BadConversation: no part of an answer fits, or the conversation cannot be encoded.
        """
        self._check_texts(turns)
        encoded, dropped = self._encode(turns), 0
        if len(encoded.tokens) > max_tokens:
            users = [i for i, turn in enumerate(turns) if turn.role == USER]
            head = turns[: users[0]]

            def fits(user: int) -> bool:
                return len(self._encode((*head, *turns[user:])).tokens) <= max_tokens

            first = users[min(bisect_left(users, True, lo=1, key=fits), len(users) - 1)]
            encoded, dropped = self._encode((*head, *turns[first:])), first - len(head)
        tokens, answers = encoded.tokens[:max_tokens], encoded.answers[:max_tokens]
        if not answers[1:].any():
            raise BadConversation(
                f"its last question leaves no place for an answer in {max_tokens} tokens"
            )
        return Encoded(tokens, answers, dropped, cut=len(tokens) < len(encoded.tokens))

    def _encode(self, turns: Sequence[Turn]) -> Encoded:
        if self._marks_answers:
            tokens, answers = self._marked(turns)
        else:
            tokens, answers = self._found(turns)
        if not answers.any():
            raise BadConversation("the chat template marks no answer in it")
        end = int(np.flatnonzero(answers)[-1]) + 1
        return Encoded(tokens[:end], answers[:end])

    def _marked(self, turns: Sequence[Turn]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens, and those in generation blocks or ending one."""
        output = self._apply(turns, return_assistant_tokens_mask=True)
        tokens = np.asarray(output["input_ids"], dtype=np.int64)
        answers = np.asarray(output["assistant_masks"], dtype=np.bool_)
        offsets = np.asarray(output["offset_mapping"])
        # The mask ends with the first token of the last character, which may have several (bytes).
        same = (offsets[1:] == offsets[:-1]).all(axis=1) & (offsets[1:, 0] < offsets[1:, 1])
        goes_on = same | (tokens[1:] == self.end_of_turn)
        for place in np.flatnonzero(goes_on):
            answers[place + 1] |= answers[place]
        return tokens, answers

    def _found(self, turns: Sequence[Turn]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens, and those behind a prompt up to the end of the turn."""
        tokens = self._render(turns)
        answers = np.zeros(len(tokens), dtype=np.bool_)
        numbers = [number for number, turn in enumerate(turns) if turn.role == ASSISTANT]
        starts = [self._start(tokens, turns[:number]) for number in numbers]
        for number, start, bound in zip(numbers, starts, [*starts[1:], len(tokens)], strict=True):
            ends = np.flatnonzero(tokens[start:bound] == self.end_of_turn)
            if len(ends) == 0:
                raise BadConversation(
                    f"the chat template of {self._name} does not end the answer in turn "
                    f"{number + 1} as that of a single question: {FIX}"
                )
            answers[start : start + ends[0] + 1] = True
        return tokens, answers

    def _start(self, tokens: np.ndarray, before: Sequence[Turn]) -> int:
        """Where the answer to the turns before it begins."""
        prompt = self._render(before, add_generation_prompt=True)
        if not np.array_equal(prompt, tokens[: len(prompt)]):
            raise BadConversation(
                f"the chat template of {self._name} renders the turns before turn "
                f"{len(before) + 1} otherwise than in the whole conversation, so that its answer "
                f"cannot be found: {FIX}"
            )
        return len(prompt)

    @property
    def _name(self) -> str:
        return self._tokenizer.name_or_path or type(self._tokenizer).__name__

    def _find_end_of_turn(self, added: set[int]) -> int:
        """The first added token behind an answer."""
        try:
            tokens = self._render(PROBE).tolist()
        except BadConversation as error:
            raise ValueError(f"{error}, even for a question and an answer: {FIX}") from error
        # The shortest end of the text that has the answer: texts of the template come before.
        decode, answer = self._tokenizer.decode, PROBE[-1].content
        places = (i for i in reversed(range(len(tokens))) if answer in decode(tokens[i:]))
        start = next(places, len(tokens))
        end = next((token for token in tokens[start:] if token in added), None)
        if end is None:
            raise ValueError(
                "the chat template ends answers with no token of its own, so that a model would "
                f"not learn to stop; let it write the end-of-turn or eos token, or {FIX}"
            )
        return end

    def _check_texts(self, turns: Sequence[Turn]) -> None:
        for number, turn in enumerate(turns, start=1):
            spelled = self._special.search(turn.content)
            if spelled:
                raise BadConversation(
                    f"turn {number} ({turn.role}) spells the special token {spelled.group()}"
                )

    def _render(self, turns: Sequence[Turn], **options: Any) -> np.ndarray:
        return np.asarray(self._apply(turns, **options)["input_ids"], dtype=np.int64)

    def _apply(self, turns: Sequence[Turn], **options: Any) -> Any:
        messages = [turn._asdict() for turn in turns]
        # Texts longer than the model's context are expected: they are shortened.
        how = {"verbose": False, "return_offsets_mapping": self._marks_answers}
        try:
            return self._tokenizer.apply_chat_template(
                messages, return_dict=True, tokenizer_kwargs=how, **options
            )
        except Exception as error:
            # Whatever the template objects to; its language is no dependency of this project.
            if not type(error).__module__.startswith("jinja2"):
                raise
            raise BadConversation(f"the chat template refuses it: {error}") from error
