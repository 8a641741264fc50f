"""Markdown tables of `tbptt.py`, from the result.json files of complete runs."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from tbptt_trials import TRIALS
from training_runs import Results, machines, read, spread

CHUNKS = (0, 2, 4)
"""Chunks of an episode of the maze whose loss is in the table."""


def report(out: Path) -> None:
    """Write `results.md` below `out`, and print it."""
    results = read(out, TRIALS)
    if not results:
        print("no complete run yet: nothing to report")
        return
    parts = []
    for task, columns in (("recall/", recall_columns), ("maze/", maze_columns)):
        runs = {name: runs for name, runs in results.items() if name.startswith(task)}
        if runs:
            parts.append(table(runs, columns))
    parts.append("\n".join(machines(results, measured="Measured")))
    text = "\n\n".join(parts) + "\n"
    (out / "results.md").write_text(text)
    print(text)


def table(results: Results, columns: Any) -> str:
    """One row per k: what was learned, mean and spread over seeds, and what a step costs."""
    lines = []
    for name, runs in results.items():
        cells = {"trial": name, "seeds": str(len(runs)), **columns(runs), **cost(runs)}
        if not lines:
            lines = [f"| {' | '.join(cells)} |", "|---" * len(cells) + "|"]
        lines.append(f"| {' | '.join(cells.values())} |")
    return "\n".join(lines)


def recall_columns(runs: list[dict[str, Any]]) -> dict[str, str]:
    """Accuracy by the distance of an answer from its pair, and of a guess."""
    curves = [dict(map(tuple, run["by_distance"])) for run in runs]
    cells = {
        f"accuracy, {d} chunk{'s' * (d > 1)} later": spread([curve[d] for curve in curves])
        for d in curves[0]
    }
    return {**cells, "a guess": f"{runs[0]['chance']:.3f}"}


def maze_columns(runs: list[dict[str, Any]]) -> dict[str, str]:
    """Success, and loss by chunk of the episode."""
    curves = [{place: loss for place, loss, _ in run["loss_by_chunk"]} for run in runs]
    cells = {"success": spread([run["success"] for run in runs])}
    return cells | {
        f"loss in chunk {c}": spread([curve[c] for curve in curves if c in curve]) for c in CHUNKS
    }


def cost(runs: list[dict[str, Any]]) -> dict[str, str]:
    """Of a step and of a chunk, means over seeds of the medians."""
    k = TRIALS[runs[0]["trial"]].k
    costs = [run["cost"] for run in runs]
    step = 1000 * mean(c["step_seconds"][1] for c in costs)
    low, high = (1000 * mean(c["step_seconds"][i] for c in costs) for i in (0, 2))
    return {
        "step ms [p10, p90]": f"{step:.0f} [{low:.0f}, {high:.0f}]",
        "ms per chunk": f"{step / k:.0f}",
        "kept for backward MiB": f"{mean(c['saved_bytes'] for c in costs) / 2**20:.1f}",
        "peak memory MiB": f"{mean(c['peak_memory'] for c in costs) / 2**20:.0f}",
    }
