"""What all monitors share: listen, accumulate on the device, write every n steps.

A training step only launches kernels. Every `every_n_steps` optimizer steps a monitor merges the
processes' statistics, copies all of them to the host in one transfer, checks them for NaN and
writes them; the steps in between never wait for the device.
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any, ClassVar, TypeVar

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from callbacks.logging import log_scalars
from callbacks.statistics import (
    GOLDEN_RATIO,
    FirstNonFinite,
    SlotMetric,
    all_reduce,
    to_host,
)
from lightning_modules.streams import NO_STREAM, Published, StreamPlan

MetricT = TypeVar("MetricT", bound=SlotMetric)


class NonFiniteError(FloatingPointError):
    """A fast state or a statistic is NaN or infinite: the run has diverged."""


@dataclass(frozen=True)
class ObservedChunk:
    """What a monitor sees of one chunk of the step that just ended.

    Args:
        published: topic -> slot -> name -> device tensor.
        chunk: the batch-contract dict.
        plan: what the host knows of its rows.
        step: optimizer step, counted from 1.
        flushing: whether statistics leave the device after this step.
    """

    published: Published
    chunk: Mapping[str, Any]
    plan: StreamPlan
    step: int
    flushing: bool

    def values(self, topic: str, name: str) -> tuple[tuple[str, ...], list[Tensor]]:
        """The slots that published `name` under `topic`, and what they published."""
        slots = self.published.get(topic, {})
        found = {slot: fields[name] for slot, fields in slots.items() if name in fields}
        return tuple(found), list(found.values())

    @property
    def idle(self) -> bool:
        """Whether every row has run out of files."""
        return all(id_ == NO_STREAM for id_ in self.plan.stream_id)

    def live(self, value: Tensor, dim: int = 0) -> Tensor:
        """`value` without the rows (along `dim`) that have run out of files; some must have one."""
        ids = self.plan.stream_id
        if NO_STREAM not in ids:
            return value
        # Slices instead of an index: an index tensor would have to be copied to the device.
        runs = [(live, len([*run])) for live, run in groupby(ids, lambda id_: id_ != NO_STREAM)]
        parts = value.split([length for _, length in runs], dim=dim)
        kept = [part for part, (live, _) in zip(parts, runs, strict=True) if live]
        return kept[0] if len(kept) == 1 else torch.cat(kept, dim=dim)


@dataclass
class _Entry:
    slots: tuple[str, ...]
    metric: SlotMetric
    in_figure: bool


@dataclass(frozen=True)
class SlotResult:
    """A metric on the host at a flush.

    Args:
        slots: names of the rows.
        values: what the metric's `compute` gave, as numpy arrays.
    """

    slots: tuple[str, ...]
    values: Mapping[str, np.ndarray]


class Monitor(Callback):
    """Base of the monitors: a subclass says what it listens to, observes and writes.

    Args:
        every_n_steps: optimizer steps between two flushes; the remainder is flushed at the end.
        observe_every_n_steps: one of so many optimizer steps is observed; in the others nothing is
            published. Steps that end with a flush are always observed.
        figure_every_n_steps: optimizer steps between two figures; one is drawn at the end.
    """

    topics: ClassVar[frozenset[str]] = frozenset()
    flush_topics: ClassVar[frozenset[str]] = frozenset()
    """Topics that are expensive: listened to in steps that end with a flush."""

    def __init__(
        self,
        every_n_steps: int = 100,
        observe_every_n_steps: int = 20,
        figure_every_n_steps: int = 5000,
    ) -> None:
        self.every_n_steps = every_n_steps
        self.observe_every_n_steps = observe_every_n_steps
        self.figure_every_n_steps = figure_every_n_steps
        for name in ("every_n_steps", "observe_every_n_steps", "figure_every_n_steps"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name}={getattr(self, name)} must be at least 1; to switch the monitor off, "
                    "remove it from trainer.callbacks"
                )
        self._entries: dict[str, _Entry] = {}
        self._closed: list[tuple[str, _Entry]] = []
        self._step = 0
        self._flushed = 0
        self._drawn = 0

    @abstractmethod
    def observe(self, chunk: ObservedChunk) -> None:
        """Accumulate one chunk in metrics (see `metric`), without waiting for the device."""

    @abstractmethod
    def write(
        self, results: Mapping[str, SlotResult], trainer: pl.Trainer, step: int
    ) -> Mapping[str, float]:
        """Draw what is no scalar, and return the scalars by tag.

        `results` holds the metrics by name; those of figures only when a figure is due, and only
        those of layers that no longer publish when adapters were switched.
        """

    def draw(self, trainer: pl.Trainer, step: int) -> None:
        """Draw what was gathered from several flushes; called behind `write` when it is due."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._entries, self._closed = {}, []
        self._flushed = self._drawn = trainer.global_step

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self._step = trainer.global_step + 1
        streams = pl_module.streams
        if self._due(self._step):
            streams.listening.update(self.topics | self.flush_topics)
        elif self._looks(self._step):
            streams.listening.update(self.topics)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        streams = pl_module.streams
        streams.listening.difference_update(self.topics | self.flush_topics)
        flushing = self._due(self._step)
        if flushing or self._looks(self._step):
            chunks = zip(streams.published, batch, streams.plans, strict=True)
            with torch.no_grad():
                for published, chunk, plan in chunks:
                    self.observe(ObservedChunk(published, chunk, plan, self._step, flushing))
            self._write_closed(trainer)
        if self._due(trainer.global_step):
            n = self.figure_every_n_steps
            self._flush(trainer, draw=trainer.global_step // n > self._drawn // n)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if trainer.global_step > min(self._flushed, self._drawn):
            self._flush(trainer, draw=True)

    def metric(
        self,
        name: str,
        slots: tuple[str, ...],
        device: torch.device,
        make: Callable[[int, torch.device], MetricT],
        in_figure: bool = False,
    ) -> MetricT:
        """The metric of that name with a row per slot, made on first use.

        It is made anew when other layers publish than before, because `set_active` has switched
        adapters; what the old one holds is then written at once, which waits for the device.

        Args:
            name: key in the results.
            slots: names of the rows.
            device: where the values are.
            make: `(number of slots, device) -> metric`.
            in_figure: keep accumulating until a figure is due.
        """
        entry = self._entries.get(name)
        if entry is not None and entry.slots != slots:
            self._closed.append((name, entry))
            entry = None
        if entry is None:
            entry = self._entries[name] = _Entry(slots, make(len(slots), device), in_figure)
        return entry.metric  # type: ignore[return-value]

    def check_finite(
        self, name: str, slots: tuple[str, ...], means: Tensor, chunk: ObservedChunk
    ) -> None:
        """Watch one number per slot and row, `means [L, B]`: NaN stops the run at a flush."""
        watch = self.metric(f"{name} is finite", slots, means.device, FirstNonFinite)
        watch.update(means, chunk.chunk["stream_id"], chunk.step)

    def _looks(self, step: int) -> bool:
        """Whether a step is observed: one in every window of n, at a place that moves about.

        Files of equal length would otherwise be looked at in the same few places again and again.
        """
        window, place = divmod(step, self.observe_every_n_steps)
        return place == int(self.observe_every_n_steps * (window * GOLDEN_RATIO % 1))

    def _due(self, step: int) -> bool:
        return step // self.every_n_steps > self._flushed // self.every_n_steps

    def _flush(self, trainer: pl.Trainer, draw: bool) -> None:
        step = self._flushed = trainer.global_step
        entries = {
            name: entry for name, entry in self._entries.items() if draw or not entry.in_figure
        }
        if not entries:
            return
        self._write(entries, trainer, step)
        if draw:
            self.draw(trainer, step)
            self._drawn = step
        for entry in entries.values():
            entry.metric.reset()

    def _write_closed(self, trainer: pl.Trainer) -> None:
        """Write what layers published that no longer do, as of the step before this one."""
        closed, self._closed = self._closed, []
        for name, entry in closed:
            if entry.metric.update_called:
                self._write({name: entry}, trainer, max(self._flushed, self._step - 1))

    def _write(self, entries: Mapping[str, _Entry], trainer: pl.Trainer, step: int) -> None:
        """Merge, fetch, check and log; one transfer from the device."""
        if trainer.world_size > 1:
            all_reduce(entry.metric for entry in entries.values())
        results = _results(entries)
        for name, entry in entries.items():
            if isinstance(entry.metric, FirstNonFinite):
                _stop_if_found(f"{type(self).__name__}: {name}", results.pop(name), step)
        scalars = self.write(results, trainer, step)
        _stop_if_not_finite(type(self).__name__, scalars, step)
        log_scalars(trainer, scalars, step)


def _results(entries: Mapping[str, _Entry]) -> dict[str, SlotResult]:
    """All metrics on the host, in one transfer."""
    # The class's own: the instance's also clones what it gives, squeezes it, and warns of a metric
    # without values on this process, which may have some of the others', or counts 0.
    computed = {name: type(entry.metric).compute(entry.metric) for name, entry in entries.items()}
    flat = {
        f"{name}\n{key}": value
        for name, values in computed.items()
        for key, value in values.items()
    }
    host = to_host(flat)
    return {
        name: SlotResult(entry.slots, {key: host[f"{name}\n{key}"] for key in computed[name]})
        for name, entry in entries.items()
    }


def _stop_if_found(what: str, result: SlotResult, step: int) -> None:
    if not result.values["found"][0]:
        return
    first_step, slot, row, stream = (int(number) for number in result.values["where"])
    if first_step < 0:
        raise NonFiniteError(f"{what}: no, on another process; its message says where")
    path = result.slots[slot]
    raise NonFiniteError(
        f"{what}: no, NaN or Inf in {path} ({layer_tag(path)}), row {row}, stream {stream}, at "
        f"step {first_step} (checked at step {step}); resume from a checkpoint of before step "
        f"{first_step} with a smaller learning rate or trainer.gradient_clip_val"
    )


def _stop_if_not_finite(monitor: str, scalars: Mapping[str, float], step: int) -> None:
    bad = [tag for tag, value in scalars.items() if not np.isfinite(value)]
    if bad:
        raise NonFiniteError(
            f"{monitor}: {bad[0]} is {scalars[bad[0]]} at step {step}: the run has diverged; "
            "resume from an earlier checkpoint with a smaller learning rate or "
            "trainer.gradient_clip_val"
        )


@cache
def layer_tag(slot: str) -> str:
    """`layer_03` of a slot such as `layers.3.self_attn`; a slot without a number is its own tag."""
    numbers = re.findall(r"(?:^|\.)(\d+)(?=\.|$)", slot)
    return f"layer_{int(numbers[0]):02d}" if numbers else slot.replace(".", "_")


def layer_tags(slots: Sequence[str]) -> list[str]:
    """One tag per slot, all different: slots that share a layer say where in it they are."""
    tags = [layer_tag(slot) for slot in slots]
    inner = [
        tag if tags.count(tag) == 1 else f"{tag}/{_within_layer(slot)}"
        for tag, slot in zip(tags, slots, strict=True)
    ]
    return [
        tag if inner.count(tag) == 1 else f"{layer_tag(slot)}/{slot}"
        for tag, slot in zip(inner, slots, strict=True)
    ]


def _within_layer(slot: str) -> str:
    """`mlp.down_proj` of `model.layers.3.mlp.down_proj`: what comes behind the layer's number."""
    return re.split(r"(?:^|\.)\d+\.", slot, maxsplit=1)[-1]


def slot_scalars(
    result: SlotResult, keys: Sequence[str], name: Callable[[str, str], str]
) -> dict[str, float]:
    """Scalars of a result, `name(key, layer tag)` each, of the slots that have seen a value."""
    tags = layer_tags(result.slots)
    return {
        name(key, tag): float(result.values[key][slot])
        for key in keys
        for slot, tag in enumerate(tags)
        if result.values["count"][slot] > 0
    }
