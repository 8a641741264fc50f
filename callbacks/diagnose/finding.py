"""A finding, and the registry of the rules that find."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from callbacks.diagnose.run import Run


@dataclass(frozen=True)
class Finding:
    """What looks wrong.

    Args:
        name: of the rule's subject, short.
        says: one sentence.
        evidence: numbers and steps.
        knob: config key to turn, and in which direction.
    """

    name: str
    says: str
    evidence: str
    knob: str


Rule = Callable[[Run], Iterable[Finding]]

RULES: list[Rule] = []
"""All rules, in the order of the report."""


def rule(function: Rule) -> Rule:
    """Register a rule."""
    RULES.append(function)
    return function


def diagnose(run: Run) -> list[Finding]:
    """What all rules find."""
    return [finding for rule in RULES for finding in rule(run)]
