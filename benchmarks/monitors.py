"""What the monitors cost, and whether a training step ever waits for the GPU.

    python benchmarks/monitors.py --out monitors.md     # on a GPU, about three minutes
    python benchmarks/monitors.py --tiny                # a minute on a CPU

Every variant is trained once by Lightning's Trainer with a TensorBoard logger, on the standard
library as bytes (the action expert: on random episodes in the LeRobot format). The monitors are
there in three steps of five, alternately, and look and flush more often than by default: steps
without them, ordinary ones, those that are looked at and those that flush see the same machine.
What is made and loaded once (first look, first flush and figures) is warm-up.

In an ordinary step the monitors are nothing but Python between two hooks' beginnings and ends: the
host's time in there is what they cost, and is not lost in steps that vary by a tenth. That nothing
is listened to, published or launched in such a step is watched, and an error where it is not so.
A look and a flush work inside of the model too. Such a step is timed as a whole, from the monitors'
first hook to their last, with the device synchronised before and behind; what it takes more is its
time less the mean of those without monitors in the same five.

The cost at the default intervals is put together from the medians: of 100 steps one flushes, five
are looked at and the others are ordinary; the figures are drawn once in 5,000. Its 95 % interval is
of 2,000 bootstraps over the fives. As a step that is timed begins with an idle device, time of the
host counts that is otherwise hidden behind the device: an upper bound. What Lightning itself takes
to call the hooks of one more callback is not in it.

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
from torch.utils._python_dispatch import TorchDispatchMode
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

WARM_UP = 14
"""Steps that hold the first look, the first flush and the first figures."""

OBSERVE, FLUSH = 2, 10
"""Steps from look to look and from flush to flush, where 20 and 100 are the defaults."""

WINDOW = 5
"""Steps that are compared with each other."""

Windows = dict[int, list[tuple[str, float]]]
"""Number of a window -> what each of its steps was, and its milliseconds: of an ordinary step those
of the monitors alone."""

WITHOUT, ORDINARY, *DIFFERENCES = KINDS = ("without", "ordinary", "look", "flush")
COLUMNS = (
    "variant | ms without [p10, p90] | ordinary: ms in the hooks | a look: + ms | "
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
        self.watched, self.figures, self.hooks = 0, 0.0, 0.0

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        self._tell("setup", trainer, pl_module, stage)

    def on_train_start(self, *args: Any) -> None:
        self._tell("on_train_start", *args)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        step = trainer.global_step + 1
        self.active, self.kind, self.hooks = step % WINDOW % 2 == 0, WITHOUT, 0.0
        self.began = now()
        if self.active:
            self._time("on_train_batch_start", step, trainer, pl_module, *args)
            self.kind = kind_of(pl_module.streams.listening)
        if self.watch:
            forbidden = step > self.warm_up and self.kind in (ORDINARY, "look")
            torch.cuda.set_sync_debug_mode("error" if forbidden else "default")
            self.watched += forbidden

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *args: Any) -> None:
        step = trainer.global_step
        if self.kind == ORDINARY:
            self._time("on_train_batch_end", step, trainer, pl_module, *args)
            if any(pl_module.streams.published):
                raise RuntimeError(f"something was published in step {step}, an ordinary one")
        elif self.active:
            self._tell("on_train_batch_end", trainer, pl_module, *args)
        milliseconds = 1e3 * (self.hooks if self.kind == ORDINARY else now() - self.began)
        if step > self.warm_up:
            self.windows[step // WINDOW].append((self.kind, milliseconds))
        elif step == self.warm_up:
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

    def _time(self, hook: str, step: int, *args: Any) -> None:
        """Add the host's time in a hook of all monitors, in which they may launch nothing."""
        with Operations() as operations:
            began = time.perf_counter()
            self._tell(hook, *args)
            self.hooks += time.perf_counter() - began
        if operations.names and step > self.warm_up:
            raise RuntimeError(f"{hook} of an ordinary step ({step}) launches {operations.names}")

    def _tell(self, hook: str, *args: Any) -> None:
        for monitor in self.monitors:
            getattr(monitor, hook)(*args)


class Operations(TorchDispatchMode):
    """Names of all operations of torch that run, also of views, unlike `launches.Launches`."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


DEFAULT = GateMonitor()
"""Its intervals are those of every monitor."""


def kind_of(listening: set[str]) -> str:
    """What a step with monitors does, by what they listen to."""
    if listening >= FastWeightMonitor.flush_topics:
        return "flush"
    return "look" if listening else ORDINARY


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
    parts = [*map(more, windows)]
    draws = [overhead(rng.choices(parts, k=len(parts)), figures) for _ in range(2000)]
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    forms = {WITHOUT: ".2f", ORDINARY: ".3f"}
    cells = [spread(gather(parts, kind), forms.get(kind, "+.2f")) for kind in KINDS]
    cost = overhead(parts, figures)
    return " | ".join([*cells, f"{figures:.0f}", f"{cost:+.2f} [{low:+.2f}, {high:+.2f}]"])


def more(steps: Sequence[tuple[str, float]]) -> dict[str, list[float]]:
    """Milliseconds of a window by kind: of looks and flushes, what they take more than without.

    More than the mean of the steps without monitors in the same window, that is.
    """
    base = statistics.mean(ms for kind, ms in steps if kind == WITHOUT)
    return {
        name: [ms - base * (name in DIFFERENCES) for kind, ms in steps if kind == name]
        for name in KINDS
    }


def gather(parts: Sequence[dict[str, list[float]]], kind: str) -> list[float]:
    """What all windows have of a kind."""
    return [ms for part in parts for ms in part[kind]]


def overhead(parts: Sequence[dict[str, list[float]]], figures: float) -> float:
    """Percent of a step without monitors that they add at the default intervals.

    NaN where the windows hold no step of a kind.
    """
    found = [gather(parts, kind) for kind in KINDS]
    if not all(found):
        return math.nan
    without, ordinary, look, flush = map(statistics.median, found)
    looks, flushes = 1 / DEFAULT.observe_every_n_steps, 1 / DEFAULT.every_n_steps
    cost = ordinary * (1 - looks - flushes) + look * looks + flush * flushes
    cost += figures / DEFAULT.figure_every_n_steps
    return 100 * cost / without


def spread(values: Sequence[float], form: str) -> str:
    """Median, 10th and 90th percentile, and of how many."""
    low, middle, high = np.percentile(values, [10, 50, 90])
    return f"{middle:{form}} [{low:{form}}, {high:{form}}] ({len(values)})"


def main() -> None:
    """Print a table, and write it after every variant."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--steps", type=int, default=200, help="steps that are timed")
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
