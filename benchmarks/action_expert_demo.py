"""Pictures of what the carried state is for: the same maze episodes with it and without it."""

from __future__ import annotations

from pathlib import Path

import yaml

from callbacks.episode_figures import animate_episodes, draw_comparison
from datamodules import RecordedSimulation
from datamodules.mazes import walls_of
from datamodules.rollout import RolloutResult, rollout
from lightning_modules.policy import ActionExpertPolicy

POLICIES = {"state reset": "maze/reset", "state carried": "maze/carry_k8"}
EPISODES, ANIMATED, SEED = 25, 4, 3
"""Episodes of their own, from which no number is taken; the first ones are shown."""


def draw(out: Path, training_seed: int = 0) -> None:
    """Write `figures/maze_paths.png` and `figures/maze_episodes.gif` below `out`.

    Args:
        out: folder of the results, with `maze/reset` and `maze/carry_k8` trained.
        training_seed: whose policies act.
    """
    folders = {title: out / name / f"seed_{training_seed}" for title, name in POLICIES.items()}
    results = {title: episodes(folder, data(folder)) for title, folder in folders.items()}
    task = data(folders["state carried"])
    walls = walls_of(task.simulation.make())
    figures = out / "figures"
    figures.mkdir(exist_ok=True)
    draw_comparison(results, walls).savefig(figures / "maze_paths.png")
    gif = animate_episodes(
        results,
        walls,
        episodes=range(ANIMATED),
        frames_per_second=task.simulation.fps,
        goal_visible_steps=task.goal_visible_steps,
    )
    (figures / "maze_episodes.gif").write_bytes(gif)


def data(folder: Path) -> RecordedSimulation:
    """The run's DataModule, which knows the simulation and when the goal is visible."""
    config = yaml.safe_load((folder / "config.yaml").read_text())
    return RecordedSimulation(**config["data"]["init_args"])


def episodes(folder: Path, task: RecordedSimulation) -> RolloutResult:
    """The run's policy in the episodes of the pictures."""
    policy = ActionExpertPolicy.from_checkpoint(folder / "policy.ckpt", seed=SEED)
    policy.reset()
    return rollout(
        task.simulation,
        policy.select_actions,
        episodes=EPISODES,
        num_envs=EPISODES,
        seed=SEED,
        goal_visible_steps=task.goal_visible_steps,
    )
