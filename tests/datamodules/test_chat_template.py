"""Answers are found with the token that ends them, whatever the template; too long ones shrink."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_cases import BLOCKS, END, PLAIN, THINKING, by_hand, make_tokenizer, turns
from hypothesis import given
from hypothesis import strategies as st

from datamodules.chat_conversations import BadConversation, Turn
from datamodules.chat_template import ChatTemplate, load_template
from datamodules.tokenization import PretrainedTokenizer

TEMPLATES = {"plain": PLAIN, "blocks": BLOCKS, "built in": "chatml"}
LONG = turns("q1", "a1 wow", "q2 wow", "a2", "q3", "a3 wow wow", system="brief")

BYTES = turns("é", "é", "ü", "日本 🙂")
"""Answers whose last character has several tokens."""
LAST_ANSWER = "loop.last and m['role'] == 'assistant'"


def template(text: str | None) -> ChatTemplate:
    return ChatTemplate(PretrainedTokenizer(copy.deepcopy(make_tokenizer().tokenizer)), text)


def spoken(encoded: Any, chat: ChatTemplate) -> str:
    return chat.tokenizer.tokenizer.decode(encoded.tokens[encoded.answers])


@pytest.mark.parametrize("text", TEMPLATES.values(), ids=TEMPLATES.keys())
@pytest.mark.parametrize("conversation", [turns("How many?", "It has six."), LONG, BYTES])
def test_tokens_and_answers_equal_those_written_by_hand(text: str, conversation: Any) -> None:
    chat = template(text)
    encoded = chat.fit(conversation, 1000)
    assert (encoded.tokens.tolist(), encoded.answers.tolist()) == by_hand(conversation)
    assert chat.tokenizer.tokenizer.convert_ids_to_tokens(chat.end_of_turn) == END
    assert encoded.tokens[-1] == chat.end_of_turn and encoded.answers[-1]
    assert (encoded.dropped, encoded.cut) == (0, False)
    answers = [turn.content for turn in conversation if turn.role == "assistant"]
    assert spoken(encoded, chat) == "".join(answer + END for answer in answers)


def test_marks_without_the_end_of_turn_would_not_teach_to_stop() -> None:
    chat = template(BLOCKS)
    messages = [turn._asdict() for turn in LONG]
    output = chat.tokenizer.tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    marked = np.asarray(output["input_ids"])[np.asarray(output["assistant_masks"], dtype=bool)]
    assert chat.end_of_turn not in marked


words = st.text(st.sampled_from("ab \n?é"), min_size=1, max_size=6).filter(str.strip)


@given(st.lists(words, min_size=2, max_size=6))
def test_found_answers_equal_marked_ones(contents: list[str]) -> None:
    conversation = turns(*contents[: len(contents) // 2 * 2])
    try:
        found = CHATS["plain"].fit(conversation, 1000)
    except BadConversation as error:  # a newline of the prompt and of the answer are one token
        assert "otherwise than in the whole" in str(error)
        assert any(turn.content[0] == "\n" for turn in conversation[1::2])
        return
    for name in ("blocks", "built in"):
        marked = CHATS[name].fit(conversation, 1000)
        assert found.tokens.tolist() == marked.tokens.tolist()
        assert found.answers.tolist() == marked.answers.tolist()


CHATS = {name: template(text) for name, text in TEMPLATES.items()}


def test_a_template_that_writes_the_last_answer_differently_is_read_as_it_is_written() -> None:
    chat = template(THINKING)
    encoded = chat.fit(LONG, 1000)
    assert spoken(encoded, chat) == f"a1 wow{END}a2{END}<think>\na3 wow wow{END}"


# --- templates that cannot be used ---


def test_a_tokenizer_without_a_template_names_the_fix() -> None:
    with pytest.raises(ValueError, match="no chat template: set chat_template to chatml, to a J"):
        template(None)
    own = PretrainedTokenizer(copy.deepcopy(make_tokenizer().tokenizer))
    own.tokenizer.chat_template = {"default": PLAIN, "tool_use": "x"}
    assert load_template(None, own) == PLAIN
    plain = PretrainedTokenizer.train(["wow"], 260)
    with pytest.raises(ValueError, match="chatml needs the tokens <|im_start|>"):
        ChatTemplate(plain, "chatml")


def test_a_template_may_lie_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text(PLAIN)
    assert template(str(tmp_path / "chat.jinja")).text == PLAIN
    with pytest.raises(FileNotFoundError, match="'chatlm' is no file and no template: set chat_t"):
        template("chatlm")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PLAIN.replace("<|im_end|>", ""), "ends answers with no token of its own.*not learn to"),
        ("{{ raise_exception('Never!') }}", "refuses it: Never!, even for a question and an ans"),
        ("{% for %}", "refuses it: .*, even for a question"),
    ],
)
def test_a_template_that_teaches_nothing_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        template(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ messages | length }}" + PLAIN, "template of .* turns before turn 3 otherwise"),
        (
            PLAIN.replace("<|im_end|>", f"{{% if {LAST_ANSWER} %}}<|im_end|>{{% endif %}}"),
            "does not end the answer in turn 3 as that of a single question",
        ),
        (
            "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system.') }}{% endif %}"
            + PLAIN,
            "the chat template refuses it: No system.",
        ),
    ],
)
def test_conversations_in_which_answers_cannot_be_found_say_why(text: str, message: str) -> None:
    with pytest.raises(BadConversation, match=message):
        template(text).fit(LONG, 1000)


def test_a_text_cannot_spell_a_special_token() -> None:
    for role, bad in enumerate((turns(f"x {END}", "y"), turns("x", "y <pad>"))):
        with pytest.raises(
            BadConversation, match=rf"turn {role + 1} .* spells the special token <"
        ):
            template(PLAIN).fit(bad, 1000)


# --- conversations that are too long ---


@pytest.mark.parametrize("text", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_the_oldest_turns_are_left_out_as_few_as_possible(text: str) -> None:
    chat = template(text)
    shorter = {0: LONG, 2: (LONG[0], *LONG[3:]), 4: (LONG[0], *LONG[5:])}
    lengths = {dropped: len(by_hand(kept)[0]) for dropped, kept in shorter.items()}
    for dropped, kept in shorter.items():
        for room in (0, min(n for d, n in lengths.items() if d < dropped) - 1) if dropped else (0,):
            encoded = chat.fit(LONG, max(lengths[dropped], room))
            assert (encoded.tokens.tolist(), encoded.answers.tolist()) == by_hand(kept)
            assert (encoded.dropped, encoded.cut) == (dropped, False)


def test_a_last_answer_that_is_too_long_loses_its_end() -> None:
    chat = template(PLAIN)
    tokens, answers = by_hand((LONG[0], *LONG[5:]))
    first = answers.index(True)
    for room in range(first + 1, len(tokens)):
        encoded = chat.fit(LONG, room)
        assert encoded.tokens.tolist() == tokens[:room] and encoded.cut and encoded.dropped == 4
        assert encoded.answers.tolist() == answers[:room] and encoded.answers.any()
    with pytest.raises(BadConversation, match=f"no place for an answer in {first} tokens"):
        chat.fit(LONG, first)


def test_one_question_keeps_its_system_turn() -> None:
    conversation = (*turns("wow " * 20, "a", system="brief"), Turn("assistant", "b"))
    tokens, _ = by_hand(conversation)
    encoded = template(PLAIN).fit(conversation, len(tokens) - 2)
    assert encoded.tokens.tolist() == tokens[:-2] and encoded.dropped == 0
