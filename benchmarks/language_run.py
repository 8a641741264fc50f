"""One run of `lact.py` or `memory.py`: train by its config file, or measure what was trained.

`compare_run.py` trains by it, too.
"""

from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from memory_flops import flops_per_token
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import machine, write_json

import cli
from datamodules import TextStreamDataModule
from datamodules.documents import TextSource
from datamodules.tokenization import TokenizerConfig
from lightning_modules.adapters import as_config

PACKAGES = ("torch", "lightning", "transformers")


def train(folder: Path) -> None:
    """Train, or continue; keep the curves."""
    last = last_checkpoint(folder)
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
    speed = "throughput/tokens_per_sec"  # not there after very few steps
    rate = [event.value for event in events.Scalars(speed)] if speed in tags else [0.0]
    training = {
        **machine(PACKAGES),
        "seconds": times[-1] - times[0],
        "tokens_per_second": sorted(rate)[len(rate) // 2],
        "peak_memory": peak_memory(),
        "curves": curves,
        "last": {
            tag: events.Scalars(tag)[-1].value
            for tag in events.Tags()["scalars"]
            if tag.startswith("chapter_router/")
        },
    }
    write_json(folder / "training.json", training)


def evaluate(name: str, folder: Path) -> None:
    """Loss, accuracy and loss by position of the last checkpoint, on all validation data."""
    scalars = validate(folder, [folder / "config.yaml"], "evaluation")
    other = folder / "held_out.yaml"
    if other.exists():
        held_out = validate(folder, [folder / "config.yaml", other], "held_out")
        scalars["held_out/loss"] = held_out["val/loss"]
    result = {
        "trial": name,
        "parameters": trained(folder),
        "loss": scalars["val/loss"],
        "accuracy": scalars["val/accuracy"],
        "held_out": scalars.get("held_out/loss"),
        "by_position": _curve(scalars, "position_loss/from_"),
        "by_chunk": _curve(scalars, "chunk_loss/chunk_"),
        "data": provenance(yaml.safe_load((folder / "config.yaml").read_text())),
        **cost(folder),
        **machine(PACKAGES),
        "training": json.loads((folder / "training.json").read_text()),
    }
    write_json(folder / "result.json", result)


def last_checkpoint(folder: Path) -> Path:
    """Where a run goes on."""
    return folder / "log" / "checkpoints" / "last.ckpt"


def trained(folder: Path) -> int:
    """Number of parameters in the last checkpoint, which leaves frozen ones out."""
    state = torch.load(last_checkpoint(folder), map_location="cpu", weights_only=True)["state_dict"]
    return sum({v.data_ptr(): v.numel() for v in state.values()}.values())


def peak_memory() -> int:
    """Most bytes that this process has held: on a GPU if it uses one, else of main memory."""
    on_gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    unit = 1 if sys.platform == "darwin" else 1024
    return on_gpu or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def validate(
    folder: Path, configs: list[Path], name: str, *, untrained: bool = False
) -> dict[str, float]:
    """What a validation of the last checkpoint logs, or of the model as it is before training."""
    options = [part for path in configs for part in ("--config", str(path))]
    options += [] if untrained else ["--ckpt_path", str(last_checkpoint(folder))]
    cli.main(["validate", *options, "--trainer.logger.init_args.name", name])
    events = EventAccumulator(str(folder / name)).Reload()
    return {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}


def cost(folder: Path) -> dict[str, float]:
    """FLOPs per token of models with a memory bank from scratch, and of their controls."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    model, data = config["model"], text_data(config)
    scratch = model["class_path"] == "MemoryBankModule" and "config" in model["init_args"]
    if data is None or not scratch:
        return {}
    return {"flops_per_token": flops_per_token(config, data.features["vocab_size"])}


def text_data(config: dict[str, Any]) -> TextStreamDataModule | None:
    """The DataModule of a config, if it reads texts."""
    if config["data"]["class_path"] != "TextStreamDataModule":
        return None
    options = dict(config["data"]["init_args"])
    for name, kind in (("source", TextSource), ("tokenizer", TokenizerConfig)):
        options[name] = as_config(kind, options.get(name), name)
    return TextStreamDataModule(**options)


def _curve(scalars: dict[str, float], prefix: str) -> list[list[float]]:
    """`[position, loss]` each, in order."""
    found = {int(t.removeprefix(prefix)): v for t, v in scalars.items() if t.startswith(prefix)}
    return [[place, found[place]] for place in sorted(found)]


def provenance(config: dict[str, Any]) -> dict[str, Any]:
    """Which texts these are; empty for drawn sequences."""
    data = text_data(config)
    return {} if data is None else data.provenance


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    task, trial, where = sys.argv[1:]
    train(Path(where)) if task == "train" else evaluate(trial, Path(where))
