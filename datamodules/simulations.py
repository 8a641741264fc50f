"""Simulated robot tasks, each with a scripted expert: what recording and evaluation run in.

gymnasium-robotics is imported when an environment is made, so that a description can be read
(and a recorded folder trained on) without it.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from datamodules.experts import EXPERTS, Expert

if TYPE_CHECKING:
    import gymnasium

SimulationName = Literal["FetchReach", "FetchPush", "FetchPickAndPlace", "PointMaze"]
Observation = Mapping[str, np.ndarray]

FIRST_BROKEN_MUJOCO = (3, 12)


class SimulationUnavailableError(ImportError):
    """The simulator is not installed, or its version cannot run the environments."""


@dataclass(frozen=True)
class Simulation:
    """One task: its environment, what a policy sees of it, and when it counts as solved.

    Actions of every task are in [-1, 1].

    Args:
        name: key in `SIMULATIONS`; also names the scripted expert.
        environment: gymnasium id.
        task: the instruction, in words; stored with recordings.
        state_names: one name per entry of `observation.state`; the goal's entries come last and
            their names begin with "goal_".
        action_names: one name per entry of the action.
        max_steps: control steps after which an episode has failed.
        fps: control steps per second.
        options: keyword arguments of `gymnasium.make`.
        action_repeat: simulator steps per control step.
        min_goal_distance: episodes start with the target at least this far (metres) from where
            the task's object is.
    """

    name: str
    environment: str
    task: str
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    max_steps: int
    fps: int
    options: Mapping[str, Any] = field(default_factory=dict)
    action_repeat: int = 1
    min_goal_distance: float = 0.0

    @property
    def goal_slice(self) -> slice:
        """Where the state holds the goal (and the flag that says whether it is visible)."""
        first = next(i for i, name in enumerate(self.state_names) if name.startswith("goal_"))
        return slice(first, len(self.state_names))

    @property
    def action_bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest action, `[D]` float32 each."""
        high = np.ones(len(self.action_names), dtype=np.float32)
        return -high, high

    def make(self) -> gymnasium.Env:
        """A new environment, headless.

        Raises:
            SimulationUnavailableError: the simulator is missing or its version is known to fail.
        """
        gymnasium = _import_simulator()
        steps = (self.max_steps + 1) * self.action_repeat
        env = gymnasium.make(
            self.environment, max_episode_steps=steps, disable_env_checker=True, **self.options
        )
        _remove_temporary_model(env)
        return env

    def expert(self, env: gymnasium.Env) -> Expert:
        """The scripted policy that solves this task in `env`."""
        return EXPERTS[self.name](env)

    def reset(self, env: gymnasium.Env, seed: int) -> Observation:
        """Begin the episode that `seed` stands for."""
        observation, _ = env.reset(seed=seed)
        while _goal_distance(observation) < self.min_goal_distance:
            observation, _ = env.reset()  # continues the random numbers that the seed began
        return observation

    def step(self, env: gymnasium.Env, action: np.ndarray) -> tuple[Observation, bool]:
        """Apply an action `[D]` for one control step; returns the observation and success.

        Success at any of the repeated simulator steps counts.
        """
        action = np.clip(np.asarray(action, dtype=np.float32), *self.action_bounds)
        success = False
        for _ in range(self.action_repeat):
            observation, _, _, _, info = env.step(action)
            success = success or self.is_success(info)
        return observation, success

    def observe(self, observation: Observation) -> dict[str, np.ndarray]:
        """What a policy sees: `observation.state [S]` float32."""
        parts = [observation["observation"], observation["desired_goal"]]
        if self.state_names[-1] == "goal_visible":
            parts.append(np.ones(1))
        return {"observation.state": np.concatenate(parts).astype(np.float32)}

    def hide_goal(self, state: np.ndarray) -> np.ndarray:
        """Copy of states `[..., S]` in which the goal (and its visibility flag) is zero."""
        hidden = np.array(state)
        hidden[..., self.goal_slice] = 0.0
        return hidden

    @staticmethod
    def is_success(info: Mapping[str, Any]) -> bool:
        """Whether the task is solved at this step."""
        return bool(info.get("is_success", info.get("success", False)))


