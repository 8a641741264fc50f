"""Running statistics that stay on the device until they are asked for.

Each metric keeps one row per *slot* (a layer's adapter). `update` only launches kernels, nothing
in it waits for the device; `all_reduce` merges the processes' states in at most three collectives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_max, dim_zero_min, dim_zero_sum

GOLDEN_RATIO = 0.6180339887498949

SAMPLE = 2**14
"""Values of a slot that a histogram counts in an update: the share of a bin is known to 0.4 %."""


def wide_dtype(device: torch.device) -> torch.dtype:
    """The accumulators' dtype: float64, except on MPS, which has none."""
    return torch.float32 if device.type == "mps" else torch.float64


class SlotGroups(list[Tensor]):
    """The slots' tensors `[...]`, those of one shape stacked as `[G, ...]`: few large reductions.

    Args:
        groups: one per shape.
        slots: number of every row's slot, one group behind the other.
    """

    def __init__(self, groups: Iterable[Tensor], slots: Sequence[int]) -> None:
        super().__init__(groups)
        self.slots = slots

    def map(self, function: Callable[..., Tensor], *others: Sequence[Tensor]) -> SlotGroups:
        """`function` of every group, and of the same one of others."""
        return SlotGroups(map(function, self, *others), self.slots)


def group_slots(values: Sequence[Tensor]) -> SlotGroups:
    """Stack the slots' tensors `[...]` of each shape as `[G, ...]`."""
    slots: dict[torch.Size, list[int]] = {}
    for slot, value in enumerate(values):
        slots.setdefault(value.shape, []).append(slot)
    groups = (torch.stack([values[slot] for slot in same]).float() for same in slots.values())
    return SlotGroups(groups, [slot for same in slots.values() for slot in same])


def _join(groups: Sequence[Tensor], parts: Sequence[Tensor]) -> Tensor:
    """Results of the groups, `[G, ...]`, in the order of the slots."""
    if len(parts) == 1:
        return parts[0]
    rows = [row for part in parts for row in part.unbind()]
    if not isinstance(groups, SlotGroups):
        return torch.stack(rows)
    order = sorted(range(len(rows)), key=groups.slots.__getitem__)
    return torch.stack([rows[index] for index in order])


def row_means(groups: Sequence[Tensor]) -> Tensor:
    """Mean over everything but slot and batch row: groups of `[G, B, ...]` give `[L, B]`."""
    means = [group.reshape(*group.shape[:2], -1).mean(dim=2) for group in groups]
    return _join(groups, means)


class SlotMetric(Metric):
    """Base of the metrics below: `slots` rows, reset by the monitor, merged by `all_reduce`.

    Args:
        slots: number of rows.
        device: where the values are.
    """

    full_state_update = False

    def __init__(self, slots: int, device: torch.device) -> None:
        super().__init__(sync_on_compute=False, compute_with_cache=False)
        self.slots = slots
        self._where = {"device": device, "dtype": wide_dtype(device)}

    def reset(self) -> None:
        """As torchmetrics' own, but in place: that one copies every default anew."""
        self._update_count, self._computed = 0, None
        for name, default in self._defaults.items():
            getattr(self, name).copy_(default)

    def _add(self, name: str, reduction: str, *shape: int, fill: float = 0.0) -> None:
        self.add_state(name, torch.full(shape, fill, **self._where), dist_reduce_fx=reduction)  # type: ignore[call-overload]


