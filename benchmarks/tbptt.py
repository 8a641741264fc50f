"""What gradients through k chunks buy, at equal numbers of chunks seen, and what they cost.

    python benchmarks/tbptt.py run    --out results --trials 'recall/*' --seeds 0 1
    python benchmarks/tbptt.py run    --out results --trials 'maze/*' --jobs 4 --accelerator gpu
    python benchmarks/tbptt.py report --out results

`recall` (configs/lact_recall.yaml, made small) asks for what stands one to three chunks back, where
only the carried state can know it; `maze` (configs/action_expert_maze_memory.yaml) shows its goal
in the first chunk only. A run with k takes 1/k of the steps. `run` trains, measures and reports: it
leaves `TRIAL/seed_N/result.json` and `results.md`, continues what was interrupted, and skips what
is complete.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from tbptt_report import report
from tbptt_trials import TRIALS
from training_runs import (
    changes_of,
    make_parser,
    pending,
    run_all,
    trial_config,
    write_config,
)

from datamodules.recording import RecordingConfig, record


def main() -> None:
    """Parse the command line and obey."""
    parser = make_parser(__doc__, ["run", "report"])
    parser.add_argument(
        "--chunks", type=int, help="chunks that a row reads in training; default: the trial's"
    )
    options = parser.parse_args()
    if options.command == "run":
        for task in ("train", "evaluate"):
            run(Namespace(**{**vars(options), "command": task}))
    report(options.out)


def run(options: Namespace) -> None:
    """Train or evaluate all runs for which that is not done yet."""
    runs = pending(options, TRIALS)
    if options.command == "train":
        for name, folder in runs:
            prepare(name, folder, options.out, changes_of(options), options.chunks)
    run_all(Path(__file__).with_name("tbptt_run.py"), options, runs)


def prepare(
    name: str, folder: Path, out: Path, changes: dict[str, Any], chunks: int | None
) -> None:
    """Write the run's config file, and record what it needs."""
    trial = TRIALS[name]
    if name.startswith("maze/"):
        changes = {"data.init_args.root": str(out / "data"), **changes}
    kept = ["ModelCheckpoint", "EMA", "Throughput"]
    config = trial_config(trial, folder, {**trial.schedule(chunks), **changes}, kept)
    cost = {"class_path": "tbptt_cost.StepCost", "init_args": {"path": str(folder / "cost.json")}}
    config["trainer"]["callbacks"].append(cost)
    if name.startswith("maze/"):
        data = config["data"]["init_args"]
        record(RecordingConfig(data["simulation"], data["episodes"]), data["root"])
    write_config(config, folder)


if __name__ == "__main__":
    main()
