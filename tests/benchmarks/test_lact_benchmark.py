"""The benchmarks of LaCT, shortened: train, evaluate, report, nothing twice; decoding's table."""

import json
from pathlib import Path

import pytest
from benchmark_cases import run

CONFIG = "model.init_args.config."
SHORT = (
    "--set",
    "trainer.max_steps=4",
    "trainer.val_check_interval=2",
    "trainer.log_every_n_steps=1",
    "data.init_args.batch_size=2",
    f"{CONFIG}hidden_size=64",
    f"{CONFIG}num_hidden_layers=1",
    "trainer.limit_val_batches=8",
)
RECALL = ("data.init_args.val_sequences=4", "data.init_args.train_sequences=40")
TEXT = ("data.init_args.chunk_length=512", "data.init_args.min_tokens=65536")
"""The longest files of the standard library, four of them for validation."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trial", "options"), [("recall/r2", RECALL), ("text/carry", TEXT)], ids=["recall", "text"]
)
def test_trials_are_trained_evaluated_and_reported_once(
    trial: str, options: tuple[str, ...], tmp_path: Path
) -> None:
    which = ["--out", str(tmp_path), "--trials", trial, "--seeds", "0"]
    assert "not trained yet" in run("lact.py", "evaluate", *which)
    assert f"train {trial} seed_0: done" in run("lact.py", "train", *which, *SHORT, *options)
    assert "done" not in run("lact.py", "train", *which, *SHORT, *options)
    text = run("lact.py", "evaluate", *which)
    assert f"| {trial} |" in text and "Trained on" in text
    assert (tmp_path / "results.md").read_text().strip() in text
    result = json.loads((tmp_path / trial / "seed_0" / "result.json").read_text())
    assert 0 <= result["accuracy"] <= 1 and result["loss"] > 0
    figure = "lact_recall.png" if trial.startswith("recall") else "lact_loss_by_position.png"
    assert (tmp_path / "figures" / figure).stat().st_size > 1000
    if trial.startswith("text"):
        positions = [position for position, _ in result["by_position"]]
        assert positions[:3] == [0, 64, 128] and "content_hash" in text


@pytest.mark.slow
def test_decoding_prints_a_row_per_model_and_history(tmp_path: Path) -> None:
    out = tmp_path / "table.md"
    text = run("lact_decoding.py", "--lengths", "30", "60", "--tokens", "3", "--out", str(out))
    rows = [line for line in text.splitlines() if line.startswith(("| LaCT", "| full"))]
    assert len(rows) == 6
    sizes = [float(row.split("|")[4]) for row in rows]
    assert sizes[0] == sizes[1] and sizes[2] == sizes[3] and sizes[4] < sizes[5]
    assert out.read_text() == text
