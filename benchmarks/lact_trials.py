"""The named trials of LaCT: a config file and what a trial changes in it."""

from __future__ import annotations

from training_runs import Trial

CONFIG = "model.init_args.config."
R1 = {f"{CONFIG}r": 1, f"{CONFIG}residual_ttt": False}
ATTENTION = {f"{CONFIG}branches": "attention"}
FULL = {f"{CONFIG}window_size": None}
NO_LACT = {f"{CONFIG}r": 1, f"{CONFIG}residual_ttt": False, **ATTENTION}

TRIALS: dict[str, Trial] = {
    "recall/r1": Trial("lact_recall", "window 64 and memory, r = 1", R1),
    "recall/r2": Trial("lact_recall", "window 64 and memory, r = 2 with skips"),
    "recall/window": Trial("lact_recall", "window 64 alone", NO_LACT),
    "recall/full": Trial("lact_recall", "full attention alone", {**NO_LACT, **FULL}),
    "text/carry": Trial("lact_stacked", "memory carried through the file, r = 1", R1),
    "text/carry_r2": Trial("lact_stacked", "memory carried through the file, r = 2 with skips"),
    "text/reset": Trial(
        "lact_stacked",
        "memory and window reset every 1,024 tokens, r = 1",
        {**R1, "model.init_args.fast_state": "reset"},
    ),
    "text/window": Trial("lact_stacked", "window 256 alone, carried through the file", NO_LACT),
}
