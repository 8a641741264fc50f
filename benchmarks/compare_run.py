"""One run of `compare_adapters.py`: train by its config file, or read all validation files."""

from __future__ import annotations

import sys
from pathlib import Path

import language_run
import torch
import yaml
from language_run import PACKAGES
from training_runs import machine, write_json


def train(folder: Path) -> None:
    """Train, or continue; what has nothing to train is left as it is."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    if config["model"]["init_args"]["method"] != "none":
        language_run.train(folder)
        return
    write_json(folder / "training.json", {**machine(PACKAGES), "curves": {}})


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    task, trial, where = sys.argv[1:]
    train(Path(where))
