"""Conversations in the shapes that they are published in, as turns of three roles."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
ROLES = {role: role for role in (SYSTEM, USER, ASSISTANT)} | {"human": USER, "gpt": ASSISTANT}
"""Role by its name in the data; those of ShareGPT are human and gpt."""

TURNS = ("messages", "conversations")
ANSWERS = ("response", "completion")
COLUMNS = frozenset({*TURNS, "prompt", *ANSWERS})
SHAPES = (
    "messages [{role, content}], conversations [{from, value}], or prompt with response or "
    "completion"
)


class Turn(NamedTuple):
    """What one side says; `role` is `system`, `user` or `assistant`."""

    role: str
    content: str


class BadConversation(ValueError):
    """A conversation that cannot be used; the message says why, not which one it is."""


def read_turns(record: Any) -> tuple[Turn, ...]:
    """Turns of a record, from the first user's to the last answer, system turns before them.

    Left out are empty system turns, answers before the first user turn (there is nothing that
    they answer), and what follows the last answer (there is nothing to learn from it).

    Args:
        record: an object with `messages` [{role, content}], with `conversations` [{from, value}]
            (as ShareGPT's, with the roles human, gpt and system), or with `prompt` and `response`
            or `completion`.

    Raises:
        BadConversation: it has none of these, an unknown role, a turn without text, or no answer
            to a user.
    """
    turns = [turn for turn in _turns(record) if turn != Turn(SYSTEM, "")]
    for number, turn in enumerate(turns, start=1):
        if not turn.content:
            raise BadConversation(f"turn {number} ({turn.role}) is empty")
    user = next((i for i, turn in enumerate(turns) if turn.role == USER), len(turns))
    kept = [turn for turn in turns[:user] if turn.role == SYSTEM] + turns[user:]
    while kept and kept[-1].role != ASSISTANT:
        kept.pop()
    if not kept:
        raise BadConversation("no assistant turn answers a user")
    return tuple(kept)


def canonical(turns: Sequence[Turn]) -> bytes:
    """The text of a conversation, the same however it was published."""
    return json.dumps(turns, ensure_ascii=False).encode()


def _turns(record: Any) -> list[Turn]:
    if not isinstance(record, Mapping):
        raise BadConversation(f"{type(record).__name__}, not an object")
    # A dataset has a column for every row: those that a row does not have are None.
    present = {key: value for key, value in record.items() if value is not None}
    for name in TURNS:
        if name in present:
            return _listed_turns(name, present[name])
    answer = next((name for name in ANSWERS if name in present), None)
    if "prompt" not in present or answer is None:
        found = ", ".join(sorted(present)) or "nothing"
        raise BadConversation(f"it has {found} instead of {SHAPES}")
    names = {"prompt": USER, answer: ASSISTANT}
    return [Turn(role, _text(name, present[name])) for name, role in names.items()]


def _listed_turns(name: str, messages: Any) -> list[Turn]:
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise BadConversation(f"{name} is {type(messages).__name__}, not a list")
    if not messages:
        raise BadConversation(f"{name} is empty")
    return [_turn(number, message) for number, message in enumerate(messages, start=1)]


def _turn(number: int, message: Any) -> Turn:
    if not isinstance(message, Mapping):
        raise BadConversation(f"turn {number} is {type(message).__name__}, not an object")
    keys = ("role", "content") if message.get("role") is not None else ("from", "value")
    role, content = (message.get(key) for key in keys)
    if role not in ROLES:
        raise BadConversation(f"turn {number} has the role {role!r}; known: {', '.join(ROLES)}")
    return Turn(ROLES[role], _text(f"turn {number} ({role})", content))


def _text(what: str, content: Any) -> str:
    if not isinstance(content, str):
        raise BadConversation(f"{what} is {type(content).__name__}, not text")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise BadConversation(f"{what} is no Unicode at character {error.start}") from error
    return content if content.strip() else ""
