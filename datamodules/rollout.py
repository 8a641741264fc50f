"""Run a policy in many environments at once: the closed loop that success rates come from."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from datamodules.simulations import Simulation, episode_seed

Act = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""`act(states [R, S] float32, new_episode [R] bool) -> actions [R, D]`, once per control step.

Row r of consecutive calls is one robot; where `new_episode` is true the row begins an episode,
and whatever the policy remembers of it (queued actions, fast state) must go.
"""


@dataclass(frozen=True)
class RolloutResult:
    """What happened in N episodes; lists have one array per episode.

    Args:
        successes: `[N]` bool, whether the task was solved within the step limit.
        lengths: `[N]` int64, control steps taken.
        positions: `[length + 1, P]`, where the object of the task (block, gripper, ball) was.
        goals: `[P]`, where it should be.
        actions: `[length, D]`, what the policy asked for.
    """

    successes: np.ndarray
    lengths: np.ndarray
    positions: list[np.ndarray]
    goals: list[np.ndarray]
    actions: list[np.ndarray]

    @property
    def success_rate(self) -> float:
        """Share of solved episodes."""
        return float(self.successes.mean())


class _Row:
    """One environment and the episode that runs in it."""

    def __init__(self, simulation: Simulation, seed: int) -> None:
        self.simulation = simulation
        self.seed = seed
        self.env = simulation.make()
        self.episode: int | None = None

    def begin(self, episode: int) -> None:
        self.episode = episode
        self.new = True
        self.success = False
        seed = episode_seed("evaluate", self.seed, episode)
        self._see(self.simulation.reset(self.env, seed))
        self.goal = np.array(self._observation["desired_goal"])
        self.positions = [np.array(self._observation["achieved_goal"])]
        self.actions: list[np.ndarray] = []

    def _see(self, observation: Any) -> None:
        self._observation = observation
        self.state = self.simulation.observe(observation)["observation.state"]

    def visible_state(self, goal_visible_steps: Collection[int] | None) -> np.ndarray:
        if goal_visible_steps is None or len(self.actions) in goal_visible_steps:
            return self.state
        return self.simulation.hide_goal(self.state)

    def step(self, action: np.ndarray) -> bool:
        """Apply an action; returns whether the episode is over."""
        observation, self.success = self.simulation.step(self.env, action)
        self._see(observation)
        self.new = False
        self.actions.append(np.array(action))
        self.positions.append(np.array(observation["achieved_goal"]))
        return self.success or len(self.actions) >= self.simulation.max_steps


def rollout(
    simulation: Simulation,
    act: Act,
    *,
    episodes: int,
    num_envs: int = 16,
    seed: int = 0,
    goal_visible_steps: Collection[int] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> RolloutResult:
    """Run `episodes` episodes, `num_envs` at a time; each ends at success or the step limit.

    Episode n starts the same whatever the policy and `num_envs`, and differently from every
    recorded one. A row that is done takes the next episode; rows without one repeat their last
    state and count nowhere.

    Args:
        simulation: the task.
        act: the policy.
        episodes: how many.
        num_envs: rows per call of the policy.
        seed: fixes start positions and targets.
        goal_visible_steps: control steps of an episode in which the policy sees the goal; None
            shows it always.
        on_step: called after every control step with the number of finished episodes.

    Raises:
        ValueError: a number is not positive, or the policy's actions have the wrong shape or are
            not finite.
    """
    if episodes < 1 or num_envs < 1:
        raise ValueError(f"episodes={episodes} and num_envs={num_envs} must be at least 1")
    rows = [_Row(simulation, seed) for _ in range(min(num_envs, episodes))]
    for episode, row in enumerate(rows):
        row.begin(episode)
    started, finished = len(rows), dict[int, _Finished]()
    while len(finished) < episodes:
        states = np.stack([row.visible_state(goal_visible_steps) for row in rows])
        actions = np.asarray(act(states, np.array([row.new for row in rows])))
        _check_actions(actions, (len(rows), len(simulation.action_names)))
        for row, action in zip(rows, actions, strict=True):
            if row.episode is None or not row.step(action):
                continue
            finished[row.episode] = _Finished.of(row)
            row.episode = None
            if started < episodes:
                row.begin(started)
                started += 1
        if on_step is not None:
            on_step(len(finished))
    for row in rows:
        row.env.close()
    return _result([finished[episode] for episode in range(episodes)])


@dataclass(frozen=True)
class _Finished:
    success: bool
    positions: np.ndarray
    goal: np.ndarray
    actions: np.ndarray

    @classmethod
    def of(cls, row: _Row) -> _Finished:
        return cls(row.success, np.stack(row.positions), row.goal, np.stack(row.actions))


def _result(episodes: list[_Finished]) -> RolloutResult:
    return RolloutResult(
        successes=np.array([episode.success for episode in episodes]),
        lengths=np.array([len(episode.actions) for episode in episodes]),
        positions=[episode.positions for episode in episodes],
        goals=[episode.goal for episode in episodes],
        actions=[episode.actions for episode in episodes],
    )


def _check_actions(actions: np.ndarray, shape: tuple[int, int]) -> None:
    if actions.shape != shape:
        raise ValueError(f"the policy's actions have shape {actions.shape}, not {shape}")
    if not np.isfinite(actions).all():
        row = int(np.flatnonzero(~np.isfinite(actions).all(axis=1))[0])
        raise ValueError(f"the policy's action in row {row} is not finite: {actions[row]}")
