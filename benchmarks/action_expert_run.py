"""One run of `action_expert.py`: train by its config file, or try the trained policy."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
import yaml
from action_expert_trials import TRIALS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import machine, write_json

import cli
from callbacks.closed_loop import wilson_interval
from datamodules import RecordedSimulation
from datamodules.rollout import rollout
from lightning_modules.action_expert import CHECKPOINT_KEY, ActionExpertModule
from lightning_modules.policy import ActionExpertPolicy
from lightning_modules.streams import NO_STREAM

PACKAGES = ("torch", "lightning", "transformers", "mujoco", "gymnasium-robotics")
SELECTION_SEED, TEST_SEED = 1, 0
SELECTION_EPISODES, TEST_EPISODES = 50, 100


def train(folder: Path) -> None:
    """Train, or continue; keep what acting needs and the curves."""
    last = folder / "log" / "checkpoints" / "last.ckpt"
    command = ["fit", "--config", str(folder / "config.yaml")]
    cli.main([*command, "--ckpt_path", str(last)] if last.exists() else command)
    checkpoint = torch.load(last, map_location="cpu", weights_only=True)
    kept = {key: checkpoint[key] for key in ("state_dict", CHECKPOINT_KEY)}
    torch.save(kept, folder / "policy.ckpt")
    events = EventAccumulator(str(folder / "log")).Reload()
    curves = {
        tag: [[event.step, event.value] for event in events.Scalars(tag)]
        for tag in ("train/loss", "val/loss", "closed_loop/success")
        if tag in events.Tags()["scalars"]
    }
    times = [event.wall_time for event in events.Scalars("train/loss")]
    training = {**machine(PACKAGES), "seconds": times[-1] - times[0], "curves": curves}
    write_json(folder / "training.json", training)


def evaluate(name: str, folder: Path) -> None:
    """Success in closed loop, loss and state norm by chunk."""
    checkpoint, data = folder / "policy.ckpt", datamodule(folder)
    module = ActionExpertPolicy.from_checkpoint(checkpoint).module
    selection = {
        execute: successes(module, data, execute, SELECTION_EPISODES, SELECTION_SEED)
        for execute in TRIALS[name].horizons
    }
    # The largest of equals: it asks the policy least often.
    best = max(selection, key=lambda n: (selection[n], n), default=None)
    execute = module.execution_horizon if best is None else best
    solved = successes(module, data, execute, TEST_EPISODES, TEST_SEED)
    result = {
        "trial": name,
        "parameters": sum(p.numel() for p in module.parameters()),
        "selection": selection,
        "execute": execute,
        "success": solved / TEST_EPISODES,
        "interval": wilson_interval(solved, TEST_EPISODES),
        **by_chunk(module, data),
        **machine(PACKAGES),
        "training": json.loads((folder / "training.json").read_text()),
    }
    write_json(folder / "result.json", result)


def datamodule(folder: Path) -> RecordedSimulation:
    """The run's data, below the folder of all results; recorded if it is not there."""
    options = yaml.safe_load((folder / "config.yaml").read_text())["data"]["init_args"]
    module = RecordedSimulation(**{**options, "root": str(folder.parents[2] / "data")})
    module.prepare_data()
    module.setup("validate")
    return module


def successes(
    module: ActionExpertModule, data: RecordedSimulation, execute: int, episodes: int, seed: int
) -> int:
    """How many episodes the policy solves."""
    policy = ActionExpertPolicy(module, execute=execute, seed=seed)
    policy.reset()
    result = rollout(
        data.simulation,
        policy.select_actions,
        episodes=episodes,
        num_envs=50,
        seed=seed,
        goal_visible_steps=data.goal_visible_steps,
    )
    return int(result.successes.sum())


@torch.no_grad()
def by_chunk(module: ActionExpertModule, data: RecordedSimulation) -> dict[str, Any]:
    """Validation loss and state norm |dW| of the first TTT layer, by chunk of the episode."""
    losses, norms = defaultdict(list), defaultdict(list)
    module.streams.listening = {"loss", "fast_weight"}
    module.streams.clear("validate")
    for index, batch in enumerate(data.val_dataloader()):
        module.streams.begin_step("validate")
        generator = torch.Generator().manual_seed(index)
        for chunk in batch:
            handle = module.streams.begin(chunk)
            module.chunk_loss(chunk, handle, generator)
            loss = handle.published["loss"]["model"]["per_row"]
            layers = handle.published.get("fast_weight", {})
            norm = next(iter(layers.values()))["state_norm"] if layers else None
            for row, stream in enumerate(chunk["plan"].stream_id):
                if stream != NO_STREAM:
                    place = chunk["plan"].chunk_index[row]
                    losses[place].append(loss[row].item())
                    if norm is not None:
                        norms[place].append(norm[row].mean().item())
        module.streams.commit()
    return {"loss_by_chunk": _means(losses), "norm_by_chunk": _means(norms)}


def _means(values: dict[int, list[float]]) -> list[list[float]]:
    """`[chunk, mean, count]` each, in order."""
    return [[place, sum(v) / len(v), len(v)] for place, v in sorted(values.items())]


if __name__ == "__main__":
    torch.set_num_threads(1)
    task, trial, where = sys.argv[1:]
    train(Path(where)) if task == "train" else evaluate(trial, Path(where))
