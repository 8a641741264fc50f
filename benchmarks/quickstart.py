"""Run the quickstart over several seeds and print a Markdown table.

    python benchmarks/quickstart.py --seeds 0 1 2

Every seed records its own data folder anew, so that the times are those of a first run.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "quickstart.yaml"
PACKAGES = ("torch", "lightning", "transformers", "mujoco", "gymnasium-robotics")
SUCCESS = re.compile(r"closed-loop success: (?P<rate>.*?) over \d+ episodes \((?P<moment>.*?)\)")


class Run(NamedTuple):
    """What one quickstart printed, and how long it took in seconds."""

    seed: int
    before: str
    after: str
    training: float
    total: float


def run(seed: int) -> Run:
    """Record, train and evaluate in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        command = [sys.executable, str(ROOT / "cli.py"), "fit", "--config", str(CONFIG)]
        done = subprocess.run(
            [*command, "--seed_everything", str(seed)],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        total = time.perf_counter() - start
        if done.returncode:
            raise SystemExit(done.stderr)
        rates = {m["moment"]: m["rate"] for m in SUCCESS.finditer(done.stdout + done.stderr)}
        training = training_time(Path(folder) / "runs" / "quickstart" / "version_0")
        return Run(seed, rates["before training"], rates["after training"], training, total)


def training_time(folder: Path) -> float:
    """Seconds from the evaluation before training to the end of training, validation included."""
    events = EventAccumulator(str(folder)).Reload()
    begin = events.Scalars("closed_loop/success")[0].wall_time
    return events.Scalars("train/loss")[-1].wall_time - begin


def cpu_name() -> str:
    """The processor's name as Linux tells it, elsewhere its architecture."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.machine()


def machine(packages: Sequence[str]) -> str:
    """Where and with what this is measured."""
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"{os.cpu_count()} cores ({cpu_name()}), Python {platform.python_version()}, {versions}"


def main() -> None:
    """Run all seeds and print the table."""
    parser = argparse.ArgumentParser(description="Run the quickstart over several seeds.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    runs = [run(seed) for seed in parser.parse_args().seeds]
    print(f"{machine(PACKAGES)}\n")
    print("| seed | success before [95 % Wilson] | success after | training s | all s |")
    print("|---|---|---|---|---|")
    for r in runs:
        print(f"| {r.seed} | {r.before} | {r.after} | {r.training:.0f} | {r.total:.0f} |")


if __name__ == "__main__":
    main()