def episode_seed(purpose: Literal["record", "evaluate"], seed: int, episode: int) -> int:
    """Seed of one episode; episodes of different purposes never share one by construction."""
    key = [("record", "evaluate").index(purpose), seed, episode]
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def get_simulation(name: str) -> Simulation:
    """The simulation of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in SIMULATIONS:
        raise ValueError(f"unknown simulation {name!r}; choose one of {', '.join(SIMULATIONS)}")
    return SIMULATIONS[name]


def simulator_versions() -> dict[str, str]:
    """Installed versions of what decides how an episode goes."""
    packages = ("gymnasium", "gymnasium-robotics", "mujoco", "numpy")
    return {package: metadata.version(package) for package in packages}


def _import_simulator() -> Any:
    try:
        mujoco = metadata.version("mujoco")
    except metadata.PackageNotFoundError as error:
        raise SimulationUnavailableError(_missing("mujoco")) from error
    if tuple(int(part) for part in mujoco.split(".")[:2]) >= FIRST_BROKEN_MUJOCO:
        raise SimulationUnavailableError(
            f"mujoco {mujoco} makes every Fetch environment fail with a bare AssertionError; "
            "install an earlier one: pip install 'mujoco>=3.8.1,<3.12'"
        )
    try:
        # Every import prints a notice about environments that are not used here.
        with contextlib.redirect_stderr(io.StringIO()):
            import gymnasium
            import gymnasium_robotics
    except ImportError as error:
        raise SimulationUnavailableError(_missing(error.name or "gymnasium-robotics")) from error
    gymnasium.register_envs(gymnasium_robotics)
    return gymnasium


def _goal_distance(observation: Observation) -> float:
    return float(np.linalg.norm(observation["desired_goal"] - observation["achieved_goal"]))


def _missing(package: str) -> str:
    return f"simulations need {package}, which is not installed: pip install '.[sim]'"


def _remove_temporary_model(env: gymnasium.Env) -> None:
    """Delete the model file that a maze leaves in the temporary folder once it is loaded."""
    path = getattr(env.unwrapped, "tmp_xml_file_path", None)
    if path is not None and os.path.exists(path):
        os.remove(path)


_REACH_STATE = (
    *(f"gripper_{axis}" for axis in "xyz"),
    "finger_right",
    "finger_left",
    *(f"gripper_velocity_{axis}" for axis in "xyz"),
    "finger_velocity_right",
    "finger_velocity_left",
)
_OBJECT_STATE = (
    *(f"gripper_{axis}" for axis in "xyz"),
    *(f"object_{axis}" for axis in "xyz"),
    *(f"object_relative_{axis}" for axis in "xyz"),
    "finger_right",
    "finger_left",
    *(f"object_rotation_{axis}" for axis in "xyz"),
    *(f"object_velocity_{axis}" for axis in "xyz"),
    *(f"object_angular_velocity_{axis}" for axis in "xyz"),
    *(f"gripper_velocity_{axis}" for axis in "xyz"),
    "finger_velocity_right",
    "finger_velocity_left",
)
_GOAL_XYZ = ("goal_x", "goal_y", "goal_z")
_FETCH_ACTION = ("move_x", "move_y", "move_z", "fingers")


def _fetch(name: str, task: str, state_names: tuple[str, ...]) -> Simulation:
    return Simulation(
        name=name,
        environment=f"{name}-v4",
        task=task,
        state_names=state_names + _GOAL_XYZ,
        action_names=_FETCH_ACTION,
        max_steps=50,
        fps=25,
    )


SIMULATIONS: dict[str, Simulation] = {
    "FetchReach": _fetch("FetchReach", "Move the gripper to the target.", _REACH_STATE),
    "FetchPush": _fetch("FetchPush", "Push the block to the target.", _OBJECT_STATE),
    "FetchPickAndPlace": _fetch(
        "FetchPickAndPlace", "Pick up the block and hold it at the target.", _OBJECT_STATE
    ),
    "PointMaze": Simulation(
        name="PointMaze",
        environment="PointMaze_Medium-v3",
        task="Roll the ball through the maze to the target.",
        state_names=("x", "y", "velocity_x", "velocity_y", "goal_x", "goal_y", "goal_visible"),
        action_names=("force_x", "force_y"),
        max_steps=80,
        fps=20,
        options={"continuing_task": False},
        action_repeat=5,
        min_goal_distance=3.0,
    ),
}
