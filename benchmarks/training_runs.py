"""Runs of a benchmark: trials over seeds, each trained and measured in a process of its own.

What is complete is not done again, and what was interrupted goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from queue import SimpleQueue
from statistics import mean, stdev
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
Results = dict[str, list[dict[str, Any]]]
"""Trial -> its complete runs by seed."""

PRODUCT = {"train": "training.json", "evaluate": "result.json"}
"""What a command leaves in the folder of a run when it is complete."""


@dataclass(frozen=True)
class Trial:
    """One row of the results.

    Args:
        config: name of a file in `configs/`, or path of one elsewhere, without `.yaml`.
        about: what the row is, in words.
        changes: dotted key -> value, set in the config.
    """

    config: str
    about: str
    changes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Arm(Trial):
    """One row of a comparison in which every row has the learning rate that is best for it.

    Args:
        rates: learning rates from which the best is taken.
    """

    rates: tuple[float, ...] = ()


LR = "model.init_args.optimizer.init_args.lr"


def trials_of(arms: Mapping[str, Arm]) -> dict[str, Trial]:
    """Every arm at every learning rate, `ARM/RATE`."""
    return {
        f"{name}/{rate:g}": Trial(
            arm.config, f"{arm.about}, lr {rate:g}", {**arm.changes, LR: rate}
        )
        for name, arm in arms.items()
        for rate in arm.rates
    }


def arm_of(trial: str) -> str:
    """Name of the arm of a trial."""
    return trial.rpartition("/")[0]


def make_parser(description: str, commands: Sequence[str]) -> argparse.ArgumentParser:
    """The command line that all such benchmarks share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=commands)
    parser.add_argument("--out", type=_folder, required=True, help="folder of the results")
    parser.add_argument("--trials", nargs="+", default=["*"], help="shell patterns of names")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--accelerator", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument(
        "--set",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="train: dotted changes of every config",
    )
    return parser


def _folder(path: str) -> Path:
    return Path(path).resolve()


def changes_of(options: argparse.Namespace) -> dict[str, Any]:
    """`--set` and `--accelerator` as dotted keys and values."""
    pairs = dict(entry.split("=", 1) for entry in options.set)
    values = {key: yaml.safe_load(value) for key, value in pairs.items()}
    return values | {"trainer.accelerator": options.accelerator}


def pending(options: argparse.Namespace, trials: Mapping[str, Trial]) -> list[tuple[str, Path]]:
    """Names and folders of the wanted runs for which the command is not done yet."""
    names = [name for name in trials if any(fnmatch(name, p) for p in options.trials)]
    if not names:
        raise SystemExit(f"no trial matches {options.trials}; there are: {', '.join(trials)}")
    runs = []
    for seed in options.seeds:
        for name in names:
            folder = options.out / name / f"seed_{seed}"
            if (folder / PRODUCT[options.command]).exists():
                continue
            if options.command == "evaluate" and not (folder / PRODUCT["train"]).exists():
                print(f"{name} seed_{seed}: not trained yet, nothing to evaluate")
                continue
            runs.append((name, folder))
    return runs


def trial_config(
    trial: Trial,
    folder: Path,
    changes: Mapping[str, Any],
    callbacks: Sequence[str],
) -> dict[str, Any]:
    """The trial's config for a run in `folder`, whose name ends in its seed.

    Args:
        trial: which config, and what it changes.
        folder: of the run; its logger writes into it.
        changes: dotted keys and values that hold for all trials.
        callbacks: of the config's callbacks, those that stay.
    """
    config = yaml.safe_load((ROOT / "configs" / f"{trial.config}.yaml").read_text())
    kept = [c for c in config["trainer"]["callbacks"] if c["class_path"] in callbacks]
    config["trainer"]["callbacks"] = kept
    settings = {
        "seed_everything": int(folder.name.removeprefix("seed_")),
        "trainer.enable_progress_bar": False,
        "trainer.enable_model_summary": False,
        "trainer.logger.init_args.save_dir": str(folder),
        "trainer.logger.init_args.name": "log",
        "trainer.logger.init_args.version": "",
        **trial.changes,
        **changes,
    }
    for key, value in settings.items():
        set_value(config, key, value)
    return config


def set_value(config: dict, key: str, value: object) -> None:
    """Set a dotted key, with the folders on the way."""
    *parents, last = key.split(".")
    for parent in parents:
        config = config.setdefault(parent, {})
    config[last] = value


