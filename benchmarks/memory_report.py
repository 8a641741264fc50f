"""Markdown tables of `memory.py`, from the result.json files of complete runs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from memory_trials import ARMS, TRIALS
from training_runs import Results, arm_of, machines, read, speed, spread, texts

ROUTER = ("load_entropy", "dead", "top_k_mass", "changed")
"""What the router did in the end, mean over layers."""


def report(out: Path) -> None:
    """Write `results.md` below `out`, and print it."""
    results = read(out, TRIALS)
    if not results:
        print("no complete run yet: nothing to report")
        return
    parts = [
        best_table(chosen)
        for prefix in ("scratch/", "adapter/")
        if (chosen := {n: runs for n, runs in results.items() if n.startswith(prefix)})
    ]
    parts.append(rate_table(results))
    parts.append("\n".join([*machines(results, measured="Measured"), *texts(results)]))
    (out / "results.md").write_text("\n\n".join(parts) + "\n")
    print("\n\n".join(parts))


def best_trials(results: Results) -> list[str]:
    """The trial of every arm with the lowest validation loss of its first seed."""
    by_arm: dict[str, list[tuple[float, str]]] = {}
    for name, runs in results.items():
        by_arm.setdefault(arm_of(name), []).append((runs[0]["loss"], name))
    return [min(trials)[1] for trials in by_arm.values()]


def best_table(results: Results) -> str:
    """Every arm at its best learning rate."""
    forgets = any(run["held_out"] is not None for runs in results.values() for run in runs)
    titles = ["arm", "what it is", "lr", "validation loss", "by seed"]
    titles += ["loss on other text"] if forgets else ["MFLOPs a token"]
    titles += ["parameters trained" if forgets else "parameters", "tokens/s in training", *ROUTER]
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name in best_trials(results):
        runs = results[name]
        losses = [run["loss"] for run in runs]
        cells = [arm_of(name), ARMS[arm_of(name)].about, name.rpartition("/")[2], spread(losses)]
        cells.append(", ".join(f"{loss:.4f}" for loss in losses))
        if forgets:
            cells.append(spread([run["held_out"] for run in runs]))
        else:
            cells.append(f"{runs[0]['flops_per_token'] / 1e6:.1f}")
        cells += [f"{runs[0]['parameters']:,}", speed(runs)]
        cells += [_statistic(runs, statistic) for statistic in ROUTER]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def rate_table(results: Results) -> str:
    """The losses from which the learning rates were chosen."""
    lines = ["| arm | validation loss of the first seed by learning rate |", "|---|---|"]
    for arm in ARMS:
        tried = {n: runs for n, runs in results.items() if arm_of(n) == arm}
        if tried:
            losses = (f"{n.rpartition('/')[2]}: {r[0]['loss']:.4f}" for n, r in tried.items())
            lines.append(f"| {arm} | {', '.join(losses)} |")
    return "\n".join(lines)


def _statistic(runs: Iterable[dict[str, Any]], name: str) -> str:
    values = [
        value
        for run in runs
        for tag, value in run["training"].get("last", {}).items()
        if tag.startswith(f"chapter_router/{name}/")
    ]
    return f"{mean(values):.3f}" if values else ""
