"""Configs as a user runs them: fitted, validated and resumed from the command line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

CONFIGS = Path(__file__).parents[1] / "configs"


def run_folder(tmp_path: Path, name: str) -> Path:
    """Where the first run of a config writes."""
    return tmp_path / "runs" / name / "version_0"


def fit_validate_resume(run_cli: Any, options: list[str], run: Path) -> EventAccumulator:
    """Fit, validate the last checkpoint and go on from it; the events of the first run.

    Args:
        run_cli: the fixture.
        options: of the command line, with a tiny overlay of four steps.
        run: folder of the run.
    """
    result = run_cli("fit", *options)
    assert result.code == 0, result.err
    events = EventAccumulator(str(run)).Reload()
    scalars = events.Tags()["scalars"]
    assert all(math.isfinite(e.value) for tag in scalars for e in events.Scalars(tag))
    saved = ["--ckpt_path", str(run / "checkpoints" / "last.ckpt")]
    assert run_cli("validate", *options, *saved).code == 0
    resumed = run_cli("fit", *options, *saved, "--trainer.max_steps", "6")
    assert resumed.code == 0, resumed.err
    return events
