"""Markdown tables and figures of `lact.py`, from the result.json files of complete runs."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from lact_trials import TRIALS
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from training_runs import Results, machines, read, speed, spread, texts

COLUMNS = (0, 256, 1024, 4096, 16384)
"""Positions in a file whose bins are in the table."""


def report(out: Path) -> None:
    """Write `results.md` and `figures/*.png` below `out`, and print the tables."""
    results = read(out, TRIALS)
    if not results:
        print("no complete run yet: nothing to report")
        return
    figures = out / "figures"
    figures.mkdir(exist_ok=True)
    parts = []
    if recall := _of(results, "recall/"):
        parts.append(recall_table(recall))
        accuracy = curves(recall, "val/accuracy", "accuracy of recalled values, validation")
        accuracy.savefig(figures / "lact_recall.png")
    if text := _of(results, "text/"):
        parts.append(text_table(text))
        by_position(text).savefig(figures / "lact_loss_by_position.png")
    parts.append("\n".join([*machines(results, measured="Measured"), *texts(results)]))
    (out / "results.md").write_text("\n\n".join(parts) + "\n")
    print("\n\n".join(parts))


def _of(results: Results, prefix: str) -> Results:
    return {name: runs for name, runs in results.items() if name.startswith(prefix)}


def recall_table(results: Results) -> str:
    """Accuracy of the recalled values, by seed."""
    lines = [
        "| trial | what it is | accuracy, mean | by seed | parameters | tokens/s in training |",
        "|---|---|---|---|---|---|",
    ]
    for name, runs in results.items():
        values = [run["accuracy"] for run in runs]
        lines.append(
            f"| {name} | {TRIALS[name].about} | {mean(values):.3f} | "
            f"{', '.join(f'{value:.3f}' for value in values)} | {runs[0]['parameters']:,} | "
            f"{speed(runs)} |"
        )
    return "\n".join(lines)


def text_table(results: Results) -> str:
    """Validation loss of all tokens and by position, mean and standard deviation over seeds."""
    titles = ["trial", "what it is", "loss", *(f"from {edge:,}" for edge in COLUMNS)]
    titles += ["parameters", "tokens/s in training"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, runs in results.items():
        bins = [dict(map(tuple, run["by_position"])) for run in runs]
        cells = [spread([run["loss"] for run in runs])]
        cells += [spread([curve[edge] for curve in bins if edge in curve]) for edge in COLUMNS]
        cells += [f"{runs[0]['parameters']:,}", speed(runs)]
        lines.append(f"| {name} | {TRIALS[name].about} | {' | '.join(cells)} |")
    return "\n".join(lines)


def curves(results: Results, tag: str, label: str) -> Figure:
    """A logged scalar over the optimizer steps, a line per run, a colour per trial."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="optimizer step", ylabel=label)
    for index, (name, runs) in enumerate(results.items()):
        for run in runs:
            steps, values = zip(*run["training"]["curves"][tag], strict=True)
            about = TRIALS[name].about if run is runs[0] else None
            axes.plot(steps, values, color=f"C{index}", label=about, alpha=0.8)
    axes.legend(fontsize="small", title="a line per seed")
    return figure


def by_position(results: Results) -> Figure:
    """Loss by position in the file, and what of it is not the window's alone, seed by seed."""
    figure = Figure(figsize=(10, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    window = {run["seed"]: _positions(run) for run in results.get("text/window", [])}
    for index, (name, runs) in enumerate(results.items()):
        _draw(left, [_positions(run) for run in runs], f"C{index}", TRIALS[name].about)
        pairs = [(_positions(run), window[run["seed"]]) for run in runs if run["seed"] in window]
        if pairs and name != "text/window":
            differences = [{p: curve[p] - base[p] for p in curve} for curve, base in pairs]
            _draw(right, differences, f"C{index}", TRIALS[name].about)
    right.axhline(0, color="0.5", linewidth=0.8)
    for axes, label in ((left, "validation loss"), (right, "minus the window alone")):
        axes.set_xlabel("position in the file: from this token to the next mark")
        axes.set_ylabel(f"{label} (nats per token)")
        axes.tick_params(axis="x", rotation=60)
    lines, names = left.get_legend_handles_labels()
    title = "thick: mean of the seeds, thin: each seed"
    figure.legend(lines, names, loc="outside upper center", ncols=2, fontsize="small", title=title)
    return figure


def _positions(run: dict[str, Any]) -> dict[int, float]:
    """Position -> loss."""
    return {int(place): loss for place, loss in run["by_position"]}


def _draw(axes: Axes, curves: list[dict[int, float]], color: str, label: str) -> None:
    """A thin line per seed and a thick one of their mean, over equally spaced positions."""
    places = [f"{place:,}" for place in curves[0]]
    for curve in curves:
        axes.plot(places, list(curve.values()), color=color, alpha=0.35, linewidth=1)
    means = [mean(values) for values in zip(*(c.values() for c in curves), strict=True)]
    axes.plot(places, means, color=color, marker="o", linewidth=2, label=label)