class RunningMoments(SlotMetric):
    r"""Mean, standard deviation, extremes and share of large values, per slot.

    Each update is reduced to its own mean $m_i$ and variance $v_i$ over $n_i$ values; over all of
    them $\mu = \sum n_i m_i / n$ and $\sigma^2 = \sum n_i (v_i + m_i^2) / n - \mu^2$, in float64,
    so that a small deviation around a large mean does not cancel.

    Args:
        slots: number of rows.
        device: where the values are.
        threshold: count the values with $|x| >$ threshold as `saturation`; None does not.
    """

    count: Tensor
    total: Tensor
    squares: Tensor
    low: Tensor
    high: Tensor
    above: Tensor

    def __init__(self, slots: int, device: torch.device, threshold: float | None = None) -> None:
        super().__init__(slots, device)
        self.threshold = threshold
        for name in ("count", "total", "squares", "above"):
            self._add(name, "sum", slots)
        self._add("low", "min", slots, fill=float("inf"))
        self._add("high", "max", slots, fill=float("-inf"))

    def update(self, groups: Sequence[Tensor]) -> None:
        """Add values: groups `[G, ...]` (see `group_slots`), in all `slots` rows."""
        flat, join, wide = [g.flatten(1) for g in groups], partial(_join, groups), self.total.dtype
        parts = [(*torch.var_mean(g, dim=1, correction=0), *g.aminmax(dim=1)) for g in flat]
        variance, mean, low, high = map(join, zip(*parts, strict=True))
        count = join([torch.full_like(g[:, 0], g.shape[1], dtype=wide) for g in flat])
        total = count * mean
        self.count.add_(count)
        self.total.add_(total)
        self.squares.addcmul_(count, variance).addcmul_(total, mean)
        torch.minimum(self.low, low, out=self.low)
        torch.maximum(self.high, high, out=self.high)
        if self.threshold is not None:
            self.above.add_(join([(g.abs() > self.threshold).sum(dim=1) for g in flat]))

    def compute(self) -> dict[str, Tensor]:
        """`count`, `mean`, `std`, `min`, `max` and (with a threshold) `saturation`, each `[slots]`.

        Without a value: count 0 and mean NaN.
        """
        mean = self.total / self.count
        variance = (self.squares / self.count - mean.square()).clamp(min=0)
        result = {
            "count": self.count,
            "mean": mean,
            "std": variance.sqrt(),
            "min": self.low,
            "max": self.high,
        }
        if self.threshold is not None:
            result["saturation"] = self.above / self.count
        return result


class RunningHistogram(SlotMetric):
    """Counts in equally wide bins over [low, high], per slot; outer bins take what is beyond.

    Of more than `SAMPLE` values a slot, so many are counted, spread evenly: all gates of a large
    model would take as long as layers of it, and many values add to the same few bins.

    Args:
        slots: number of rows.
        device: where the values are.
        low: left edge of the first bin.
        high: right edge of the last bin.
        bins: number of bins.
    """

    counts: Tensor

    def __init__(
        self,
        slots: int,
        device: torch.device,
        low: float = -1.5,
        high: float = 1.5,
        bins: int = 60,
    ) -> None:
        super().__init__(slots, device)
        self.edges = torch.linspace(low, high, bins + 1, device=device)
        self.bins = bins
        self._add("counts", "sum", slots, bins)

    def update(self, groups: Sequence[Tensor]) -> None:
        """Add values: groups `[G, ...]`, in all `slots` rows."""
        counts = [self._count(_spread(group.flatten(1))) for group in groups]
        self.counts.add_(_join(groups, counts))

    def _count(self, values: Tensor) -> Tensor:
        """How many of `values [G, N]` fall into each bin, `[G, bins]`."""
        bin_index = torch.bucketize(values, self.edges[1:-1], right=True)
        counts = self.counts.new_zeros(len(values), self.bins)
        return counts.scatter_add_(1, bin_index, torch.ones_like(values, dtype=counts.dtype))

    def compute(self) -> dict[str, Tensor]:
        """`counts [slots, bins]`."""
        return {"counts": self.counts}


def _spread(values: Tensor) -> Tensor:
    """At most `SAMPLE` columns of `[G, N]`; by golden steps, which rhyme with no width of a model.

    A fixed stride could meet the same few channels in every token.
    """
    n = values.shape[1]
    if n <= SAMPLE:
        return values
    steps = torch.arange(SAMPLE, device=values.device, dtype=wide_dtype(values.device))
    columns = (steps * GOLDEN_RATIO % 1 * n).long().clamp_(max=n - 1)
    return values.index_select(1, columns)


