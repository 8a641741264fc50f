"""Rules about routers: are all chapters (or members) used?"""

from __future__ import annotations

from collections.abc import Iterator

from callbacks.diagnose.finding import Finding, rule
from callbacks.diagnose.run import Curve, Run

COLLAPSED = 0.5
"""Entropy of the load over its largest value. One half is what 4 of 16 chapters used evenly have:
a router with top_k 4 that always chooses the same ones."""

DEAD = 0.25
"""Share of chapters that nothing chose. A quarter of the bank is then never read; a few of them
may only be rare in the data that was looked at."""

TOPICS = {
    "chapter_router": ("chapters", "model.init_args.memory.memory.router.balance_coefficient"),
    "router": ("members", "balance_coefficient of the routed line in model.init_args.adapters"),
}


@rule
def collapsed(run: Run) -> Iterator[Finding]:
    """A few chapters get everything."""
    for topic, (choices, knob) in TOPICS.items():
        entropy = _late(run, f"{topic}/load_entropy/(.+)")
        low = {layer: value for layer, value in entropy.items() if value < COLLAPSED}
        if low:
            worst = min(low, key=lambda layer: low[layer])
            fullest = run.scalars.get(f"{topic}/max_over_mean/{worst}")
            more = "" if fullest is None else f", the fullest has {fullest.late():.1f} x the mean"
            yield Finding(
                "router collapsed",
                f"The router sends nearly everything to few {choices} in {len(low)} of "
                f"{len(entropy)} layers.",
                f"{topic}/load_entropy/{worst} is {low[worst]:.2f} in the last flushes up to step "
                f"{run.last_step} (1 is balanced, threshold {COLLAPSED}){more}",
                f"{knob}: larger, e.g. 0.1",
            )


@rule
def dead(run: Run) -> Iterator[Finding]:
    """Chapters that nothing chooses."""
    for topic, (choices, knob) in TOPICS.items():
        shares = _late(run, f"{topic}/dead/(.+)")
        many = {layer: value for layer, value in shares.items() if value > DEAD}
        if many:
            worst = max(many, key=lambda layer: many[layer])
            yield Finding(
                "dead choices",
                f"{many[worst]:.0%} of the {choices} are chosen by nothing in {worst}.",
                f"{topic}/dead/{worst} is {many[worst]:.2f} in the last flushes up to step "
                f"{run.last_step} (threshold {DEAD}); {len(many)} of {len(shares)} layers",
                f"{knob}: larger, e.g. 0.1; or fewer of them (num_chapters). Too few decisions "
                "between flushes look the same: then raise every_n_steps of RouterMonitor",
            )


def _late(run: Run, pattern: str) -> dict[str, float]:
    curves: dict[tuple[str, ...], Curve] = run.curves(pattern)
    return {layer: curve.late() for (layer,), curve in curves.items()}
