"""One run of `compare_adapters.py`: train by its config file, or read all validation files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import language_run
import torch
import yaml
from language_run import PACKAGES, last_checkpoint, peak_memory, provenance, trained, validate
from training_runs import machine, write_config, write_json

CONFIGS = ("config", "evaluation")
"""As it was trained, and what its evaluation changes."""

READING, RESET = "reading", "reading_reset"
"""Names of what `compare_recorder.FileLosses` writes: as trained, and with the memory off."""


def train(folder: Path) -> None:
    """Train, or continue; what has nothing to train is left as it is."""
    if _model(folder)["method"] == "none":
        write_json(folder / "training.json", {**machine(PACKAGES), "curves": {}})
    else:
        language_run.train(folder)


def evaluate(name: str, folder: Path) -> None:
    """Read all validation files from beginning to end, also as if every chunk were a first one."""
    model = _model(folder)
    if model["method"] != "none":
        check_finished(folder)
    reading = read_files(folder, READING, model["fast_state"])
    remembers = model["fast_state"] == "carry" and model["method"].startswith("ttt_lora")
    result = {
        "trial": name,
        "parameters": 0 if model["method"] == "none" else trained(folder),
        "peak_memory": peak_memory(),
        **reading,
        "reset": read_files(folder, RESET, "reset") if remembers else None,
        "in_place_every_n": model["in_place"]["every_n"] if model["method"] == "in_place" else None,
        "data": provenance(overlaid(*(_config(folder, part) for part in CONFIGS))),
        **machine(PACKAGES),
        "training": json.loads((folder / "training.json").read_text()),
    }
    write_json(folder / "result.json", result)


def check_finished(folder: Path) -> None:
    """The checkpoint must be the last step's.

    Raises:
        SystemExit: it is an earlier one.
    """
    last = last_checkpoint(folder)
    steps = _config(folder)["trainer"]["max_steps"]
    found = torch.load(last, map_location="cpu", weights_only=True)["global_step"]
    if found != steps:
        raise SystemExit(f"{last} is of step {found} instead of {steps}: remove training.json")


def read_files(folder: Path, name: str, fast_state: str) -> dict[str, Any]:
    """Losses by file go into `NAME.npz`; the rest comes back. Not done twice."""
    summary = folder / f"{name}.json"
    if not summary.exists():
        recorder = {
            "class_path": "compare_recorder.FileLosses",
            "init_args": {"path": str(folder / name)},
        }
        overlay = {
            "model": {"init_args": {"fast_state": fast_state}},
            "trainer": {"limit_val_batches": 1.0, "callbacks": [recorder]},
        }
        write_config(overlay, folder, f"{name}.yaml")
        configs = [folder / f"{part}.yaml" for part in (*CONFIGS, name)]
        untrained = _model(folder)["method"] == "none"
        validate(folder, configs, f"log_{name}", untrained=untrained)
    return json.loads(summary.read_text())


def overlaid(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """A config with what another one sets, as the command line reads them."""
    both = {
        k: v for k, v in above.items() if isinstance(v, dict) and isinstance(below.get(k), dict)
    }
    return {**below, **above, **{key: overlaid(below[key], value) for key, value in both.items()}}


def _config(folder: Path, name: str = "config") -> dict[str, Any]:
    return yaml.safe_load((folder / f"{name}.yaml").read_text())


def _model(folder: Path) -> dict[str, Any]:
    return _config(folder)["model"]["init_args"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    task, trial, where = sys.argv[1:]
    train(Path(where)) if task == "train" else evaluate(trial, Path(where))
