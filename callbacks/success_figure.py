"""Success rate against training step, with the interval in which it lies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Evaluation(NamedTuple):
    """Success rate at an optimizer step, with the ends of its interval."""

    step: int
    success: float
    low: float
    high: float


def draw_trajectory(evaluations: Sequence[Evaluation], title: str) -> Figure:
    """The success rate of all evaluations of a run, with its 95 % Wilson interval as a band.

    Args:
        evaluations: in order of their steps; at least one.
        title: what was evaluated.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), dpi=80, layout="constrained")
    axes = figure.add_subplot()
    steps, success, low, high = zip(*evaluations, strict=True)
    errors = [
        [rate - end for rate, end in zip(success, low, strict=True)],
        [end - rate for rate, end in zip(success, high, strict=True)],
    ]
    axes.fill_between(steps, low, high, color="tab:green", alpha=0.2, label="95 % Wilson interval")
    axes.errorbar(
        steps, success, yerr=errors, color="tab:green", marker="o", capsize=3, label="success rate"
    )
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("step")
    axes.set_ylabel("share of solved episodes")
    axes.set_title(title)
    axes.legend(loc="best")
    axes.grid(alpha=0.3)
    return figure
