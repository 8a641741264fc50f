"""What a checkpoint and the folder of its run tell of the training."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

CONFIG = "config.yaml"
EVENTS = "events.out.tfevents.*"
METRICS = re.compile(r"(train/loss|(val|test)/\w+|closed_loop/success)")


class Metric(NamedTuple):
    """A value, the step at which it was measured, and how it was chosen, in words."""

    value: float
    step: int | None
    which: str


@dataclass(frozen=True)
class Origin:
    """Where weights come from.

    Args:
        checkpoint: name of the file.
        step: optimizer steps behind it; None if it does not say.
        run: folder with the run's `config.yaml`; None if it is not above the checkpoint.
        metrics: tag -> value.
        data: what the DataModule said of its source; empty in older checkpoints.
        lightning: version that wrote it.
    """

    checkpoint: str
    step: int | None
    run: Path | None
    metrics: Mapping[str, Metric]
    data: Mapping[str, Any]
    lightning: str

    @classmethod
    def of(cls, path: Path, content: Mapping[str, Any]) -> Origin:
        """From a checkpoint file and its content."""
        above = path.resolve().parents[:2]
        run = next((folder for folder in above if (folder / CONFIG).is_file()), None)
        events = {} if run is None else _from_events(run)
        stored = (value for value in content.values() if isinstance(value, Mapping))
        data = next((v.get("data", {}) for v in stored if "fingerprint" in v), {})
        return cls(
            path.name,
            content.get("global_step"),
            run,
            events or _from_callbacks(content.get("callbacks", {})),
            data,
            str(content.get("pytorch-lightning_version", "unknown")),
        )

    @property
    def config(self) -> str | None:
        """Text of the run's options; None without."""
        return None if self.run is None else (self.run / CONFIG).read_text(encoding="utf-8")

    def copy_into(self, folder: Path) -> bool:
        """Put the run's options and its tokenizer beside the weights; says whether it had one."""
        if self.run is not None:
            shutil.copyfile(self.run / CONFIG, folder / CONFIG)
        source = Path(self.data.get("tokenizer_folder", ""))
        known = "tokenizer_folder" in self.data
        files = [file for file in source.glob("*") if file.is_file()] if known else []
        for file in files:
            shutil.copyfile(file, folder / file.name)
        return bool(files)


def _from_events(run: Path) -> dict[str, Metric]:
    """The last values of the run, and the lowest validation loss, from its TensorBoard files."""
    if not list(run.glob(EVENTS)):
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    found = {}
    for tag in filter(METRICS.fullmatch, events.Tags()["scalars"]):
        scalars = events.Scalars(tag)
        found[tag] = Metric(scalars[-1].value, scalars[-1].step, "last of the run")
        if tag == "val/loss":
            best = min(scalars, key=lambda scalar: scalar.value)
            found["val/loss (best)"] = Metric(best.value, best.step, "lowest of the run")
    return found


def _from_callbacks(callbacks: Mapping[str, Any]) -> dict[str, Metric]:
    """What ModelCheckpoint watched, for runs without TensorBoard."""
    found = {}
    for state in callbacks.values():
        name = state.get("monitor") if isinstance(state, Mapping) else None
        if name and state.get("current_score") is not None:
            found[name] = Metric(float(state["current_score"]), None, "at the checkpoint")
        if name and state.get("best_model_score") is not None:
            found[f"{name} (best)"] = Metric(float(state["best_model_score"]), None, "of the run")
    return found
