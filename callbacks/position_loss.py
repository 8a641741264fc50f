"""Loss by position in the file: the plot that shows whether a memory works."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from callbacks.logging import log_figure, log_scalars
from callbacks.statistics import BinnedMean, all_reduce, to_host

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TOPIC = "token_loss"


class PositionLossMonitor(Callback):
    """Write the validation loss per token by its position in the file, and by chunk index.

    Scalars `position_loss/from_000512` (positions 512 to 1023, and so on: every bin is twice as
    wide as the one before) and `chunk_loss/chunk_03`, and a figure `position_loss/curve` that shows
    how many tokens are behind each point: later positions are reached by fewer files. A model that
    remembers gets better with the position, beyond what its attention reaches. In packed rows the
    position is that in the document.

    Args:
        first_bin: width of the first bin, in tokens.
        bins: number of bins of positions; the last one takes what is beyond.
        chunk_bins: number of bins of chunk indices; the last one takes what is beyond.
    """

    def __init__(self, first_bin: int = 64, bins: int = 15, chunk_bins: int = 16) -> None:
        for name, value in (("first_bin", first_bin), ("bins", bins), ("chunk_bins", chunk_bins)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self.edges = [0, *(first_bin * 2**index for index in range(bins - 1))]
        self.chunk_bins = chunk_bins
        self._metrics: dict[str, BinnedMean] = {}
        self._device_edges: Tensor | None = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        sizes = {"position": len(self.edges), "chunk": self.chunk_bins}
        # One bin more than are shown: tokens without a label go there.
        self._metrics = {
            name: BinnedMean(1, pl_module.device, size + 1) for name, size in sizes.items()
        }
        self._device_edges = torch.tensor(self.edges[1:], device=pl_module.device)

    def on_validation_batch_start(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        pl_module.streams.listening.add(TOPIC)

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, *args: Any
    ) -> None:
        pl_module.streams.listening.discard(TOPIC)
        for chunk, published in zip(batch, pl_module.streams.published, strict=True):
            for fields in published.get(TOPIC, {}).values():
                self._add(chunk, **fields)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.sanity_checking or not self._metrics:
            return
        if trainer.world_size > 1:
            all_reduce(self._metrics.values())
        host = to_host(
            {
                f"{name} {key}": value.reshape(-1)
                for name, metric in self._metrics.items()
                for key, value in (("total", metric.total), ("count", metric.count))
            }
        )
        curves = {name: _curve(host, name) for name in self._metrics}
        names = {
            "position": [f"position_loss/from_{edge:06d}" for edge in self.edges],
            "chunk": [f"chunk_loss/chunk_{index:02d}" for index in range(self.chunk_bins)],
        }
        scalars = {
            tag: float(mean)
            for name, (means, _) in curves.items()
            for tag, mean in zip(names[name], means, strict=True)
            if not np.isnan(mean)
        }
        log_scalars(trainer, scalars, trainer.global_step)
        log_figure(trainer, "position_loss/curve", self._draw(curves), trainer.global_step)
        self._metrics = {}

    def _add(self, chunk: dict[str, Tensor], loss: Tensor, position: Tensor) -> None:
        """Count the losses `[B, T]` of a chunk; nothing waits for the device."""
        assert self._device_edges is not None
        index = chunk["chunk_index"].clamp(max=self.chunk_bins - 1).unsqueeze(1).expand_as(loss)
        bins = {
            "position": torch.bucketize(position, self._device_edges, right=True),
            "chunk": index,
        }
        for name, metric in self._metrics.items():
            where = torch.where(position < 0, metric.bins - 1, bins[name])
            metric.update(loss.reshape(1, -1), where.flatten())

    def _draw(self, curves: dict[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 3.6), dpi=80, layout="constrained")
        labels = {
            "position": [str(edge) for edge in self.edges],
            "chunk": [*map(str, range(self.chunk_bins - 1)), f"{self.chunk_bins - 1}+"],
        }
        titles = {"position": "position in the file, from token", "chunk": "chunk of the file"}
        for axes, name in zip(figure.subplots(1, 2), curves, strict=True):
            used = 1 + max(np.flatnonzero(curves[name][1]), default=0)
            mean, count = (values[:used] for values in curves[name])
            places = np.arange(used)
            tokens = axes.twinx()
            tokens.bar(places, count, color="0.88", width=0.9)
            tokens.set_ylabel("tokens", color="0.5")
            axes.plot(places, mean, marker="o")
            axes.set_zorder(tokens.get_zorder() + 1)
            axes.patch.set_visible(False)
            axes.set_xticks(places, labels[name][:used], rotation=60)
            axes.set_xlabel(titles[name])
            axes.set_ylabel("loss (nats per token)")
            axes.set_title("validation loss (line), tokens behind it (bars)")
        return figure


def _curve(host: dict[str, np.ndarray], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean loss (NaN where there is no token) and number of tokens of the bins that are shown."""
    total, count = host[f"{name} total"][:-1], host[f"{name} count"][:-1]
    with np.errstate(invalid="ignore"):
        return total / count, count
