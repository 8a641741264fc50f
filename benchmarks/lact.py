"""Train LaCT's trials over seeds, measure them on validation data, report.

    python benchmarks/lact.py train    --out results --jobs 4 --accelerator gpu
    python benchmarks/lact.py evaluate --out results --jobs 4 --accelerator gpu
    python benchmarks/lact.py report   --out results

`train` leaves `TRIAL/seed_N/training.json`; called again it continues what was interrupted from
its last checkpoint and skips what is complete. `evaluate` validates the last checkpoint on all
validation data and leaves `result.json`. `report` writes `results.md` and the figures from whatever
is complete.
"""

from __future__ import annotations

from pathlib import Path

from lact_report import report
from lact_trials import TRIALS
from training_runs import (
    changes_of,
    make_parser,
    pending,
    run_all,
    trial_config,
    write_config,
)


def main() -> None:
    """Parse the command line and obey."""
    options = make_parser(__doc__, ["train", "evaluate", "report"]).parse_args()
    if options.command != "report":
        runs = pending(options, TRIALS)
        if options.command == "train":
            for name, folder in runs:
                prepare(name, folder, options.out, changes_of(options))
        run_all(Path(__file__).with_name("language_run.py"), options, runs)
    report(options.out)


def prepare(name: str, folder: Path, out: Path, changes: dict) -> None:
    """Write the run's config file; texts are tokenised by the first run that needs them."""
    trial = TRIALS[name]
    kept = ["ModelCheckpoint", "PositionLossMonitor", "Throughput"]
    config = trial_config(trial, folder, changes, kept)
    if config["data"]["class_path"] == "TextStreamDataModule":
        config["data"]["init_args"]["cache"] = str(out / "data")
    write_config(config, folder)


if __name__ == "__main__":
    main()
