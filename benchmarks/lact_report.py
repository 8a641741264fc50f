"""Markdown tables and figures of `lact.py`, from the result.json files of complete runs."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev
from typing import Any

from lact_trials import TRIALS
from matplotlib.figure import Figure
from training_runs import Results, machines, read

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
        curves(recall, "val/accuracy").savefig(figures / "lact_recall.png")
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
            f"{_speed(runs)} |"
        )
    return "\n".join(lines)


def text_table(results: Results) -> str:
    """Validation loss of all tokens and by position, mean and standard deviation over seeds."""
    titles = ["trial", "what it is", "loss", *(f"from {edge:,}" for edge in COLUMNS)]
    titles += ["parameters", "tokens/s in training"]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name, runs in results.items():
        bins = [dict(map(tuple, run["by_position"])) for run in runs]
        cells = [_spread([run["loss"] for run in runs])]
        cells += [_spread([curve[edge] for curve in bins if edge in curve]) for edge in COLUMNS]
        cells += [f"{runs[0]['parameters']:,}", _speed(runs)]
        lines.append(f"| {name} | {TRIALS[name].about} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    if len(values) < 2:
        return ", ".join(f"{value:.4f}" for value in values)
    return f"{mean(values):.4f} ± {stdev(values):.4f}"


def _speed(runs: list[dict[str, Any]]) -> str:
    return f"{mean(run['training']['tokens_per_second'] for run in runs):,.0f}"


def texts(results: Results) -> list[str]:
    """On which texts: a line for each."""
    data = [run["data"] for runs in results.values() for run in runs if run["data"]]
    lines = {", ".join(f"{name} {value}" for name, value in facts.items()) for facts in data}
    return [f"Text: {line}." for line in sorted(lines)]


def curves(results: Results, tag: str) -> Figure:
    """A logged scalar over the optimizer steps, a line per run, a colour per trial."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="optimizer step", ylabel=tag)
    for index, (name, runs) in enumerate(results.items()):
        for run in runs:
            steps, values = zip(*run["training"]["curves"][tag], strict=True)
            label = TRIALS[name].about if run is runs[0] else None
            axes.plot(steps, values, color=f"C{index}", label=label, alpha=0.8)
    axes.legend(fontsize="small")
    return figure


def by_position(results: Results) -> Figure:
    """Loss by position in the file, and its difference to that of the window alone."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    means = {name: _mean_curve(runs) for name, runs in results.items()}
    base = means.get("text/window", {})
    for name, curve in means.items():
        places = list(curve)
        left.plot(range(len(places)), [curve[p] for p in places], marker="o", label=name)
        common = [p for p in places if p in base]
        right.plot(range(len(common)), [curve[p] - base[p] for p in common], marker="o")
    for axes, label in ((left, "validation loss"), (right, "difference to window alone")):
        places = list(next(iter(means.values())))
        axes.set_xticks(range(len(places)), [str(p) for p in places], rotation=60)
        axes.set_xlabel("position in the file, from token")
        axes.set_ylabel(f"{label} (nats per token)")
    left.legend(fontsize="small")
    return figure


def _mean_curve(runs: list[dict[str, Any]]) -> dict[float, float]:
    """Position -> loss, mean over seeds."""
    values: dict[float, list[float]] = {}
    for run in runs:
        for place, loss in run["by_position"]:
            values.setdefault(place, []).append(loss)
    return {place: mean(losses) for place, losses in values.items()}
