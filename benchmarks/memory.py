"""Train language models with and without a memory bank, measure them, report.

    python benchmarks/memory.py train    --out results --seeds 0 --jobs 6 --accelerator gpu
    python benchmarks/memory.py evaluate --out results --seeds 0 --jobs 6 --accelerator gpu
    python benchmarks/memory.py train    --out results --best --jobs 6 --accelerator gpu
    python benchmarks/memory.py evaluate --out results --best --jobs 6 --accelerator gpu
    python benchmarks/memory.py report   --out results

The first two lines try every learning rate with one seed; `--best` takes every arm's best rate by
validation loss for all seeds. What is complete is not done again. `report` writes `results.md`.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from memory_report import best_trials, report
from memory_trials import HELD_OUT, TRIALS
from training_runs import (
    changes_of,
    make_parser,
    pending,
    read,
    run_all,
    trial_config,
    write_config,
)


def main() -> None:
    """Parse the command line and obey."""
    parser = make_parser(__doc__, ["train", "evaluate", "report"])
    parser.add_argument("--best", action="store_true", help="only the best rate of every arm")
    parser.add_argument("--held-out", help="folder or glob of other text, or `stdlib`: lost?")
    options = parser.parse_args()
    trials = TRIALS
    if options.best:
        names = best_trials(read(options.out, TRIALS))
        trials = {name: TRIALS[name] for name in names}
    if options.command != "report":
        runs = pending(options, trials)
        if options.command == "train":
            for name, folder in runs:
                prepare(name, folder, options)
        run_all(Path(__file__).with_name("language_run.py"), options, runs)
    report(options.out)


def prepare(name: str, folder: Path, options: Namespace) -> None:
    """Write the run's config file; texts are tokenised by the first run that needs them."""
    kept = ["ModelCheckpoint", "RouterMonitor", "Throughput"]
    config = trial_config(TRIALS[name], folder, changes_of(options), kept)
    config["data"]["init_args"]["cache"] = str(options.out / "data")
    write_config(config, folder)
    if name.startswith(HELD_OUT) and options.held_out:
        source: dict[str, str | None] = {"kind": "stdlib", "path": None}
        if options.held_out != "stdlib":
            source = {"kind": "files", "path": str(Path(options.held_out).resolve())}
        other = {"source": source}
        write_config({"data": {"init_args": other}}, folder, "held_out.yaml")


if __name__ == "__main__":
    main()
