"""One run of `lact.py`: train by its config file, or measure what was trained."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import machine, write_json

import cli
import datamodules

PACKAGES = ("torch", "lightning", "transformers")


def train(folder: Path) -> None:
    """Train, or continue; keep the curves."""
    last = folder / "log" / "checkpoints" / "last.ckpt"
    command = ["fit", "--config", str(folder / "config.yaml")]
    cli.main([*command, "--ckpt_path", str(last)] if last.exists() else command)
    events = EventAccumulator(str(folder / "log")).Reload()
    tags = events.Tags()["scalars"]
    curves = {
        tag: [[event.step, event.value] for event in events.Scalars(tag)]
        for tag in ("train/loss", "val/loss", "val/accuracy")
        if tag in tags
    }
    times = [event.wall_time for event in events.Scalars("train/loss")]
    rate = [event.value for event in events.Scalars("throughput/tokens_per_sec")]
    training = {
        **machine(PACKAGES),
        "seconds": times[-1] - times[0],
        "tokens_per_second": sorted(rate)[len(rate) // 2],
        "curves": curves,
    }
    write_json(folder / "training.json", training)


def evaluate(name: str, folder: Path) -> None:
    """Loss, accuracy and loss by position of the last checkpoint, on all validation data."""
    last = folder / "log" / "checkpoints" / "last.ckpt"
    config = str(folder / "config.yaml")
    place = ["--trainer.logger.init_args.name", "evaluation"]
    cli.main(["validate", "--config", config, "--ckpt_path", str(last), *place])
    events = EventAccumulator(str(folder / "evaluation")).Reload()
    scalars = {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}
    state = torch.load(last, map_location="cpu", weights_only=True)["state_dict"]
    result = {
        "trial": name,
        "parameters": sum(value.numel() for value in state.values()),
        "loss": scalars["val/loss"],
        "accuracy": scalars["val/accuracy"],
        "by_position": _curve(scalars, "position_loss/from_"),
        "by_chunk": _curve(scalars, "chunk_loss/chunk_"),
        "data": provenance(folder),
        **machine(PACKAGES),
        "training": json.loads((folder / "training.json").read_text()),
    }
    write_json(folder / "result.json", result)


def _curve(scalars: dict[str, float], prefix: str) -> list[list[float]]:
    """`[position, loss]` each, in order."""
    found = {int(t.removeprefix(prefix)): v for t, v in scalars.items() if t.startswith(prefix)}
    return [[place, found[place]] for place in sorted(found)]


def provenance(folder: Path) -> dict[str, Any]:
    """Which texts these are; empty for drawn sequences."""
    options = yaml.safe_load((folder / "config.yaml").read_text())["data"]
    if options["class_path"] != "TextStreamDataModule":
        return {}
    return datamodules.TextStreamDataModule(**options["init_args"]).provenance


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    task, trial, where = sys.argv[1:]
    train(Path(where)) if task == "train" else evaluate(trial, Path(where))