def write_config(config: Mapping[str, Any], folder: Path, name: str = "config.yaml") -> None:
    """Write the run's own config file, or an overlay of it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(yaml.safe_dump(dict(config), sort_keys=False))


def run_all(program: Path, options: argparse.Namespace, runs: Sequence[tuple[str, Path]]) -> None:
    """Call `program COMMAND NAME FOLDER` for every run, some at a time, spread over the GPUs.

    Raises:
        SystemExit: one of them failed; the message names it.
    """
    places: SimpleQueue[int] = SimpleQueue()
    for number in range(options.jobs):
        places.put(number % max(1, gpu_count()))

    def run(name: str, folder: Path) -> str | None:
        gpu = places.get()
        try:
            return _run_one(program, options.command, name, folder, gpu)
        finally:
            places.put(gpu)

    with ThreadPoolExecutor(options.jobs) as pool:
        failed = [name for name in pool.map(lambda r: run(*r), runs) if name]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def gpu_count() -> int:
    """GPUs of this machine."""
    import torch

    return torch.cuda.device_count()


def _run_one(program: Path, command: str, name: str, folder: Path, gpu: int) -> str | None:
    """One run in a process of its own, which sees one GPU; its name if that failed."""
    began = time.time()
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": str(gpu)}
    environment = {**os.environ, **own}
    with (folder / "output.txt").open("a") as log:
        done = subprocess.run(
            [sys.executable, str(program), command, name, str(folder)],
            stdout=log,
            stderr=log,
            env=environment,
            check=False,
        )
    state = "failed, see its output.txt" if done.returncode else "done"
    print(f"{command} {name} {folder.name}: {state} ({time.time() - began:.0f} s)", flush=True)
    return f"{name} {folder.name}" if done.returncode else None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file that is there completely or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1))
    partial.replace(path)


def machine(packages: Sequence[str]) -> dict[str, Any]:
    """Where and with what this is measured."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "machine": f"{os.cpu_count()} cores" + (f", {gpu}" if gpu else ""),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
    }


def read(out: Path, trials: Mapping[str, Trial]) -> Results:
    """Trial -> its complete runs by seed, in the order of `trials`."""
    found: Results = {}
    for name in trials:
        for path in sorted((out / name).glob("seed_*/result.json")):
            seed = int(path.parent.name.removeprefix("seed_"))
            found.setdefault(name, []).append({"seed": seed, **json.loads(path.read_text())})
    return found


def machines(results: Results, measured: str) -> list[str]:
    """What was trained and measured where: a line per machine and set of versions."""
    lines = []
    for title, part in (("Trained", lambda run: run["training"]), (measured, lambda run: run)):
        places = defaultdict(list)
        for name, runs in results.items():
            for run in runs:
                versions = ", ".join(f"{k} {v}" for k, v in part(run)["versions"].items())
                places[f"{part(run)['machine']} ({versions})"].append(f"{name}/{run['seed']}")
        complete = len(places) == 1
        for place, names in places.items():
            what = "" if complete else f": {', '.join(_shortened(names, results))}"
            lines.append(f"{title} on {place}{what}.")
    return lines


def texts(results: Results) -> list[str]:
    """On which texts: a line for each."""
    data = [run["data"] for runs in results.values() for run in runs if run["data"]]
    lines = {", ".join(f"{name} {value}" for name, value in facts.items()) for facts in data}
    return [f"Text: {line}." for line in sorted(lines)]


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation; a single value as it is."""
    if len(values) < 2:
        return ", ".join(f"{value:.4f}" for value in values)
    return f"{mean(values):.4f} ± {stdev(values):.4f}"


def speed(runs: Sequence[Mapping[str, Any]]) -> str:
    """Tokens per second in training, mean over runs."""
    return f"{mean(run['training']['tokens_per_second'] for run in runs):,.0f}"


def _shortened(names: list[str], results: Results) -> list[str]:
    """`trial/seed` names, where a trial all of whose seeds are there stands for them."""
    by_trial = defaultdict(list)
    for name in names:
        trial, _, seed = name.rpartition("/")
        by_trial[trial].append(seed)
    return [
        trial if len(seeds) == len(results[trial]) else f"{trial} (seed {', '.join(seeds)})"
        for trial, seeds in by_trial.items()
    ]
