"""Rules about the run as a whole: did it end, did it learn at all, was it watched and fed?"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from callbacks.diagnose.finding import Finding, rule
from callbacks.diagnose.run import Run

STARVED = 0.5
"""Share of the time spent waiting for data. From one half on, a device twice as fast would hardly
help: the loader is what to speed up first."""

ON_PURPOSE = ("KeyboardInterrupt", "SIGTERMException")
"""A run that someone (or the machine's queue) stopped is not a run that failed."""

WATCHES = r"(gate|fast_weight|chapter_router|router|position_loss)/.*"
MONITORS = ("GateMonitor", "FastWeightMonitor", "RouterMonitor", "PositionLossMonitor")


@rule
def stopped(run: Run) -> Iterator[Finding]:
    """The run ended with an error; `not_finite` tells of those that NaN caused."""
    text = run.texts.get("run/stopped", "")
    if not text or any(reason in text for reason in (*ON_PURPOSE, "NonFiniteError")):
        return
    yield Finding(
        "stopped", "The run ended with an error.", text, "what the error says; then --ckpt_path"
    )


@rule
def not_finite(run: Run) -> Iterator[Finding]:
    """NaN or Inf: a monitor stopped the run, or a curve has such values."""
    text = run.texts.get("run/stopped", "")
    first = [
        (int(curve.steps[np.argmin(np.isfinite(curve.values))]), tag)
        for tag, curve in run.scalars.items()
        if not np.isfinite(curve.values).all()
    ]
    if "NonFiniteError" in text:
        evidence = text
    elif first:
        step, tag = min(first)
        evidence = f"{tag} is not finite from step {step} on ({len(first)} such curves)"
    else:
        return
    yield Finding(
        "NaN",
        "Numbers became NaN or infinite: the run has diverged.",
        evidence,
        "a smaller model.init_args.optimizer.init_args.lr or trainer.gradient_clip_val, from a "
        "checkpoint of before that step (--ckpt_path)",
    )


@rule
def learning_rate_zero(run: Run) -> Iterator[Finding]:
    """A group's learning rate was 0 all the time; at the end of a cosine it may be."""
    curves = run.curves(r"lr[-/]?(.*)")
    zero = [group for (group,), curve in curves.items() if not curve.values.any()]
    if zero:
        yield Finding(
            "learning rate",
            f"The learning rate of {', '.join(sorted(zero))} was 0 in the whole run: nothing of it "
            "was trained.",
            f"lr/{sorted(zero)[0]} is 0 at all of {len(curves[(sorted(zero)[0],)].steps)} steps "
            f"that were written, up to step {run.last_step}",
            "model.init_args.optimizer.init_args.lr; to leave a group out on purpose, "
            "model.init_args.groups.NAME.frozen: true",
        )


@rule
def starved(run: Run) -> Iterator[Finding]:
    """Training waits for data. The first window, in which workers start, does not count."""
    curve = run.scalars.get("throughput/data_wait")
    if curve is None or len(curve.values) < 3:
        return
    share = float(np.median(curve.values[1:]))
    if share > STARVED:
        yield Finding(
            "starved",
            f"Training waits for data in {share:.0%} of its time.",
            f"median of throughput/data_wait over {len(curve.values) - 1} windows up to step "
            f"{int(curve.steps[-1])} is {share:.2f} (threshold {STARVED})",
            "data.init_args.num_workers: as many as there are spare cores (now "
            f"{run.options.get('data.num_workers', 'not known')}); then faster storage",
        )


@rule
def not_watched(run: Run) -> Iterator[Finding]:
    """No monitor: nothing can be said about the memory."""
    if run.curves(WATCHES):
        return
    # A monitor of a control without a memory has nothing to write.
    if not set(str(run.options.get("trainer.callbacks", "")).split(", ")) & set(MONITORS):
        yield Finding(
            "no monitors",
            "No monitor ran, so that nothing can be said about the memory.",
            f"none of the {len(run.scalars)} curves is of a gate, fast weights, a router or the "
            "loss by position",
            f"trainer.callbacks: add {', '.join(MONITORS)}",
        )
