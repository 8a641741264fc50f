"""At matched parameters and the same data: does an adapter that learns while it reads beat LoRA?

    python benchmarks/compare_adapters.py train    --out results --seeds 0 --jobs 2
    python benchmarks/compare_adapters.py train    --out results --best --jobs 2
    python benchmarks/compare_adapters.py evaluate --out results --best --jobs 2
    python benchmarks/compare_adapters.py report   --out results

The first line tries every learning rate of every arm with one seed; `--best` takes every arm's best
rate for all seeds, by the last validation loss of training, which `trainer.limit_val_batches` of
the config keeps short. `evaluate` reads all validation files from beginning to end. What is
complete is not done again, and what was interrupted goes on from its last checkpoint. `report`
writes `results.md`. Another base model and other texts, say:

    --set model.init_args.pretrained.name=FOLDER data.init_args.tokenizer.name=FOLDER \\
        data.init_args.source.kind=files data.init_args.source.path=TEXTS
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from compare_report import report
from compare_results import best_trials
from compare_trials import ARMS, BASE, EVERY_N, METHOD, OPTIONAL, TRIALS, match_in_place
from training_runs import (
    ROOT,
    arm_of,
    changes_of,
    make_parser,
    pending,
    run_all,
    set_value,
    trial_config,
    write_config,
)

PROGRAM = Path(__file__).with_name("compare_run.py")
USUAL = [f"{arm}/*" for arm in ARMS if arm not in OPTIONAL]


def main() -> None:
    """Parse the command line and obey."""
    parser = make_parser(__doc__, ["train", "evaluate", "report"])
    parser.set_defaults(trials=USUAL)
    parser.add_argument("--best", action="store_true", help="only the best rate of every arm")
    parser.add_argument(
        "--config",
        type=Path,
        default=ROOT / "configs" / "compare_lora_ttt.yaml",
        help="train: of a TTTLoRAModule on long files; the arms set method, fast_state and rate",
    )
    options = parser.parse_args()
    if options.command != "report":
        go(options)
    report(options.out)


def go(options: Namespace) -> None:
    """Train or evaluate what is wanted and not there yet."""
    trials = {name: TRIALS[name] for name in best_trials(options.out)} if options.best else TRIALS
    runs = [
        (name, folder)
        for name, folder in pending(options, trials)
        if arm_of(name) != BASE or folder.name == f"seed_{options.seeds[0]}"
    ]
    for name, folder in runs:
        if options.command == "train":
            prepare(name, folder, options)
        else:
            write_config(nested(changes_of(options)), folder, "evaluation.yaml")
    run_all(PROGRAM, options, runs)


def prepare(name: str, folder: Path, options: Namespace) -> None:
    """Write the run's config file; texts are tokenised by the first run that needs them."""
    trial = replace(TRIALS[name], config=str(options.config.resolve().with_suffix("")))
    changes = changes_of(options)
    config = trial_config(trial, folder, changes, ["ModelCheckpoint", "Throughput"])
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    data["cache"] = str(options.out / "data")
    data.setdefault("seed", config["seed_everything"])  # the order of files, the same in all arms
    if TRIALS[name].changes[METHOD] == "in_place" and EVERY_N not in changes:
        set_value(config, EVERY_N, match_in_place(model))
    check_checkpoints(config["trainer"])
    write_config(config, folder)


def nested(changes: dict[str, Any]) -> dict[str, Any]:
    """Dotted keys as a config."""
    config: dict[str, Any] = {}
    for key, value in changes.items():
        set_value(config, key, value)
    return config


def check_checkpoints(trainer: dict) -> None:
    """The last checkpoint must be that of the last step.

    Raises:
        SystemExit: it would be of an earlier one.
    """
    for callback in trainer["callbacks"]:
        every = callback.get("init_args", {}).get("every_n_train_steps")
        if every and trainer["max_steps"] > every and trainer["max_steps"] % every:
            raise SystemExit(
                f"trainer.max_steps={trainer['max_steps']} must be a multiple of {every}, the "
                "every_n_train_steps of ModelCheckpoint: what comes behind would be lost"
            )


if __name__ == "__main__":
    main()
