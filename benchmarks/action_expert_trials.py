"""The named trials of the action expert: a config file and what a trial changes in it."""

from __future__ import annotations

from dataclasses import dataclass

from training_runs import Trial

MAZE = "action_expert_maze_memory"
PICK_AND_PLACE = "action_expert_fetch_pick_place"


@dataclass(frozen=True)
class ActionTrial(Trial):
    """A trial whose policy may choose how many actions it executes.

    Args:
        horizons: numbers of executed actions to choose from on episodes of their own; empty keeps
            the config's.
    """

    horizons: tuple[int, ...] = ()


TTT = "model.init_args.ttt."
TRIALS: dict[str, ActionTrial] = {
    "pick_place/ttt": ActionTrial(PICK_AND_PLACE, "TTT in every layer", horizons=(2, 4, 8)),
    "pick_place/control": ActionTrial(
        f"{PICK_AND_PLACE}_control", "no TTT, wider MLPs, equal parameters", horizons=(2, 4, 8)
    ),
    "maze/visible": ActionTrial(
        MAZE,
        "goal always visible, state reset (upper bound)",
        {"data.init_args.goal_visible_chunks": None, "model.init_args.ttt_state": "reset"},
    ),
    "maze/reset": ActionTrial(
        MAZE, "goal in the first chunk, state reset", {"model.init_args.ttt_state": "reset"}
    ),
    # As many chunks are seen as with k = 8: a step takes k of each row.
    "maze/carry_k1": ActionTrial(
        MAZE,
        "state carried, k = 1",
        {
            "data.init_args.tbptt": 1,
            "trainer.max_steps": 40_000,
            "trainer.val_check_interval": 8_000,
        },
    ),
    "maze/carry_k4": ActionTrial(
        MAZE,
        "state carried, k = 4",
        {
            "data.init_args.tbptt": 4,
            "trainer.max_steps": 10_000,
            "trainer.val_check_interval": 2_000,
        },
    ),
    "maze/carry_k8": ActionTrial(MAZE, "state carried, k = 8"),
    "maze/write_all": ActionTrial(MAZE, "all tokens write", {"model.init_args.ttt_write": "all"}),
    "maze/write_action": ActionTrial(
        MAZE, "action tokens write", {"model.init_args.ttt_write": "action"}
    ),
    "maze/after_attn": ActionTrial(MAZE, "TTT reads attention", {f"{TTT}ttt_mode": "after_attn"}),
    "maze/mlp": ActionTrial(MAZE, "TTT-MLP", {f"{TTT}layer.kind": "mlp"}),
    "maze/write_all_over_length": ActionTrial(
        MAZE,
        "all tokens write, inner step divided by their number",
        {"model.init_args.ttt_write": "all", f"{TTT}layer.eta_over_length": True},
    ),
    "maze/gate_tanh": ActionTrial(MAZE, "gate tanh(alpha)", {f"{TTT}ttt_gate": "tanh"}),
    "maze/gate_adarms": ActionTrial(
        MAZE, "gate from adaRMS", {f"{TTT}ttt_gate": "adarms", f"{TTT}ttt_input_norm": "adarms"}
    ),
    "maze/late_cue": ActionTrial(
        MAZE, "goal in chunk 2 only, state carried", {"data.init_args.goal_visible_chunks": [2]}
    ),
    "maze/late_cue_reset": ActionTrial(
        MAZE,
        "goal in chunk 2 only, state reset",
        {"data.init_args.goal_visible_chunks": [2], "model.init_args.ttt_state": "reset"},
    ),
}
