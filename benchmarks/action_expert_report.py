"""Markdown table and figures of `action_expert.py`, from the result.json files of complete runs."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

from action_expert_trials import TRIALS
from matplotlib.figure import Figure
from training_runs import Results, machines, read

from callbacks.closed_loop import wilson_interval

EPISODES = 100
"""Test episodes per seed."""


def report(out: Path) -> None:
    """Write `results.md` and `figures/*.png` below `out`, and print the table."""
    results = read(out, TRIALS)
    if not results:
        print("no complete run yet: nothing to report")
        return
    text = table(results)
    (out / "results.md").write_text(text)
    print(text)
    figures = out / "figures"
    figures.mkdir(exist_ok=True)
    for task in sorted({name.split("/")[0] for name in results}):
        mine = {name: runs for name, runs in results.items() if name.startswith(f"{task}/")}
        success(mine).savefig(figures / f"{task}_success.png")
        for tag in ("val/loss", "closed_loop/success"):
            name = tag.replace("/", "_")
            curves(mine, tag).savefig(figures / f"{task}_{name}.png")
        for key, label in (("loss_by_chunk", "validation loss"), ("norm_by_chunk", "|dW|")):
            by_chunk(mine, key, label).savefig(figures / f"{task}_{key}.png")


def table(results: Results) -> str:
    """One row per trial: success over all seeds with its interval, by seed, and the settings."""
    lines = [
        "| trial | what it is | success [95 % Wilson] | by seed | spread (sd) | executes | "
        "parameters |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, runs in results.items():
        rates = [run["success"] for run in runs]
        low, high = wilson_interval(round(sum(rates) * EPISODES), EPISODES * len(runs))
        lines.append(
            f"| {name} | {TRIALS[name].about} | {mean(rates):.2f} [{low:.2f}, {high:.2f}] | "
            f"{', '.join(f'{rate:.2f}' for rate in rates)} | "
            f"{f'{stdev(rates):.2f}' if len(rates) > 1 else '-'} | "
            f"{', '.join(str(run['execute']) for run in runs)} | {runs[0]['parameters']:,} |"
        )
    return "\n".join([*lines, "", *machines(results, measured="Tried")]) + "\n"


def success(results: Results) -> Figure:
    """Bars of the mean success with its interval, and a dot per seed."""
    figure = Figure(figsize=(7, 0.6 + 0.35 * len(results)), layout="constrained")
    axes = figure.add_subplot()
    for place, runs in enumerate(results.values()):
        rates = [run["success"] for run in runs]
        low, high = wilson_interval(round(sum(rates) * EPISODES), EPISODES * len(runs))
        axes.barh(place, mean(rates), color="tab:blue", alpha=0.4)
        axes.hlines(place, low, high, color="tab:blue")
        axes.plot(rates, [place] * len(rates), "o", color="black", markersize=3)
    axes.set_yticks(range(len(results)), [name.split("/")[1] for name in results])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("success (bar: mean, line: 95 % Wilson, dots: seeds)")
    return figure


def curves(results: Results, tag: str) -> Figure:
    """A logged scalar over the optimizer steps, a line per trial (mean over its seeds)."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="optimizer step", ylabel=tag)
    for name, runs in results.items():
        values = defaultdict(list)
        for run in runs:
            for step, value in run["training"]["curves"].get(tag, []):
                values[step].append(value)
        steps = sorted(values)
        axes.plot(steps, [mean(values[step]) for step in steps], label=name.split("/")[1])
    axes.legend(fontsize="small")
    return figure


def by_chunk(results: Results, key: str, label: str) -> Figure:
    """A quantity over the chunk of the episode; chunks with fewer than ten values are left out."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="chunk in the episode", ylabel=label)
    for name, runs in results.items():
        values = defaultdict(list)
        for run in runs:
            for place, value, count in run[key]:
                if count >= 10:
                    values[place].append(value)
        places = sorted(values)
        if places:
            averages = [mean(values[place]) for place in places]
            axes.plot(places, averages, marker="o", label=name.split("/")[1])
    if axes.lines:
        axes.legend(fontsize="small")
    return figure
