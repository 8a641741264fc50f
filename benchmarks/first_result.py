"""How long a newcomer waits: from nothing to the first loss and the first evaluation.

    python benchmarks/first_result.py --repeats 3            # the first config of each variant
    python benchmarks/first_result.py --install              # also: clone, venv, packages

Every run starts in an empty folder: data are recorded or tokenised anew. The clock starts with the
process; the run ends behind its first validation during training. Wall time, one run at a time.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml
from quickstart import machine
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ("quickstart", "lact_small", "memory_small", "ttt_lora_small")
COLUMNS = ("first loss", "first validation", "end")
PACKAGES = ("torch", "lightning", "transformers")


def run(name: str) -> list[float]:
    """Seconds from the start of the process to each of `COLUMNS`."""
    config = ROOT / "configs" / f"{name}.yaml"
    steps = yaml.safe_load(config.read_text())["trainer"]["val_check_interval"]
    command = [sys.executable, str(ROOT / "cli.py"), "fit", "--config", str(config)]
    with tempfile.TemporaryDirectory() as folder:
        start = time.time()  # the clock of TensorBoard's events
        done = subprocess.run(
            [*command, "--trainer.max_steps", str(steps)],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        end = time.time()
        if done.returncode:
            raise SystemExit(done.stderr)
        events = EventAccumulator(str(Path(folder) / "runs" / name / "version_0")).Reload()
        first = [events.Scalars(tag)[0].wall_time for tag in ("train/loss", "val/loss")]
    return [moment - start for moment in (*first, end)]


def install() -> float:
    """Seconds to make the environment in a clone of this repository."""
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        start = time.perf_counter()
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        subprocess.run(["make", "install"], cwd=clone, check=True, capture_output=True)
        return time.perf_counter() - start


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--configs", nargs="+", choices=CONFIGS, default=CONFIGS)
    parser.add_argument("--install", action="store_true", help="time `make install` in a clone")
    options = parser.parse_args()
    print(f"| config | {' s | '.join(COLUMNS)} s |")
    print("|---" * (1 + len(COLUMNS)) + "|")
    for name in options.configs:
        runs = [run(name) for _ in range(options.repeats)]
        cells = [
            f"{statistics.median(times):.0f} [{min(times):.0f}, {max(times):.0f}]"
            for times in zip(*runs, strict=True)
        ]
        print(f"| `{name}` | {' | '.join(cells)} |", flush=True)
    if options.install:
        print(f"\nClone, environment, packages: {install():.0f} s")
    print(f"\nMedian [lowest, highest] of {options.repeats}; {machine(PACKAGES)}")


if __name__ == "__main__":
    main()
