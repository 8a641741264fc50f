"""How far the gates are open, and how much each branch adds to the residual stream."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import lightning.pytorch as pl
import numpy as np
from torch import Tensor

from callbacks.history import History
from callbacks.logging import heat_map, log_figure, log_histograms
from callbacks.monitor import Monitor, ObservedChunk, SlotResult, layer_tags, slot_scalars
from callbacks.statistics import (
    BinnedMean,
    RunningHistogram,
    RunningMoments,
    group_slots,
    row_means,
)

TIME_BINS = 10
SATURATION = 0.99
HISTOGRAM_LIMIT = 1.5
HISTOGRAM_BINS = 60


class GateMonitor(Monitor):
    """Write the gates of every layer to the logger.

    For each published gate (`attn`, `ttt`, ...) and for `alpha` (tanh of the static gate's
    parameter): `gate/ttt/mean/layer_03`, `std`, `min`, `max`, and `saturation`, the share of
    entries with |gate| > 0.99. The ratio |gate * branch| / |residual| of each row gives
    `gate/ratio_ttt/mean/layer_03`, `std`, `min`, `max`. TensorBoard also gets a histogram of the
    last step's gates (of 16,384 of a layer, where there are more), and heat maps of the means,
    layer by step and (where there is one) layer by flow-matching time in 10 bins.

    Args:
        every_n_steps: optimizer steps between two flushes.
        observe_every_n_steps: one of so many optimizer steps is looked at, and every flush.
        figure_every_n_steps: optimizer steps between two heat maps.
    """

    topics: ClassVar[frozenset[str]] = frozenset({"gate"})

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        self._history = History()

    def observe(self, chunk: ObservedChunk) -> None:
        _, times = chunk.values("gate", "time")
        bins = (times[0] * TIME_BINS).long() if times else None
        names = [name for fields in chunk.published.get("gate", {}).values() for name in fields]
        for name in dict.fromkeys(names):
            if name != "time":
                self._observe(name, chunk, bins)

    def _observe(self, name: str, chunk: ObservedChunk, bins: Tensor | None) -> None:
        slots, values = chunk.values("gate", name)
        quantity, device = name.removeprefix("gate_"), values[0].device
        is_ratio = name.startswith("ratio_")
        by_row = is_ratio or (values[0].dim() == 3 and len(values[0]) == len(chunk.plan.stream_id))
        threshold = None if is_ratio else SATURATION
        moments = self.metric(quantity, slots, device, partial(RunningMoments, threshold=threshold))
        histogram = by_time = None
        if chunk.flushing and not is_ratio:
            make = partial(
                RunningHistogram, low=-HISTOGRAM_LIMIT, high=HISTOGRAM_LIMIT, bins=HISTOGRAM_BINS
            )
            histogram = self.metric(f"{quantity} histogram", slots, device, make)
        if by_row and bins is not None:
            make_binned = partial(BinnedMean, bins=TIME_BINS)
            by_time = self.metric(f"{quantity} by time", slots, device, make_binned, in_figure=True)
        groups = group_slots(values)
        if is_ratio:
            self.check_finite(quantity, slots, row_means(groups), chunk)
        if chunk.idle:
            return
        if by_row:
            groups = groups.map(partial(chunk.live, dim=1))
        moments.update(groups)
        if histogram is not None:
            histogram.update(groups)
        if by_time is not None and bins is not None:
            by_time.update(row_means(groups), chunk.live(bins))

    def write(
        self, results: Mapping[str, SlotResult], trainer: pl.Trainer, step: int
    ) -> dict[str, float]:
        scalars: dict[str, float] = {}
        for name, result in results.items():
            quantity, _, kind = name.partition(" ")
            if kind == "histogram":
                self._write_histograms(quantity, result, trainer, step)
            elif kind == "by time":
                figure = heat_map(
                    result.values["mean"],
                    layer_tags(result.slots),
                    [f"{i / TIME_BINS:.1f}" for i in range(TIME_BINS)],
                    "flow-matching time (left edge of bin)",
                    f"mean {_in_words(quantity)}",
                )
                log_figure(trainer, f"gate/{quantity}/by_time", figure, step)
            else:
                keys = [key for key in result.values if key != "count"]
                means = slot_scalars(result, ["mean"], lambda _, layer: layer)
                self._history.add(quantity, step, means)
                scalars |= slot_scalars(result, keys, partial(_tag, quantity))
        return scalars

    def draw(self, trainer: pl.Trainer, step: int) -> None:
        for quantity in self._history.quantities:
            figure = heat_map(
                *self._history.table(quantity),
                "step",
                f"mean {_in_words(quantity)} since the start",
            )
            log_figure(trainer, f"gate/{quantity}/by_step", figure, step)

    @staticmethod
    def _write_histograms(
        quantity: str, result: SlotResult, trainer: pl.Trainer, step: int
    ) -> None:
        edges = np.linspace(-HISTOGRAM_LIMIT, HISTOGRAM_LIMIT, HISTOGRAM_BINS + 1)
        counts = zip(layer_tags(result.slots), result.values["counts"], strict=True)
        found = {_tag(quantity, "histogram", tag): row for tag, row in counts if row.sum() > 0}
        log_histograms(trainer, found, edges, step)


def _in_words(quantity: str) -> str:
    """`gate ttt`; of a ratio what it is the ratio of."""
    name = quantity.removeprefix("ratio_")
    return f"gate {name}" if name == quantity else f"|{name} branch| / |residual stream|"


def _tag(quantity: str, key: str, layer: str) -> str:
    return f"gate/{quantity}/{key}/{layer}"
