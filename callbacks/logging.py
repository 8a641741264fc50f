"""Where callbacks write: scalars to every logger, figures and histograms to TensorBoard."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_SCALAR, Summary, SummaryMetadata
from torch.utils.tensorboard.summary import histogram_raw

from callbacks.tags import Charts, describe

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

MAX_TICKS = 32


class ScalarListener(ABC):
    """A callback that is told of every scalar that callbacks write."""

    @abstractmethod
    def on_scalars(self, scalars: Mapping[str, float]) -> None:
        """Called on the first process, before the scalars are written."""


def log_scalars(trainer: pl.Trainer, scalars: Mapping[str, float], step: int) -> None:
    """Write Python floats to every logger; on the first process only.

    TensorBoard also gets what each of them means, the first time.
    """
    if not (trainer.is_global_zero and scalars):
        return
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ScalarListener):
            callback.on_scalars(scalars)
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            writer = logger.experiment
            # SummaryWriter.add_scalar takes no description.
            summary = Summary(value=_values(scalars, KNOWN.setdefault(writer, set())))
            writer._get_file_writer().add_summary(summary, step)
        else:
            logger.log_metrics(dict(scalars), step=step)


KNOWN: WeakKeyDictionary[SummaryWriter, set[str]] = WeakKeyDictionary()
"""Tags that a writer has described: the checksum of a record takes 0.1 us a byte, in Python."""


def _values(scalars: Mapping[str, float], known: set[str]) -> list[Summary.Value]:
    values = [
        Summary.Value(tag=tag, simple_value=value) if tag in known else _described(tag, value)
        for tag, value in scalars.items()
    ]
    known.update(scalars)
    return values


def _described(tag: str, value: float) -> Summary.Value:
    plugin = SummaryMetadata.PluginData(plugin_name="scalars")
    # Without its class, TensorBoard's data server takes the value and drops the description.
    metadata = SummaryMetadata(
        plugin_data=plugin, summary_description=describe(tag), data_class=DATA_CLASS_SCALAR
    )
    return Summary.Value(tag=tag, simple_value=value, metadata=metadata)


def log_text(trainer: pl.Trainer, tag: str, markdown: str, step: int) -> None:
    """Write a page of Markdown to every TensorBoard logger."""
    for writer in tensorboards(trainer):
        writer.add_text(tag, markdown, step)


def log_layout(trainer: pl.Trainer, charts: Charts) -> None:
    """Tell every TensorBoard logger which curves its custom-scalars tab shows together."""
    for writer in tensorboards(trainer):
        writer.add_custom_scalars(charts)


def log_figure(trainer: pl.Trainer, tag: str, figure: Figure, step: int) -> None:
    """Write a figure to every TensorBoard logger."""
    for writer in tensorboards(trainer):
        writer.add_figure(tag, figure, step)


def log_animation(trainer: pl.Trainer, tag: str, gif: bytes, step: int) -> None:
    """Write an animated GIF to every TensorBoard logger, which plays it among the images."""
    width, height = Image.open(io.BytesIO(gif)).size
    image = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=gif)
    summary = Summary(value=[Summary.Value(tag=tag, image=image)])
    for writer in tensorboards(trainer):
        # As SummaryWriter.add_video, which would encode the frames with moviepy: no public method
        # takes an encoded animation, and `file_writer` is None after an earlier run was closed.
        writer._get_file_writer().add_summary(summary, step)


def log_histograms(
    trainer: pl.Trainer, histograms: Mapping[str, np.ndarray], edges: np.ndarray, step: int
) -> None:
    """Write histograms that were counted elsewhere to every TensorBoard logger.

    As one event: the writer's queue holds ten, and training would wait for the file.

    Args:
        trainer: its loggers are written to.
        histograms: name in TensorBoard -> how many values fell into each bin, `[N]`, not all 0.
            Empty bins at the ends are left out.
        edges: borders of the bins, `[N + 1]`.
        step: optimizer step.
    """
    if not histograms:
        return
    for writer in tensorboards(trainer):
        values = [_histogram(tag, counts, edges) for tag, counts in histograms.items()]
        writer._get_file_writer().add_summary(Summary(value=values), step)


def _histogram(tag: str, counts: np.ndarray, edges: np.ndarray) -> Summary.Value:
    used = np.flatnonzero(counts)
    counts, edges = counts[used[0] : used[-1] + 1], edges[used[0] : used[-1] + 2]
    centers = (edges[:-1] + edges[1:]) / 2
    summary = histogram_raw(
        tag,
        min=float(edges[0]),
        max=float(edges[-1]),
        num=float(counts.sum()),
        sum=float(counts @ centers),
        sum_squares=float(counts @ centers**2),
        bucket_limits=edges[1:].tolist(),
        bucket_counts=counts.tolist(),
    )
    return summary.value[0]


def heat_map(
    values: np.ndarray, rows: Sequence[str], columns: Sequence[str], column_name: str, title: str
) -> Figure:
    """A labelled heat map of `values [len(rows), len(columns)]`; NaN stays white.

    Of more than `MAX_TICKS` columns only some are named, and they share the width of that many.
    """
    figure, axes = row_figure(rows, title, width=1.2 + 0.5 * min(len(columns), MAX_TICKS))
    image = axes.imshow(np.ma.masked_invalid(values), aspect="auto", cmap="viridis")
    step = -(-len(columns) // MAX_TICKS)
    axes.set_xticks(range(0, len(columns), step), columns[::step], rotation=45)
    axes.set_xlabel(column_name)
    figure.colorbar(image)
    return figure


def row_figure(rows: Sequence[str], title: str, width: float) -> tuple[Figure, Axes]:
    """A figure with one named row per entry, the first on top, that has room for all of them.

    Args:
        rows: their names.
        title: of the figure.
        width: of what is right of the names, in inches.
    """
    from matplotlib.figure import Figure

    pitch = min(0.3, max(0.12, 14 / len(rows)))
    left, bottom, top = 0.4 + 0.085 * max(map(len, rows)), 0.8, 0.4
    # The title may be wider than a figure of few columns.
    width, height = left + max(width, 0.1 * len(title)), bottom + top + pitch * max(2, len(rows))
    figure = Figure(figsize=(width, height), dpi=80)
    figure.subplots_adjust(
        left=left / width, right=1 - 0.1 / width, bottom=bottom / height, top=1 - top / height
    )
    axes = figure.add_subplot()
    axes.set_yticks(range(len(rows)), rows, fontsize=min(10, 40 * pitch))
    axes.set_title(title)
    return figure, axes


def tensorboards(trainer: pl.Trainer) -> Iterator[SummaryWriter]:
    """Writers of the TensorBoard loggers; on the first process only."""
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                yield logger.experiment
