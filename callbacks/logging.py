"""Where callbacks write: scalars to every logger, figures and histograms to TensorBoard."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter

MAX_TICKS = 32


def log_scalars(trainer: pl.Trainer, scalars: Mapping[str, float], step: int) -> None:
    """Write Python floats to every logger; on the first process only."""
    if trainer.is_global_zero and scalars:
        for logger in trainer.loggers:
            logger.log_metrics(dict(scalars), step=step)


def log_figure(trainer: pl.Trainer, tag: str, figure: Figure, step: int) -> None:
    """Write a figure to every TensorBoard logger."""
    for writer in _tensorboards(trainer):
        writer.add_figure(tag, figure, step)


def log_animation(trainer: pl.Trainer, tag: str, gif: bytes, step: int) -> None:
    """Write an animated GIF to every TensorBoard logger, which plays it among the images."""
    width, height = Image.open(io.BytesIO(gif)).size
    image = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=gif)
    summary = Summary(value=[Summary.Value(tag=tag, image=image)])
    for writer in _tensorboards(trainer):
        # As SummaryWriter.add_video, which would encode the frames with moviepy: no public method
        # takes an encoded animation, and `file_writer` is None after an earlier run was closed.
        writer._get_file_writer().add_summary(summary, step)


def log_histogram(
    trainer: pl.Trainer, tag: str, counts: np.ndarray, edges: np.ndarray, step: int
) -> None:
    """Write a histogram that was counted elsewhere to every TensorBoard logger.

    Args:
        trainer: its loggers are written to.
        tag: name in TensorBoard.
        counts: how many values fell into each bin, `[N]`.
        edges: borders of the bins, `[N + 1]`.
        step: optimizer step.
    """
    centers = (edges[:-1] + edges[1:]) / 2
    for writer in _tensorboards(trainer):
        writer.add_histogram_raw(
            tag,
            min=float(edges[0]),
            max=float(edges[-1]),
            num=float(counts.sum()),
            sum=float(counts @ centers),
            sum_squares=float(counts @ centers**2),
            bucket_limits=edges[1:].tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )


def heat_map(
    values: np.ndarray, rows: Sequence[str], columns: Sequence[str], column_name: str, title: str
) -> Figure:
    """A labelled heat map of `values [len(rows), len(columns)]`; NaN stays white.

    Of more than `MAX_TICKS` columns only some are named, and they share the width of that many.
    """
    from matplotlib.figure import Figure

    width, height = 2.5 + 0.5 * min(len(columns), MAX_TICKS), 1.3 + 0.3 * len(rows)
    figure = Figure(figsize=(width, height), dpi=80)
    figure.subplots_adjust(
        left=1.2 / width, right=1 - 0.1 / width, bottom=0.8 / height, top=1 - 0.4 / height
    )
    axes = figure.add_subplot()
    image = axes.imshow(np.ma.masked_invalid(values), aspect="auto", cmap="viridis")
    step = -(-len(columns) // MAX_TICKS)
    axes.set_xticks(range(0, len(columns), step), columns[::step], rotation=45)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel(column_name)
    axes.set_title(title)
    figure.colorbar(image)
    return figure


def _tensorboards(trainer: pl.Trainer) -> Iterator[SummaryWriter]:
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                yield logger.experiment
