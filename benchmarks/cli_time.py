"""How long the command line takes to answer, beside a bare LightningCLI of Lightning's demo.

    python benchmarks/cli_time.py --repeats 10

Every row is a process of its own from its start to its end, without another one beside it. The
rows take turns, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from quickstart import machine

ROOT = Path(__file__).resolve().parents[1]
VARIANTS = ("ActionExpertModule", "LaCTModule", "MemoryBankModule", "TTTLoRAModule")
BARE = """
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
LightningCLI(BoringModel, BoringDataModule)
"""
OURS, BARE_HELP = "cli.py fit --help", "bare LightningCLI fit --help"
PACKAGES = ("torch", "lightning", "transformers", "jsonargparse")


def commands() -> dict[str, list[str]]:
    """What is timed: name -> arguments of the interpreter."""
    quickstart = ["--config", "configs/quickstart.yaml", "--print_config"]
    rows = {
        "python -c pass": ["-c", "pass"],
        "cli.py --help": ["cli.py", "--help"],
        OURS: ["cli.py", "fit", "--help"],
        BARE_HELP: ["-c", BARE, "fit", "--help"],
        "cli.py fit --config quickstart --print_config": ["cli.py", "fit", *quickstart],
        "import lightning.pytorch": ["-c", "import lightning.pytorch"],
    }
    for name in VARIANTS:
        code = f"import lightning.pytorch; from lightning_modules import {name}"
        rows[f"the same and {name}"] = ["-c", code]
    return rows


def time_command(arguments: list[str]) -> float:
    """Seconds from start to end of a process, which must succeed."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.perf_counter() - start


def table(times: dict[str, list[float]]) -> str:
    """Markdown: median, lowest and highest of every row."""
    lines = ["| command | median s | lowest | highest |", "|---|---|---|---|"]
    for name, seconds in times.items():
        low, high = min(seconds), max(seconds)
        lines.append(f"| {name} | {statistics.median(seconds):.2f} | {low:.2f} | {high:.2f} |")
    return "\n".join(lines)


def added(times: dict[str, list[float]]) -> float:
    """Median over the rounds of what our `fit --help` takes longer than the bare one."""
    pairs = zip(times[OURS], times[BARE_HELP], strict=True)
    return statistics.median(ours - bare for ours, bare in pairs)


def main() -> None:
    """Time all rows, warm after a first round that does not count, and print the table."""
    parser = argparse.ArgumentParser(description="Time the command line's answers.")
    parser.add_argument("--repeats", type=int, default=10, help="rounds over all rows")
    repeats = parser.parse_args().repeats
    rows = commands()
    times: dict[str, list[float]] = {name: [] for name in rows}
    for count in range(repeats + 1):
        for name, arguments in rows.items():
            seconds = time_command(arguments)
            if count > 0:
                times[name].append(seconds)
    print(f"{machine(PACKAGES)}; {repeats} rounds\n\n{table(times)}")
    print(f"\ncli.py fit --help takes {added(times):.2f} s longer than a bare LightningCLI's.")


if __name__ == "__main__":
    main()
