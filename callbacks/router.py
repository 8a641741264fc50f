"""Where routers send tokens: load, dead chapters, certainty, and how often the choice changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from callbacks.logging import heat_map, log_figure
from callbacks.monitor import Monitor, ObservedChunk, SlotResult, layer_tags
from callbacks.statistics import SlotMetric

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHOICES = {"chapter_router": "routed chapter", "router": "member"}
"""Topic -> what its routers choose among."""
MEANS = ("entropy", "top_k_mass", "z", "changed")
IN_FIGURE = " in figure"

Fields = Mapping[str, Tensor]


class RouterMonitor(Monitor):
    """Write what the routers of every layer choose to the logger.

    Routers of a memory bank choose chapters, those of a `routed` adapter its members. Of the
    decisions since the last flush, `chapter_router/load_entropy/layer_03` (members: `router/...`)
    is the entropy of the chapters' shares divided by its largest value: 1 is balanced, 0 one
    chapter. `dead` is the share of chapters that nothing chose, `max_over_mean` the largest share
    in multiples of the mean one, `balance` the load balancing loss before its coefficient (1 when
    balanced), `entropy` the mean entropy of a decision's probabilities in nats, `top_k_mass` the
    mean probability of what was chosen, `z` the mean of the squared logsumexp of the logits, and
    `changed` the share of decisions that chose otherwise than the one before. Of members there are
    `load_entropy`, `dead`, `max_over_mean` and `entropy`. Heat maps show the load by layer and
    chapter, in multiples of the mean.

    Shared chapters, which everything reads, count nowhere. Where fewer decisions are looked at
    than there are chapters, some are dead in any case.

    Args:
        every_n_steps: optimizer steps between two flushes.
        observe_every_n_steps: one of so many optimizer steps is looked at, and every flush.
        figure_every_n_steps: optimizer steps between two heat maps.
    """

    topics: ClassVar[frozenset[str]] = frozenset(CHOICES)

    def observe(self, chunk: ObservedChunk) -> None:
        for topic in CHOICES:
            slots = chunk.published.get(topic, {})
            if slots:
                fields = [_decided(field) for field in slots.values()]
                self._observe(topic, tuple(slots), fields, chunk)

    def _observe(
        self, topic: str, slots: tuple[str, ...], fields: Sequence[Fields], chunk: ObservedChunk
    ) -> None:
        choices = tuple(field["counts"].shape[1] for field in fields)
        means = tuple(name for name in MEANS if name in fields[0])
        make, device = partial(RouterLoad, choices=choices), fields[0]["counts"].device
        numbers = self.metric(topic, slots, device, partial(make, means=means))
        figure = self.metric(
            topic + IN_FIGURE, slots, device, partial(make, means=()), in_figure=True
        )
        if chunk.idle:
            return
        live = [{name: chunk.live(value) for name, value in field.items()} for field in fields]
        for metric in (numbers, figure):
            metric.update(live)

    def write(
        self, results: Mapping[str, SlotResult], trainer: pl.Trainer, step: int
    ) -> dict[str, float]:
        scalars: dict[str, float] = {}
        for name, result in results.items():
            if name.endswith(IN_FIGURE):
                topic = name.removesuffix(IN_FIGURE)
                log_figure(trainer, f"{topic}/load", _draw(CHOICES[topic], result), step)
            else:
                for slot, tag in enumerate(layer_tags(result.slots)):
                    values = {key: value[slot] for key, value in result.values.items()}
                    scalars |= {
                        f"{name}/{key}/{tag}": number for key, number in _numbers(values).items()
                    }
        return scalars


class RouterLoad(SlotMetric):
    """Sums over the decisions of routers, per slot.

    Args:
        slots: number of rows.
        device: where the values are.
        choices: among how many each slot's router chooses (n).
        means: names of what is averaged over decisions.
    """

    counts: Tensor
    probability: Tensor
    decisions: Tensor
    pairs: Tensor
    totals: Tensor

    def __init__(
        self, slots: int, device: torch.device, choices: tuple[int, ...], means: tuple[str, ...]
    ) -> None:
        super().__init__(slots, device)
        self.choices = choices
        self.means = means
        for name in ("counts", "probability"):
            # Two at least: torchmetrics makes a scalar of a result with one element.
            self._add(name, "sum", slots, max(2, *choices))
        for name in ("decisions", "pairs"):
            self._add(name, "sum", slots)
        self._add("totals", "sum", len(means), slots)

    def update(self, fields: Sequence[Fields]) -> None:
        """Add what every slot published.

        Args:
            fields: per slot `counts [B, n]` and (if all have it) `probability [B, n]`, sums over a
                row's decisions, `decisions [B]`, and means over them, `[B]`. Rows without a
                decision count nowhere; `changed` counts pairs of decisions.
        """
        decisions = self._stack(fields, "decisions")
        pairs = (decisions - 1).clamp(min=0)
        self.decisions.add_(decisions.sum(dim=1))
        self.pairs.add_(pairs.sum(dim=1))
        for name, total in (("counts", self.counts), ("probability", self.probability)):
            if name in fields[0]:
                total.add_(self._stack(fields, name).sum(dim=1))
        for name, total in zip(self.means, self.totals, strict=True):
            weight = pairs if name == "changed" else decisions
            values = torch.where(weight > 0, self._stack(fields, name), 0.0)
            total.add_((values * weight).sum(dim=1))

    def compute(self) -> dict[str, Tensor]:
        """Sums `counts`, `probability` `[slots, max n]`, `decisions`, `pairs`; `choices` and means.

        The means are NaN without a decision.
        """
        means = {
            name: total / (self.pairs if name == "changed" else self.decisions)
            for name, total in zip(self.means, self.totals, strict=True)
        }
        return {
            "counts": self.counts,
            "probability": self.probability,
            "decisions": self.decisions,
            "pairs": self.pairs,
            "choices": self.counts.new_tensor(self.choices),
            **means,
        }

    def _stack(self, fields: Sequence[Fields], name: str) -> Tensor:
        """The slots' values `[slots, B, ...]`, filled up to the widest."""
        values, width = [field[name] for field in fields], self.counts.shape[1]
        if values[0].dim() == 2:
            widths = (width - value.shape[1] for value in values)
            values = [F.pad(v, (0, w)) if w else v for v, w in zip(values, widths, strict=True)]
        return torch.stack(values).to(self.counts.dtype)


