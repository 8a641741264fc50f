"""One run of `tbptt.py`: train by its config file, or measure what was trained."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import action_expert_run
import language_run
import torch
import yaml
from training_runs import machine, write_json

from datamodules import RecallDataModule
from datamodules.recall_probes import RecallProbe
from lightning_modules import LaCTModule
from lightning_modules.language import IGNORED
from lightning_modules.policy import ActionExpertPolicy


def train(name: str, folder: Path) -> None:
    """Train, or continue."""
    (language_run if name.startswith("recall/") else action_expert_run).train(folder)


def evaluate(name: str, folder: Path) -> None:
    """What was learned, and what a step cost."""
    measured = recall(folder) if name.startswith("recall/") else maze(folder)
    result = {
        "trial": name,
        **measured,
        "cost": json.loads((folder / "cost.json").read_text()),
        **machine(language_run.PACKAGES),
        "training": json.loads((folder / "training.json").read_text()),
    }
    write_json(folder / "result.json", result)


@torch.no_grad()
def recall(folder: Path) -> dict[str, Any]:
    """Accuracy of the answers by their distance from the pairs in chunks: `[distance, share]`."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    options = config["data"]["init_args"]
    probe = RecallProbe(**options.pop("probe"))
    data = RecallDataModule(probe, **options)
    module = LaCTModule.load_from_checkpoint(
        language_run.last_checkpoint(folder),
        map_location="cpu",
        optimizer=None,
        config=config["model"]["init_args"]["config"],
    )
    module.eval()
    right: dict[int, int] = defaultdict(int)
    asked: dict[int, int] = defaultdict(int)
    for batch in data.val_dataloader():
        module.streams.begin_step("validate")
        for chunk in batch:
            guess = module.logits(chunk, module.streams.begin(chunk)).argmax(-1)
            question = chunk["labels"] != IGNORED
            hits = ((guess == chunk["labels"]) & question).sum(1).tolist()
            rows = zip(chunk["plan"].chunk_index, hits, question.sum(1).tolist(), strict=True)
            for distance, hit, questions in rows:
                right[distance] += hit
                asked[distance] += questions
        module.streams.commit()
    by_distance = [[d, right[d] / asked[d]] for d in sorted(asked) if asked[d]]
    return {"by_distance": by_distance, "chance": probe.chance}


def maze(folder: Path) -> dict[str, Any]:
    """Success in closed loop, and validation loss by chunk of the episode."""
    module = ActionExpertPolicy.from_checkpoint(folder / "policy.ckpt").module
    data = action_expert_run.datamodule(folder)
    episodes = action_expert_run.TEST_EPISODES
    solved = action_expert_run.successes(
        module, data, module.execution_horizon, episodes, action_expert_run.TEST_SEED
    )
    return {"success": solved / episodes, **action_expert_run.by_chunk(module, data)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    task, trial, where = sys.argv[1:]
    (train if task == "train" else evaluate)(trial, Path(where))
