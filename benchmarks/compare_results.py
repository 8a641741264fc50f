"""What `compare_adapters.py` has measured so far, and which learning rate of every arm is best."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from compare_run import READING, RESET
from compare_statistics import Reading, average, load
from compare_trials import ARMS, BASE, TRIALS
from training_runs import PRODUCT, arm_of, read


@dataclass(frozen=True)
class Measured:
    """An arm at its best learning rate.

    Args:
        trial: its name.
        runs: `result.json` of every seed.
        readings: seed -> losses by file.
        reset: seed -> losses by file of the same weights with the memory off, if it has one.
    """

    trial: str
    runs: list[dict[str, Any]]
    readings: dict[int, Reading]
    reset: dict[int, Reading]

    @property
    def mean(self) -> Reading:
        """Averaged over seeds."""
        return average(list(self.readings.values()))

    def memory(self, name: str) -> float | None:
        """A statistic of the fast weights, mean over seeds."""
        values = [run["memory"][name]["mean"] for run in self.runs if name in run["memory"]]
        return mean(values) if values else None


def comparable(arms: Mapping[str, Measured], one: str, other: str) -> bool:
    """Whether both are there, with a seed in common."""
    if one not in arms or other not in arms:
        return False
    return bool(arms[one].readings.keys() & arms[other].readings.keys())


def measured(out: Path) -> dict[str, Measured]:
    """Arm -> what was measured at the best of its rates that was evaluated."""
    results = read(out, TRIALS)
    found = {}
    for name in best_trials(out, PRODUCT["evaluate"]):
        runs = results[name]
        folders = {run["seed"]: out / name / f"seed_{run['seed']}" for run in runs}
        readings = {seed: load(path / f"{READING}.npz") for seed, path in folders.items()}
        resets = {s: load(p / f"{RESET}.npz") for s, p in folders.items() if runs[0]["reset"]}
        found[arm_of(name)] = Measured(name, runs, readings, resets)
    if BASE in found:  # nothing is trained: it is the same for every seed
        seeds = {seed for arm in found.values() for seed in arm.readings}
        (reading, *_) = found[BASE].readings.values()
        found[BASE].readings.update({seed: reading for seed in seeds})
    return found


def search_losses(out: Path) -> dict[str, dict[str, float]]:
    """Arm -> trial -> last validation loss in the training of its lowest seed."""
    losses: dict[str, dict[str, float]] = {}
    for name in TRIALS:
        paths = {int(p.parent.name[5:]): p for p in (out / name).glob("seed_*/training.json")}
        if paths:
            curve = json.loads(paths[min(paths)].read_text())["curves"].get("val/loss", [])
            loss = curve[-1][1] if curve else math.nan
            losses.setdefault(arm_of(name), {})[name] = loss
    return losses


def best_trials(out: Path, product: str = PRODUCT["train"]) -> list[str]:
    """The trial of every arm with the lowest of `search_losses`, of those that have a product.

    Raises:
        SystemExit: several rates were tried without a validation.
    """
    best = []
    for arm, losses in search_losses(out).items():
        having = {n: v for n, v in losses.items() if any((out / n).glob(f"seed_*/{product}"))}
        if not having:
            continue
        known = {name: loss for name, loss in having.items() if not math.isnan(loss)}
        if not known and len(having) > 1:
            raise SystemExit(
                f"no rate of {arm} has a validation loss to choose by: raise "
                "trainer.limit_val_batches, or remove all but one"
            )
        best.append(min(known, key=known.__getitem__) if known else next(iter(having)))
    return best


def at_edge(trial: str) -> bool:
    """Whether the best rate is the first or the last that an arm may try."""
    rates = ARMS[arm_of(trial)].rates
    return len(rates) > 1 and float(trial.rpartition("/")[2]) in (min(rates), max(rates))
