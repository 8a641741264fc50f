"""What the TensorBoard files of a run hold: curves, texts and options."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.metadata import (
    PLUGIN_NAME,
    SESSION_START_INFO_TAG,
    parse_session_start_info_plugin_data,
)

EVENTS = "events.out.tfevents.*"
TEXT = "/text_summary"
"""What tensorboard appends to the tag of a text."""


class RunError(ValueError):
    """There is no run to read; the message names the cause and the fix."""


class Curve(NamedTuple):
    """A scalar over the run.

    Attributes:
        steps: ascending.
        values: at these steps.
    """

    steps: np.ndarray
    values: np.ndarray

    @property
    def last(self) -> float:
        """The newest value."""
        return float(self.values[-1])

    def late(self, n: int = 3) -> float:
        """Mean of the last n values: one flush alone may be an exception."""
        return float(self.values[-n:].mean())


@dataclass(frozen=True)
class Run:
    """A run as far as it has been written.

    Args:
        folder: where it lies.
        scalars: tag -> curve.
        texts: tag -> the newest text.
        options: as `RunSummary` wrote them (`data.chunk_length`); empty where it did not run.
    """

    folder: Path
    scalars: Mapping[str, Curve]
    texts: Mapping[str, str]
    options: Mapping[str, Any]

    @property
    def last_step(self) -> int:
        """Of any curve."""
        return max((int(curve.steps[-1]) for curve in self.scalars.values()), default=0)

    def curves(self, pattern: str) -> dict[tuple[str, ...], Curve]:
        """The curves whose whole tag matches, by the groups of the pattern."""
        matches = ((re.fullmatch(pattern, tag), curve) for tag, curve in self.scalars.items())
        return {match.groups(): curve for match, curve in matches if match is not None}


def read_run(folder: Path) -> Run:
    """Read a folder with event files; several (of a run that was resumed there) are one run.

    Raises:
        RunError: there is no such folder, or no event file in it.
    """
    if not folder.is_dir():
        raise RunError(f"{folder} is no folder: give the folder of a run, e.g. {_example(folder)}")
    if not list(folder.glob(EVENTS)):
        raise RunError(
            f"{folder} has no TensorBoard file ({EVENTS}): give the folder of a run, e.g. "
            f"{_example(folder)}, that was trained with TensorBoardLogger as trainer.logger"
        )
    # 0 keeps all of them; figures and histograms are not looked at.
    sizes = {"scalars": 0, "tensors": 0, "images": 1, "histograms": 1}
    events = EventAccumulator(str(folder), size_guidance=sizes).Reload()
    tags = events.Tags()
    return Run(
        folder,
        {tag: _curve(events, tag) for tag in tags["scalars"]},
        {tag.removesuffix(TEXT): _text(events, tag) for tag in tags["tensors"] if TEXT in tag},
        _options(folder / "final"),
    )


def _example(folder: Path) -> str:
    """The newest run that lies near by, or how its path would look."""
    near = [folder, *folder.parents][:2] if folder.is_dir() else []
    for place in near:
        found = [path for path in place.rglob(EVENTS) if path.parent.name != "final"]
        if found:
            return str(max(found, key=lambda path: path.stat().st_mtime).parent)
    return "runs/quickstart/version_0"


def _curve(events: EventAccumulator, tag: str) -> Curve:
    newest = {event.step: event.value for event in events.Scalars(tag)}
    steps = sorted(newest)
    return Curve(np.array(steps), np.array([newest[step] for step in steps]))


def _text(events: EventAccumulator, tag: str) -> str:
    return events.Tensors(tag)[-1].tensor_proto.string_val[0].decode()


def _options(folder: Path) -> dict[str, Any]:
    if not list(folder.glob(EVENTS)):
        return {}
    contents = EventAccumulator(str(folder)).Reload().PluginTagToContent(PLUGIN_NAME)
    start = parse_session_start_info_plugin_data(contents[SESSION_START_INFO_TAG])
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in start.hparams.items()}
