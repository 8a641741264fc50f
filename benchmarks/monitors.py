"""What the monitors cost, and whether a training step ever waits for the GPU.

    python benchmarks/monitors.py --out monitors.md     # on a GPU, about three minutes
    python benchmarks/monitors.py --tiny                # a minute on a CPU

Every variant is trained once by Lightning's Trainer with a TensorBoard logger, on the standard
library as bytes (the action expert: on random episodes in the LeRobot format). The monitors are
there in three steps of five, alternately, and look and flush more often than by default: steps
without them, ordinary ones, those that are looked at and those that flush see the same machine.
Each step is timed by itself, from the monitors' first hook to their last, with the device
synchronised before and behind. What is made and loaded once (first look, flush and figures) is
warm-up.

What a step with monitors takes more is its time less the mean of those without in the same five.
The cost at the default intervals is put together from the medians of that: of an ordinary step, and
what a look, a flush and the figures add to it, each divided by how seldom it is by default. Its
95 % interval is of 2,000 bootstraps over the fives. As every step begins with an idle device, time
of the host counts that is otherwise hidden behind the device: an upper bound.

On a GPU CUDA raises an error wherever a timed step with monitors waits for the device, flushes
left out; the clock's own waiting is allowed. A variant that waits says where, and is timed again
unwatched.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import tempfile
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from monitors_cases import FULL, TINY, VARIANTS, Sizes, make_data
from training_runs import machine

from callbacks import (
    FastWeightMonitor,
    FileBoundaryReset,
    GateMonitor,
    PositionLossMonitor,
    RouterMonitor,
    StreamStateCheckpoint,
    Throughput,
)

WARM_UP = 24
"""Steps that hold the first look, the first flush and the first figures."""

OBSERVE, FLUSH = 5, 20
"""Steps from look to look and from flush to flush, where 20 and 100 are the defaults."""

WINDOW = 5
"""Steps that are compared with each other."""

Windows = dict[int, list[tuple[str, float]]]
"""Number of a window -> what each of its steps was, and its milliseconds."""

WITHOUT, *KINDS = ("without", "ordinary", "look", "flush")
COLUMNS = (
    "variant | ms without [p10, p90] | ordinary with monitors: + ms | a look: + ms | "
    "a flush: + ms | figures: ms | overhead % [95 %] | waits between flushes"
)


def monitors(observe: int = OBSERVE, flush: int = FLUSH) -> list[pl.Callback]:
    """All of them; figures are drawn at the first flush, to load what draws."""
    return [
        *(kind(flush, observe, flush) for kind in (GateMonitor, FastWeightMonitor, RouterMonitor)),
        PositionLossMonitor(),
        Throughput(flush),
    ]


class Stopwatch(pl.Callback):
    """Times every step behind the warm-up by itself, and hands some of them to the monitors.

    Args:
        warm_up: steps before.
        watch: raise an error where a step with monitors waits for the device and does not flush.
    """

    def __init__(self, warm_up: int, watch: bool) -> None:
        self.monitors, self.warm_up, self.watch = monitors(), warm_up, watch
        self.windows: Windows = defaultdict(list)
        self.watched, self.figures = 0, 0.0

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        self._tell("setup", trainer, pl_module, stage)

    def on_train_start(self, *args: Any) -> None:
        self._tell("on_train_start", *args)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        step = trainer.global_step + 1
        self.active, self.kind = step % WINDOW % 2 == 0, WITHOUT
        self.began = now()
        if self.active:
            self._tell("on_train_batch_start", trainer, pl_module, *args)
            self.kind = kind_of(pl_module.streams.listening)
        if self.watch:
            forbidden = step > self.warm_up and self.kind in ("ordinary", "look")
            torch.cuda.set_sync_debug_mode("error" if forbidden else "default")
            self.watched += forbidden

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if self.active:
            self._tell("on_train_batch_end", trainer, *args)
        milliseconds = 1e3 * (now() - self.began)
        if trainer.global_step > self.warm_up:
            self.windows[trainer.global_step // WINDOW].append((self.kind, milliseconds))
        elif trainer.global_step == self.warm_up:
            for monitor in self.monitors[:3]:
                monitor.figure_every_n_steps = DEFAULT.figure_every_n_steps

    def on_train_epoch_end(self, *args: Any) -> None:
        self._allow_waiting()

    def on_train_end(self, *args: Any) -> None:
        self._allow_waiting()
        began = now()
        self._tell("on_train_end", *args)
        self.figures = 1e3 * (now() - began)

    def _allow_waiting(self) -> None:
        """Lightning's own bookkeeping behind an epoch, and the last flush, are no steps."""
        if self.watch:
            torch.cuda.set_sync_debug_mode("default")

    def _tell(self, hook: str, *args: Any) -> None:
        for monitor in self.monitors:
            getattr(monitor, hook)(*args)


DEFAULT = GateMonitor()
"""Its intervals are those of every monitor."""


def kind_of(listening: set[str]) -> str:
    """What a step with monitors does, by what they listen to."""
    if listening >= FastWeightMonitor.flush_topics:
        return "flush"
    return "look" if listening else "ordinary"


def now() -> float:
    """Seconds, when the device has done all; CUDA may forbid others to wait, but not this."""
    if torch.cuda.is_available():
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
    return time.perf_counter()