class BinnedMean(SlotMetric):
    """Mean of a value by a bin index (a gate by flow-matching time, a norm by chunk), per slot.

    Args:
        slots: number of rows.
        device: where the values are.
        bins: number of bins; larger indices fall into the last one.
    """

    total: Tensor
    count: Tensor

    def __init__(self, slots: int, device: torch.device, bins: int) -> None:
        super().__init__(slots, device)
        self.bins = bins
        self._bin_numbers = torch.arange(bins, device=device)
        self._add("total", "sum", slots, bins)
        self._add("count", "sum", bins)

    def update(self, values: Tensor, bin_index: Tensor) -> None:
        """Add `values [slots, N]`; column i belongs to bin `bin_index[i]` (int64 `[N]`)."""
        member = bin_index.clamp(0, self.bins - 1).unsqueeze(1) == self._bin_numbers
        one_hot = member.to(self.total.dtype)
        self.total.addmm_(values.to(self.total.dtype), one_hot)
        self.count.add_(one_hot.sum(dim=0))

    def compute(self) -> dict[str, Tensor]:
        """`mean [slots, bins]`, NaN where nothing fell, and `count [bins]`."""
        return {"mean": self.total / self.count, "count": self.count}


class RunningShare(SlotMetric):
    """Share of a whole, per slot, from counts that the host knows."""

    part: Tensor
    count: Tensor

    def __init__(self, slots: int, device: torch.device) -> None:
        super().__init__(slots, device)
        self._add("part", "sum", slots)
        self._add("count", "sum", slots)

    def update(self, part: int, whole: int) -> None:
        """Add `part` of `whole` to every slot."""
        self.part.add_(part)
        self.count.add_(whole)

    def compute(self) -> dict[str, Tensor]:
        """`mean [slots]` and `count [slots]`."""
        return {"mean": self.part / self.count, "count": self.count}


class FirstNonFinite(SlotMetric):
    """Remembers where the first NaN or Inf appeared: step, slot, row, stream id."""

    where: Tensor
    found: Tensor

    def __init__(self, slots: int, device: torch.device) -> None:
        super().__init__(slots, device)
        self.add_state("where", torch.full((4,), -1, device=device), dist_reduce_fx=None)
        self._add("found", "sum", 1)

    def update(self, values: Tensor, stream_id: Tensor, step: int) -> None:
        """Look at `values [slots, B]`; `stream_id [B]` int64 and `step` name what is found."""
        # 0 times NaN and infinity are NaN; of several maxima, max names the first.
        any_bad, index = (values * 0 != 0).flatten().max(dim=0)
        slot, row = index // values.shape[1], index % values.shape[1]
        here = torch.stack([torch.full_like(index, step), slot, row, stream_id.take(row)])
        torch.where((self.where[0] < 0) & any_bad, here, self.where, out=self.where)
        self.found.add_(any_bad)

    def compute(self) -> dict[str, Tensor]:
        """`where [4]` = (step, slot, row, stream id) on this process, and `found [1]` on any."""
        return {"where": self.where, "found": self.found}


def all_reduce(metrics: Iterable[Metric]) -> None:
    """Merge the states of all processes in place: one collective per kind of reduction.

    Every process must pass the same metrics in the same order. States without a reduction stay
    what they are on this process.
    """
    metrics = list(metrics)
    kinds = torch.distributed.ReduceOp
    operations = {dim_zero_sum: kinds.SUM, dim_zero_min: kinds.MIN, dim_zero_max: kinds.MAX}
    for reduction, operation in operations.items():
        owners = [
            (metric, name)
            for metric in metrics
            for name, function in metric._reductions.items()
            if function is reduction
        ]
        if not owners:
            continue
        states: list[Any] = [getattr(metric, name) for metric, name in owners]
        flat = torch.cat([state.flatten() for state in states])
        torch.distributed.all_reduce(flat, op=operation)
        merged = flat.split([state.numel() for state in states])
        for (metric, name), state, value in zip(owners, states, merged, strict=True):
            setattr(metric, name, value.view_as(state))


def to_host(tensors: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Copy device tensors to numpy arrays of the same shapes (float64), in one transfer."""
    values = list(tensors.values())
    wide = wide_dtype(values[0].device)
    numbers = np.array(torch.cat([value.flatten().to(wide) for value in values]).tolist())
    parts = np.split(numbers, np.cumsum([value.numel() for value in values])[:-1])
    shaped = (part.reshape(value.shape) for part, value in zip(parts, values, strict=True))
    return dict(zip(tensors, shaped, strict=True))
