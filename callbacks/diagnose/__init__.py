"""Reads the TensorBoard files of a run and says in words what looks wrong, and what to turn.

`python -m callbacks.diagnose RUN_DIR`. A rule is a function that looks at one thing; adding one is
a function under `@rule` in one of the `*_rules` files.
"""

from callbacks.diagnose import (
    fast_weight_rules,
    gate_rules,
    position_rules,
    router_rules,
    run_rules,
)
from callbacks.diagnose.finding import RULES, Finding, Rule, diagnose
from callbacks.diagnose.run import Curve, Run, RunError, read_run

__all__ = [
    "RULES",
    "Curve",
    "Finding",
    "Rule",
    "Run",
    "RunError",
    "diagnose",
    "fast_weight_rules",
    "gate_rules",
    "position_rules",
    "read_run",
    "router_rules",
    "run_rules",
]
