"""From the command line to files: fit, predict, export, and the card's code, for every data."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from audio_cases import write_codes
from chat_cases import save_tokenizer
from config_cases import CONFIGS, run_folder
from lact_module_cases import save_pretrained
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_modules.export.__main__ import main

pytestmark = pytest.mark.slow

DOCS = Path(__file__).parents[2] / "docs"
MEMORY = "--model.init_args.memory.memory."


def tiny(config: str, overlay: str = "text") -> list[str]:
    files = (CONFIGS / f"{config}.yaml", CONFIGS / "tiny" / f"{overlay}.yaml")
    return [part for file in files for part in ("--config", str(file))]


def text(folder: Path) -> list[str]:
    texts = folder / "texts"
    texts.mkdir()
    for number in range(8):
        (texts / f"{number}.txt").write_text(f"The number {number} and the next one. " * 80)
    source = ["--data.source.kind", "files", "--data.source.path", str(texts)]
    size = ["--data.chunk_length", "192"]
    return [*tiny("lact_small"), *source, *size, "--data.tokenizer.kind", "bpe"]


def recall(folder: Path) -> list[str]:
    sizes = ["--data.val_sequences", "4", "--data.train_sequences", "100"]
    return [*tiny("lact_recall"), *sizes]


def audio(folder: Path) -> list[str]:
    path = ["--data.path", str(write_codes(folder, copies=4)), "--data.chunk_frames", "12"]
    return [*tiny("ttt_lora_moshi_tiny"), *path, "--model.init_args.config.num_hidden_layers=2"]


def chat(folder: Path) -> list[str]:
    lines = [{"prompt": f"What is {n}?", "response": f"It is {n}."} for n in range(40)]
    (folder / "chat.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(save_pretrained(folder))
    base.resize_token_embeddings(400)  # the tokenizer's two tokens of ChatML are behind 300
    base.save_pretrained(folder / "base")
    options = ["--model.init_args.pretrained.name", str(folder / "base")]
    options += ["--model.init_args.memory.count=1", "--trainer.precision", "32-true"]
    options += [f"{MEMORY}bank.num_rows=64", f"{MEMORY}bank.rank=8"]
    options += [f"{MEMORY}attention.num_heads=2", f"{MEMORY}router.num_chapters=8"]
    options += [f"{MEMORY}router.block_size=16", "--data.chunk_length", "96"]
    options += ["--data.tokenizer", save_tokenizer(folder / "tokenizer")]
    options += ["--data.source.path", str(folder / "chat.jsonl")]
    return [*tiny("memory_smollm2", "memory"), *options]


def actions(folder: Path) -> list[str]:
    return tiny("quickstart", "action_expert")


RUNS = {
    "lact_small": text,
    "lact_recall": recall,
    "ttt_lora_moshi_tiny": audio,
    "memory_smollm2": chat,
    "quickstart": actions,
}


def documented(module: str) -> list[tuple[str, str]]:
    """Columns and types in the table of docs/predict.md."""
    lines = (DOCS / "predict.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]
    return [(row[1].strip("`"), row[2]) for row in rows if row[0] == module]


def in_words(kind: Any) -> str:
    """A type of parquet as the table says it, whatever the sizes."""
    words = str(kind).replace("double", "float")
    words = re.sub(r"fixed_size_list<element: (\w+)>\[\d+\]", r"list of A \1s", words)
    words = re.sub(r"fixed_size_list<element: list of A (\w+)>\[\d+\]", r"list of A lists of D \1",
                   words)  # fmt: skip
    return words


@pytest.mark.parametrize("name", RUNS)
def test_a_run_predicts_what_the_docs_say_and_its_export_works_as_its_card_says(
    name: str, run_cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    options = RUNS[name](tmp_path)
    result = run_cli("fit", *options)
    assert result.code == 0, result.err
    run = run_folder(tmp_path, name)
    path = run / "checkpoints" / "last.ckpt"
    result = run_cli("predict", *options, "--ckpt_path", str(path))
    assert result.code == 0, result.err
    file = run.parent / "version_1" / "predictions.parquet"
    schema = pq.read_schema(file)
    found = [(field.name, in_words(field.type)) for field in schema]
    assert found == documented("action" if name == "quickstart" else "language")
    assert pq.read_metadata(file).num_rows > 0

    assert main([str(path), "out"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "config.yaml").read_text() == (run / "config.yaml").read_text()
    losses = EventAccumulator(str(run)).Reload().Scalars("val/loss")
    assert f"| `val/loss` | {losses[-1].value:.6g} | {losses[-1].step} | last of the run |" in card
    assert f"{min(e.value for e in losses):.6g} |" in card
    assert "Not recorded" not in card and "class_path: lightning_modules" in card
    if name not in ("quickstart", "lact_recall"):
        assert "content_hash" in card and "are not in the checkpoint" not in card
    if name == "lact_small":
        _check_that_the_mean_of_predictions_is_the_loss(run_cli, options, path, file)
    capsys.readouterr()
    monkeypatch.chdir(tmp_path / "out")
    torch.manual_seed(0)
    exec(card.split("```python\n")[1].split("```")[0], {})
    printed = capsys.readouterr().out
    wanted = {"lact_small": "The ", "memory_smollm2": "Hello!", "quickstart": "tensor(["}
    assert wanted.get(name, "tensor([[") in printed


def _check_that_the_mean_of_predictions_is_the_loss(
    run_cli: Any, options: list[str], path: Path, file: Path
) -> None:
    everything = ["--ckpt_path", str(path), "--trainer.limit_val_batches", "1.0"]
    assert run_cli("validate", *options, *everything).code == 0
    events = EventAccumulator(str(file.parents[1] / "version_2")).Reload()
    rows = pq.read_table(file).to_pylist()
    total = sum(row["loss"] * row["labels"] for row in rows)
    mean = total / sum(row["labels"] for row in rows)
    # float32 sums in another order
    assert mean == pytest.approx(events.Scalars("val/loss")[-1].value, rel=1e-5)
