"""Findings in words."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill

from callbacks.diagnose.finding import Finding
from callbacks.diagnose.run import Run

SUBJECTS = {
    "loss": (r"(train|val)/loss", "self.log of the module"),
    "learning rate": (r"lr.*", "LearningRateMonitor"),
    "gates": (r"gate/.+", "GateMonitor"),
    "fast weights": (r"fast_weight/.+", "FastWeightMonitor"),
    "routers": (r"(chapter_)?router/.+", "RouterMonitor"),
    "loss by position": (r"position_loss/.+", "PositionLossMonitor"),
    "waiting for data": (r"throughput/data_wait", "Throughput"),
}
"""What is looked at -> its curves, and who writes them."""


def report(run: Run, findings: Sequence[Finding]) -> str:
    """What was looked at, and each finding with its evidence and its knob."""
    seen = [name for name, (pattern, _) in SUBJECTS.items() if run.curves(pattern)]
    missing = [f"{name} ({writer})" for name, (_, writer) in SUBJECTS.items() if name not in seen]
    lines = [
        f"{run.folder}: {len(run.scalars)} curves up to step {run.last_step}",
        _wrap("looked at: ", ", ".join(seen) or "nothing"),
    ]
    if missing:
        lines.append(_wrap("no curves: ", ", ".join(missing)))
    for number, finding in enumerate(findings, 1):
        lines += ["", f"{number}. {finding.name}: {finding.says}"]
        lines += [_wrap("   seen: ", finding.evidence), _wrap("   turn: ", finding.knob)]
    if not findings:
        lines += ["", "Nothing looks wrong."]
    return "\n".join(lines)


def _wrap(label: str, text: str) -> str:
    flat = " ".join(text.split())
    return fill(label + flat, 98, subsequent_indent=" " * len(label), break_on_hyphens=False)
