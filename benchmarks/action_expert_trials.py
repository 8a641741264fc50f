"""The named trials of the action expert: a config file and what a trial changes in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MAZE = "action_expert_maze_memory"
PICK_AND_PLACE = "action_expert_fetch_pick_place"


@dataclass(frozen=True)
class Trial:
    """One row of the results.

    Args:
        config: name of a file in `configs/`, without `.yaml`.
        about: what the row is, in words.
        changes: dotted key -> value, set in the config.
        horizons: numbers of executed actions to choose from on episodes of their own; empty keeps
            the config's.
    """

    config: str
    about: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    horizons: tuple[int, ...] = ()


TTT = "model.init_args.ttt."
TRIALS: dict[str, Trial] = {
    "pick_place/ttt": Trial(PICK_AND_PLACE, "TTT in every layer", horizons=(2, 4, 8)),
    "pick_place/control": Trial(
        f"{PICK_AND_PLACE}_control", "no TTT, wider MLPs, equal parameters", horizons=(2, 4, 8)
    ),
    "maze/visible": Trial(
        MAZE,
        "goal always visible, state reset (upper bound)",
        {"data.init_args.goal_visible_chunks": None, "model.init_args.ttt_state": "reset"},
    ),
    "maze/reset": Trial(
        MAZE, "goal in the first chunk, state reset", {"model.init_args.ttt_state": "reset"}
    ),
    # As many chunks are seen as with k = 8: a step takes k of each row.
    "maze/carry_k1": Trial(
        MAZE,
        "state carried, k = 1",
        {
            "data.init_args.tbptt": 1,
            "trainer.max_steps": 40_000,
            "trainer.val_check_interval": 8_000,
        },
    ),
    "maze/carry_k4": Trial(
        MAZE,
        "state carried, k = 4",
        {
            "data.init_args.tbptt": 4,
            "trainer.max_steps": 10_000,
            "trainer.val_check_interval": 2_000,
        },
    ),
    "maze/carry_k8": Trial(MAZE, "state carried, k = 8"),
    "maze/write_all": Trial(MAZE, "all tokens write", {"model.init_args.ttt_write": "all"}),
    "maze/write_action": Trial(
        MAZE, "action tokens write", {"model.init_args.ttt_write": "action"}
    ),
    "maze/after_attn": Trial(MAZE, "TTT reads attention", {f"{TTT}ttt_mode": "after_attn"}),
    "maze/mlp": Trial(MAZE, "TTT-MLP", {f"{TTT}layer.kind": "mlp"}),
    "maze/write_all_over_length": Trial(
        MAZE,
        "all tokens write, inner step divided by their number",
        {"model.init_args.ttt_write": "all", f"{TTT}layer.eta_over_length": True},
    ),
    "maze/gate_tanh": Trial(MAZE, "gate tanh(alpha)", {f"{TTT}ttt_gate": "tanh"}),
    "maze/gate_adarms": Trial(
        MAZE, "gate from adaRMS", {f"{TTT}ttt_gate": "adarms", f"{TTT}ttt_input_norm": "adarms"}
    ),
    "maze/late_cue": Trial(
        MAZE, "goal in chunk 2 only, state carried", {"data.init_args.goal_visible_chunks": [2]}
    ),
    "maze/late_cue_reset": Trial(
        MAZE,
        "goal in chunk 2 only, state reset",
        {"data.init_args.goal_visible_chunks": [2], "model.init_args.ttt_state": "reset"},
    ),
}