def _decided(fields: Fields) -> Fields:
    """What a router published; the shares of a `routed` adapter's row count as one decision."""
    if "counts" in fields:
        return fields
    load = fields["load"]
    return {"counts": load, "decisions": load.sum(dim=1) > 0, "entropy": fields["entropy"]}


def _numbers(values: Mapping[str, np.ndarray]) -> dict[str, float]:
    """What is written of one slot; nothing without a decision."""
    if values["decisions"] == 0:
        return {}
    n = int(values["choices"])
    share = values["counts"][:n] / values["counts"][:n].sum()
    chosen = share[share > 0]
    numbers = {
        "load_entropy": -(chosen * np.log(chosen)).sum() / np.log(n) if n > 1 else 1.0,
        "dead": 1 - len(chosen) / n,
        "max_over_mean": share.max() * n,
    }
    probability = values["probability"][:n] / values["decisions"]
    if probability.any():
        numbers["balance"] = n * (share * probability).sum()
    numbers |= {name: values[name] for name in MEANS if name in values}
    if values["pairs"] == 0:
        numbers.pop("changed", None)
    return {name: float(number) for name, number in numbers.items()}


def _draw(choice: str, result: SlotResult) -> Figure:
    """The load of every layer in multiples of its mean; white where there is none."""
    counts, choices = result.values["counts"], result.values["choices"][:, None]
    columns = np.arange(counts.shape[1])
    with np.errstate(invalid="ignore"):
        load = counts / counts.sum(axis=1, keepdims=True) * choices
    return heat_map(
        np.where(columns < choices, load, np.nan),
        layer_tags(result.slots),
        [str(column) for column in columns],
        choice,
        f"load of each {choice} / mean load",
    )