def run(name: str, size: Sizes, folder: Path, steps: int, stopwatch: Stopwatch) -> None:
    """Train for some steps, without validation."""
    torch.manual_seed(0)
    trainer = pl.Trainer(
        accelerator="auto",
        devices=1,
        precision="bf16-mixed" if torch.cuda.is_available() else "32-true",
        max_steps=steps,
        max_epochs=-1,
        logger=TensorBoardLogger(folder, name="runs"),
        log_every_n_steps=100,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[FileBoundaryReset(), StreamStateCheckpoint(), stopwatch],
    )
    try:
        trainer.fit(VARIANTS[name](size), make_data(name, size, folder))
    finally:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")


def measure(name: str, size: Sizes, folder: Path, options: argparse.Namespace) -> str:
    """A line of the table."""
    steps, watch = options.warm_up + options.steps, torch.cuda.is_available()
    stopwatch = Stopwatch(options.warm_up, watch)
    try:
        run(name, size, folder, steps, stopwatch)
        waits = f"none in {stopwatch.watched} steps" if watch else ""
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        waits = f"{str(error).splitlines()[0]}, {where(error)}"
        stopwatch = Stopwatch(options.warm_up, watch=False)
        run(name, size, folder, steps, stopwatch)
    return f"| {name} | {line([*stopwatch.windows.values()], stopwatch.figures)} | {waits} |"


def where(error: BaseException) -> str:
    """The last line of this repository that an error came through."""
    root = str(Path(__file__).parents[1])
    own = [at for at in traceback.extract_tb(error.__traceback__) if at.filename.startswith(root)]
    place = own[-1]
    return f"{Path(place.filename).relative_to(root)}:{place.lineno}"


def line(windows: Sequence[Sequence[tuple[str, float]]], figures: float) -> str:
    """The cells of a variant: medians with 10th and 90th percentile, and what they come to.

    Args:
        windows: what each step was, and its milliseconds.
        figures: milliseconds of drawing all of them.
    """
    rng = random.Random(0)
    without = [ms for steps in windows for kind, ms in steps if kind == WITHOUT]
    parts = [*map(more, windows)]
    draws = [overhead(rng.choices(parts, k=len(parts)), without, figures) for _ in range(2000)]
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    ordinary, look, flush = (np.concatenate([part[kind] for part in parts]) for kind in KINDS)
    middle = np.median(ordinary)
    cells = [spread(np.array(without)), spread(ordinary, "+")]
    cells += [spread(look - middle, "+"), spread(flush - middle, "+"), f"{figures:.0f}"]
    cost = overhead(parts, without, figures)
    return " | ".join([*cells, f"{cost:+.2f} [{low:+.2f}, {high:+.2f}]"])


def more(steps: Sequence[tuple[str, float]]) -> dict[str, list[float]]:
    """By kind, what steps of a window take more than the mean of those without monitors."""
    base = statistics.mean(ms for kind, ms in steps if kind == WITHOUT)
    return {name: [ms - base for kind, ms in steps if kind == name] for name in KINDS}


def overhead(
    parts: Sequence[dict[str, list[float]]], without: Sequence[float], figures: float
) -> float:
    """Percent of a step without monitors that they add at the default intervals.

    NaN where the windows hold no step of a kind.
    """
    found = [[ms for part in parts for ms in part[kind]] for kind in KINDS]
    if not all(found):
        return math.nan
    ordinary, look, flush = map(statistics.median, found)
    cost = ordinary + (look - ordinary) / DEFAULT.observe_every_n_steps
    cost += (flush - ordinary) / DEFAULT.every_n_steps + figures / DEFAULT.figure_every_n_steps
    return 100 * cost / statistics.median(without)


def spread(values: np.ndarray, sign: str = "") -> str:
    """Median, 10th and 90th percentile, and of how many."""
    low, middle, high = np.percentile(values, [10, 50, 90])
    return f"{middle:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}] ({len(values)})"


def main() -> None:
    """Print a table, and write it after every variant."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--steps", type=int, default=200, help="steps that are timed, 20 at least")
    parser.add_argument("--warm-up", type=int, default=WARM_UP, help=f"{FLUSH} at least")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--out", type=Path, help="file to write")
    options = parser.parse_args()
    if options.steps < FLUSH or options.warm_up < FLUSH:
        parser.error(f"--steps and --warm-up must be at least {FLUSH}: one flush is in each")
    warnings.filterwarnings("ignore", category=UserWarning, module="lightning|lightning_modules")
    lines = [f"| {COLUMNS} |", "|---" * (1 + COLUMNS.count("|")) + "|"]
    about = (
        f"Overhead at the default intervals: looked at every {DEFAULT.observe_every_n_steps}th "
        f"step, flushed every {DEFAULT.every_n_steps}th, figures every "
        f"{DEFAULT.figure_every_n_steps}th. In parentheses: number of steps. "
        f"{machine(('torch', 'lightning', 'transformers', 'torchmetrics'))}"
    )
    print(*lines, sep="\n")
    for name in options.variants:
        with tempfile.TemporaryDirectory() as folder:
            size = TINY if options.tiny else FULL
            lines.append(measure(name, size, Path(folder), options))
        print(lines[-1], flush=True)
        if options.out:
            options.out.write_text("\n".join([*lines, "", about]) + "\n")
    print(about)


if __name__ == "__main__":
    main()
