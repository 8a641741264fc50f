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

import argparse
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path

import yaml
from action_expert_demo import draw
from action_expert_report import report
from action_expert_trials import TRIALS, Trial

from datamodules.recording import RecordingConfig, record

ROOT = Path(__file__).resolve().parents[1]
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

PRODUCT = {"train": "training.json", "evaluate": "result.json"}


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["train", "evaluate", "report", "draw"])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--trials", nargs="+", default=["*"], help="shell patterns of names")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--accelerator", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument(
        "--curve", type=int, default=5, help="train: evaluations in closed loop on the way"
    )
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="train: dotted changes of every config",
    )
    options = parser.parse_args()
    options.out = options.out.resolve()
    if options.command == "draw":
        return draw(options.out)
    if options.command != "report":
        run(options)
    report(options.out)


def run(options: argparse.Namespace) -> None:
    """Train or evaluate all wanted runs for which that is not done yet, some at a time."""
    names = [name for name in TRIALS if any(fnmatch(name, p) for p in options.trials)]
    if not names:
        raise SystemExit(f"no trial matches {options.trials}; there are: {', '.join(TRIALS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    changes = dict(entry.split("=", 1) for entry in options.set)
    changes |= {"trainer.accelerator": options.accelerator}
    folders = []
    for seed in options.seeds:
        for name in names:
            folder = options.out / name / f"seed_{seed}"
            if (folder / PRODUCT[options.command]).exists():
                continue
            if options.command == "train":
                write_config(TRIALS[name], seed, changes, options.curve, folder, options.out)
            elif not (folder / PRODUCT["train"]).exists():
                print(f"{name} seed_{seed}: not trained yet, nothing to evaluate")
                continue
            folders.append((name, folder))
    with ThreadPoolExecutor(options.jobs) as pool:
        done = pool.map(lambda job: run_one(options.command, *job), folders)
        failed = [name for name in done if name]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def write_config(
    trial: Trial, seed: int, changes: dict, curve: int, folder: Path, out: Path
) -> None:
    """The run's own config file, with an absolute data folder; records what it needs."""
    config = yaml.safe_load((ROOT / "configs" / f"{trial.config}.yaml").read_text())
    wanted = ("ModelCheckpoint", "EMA", "Throughput")
    callbacks = config["trainer"]["callbacks"]
    config["trainer"]["callbacks"] = [c for c in callbacks if c["class_path"] in wanted]
    settings = {
        "seed_everything": seed,
        "trainer.enable_progress_bar": False,
        "trainer.enable_model_summary": False,
        "trainer.logger.init_args.save_dir": str(folder),
        "trainer.logger.init_args.name": "log",
        "trainer.logger.init_args.version": "",
        "data.init_args.root": str(out / "data"),
        **trial.changes,
        **{key: yaml.safe_load(value) for key, value in changes.items()},
    }
    for key, value in settings.items():
        set_value(config, key, value)
    if curve:
        points = {**CURVE["init_args"], "every_n_steps": config["trainer"]["max_steps"] // curve}
        config["trainer"]["callbacks"].append({**CURVE, "init_args": points})
    data = config["data"]["init_args"]
    record(RecordingConfig(data["simulation"], data["episodes"]), data["root"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def set_value(config: dict, key: str, value: object) -> None:
    """Set a dotted key, with the folders on the way."""
    *parents, last = key.split(".")
    for parent in parents:
        config = config.setdefault(parent, {})
    config[last] = value


def run_one(command: str, name: str, folder: Path) -> str | None:
    """Train or evaluate one run in a process of its own; its name if that failed."""
    began = time.time()
    program = [sys.executable, str(Path(__file__).with_name("action_expert_run.py"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": _python_path()}
    with (folder / "output.txt").open("a") as log:
        done = subprocess.run(
            [*program, command, name, str(folder)],
            stdout=log,
            stderr=log,
            env=environment,
            check=False,
        )
    state = "failed, see its output.txt" if done.returncode else "done"
    print(f"{command} {name} {folder.name}: {state} ({time.time() - began:.0f} s)", flush=True)
    return f"{name} {folder.name}" if done.returncode else None


def _python_path() -> str:
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


if __name__ == "__main__":
    main()
