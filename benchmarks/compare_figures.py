"""Figures of `compare_adapters.py`: loss by chunk index, and what differs from LoRA's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from compare_results import Measured, comparable
from compare_statistics import (
    FEWEST,
    Estimate,
    chunk_bins,
    difference,
    level,
    position_bins,
    region,
    shared,
)
from compare_trials import LORA
from matplotlib.axes import Axes
from matplotlib.figure import Figure


def by_chunk(arms: Mapping[str, Measured]) -> Figure:
    """Mean over files by chunk index, as far as there are enough files."""
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel="chunk of the file", ylabel="loss (nats per token)")
    for color, (name, arm) in enumerate(arms.items()):
        reading = arm.mean
        curve = [level(reading, region(reading, *edges)) for edges in chunk_bins(reading)]
        _draw(axes, curve, [str(index) for index in range(len(curve))], f"C{color}", name)
    _finish(axes, "mean over files; band: 95 % interval over files")
    return figure


def to_lora(arms: Mapping[str, Measured]) -> Figure:
    """Loss minus that of LoRA, paired by file, by position in the file."""
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot(ylabel="loss minus LoRA's (nats per token)")
    axes.set_xlabel("position in the file: from this token to the next mark")
    for color, name in enumerate(arms):
        if name == LORA or not comparable(arms, name, LORA):
            continue
        a, b, _ = shared(arms[name].readings, arms[LORA].readings)
        bins = position_bins(a)
        curve = [difference(a, b, region(a, *edges)) for edges in bins]
        _draw(axes, curve, [f"{low:,}" for low, _ in bins], f"C{color}", name)
    axes.axhline(0, color="0.5", linewidth=0.8)
    _finish(axes, "mean over files, paired; band: 95 % interval over files")
    return figure


def _draw(
    axes: Axes, curve: Sequence[Estimate], labels: Sequence[str], color: str, name: str
) -> None:
    """A line and its band, at equal distances, where there are enough files."""
    there = [place for place, estimate in enumerate(curve) if estimate.files >= FEWEST]
    means, low, high = ([getattr(curve[i], key) for i in there] for key in ("mean", "low", "high"))
    axes.plot(there, means, color=color, marker=".", label=name)
    axes.fill_between(there, low, high, color=color, alpha=0.15, linewidth=0)
    step = max(1, len(there) // 16)
    axes.set_xticks(there[::step], [labels[place] for place in there[::step]])


def _finish(axes: Axes, title: str) -> None:
    axes.tick_params(axis="x", rotation=60)
    axes.legend(fontsize="small", title=title, title_fontsize="small", ncols=3)
