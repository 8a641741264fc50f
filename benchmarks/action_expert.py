"""Train the action expert's trials over seeds, try the policies in the simulator, report.

    python benchmarks/action_expert.py train    --out results --trials 'maze/*' --jobs 2
    python benchmarks/action_expert.py evaluate --out results --trials 'maze/*' --jobs 2
    python benchmarks/action_expert.py report   --out results
    python benchmarks/action_expert.py draw     --out results

`train` records the data (or reuses it) and leaves `TRIAL/seed_N/policy.ckpt` and `training.json`;
called again it continues what was interrupted from its last checkpoint and skips what is complete.
`evaluate` needs only these two and `config.yaml` (training may have happened on another machine),
and leaves `result.json`. `report` writes `results.md` and the figures from whatever is complete,
`draw` the paths and the animation of the maze with and without carried state.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from action_expert_demo import draw
from action_expert_report import report
from action_expert_trials import TRIALS
from training_runs import (
    changes_of,
    make_parser,
    pending,
    run_all,
    trial_config,
    write_config,
)

from datamodules.recording import RecordingConfig, record

CURVE = {
    "class_path": "ClosedLoopEvaluation",
    "init_args": {
        "episodes": 50,
        "num_envs": 50,
        "at_start": False,
        "at_end": False,
        "seed": 2,
    },
}
"""Success while training goes on, on episodes that no result is taken from."""


def main() -> None:
    """Parse the command line and obey."""
    parser = make_parser(__doc__, ["train", "evaluate", "report", "draw"])
    parser.add_argument(
        "--curve", type=int, default=5, help="train: evaluations in closed loop on the way"
    )
    options = parser.parse_args()
    if options.command == "draw":
        return draw(options.out)
    if options.command != "report":
        runs = pending(options, TRIALS)
        if options.command == "train":
            for name, folder in runs:
                prepare(name, folder, options.out, changes_of(options), options.curve)
        run_all(Path(__file__).with_name("action_expert_run.py"), options, runs)
    report(options.out)


def prepare(name: str, folder: Path, out: Path, changes: dict[str, Any], curve: int) -> None:
    """Write the run's config file, and record what it needs."""
    changes = {"data.init_args.root": str(out / "data"), **changes}
    config = trial_config(TRIALS[name], folder, changes, ["ModelCheckpoint", "EMA", "Throughput"])
    if curve:
        points = {**CURVE["init_args"], "every_n_steps": config["trainer"]["max_steps"] // curve}
        config["trainer"]["callbacks"].append({**CURVE, "init_args": points})
    data = config["data"]["init_args"]
    record(RecordingConfig(data["simulation"], data["episodes"]), data["root"])
    write_config(config, folder)


if __name__ == "__main__":
    main()
