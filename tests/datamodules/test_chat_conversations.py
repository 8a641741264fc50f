"""Every published shape of a conversation gives the same turns; what cannot be used is named."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
from chat_cases import as_messages, turns, write_lines

from datamodules.chat_conversations import BadConversation, Turn, canonical, read_turns
from datamodules.chat_sources import ChatSource, Conversation, open_conversations
from datamodules.documents import Skipped

PAIR = turns("How many?", "Six.")
SHARE_GPT = [{"from": "human", "value": "How many?"}, {"from": "gpt", "value": "Six."}]


@pytest.mark.parametrize(
    "record",
    [
        as_messages(PAIR),
        {"conversations": SHARE_GPT},
        {"prompt": "How many?", "response": "Six."},
        {"prompt": "How many?", "completion": "Six."},
        {"id": 3, "messages": None, "prompt": "How many?", "response": None, "completion": "Six."},
        {"messages": SHARE_GPT},
        {"conversations": as_messages(PAIR)["messages"]},
        {"messages": [{**turn._asdict(), "from": None, "tool_calls": None} for turn in PAIR]},
        {"conversations": [{"from": "system", "value": " "}, *SHARE_GPT]},
        {"conversations": [{"from": "gpt", "value": "Hello, I am a bot."}, *SHARE_GPT]},
        {"conversations": [*SHARE_GPT, {"from": "human", "value": "Thanks!"}]},
    ],
)  # fmt: skip
def test_every_shape_gives_the_same_turns(record: dict[str, Any]) -> None:
    assert read_turns(record) == PAIR
    assert canonical(read_turns(record)) == canonical(PAIR)


def test_system_turns_and_all_rounds_are_kept() -> None:
    long = turns("a", "b", "c", "d", system="Be brief.")
    assert read_turns(as_messages(long)) == long
    assert canonical(long) != canonical(long[1:])
    assert canonical(turns("a b", "c")) != canonical(turns("a", "b c"))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([1], "list, not an object"),
        ({"text": "x", "id": 1}, r"it has id, text instead of messages \[\{role"),
        ({}, "it has nothing instead of"),
        ({"prompt": "x"}, "it has prompt instead of"),
        ({"prompt": "x", "response": 3}, "response is int, not text"),
        ({"messages": "hello"}, "messages is str, not a list"),
        ({"messages": []}, "messages is empty"),
        ({"conversations": [SHARE_GPT[0], "x"]}, "turn 2 is str, not an object"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "turn 1 has the role 'tool'; known: sy"),
        ({"messages": [{"content": "x"}]}, "turn 1 has the role None"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, r"turn 1 \(user\) is list, not text"),
        ({"messages": [{"role": "user"}]}, r"turn 1 \(user\) is NoneType, not text"),
        (as_messages(turns("x", " \n")), r"turn 2 \(assistant\) is empty"),
        (as_messages(turns("")), r"turn 1 \(user\) is empty"),
        (as_messages(turns("x")), "no assistant turn answers a user"),
        (as_messages((Turn("assistant", "x"),)), "no assistant turn answers a user"),
        (as_messages(turns("x", "y\ud800")), "turn 2 .assistant. is no Unicode at character 1"),
    ],
)
def test_what_cannot_be_used_says_why(record: Any, message: str) -> None:
    with pytest.raises(BadConversation, match=message):
        read_turns(record)


# --- sources ---


def read(path: Path, **options: Any) -> list[Conversation | Skipped]:
    return list(open_conversations(ChatSource(str(path), **options)))


def test_lines_are_read_in_the_order_of_their_files_and_named_by_file_and_line(
    tmp_path: Path,
) -> None:
    write_lines(tmp_path / "chat/b.jsonl", ["", as_messages(PAIR)])
    write_lines(tmp_path / "chat/a/a.jsonl", [as_messages(turns("1", "2")), as_messages(PAIR)])
    (tmp_path / "chat/README.md").write_text("not a conversation")
    found = read(tmp_path / "chat")
    assert [item.name for item in found] == ["a/a.jsonl:1", "a/a.jsonl:2", "b.jsonl:2"]
    assert found[2].turns == PAIR
    assert len(open_conversations(ChatSource(str(tmp_path / "chat")))) == 3
    assert [item.name for item in read(tmp_path / "chat/*.jsonl")] == ["b.jsonl:2"]
    assert read(tmp_path / "chat/b.jsonl") == found[2:]


def test_bad_lines_are_skipped_with_their_place_or_stop_a_strict_run(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "c.jsonl", [as_messages(PAIR), '{"messages": [', "[1]", "x\x00"])
    with path.open("ab") as file:
        file.write(b'{"prompt": "\xff"}\n')
    found = read(path)
    reasons = {item.name: item.reason for item in found if isinstance(item, Skipped)}
    assert list(reasons) == [f"c.jsonl:{line}" for line in (2, 3, 4, 5)]
    assert reasons["c.jsonl:2"].startswith("no line of JSON (Expecting value")
    assert reasons["c.jsonl:5"] == "not UTF-8 at byte 12"
    with pytest.raises(ValueError, match=r"c\.jsonl:2: no line of JSON.*strict: false to skip it"):
        read(path, strict=True)


def test_a_byte_order_mark_is_no_mistake(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(json.dumps(as_messages(PAIR)), encoding="utf-8-sig")
    assert [item.turns for item in read(path)] == [PAIR]


def test_keys_change_with_contents_names_and_strictness(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "c.jsonl", [as_messages(PAIR)])
    same = write_lines(tmp_path / "other/c.jsonl", [as_messages(PAIR)])
    keys = [open_conversations(ChatSource(str(p))).key for p in (path, same)]
    keys.append(open_conversations(ChatSource(str(path), strict=True)).key)
    write_lines(path, [as_messages(turns("How many?", "Seven."))])
    keys.append(open_conversations(ChatSource(str(path))).key)
    assert keys[0] == keys[1] and len(set(keys)) == 3


def test_nothing_found_says_what_to_do(tmp_path: Path) -> None:
    for name in ("a.json", "b.txt"):
        (tmp_path / name).write_text("[]")
    with pytest.raises(FileNotFoundError, match=r"has no .jsonl files; .* kind: datasets"):
        read(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read(tmp_path / "nowhere")
    (tmp_path / "broken.jsonl").symlink_to(tmp_path / "gone")
    with pytest.raises(ValueError, match=r"broken.jsonl cannot be read: No such file"):
        read(tmp_path)
    with pytest.raises(ValueError, match="choose files or datasets"):
        ChatSource("x", kind="hub")
    with pytest.raises(ValueError, match="needs a path"):
        ChatSource("")


@pytest.mark.parametrize("shape", ["messages", "conversations", "pair"])
def test_rows_of_a_dataset_equal_lines_of_a_file(tmp_path: Path, shape: str) -> None:
    rounds = [turns("a", "b"), turns("c", "d")] + [turns("e", "f", "g", "h")] * (shape != "pair")
    records = [as_messages(conversation) for conversation in rounds]
    if shape == "conversations":
        names = {"user": "human", "assistant": "gpt"}
        records = [{"conversations": [{"from": names[t.role], "value": t.content} for t in c]}
                   for c in rounds]  # fmt: skip
    if shape == "pair":
        records = [{"prompt": c[0].content, "completion": c[1].content} for c in rounds]
    lines = read(write_lines(tmp_path / "c.jsonl", records))
    datasets.Dataset.from_list(records).save_to_disk(tmp_path / "set")
    rows = read(tmp_path / "set", kind="datasets")
    assert [item.turns for item in rows] == [item.turns for item in lines] == rounds
    assert [item.name for item in rows] == [f"row {n}" for n in range(len(rounds))]


def test_a_dataset_without_conversations_names_its_columns(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["x"], "id": [1]}).save_to_disk(tmp_path / "set")
    message = re.escape("has the columns text, id, but conversations are messages [{role")
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "set", kind="datasets")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read(tmp_path / "nowhere", kind="datasets")
