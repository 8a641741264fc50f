"""What the fast weights learn while they read, and how far they move."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import lightning.pytorch as pl
import numpy as np

from callbacks.logging import heat_map, log_figure, row_figure
from callbacks.monitor import Monitor, ObservedChunk, SlotResult, layer_tags, slot_scalars
from callbacks.statistics import (
    BinnedMean,
    RunningMoments,
    RunningShare,
    SlotGroups,
    group_slots,
    row_means,
)
from lightning_modules.streams import NO_STREAM, StreamPlan

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHUNK_BINS = 16
CHUNK_FIGURE = "state_norm by chunk"
WATCHED = (
    ("fast_weight", "cosine"),
    ("fast_weight", "eta"),
    ("inner_loss", "before"),
    ("inner_loss", "after"),
)
"""Topic and name of what is averaged and nothing else."""


class FastWeightMonitor(Monitor):
    """Write what the fast weights W + dW of every layer do to the logger.

    Means over rows and heads, per layer: `fast_weight/state_norm/layer_03` = |dW|,
    `relative_change` = |dW| / |W| (and `relative_change_max`), `cosine` between W + dW and W, and
    `eta`, the inner learning rate as used. In the step that ends with a flush also
    `inner_loss_before` and `inner_loss_after`, the objective that is optimised, per token, before
    and after the call's update: 1/2 || LN(f(k)) - (v - k) ||^2 for TTT, -<f(k), v> for LaCT. One
    tag without a layer, of all steps: `fast_weight/reset_share`, the share of rows that began a
    file. A heat map shows the norm by chunk index in the file, and a figure the inner loss of
    every layer before and after the last flush's update.

    NaN or Inf in a state stops the run at the next flush and names layer, row, stream and step.

    Args:
        every_n_steps: optimizer steps between two flushes.
        observe_every_n_steps: one of so many optimizer steps is looked at, and every flush.
        figure_every_n_steps: optimizer steps between two heat maps.
    """

    topics: ClassVar[frozenset[str]] = frozenset({"fast_weight"})
    flush_topics: ClassVar[frozenset[str]] = frozenset({"inner_loss"})

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        self._inner_losses: dict[str, dict[str, float]] = {}
        self._inner_step = 0
        self._begun = self._rows = 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Counted in every step: how often files begin may rhyme with how often we look.
        # On the host, so that a step that is not looked at launches nothing.
        for plan in pl_module.streams.plans:
            begun, rows = _resets(plan)
            self._begun += begun
            self._rows += rows
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _flush(self, trainer: pl.Trainer, draw: bool) -> None:
        device = trainer.strategy.root_device
        share = self.metric("reset_share", ("rows",), device, RunningShare)
        share.update(self._begun, self._rows)
        self._begun = self._rows = 0
        super()._flush(trainer, draw)

    def observe(self, chunk: ObservedChunk) -> None:
        self._observe_norms(chunk)
        for topic, name in WATCHED:
            slots, values = chunk.values(topic, name)
            if slots:
                tag = f"{topic}_{name}" if topic == "inner_loss" else name
                self._observe_mean(tag, slots, group_slots(values), chunk)

    def _observe_norms(self, chunk: ObservedChunk) -> None:
        slots, norms = chunk.values("fast_weight", "state_norm")
        if not slots:
            return
        _, weights = chunk.values("fast_weight", "weight_norm")
        groups = group_slots(norms)
        relative = groups.map(
            lambda norm, weight: norm / weight.unsqueeze(1).clamp_min(1e-8), group_slots(weights)
        )
        means = row_means(groups)
        self.check_finite("fast state", slots, means, chunk)
        self._observe_mean("state_norm", slots, groups, chunk)
        self._observe_mean("relative_change", slots, relative, chunk)
        make = partial(BinnedMean, bins=CHUNK_BINS)
        by_chunk = self.metric(CHUNK_FIGURE, slots, means.device, make, in_figure=True)
        if not chunk.idle:
            by_chunk.update(chunk.live(means, dim=1), chunk.live(chunk.chunk["chunk_index"]))

    def _observe_mean(
        self, name: str, slots: tuple[str, ...], groups: SlotGroups, chunk: ObservedChunk
    ) -> None:
        moments = self.metric(name, slots, groups[0].device, RunningMoments)
        if not chunk.idle:
            moments.update(groups.map(partial(chunk.live, dim=1)))

    def write(
        self, results: Mapping[str, SlotResult], trainer: pl.Trainer, step: int
    ) -> dict[str, float]:
        scalars: dict[str, float] = {}
        for name, result in results.items():
            if name == CHUNK_FIGURE:
                self._draw(result, trainer, step)
            elif name == "reset_share":
                scalars |= slot_scalars(
                    result, ["mean"], lambda key, tag: "fast_weight/reset_share"
                )
            else:
                scalars |= slot_scalars(result, ["mean"], partial(_tag, name))
                if name.startswith("inner_loss"):
                    self._keep(name, result, step)
        if "relative_change" in results:
            largest = partial(_tag, "relative_change_max")
            scalars |= slot_scalars(results["relative_change"], ["max"], largest)
        return scalars

    def _keep(self, name: str, result: SlotResult, step: int) -> None:
        """For the figure; the remainder at the end of a run has no inner losses."""
        losses = slot_scalars(result, ["mean"], lambda key, layer: layer)
        if losses:
            self._inner_losses[name.removeprefix("inner_loss_")] = losses
            self._inner_step = step

    def draw(self, trainer: pl.Trainer, step: int) -> None:
        if self._inner_losses:
            figure = draw_inner_losses(**self._inner_losses, step=self._inner_step)
            log_figure(trainer, "fast_weight/inner_loss/by_layer", figure, step)

    @staticmethod
    def _draw(result: SlotResult, trainer: pl.Trainer, step: int) -> None:
        columns = [*map(str, range(CHUNK_BINS - 1)), f"{CHUNK_BINS - 1}+"]
        # Files may be shorter, and without carried state every chunk is the first one.
        used = 1 + max(np.flatnonzero(result.values["count"]), default=0)
        figure = heat_map(
            result.values["mean"][:, :used],
            layer_tags(result.slots),
            columns[:used],
            "chunk in the file",
            "size of the state, |dW|",
        )
        log_figure(trainer, "fast_weight/state_norm/by_chunk", figure, step)


def draw_inner_losses(before: Mapping[str, float], after: Mapping[str, float], step: int) -> Figure:
    """Every layer's inner loss before and after the call's update, joined by a line.

    Args:
        before: by layer.
        after: by layer; green where it is lower, red where it is not.
        step: for the title.
    """
    layers = list(before)
    title = f"inner loss per token at step {step}: before (o) and after the update"
    figure, axes = row_figure(layers, title, width=6)
    for row, layer in enumerate(layers):
        color = "tab:green" if after[layer] < before[layer] else "tab:red"
        axes.plot([before[layer], after[layer]], [row, row], color=color)
        axes.plot(before[layer], row, "o", color="0.5", fillstyle="none")
        axes.plot(after[layer], row, "D", color=color, markersize=5)
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.set_xlabel("inner loss (green: the update lowers it, red: it does not)")
    axes.grid(axis="x", alpha=0.3)
    return figure


def _resets(plan: StreamPlan) -> tuple[int, int]:
    """Rows that begin a file, and rows that have one."""
    rows = zip(plan.stream_id, plan.is_first, strict=True)
    live = [first for id_, first in rows if id_ != NO_STREAM]
    return sum(live), len(live)


def _tag(quantity: str, key: str, layer: str) -> str:
    return f"fast_weight/{quantity}/{layer}"
