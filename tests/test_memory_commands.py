"""Memories of streams from the command line: saved by one run, attached by the next."""

from __future__ import annotations

from pathlib import Path

import pytest
from config_cases import CONFIGS, run_folder
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_modules.stream_memory import list_memories

OVERLAY = """
trainer:
  callbacks+:
    - class_path: StreamMemoryFiles
      init_args:
        save: memories
        stages: [validate]
        name: standard library
"""


def loss_of(folder: Path) -> float:
    return EventAccumulator(str(folder)).Reload().Scalars("val/loss")[-1].value


@pytest.mark.slow
def test_validate_saves_memories_and_a_later_run_attaches_one(run_cli, tmp_path: Path) -> None:
    options = ["--config", str(CONFIGS / "lact_small.yaml")]
    options += ["--config", str(CONFIGS / "tiny" / "text.yaml")]
    assert run_cli("fit", *options).code == 0
    runs = run_folder(tmp_path, "lact_small").parent
    trained = ["--ckpt_path", str(runs / "version_0" / "checkpoints" / "last.ckpt")]

    Path("memories.yaml").write_text(OVERLAY)
    saved = run_cli("validate", *options, *trained, "--config", "memories.yaml")
    assert saved.code == 0, saved.err
    files = list_memories("memories")
    assert f"memories: {len(files)} streams in memories" in saved.out
    # Two batches of two rows: at least two files, and no more chunks than were read.
    assert 2 <= len(files) == len({file.stream_id for file in files})
    assert 2 <= sum(file.chunk_index + 1 for file in files) <= 4
    assert {file.name for file in files} == {"standard library"}

    add = [
        "--trainer.callbacks+=StreamMemoryFiles",
        "--trainer.callbacks.attach",
        str(files[0].path),
    ]
    attached = run_cli("validate", *options, *trained, *add)
    assert attached.code == 0, attached.err
    plain, other = (loss_of(runs / f"version_{number}") for number in (1, 2))
    assert other != pytest.approx(plain, rel=1e-5)

    untrained = run_cli("validate", *options, *add)
    assert untrained.code == 1
    assert untrained.last_line.startswith(
        "error: the memory of stream 0 (standard library) belongs"
    )
    wrong = run_cli("validate", *options, *add, "--trainer.callbacks.stages", "[fit]")
    assert wrong.code == 2
